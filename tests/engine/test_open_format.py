"""Readers that know nothing of stepsave read its backups, and refuse spoiled ones."""

import shutil
import traceback

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from engine_support import (
    assert_same_bits,
    flip_bit,
    random_array,
    restore_once,
    save_once,
    tree_bytes,
)
from orbax.checkpoint import v1

import stepsave
from stepsave.format.layout import decode_layout
from stepsave.format.records import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

WRITERS = ["auto", "tensorstore"]
# Orbax itself, and not what stepsave writes, limits what it hands out as NumPy arrays.
ORBAX_DTYPES = [name for name in DTYPES if not name.startswith(("int2", "int4", "float4"))]


def sample_state(dtypes):
    state = {name: {"a": random_array((3, 5), name)} for name in dtypes}
    state["float32"] |= {
        "scalar": np.float32(3),
        "empty": np.zeros((0, 4), np.float32),
        "odd": random_array((7, 11, 13), "float32"),
        "ünïcode/with slash": random_array((5,), "float32"),
        "large": random_array((300, 400), "float32"),
        "zeros": np.zeros((9, 9), np.float32),
    }
    return state


def flat(state, at=()):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from flat(value, (*at, key))
        else:
            yield (*at, key), value


def stock_read(directory, path):
    base = {"driver": "ocdbt", "base": f"file://{directory}/pytree/", "path": ".".join(path)}
    spec = {"driver": "zarr3", "kvstore": base}
    return ts.open(spec, read=True).result().read().result()


def restore_v0(directory):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(directory / "pytree")


def restore_v1(directory):
    return v1.load_checkpointables(directory)["pytree"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.usefixtures("small_shards")
def test_stock_tensorstore_reads_every_array_by_name(tmp_path, writer):
    state = sample_state(DTYPES)
    save_once(tmp_path, state, step=12, writer=writer)
    for path, array in flat(state):
        assert_same_bits(stock_read(tmp_path / "12", path), array, str(path))


@pytest.mark.parametrize("restore", [restore_v0, restore_v1], ids=["v0", "v1"])
@pytest.mark.usefixtures("small_shards")
def test_stock_orbax_reads_the_whole_state(tmp_path, restore):
    state = sample_state(ORBAX_DTYPES)
    save_once(tmp_path, state, step=12, metadata={"epoch": 3})
    found = restore(tmp_path / "12")
    expected = dict(flat(state))
    assert set(dict(flat(found))) == set(expected)
    for path, array in flat(found):
        assert_same_bits(np.asarray(array), expected[path], str(path))


@pytest.mark.parametrize("restore", [restore_v0, restore_v1], ids=["v0", "v1"])
def test_stock_readers_find_lists_and_integer_keys_by_their_standard_names(tmp_path, restore):
    state = {"a": [np.arange(3), (np.ones(2),)], 7: {"b": np.zeros(4)}, "empty": {}, "none": None}
    save_once(tmp_path, state, step=12)
    expected = {
        ("a", "0"): state["a"][0],
        ("a", "1", "0"): state["a"][1][0],
        ("7", "b"): state[7]["b"],
    }
    for path, array in expected.items():
        assert_same_bits(stock_read(tmp_path / "12", path), array, str(path))
    found = dict(flat(restore(tmp_path / "12")))
    assert set(found) == set(expected)
    for path, array in found.items():
        assert_same_bits(np.asarray(array), expected[path], str(path))


def test_stock_orbax_finds_the_step_beside_our_files(tmp_path):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (3, 7, 9):
            saver.save(step, {"a": np.full(4, step)}).wait()
    with v1.training.Checkpointer(tmp_path) as reader:
        assert reader.latest.step == 9
        assert [found.step for found in reader.checkpoints] == [7, 9]
    assert restore_once(tmp_path).step == 9


def test_items_beside_the_state_are_read_by_stock_orbax(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.attach({"model_config": {"config": '{"ü": 1}'}})
        saver.save(1, {"a": np.arange(3)}).wait()
        assert_same_bits(saver.restore().state, {"a": np.arange(3)})
    found = v1.load_checkpointables(tmp_path / "1")
    assert found["model_config"] == {"config": '{"ü": 1}'}
    assert_same_bits(np.asarray(found["pytree"]["a"]), np.arange(3))


@pytest.mark.usefixtures("small_shards")
def test_one_flipped_bit_in_any_array_is_refused_by_every_reader(tmp_path):
    rng = np.random.default_rng(7)
    specs = [(7,), (), (30, 20), (250, 300), (4, 5, 6), (1,), (0, 3)]
    state = {
        f"w{i}": random_array(specs[i % len(specs)], dtype, seed=i)
        for i, dtype in enumerate(["float32", "bfloat16", "int64", "uint8"] * 6)
    }
    save_once(tmp_path, state, step=1)
    backup = tmp_path / "1"
    plan = decode_layout((backup / "layout.json").read_bytes(), "layout.json")
    by_leaf = {}
    for chunk in plan.chunks:
        by_leaf.setdefault(chunk.leaf, []).append(chunk)
    assert len(by_leaf) >= 20
    for number, chunks in by_leaf.items():
        chunk = chunks[rng.integers(len(chunks))]
        at = chunk.offset_bytes + int(rng.integers(chunk.data_bytes))
        shard, offset = divmod(at, plan.shard_bytes)
        path, bit = backup / f"pytree/d/c/{shard}", int(rng.integers(8))
        flip_bit(path, offset, bit)
        name = plan.leaves[number].path
        with pytest.raises(stepsave.CorruptBackupError, match=f"{path}.*{name[0]}"):
            restore_once(tmp_path)
        with pytest.raises(ValueError, match=r"[Dd]igest"):
            stock_read(backup, name)
        for restore in (restore_v0, restore_v1):
            with pytest.raises(Exception) as caught:  # v1 wraps it in an error of its own
                restore(backup)
            assert "igest mismatch" in "".join(traceback.format_exception(caught.value))
        flip_bit(path, offset, bit)
    assert_same_bits(restore_once(tmp_path).state, state)


def without_times(directory):
    """All files but those that tell the time or a random number of the save."""
    files = tree_bytes(directory)
    return {
        name: data
        for name, data in files.items()
        if name not in ("COMMIT", "PREVIOUS", "LOCK") and "_CHECKPOINT_METADATA" not in name
    }


@pytest.mark.usefixtures("small_shards")
def test_the_two_writers_make_the_same_files(tmp_path):
    states = [sample_state(DTYPES), {"b": random_array((900, 100), "uint8")}, {"c": np.zeros(3)}]
    for writer in WRITERS:
        with stepsave.Checkpointer(tmp_path / writer, writer=writer) as saver:
            if writer == "auto" and saver.stats().writer != "direct":
                pytest.skip("the file system of the temporary directory does not take O_DIRECT")
            for step in range(9):  # spares are reused, and made anew
                saver.save(step, states[step // 2 % 3], {"step": step}).wait()
    direct, reference = (without_times(tmp_path / writer) for writer in WRITERS)
    assert list(direct) == list(reference)
    spares = {name for name in direct if name.startswith("spare")}
    assert {name for name in direct if direct[name] != reference[name]} == set()
    assert len(spares) > 5


def test_a_copied_backup_restores_elsewhere(tmp_path):
    state = {"a": random_array((50, 3), "bfloat16")}
    save_once(tmp_path / "here", state, step=4)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert_same_bits(restore_once(tmp_path / "there").state, state)


def test_a_name_that_ends_in_a_slash_is_refused_or_readable_by_name(tmp_path):
    """tensorstore drops a slash at the end of a path: `a/` would be read as `a`."""
    state = {"a": np.zeros(3, ml_dtypes.bfloat16), "a/": np.arange(3.0)}
    try:
        save_once(tmp_path, state)
    except stepsave.InvalidStateError:
        return
    for path, array in flat(state):
        assert_same_bits(stock_read(tmp_path / "1", path), array, str(path))
