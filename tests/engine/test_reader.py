import os

import numpy as np
import pytest
from engine_support import assert_same_bits, random_array, restore_once, save_once

import stepsave
from stepsave.format.records import DTYPES

WRITERS = ["auto", "tensorstore"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (5,), (3, 1, 7), (40, 60)], ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, writer, shape):
    state = {name: random_array(shape, name, seed=i) for i, name in enumerate(DTYPES)}
    save_once(tmp_path, state, writer=writer)
    assert_same_bits(restore_once(tmp_path).state, state)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.usefixtures("small_shards")
def test_arrays_larger_than_a_shard_come_back(tmp_path, writer):
    state = {
        "rows": random_array((1000, 70), "float32"),
        "columns": random_array((1, 300_000), "uint8"),
        "rows too long for a chunk": random_array((3, 5, 9000), "int16"),
        "transposed": random_array((500, 300), "bfloat16").T,
        "small": random_array((3,), "bool"),
    }
    save_once(tmp_path, state, writer=writer)
    assert len(os.listdir(tmp_path / "1/pytree/d/c")) > 5
    assert_same_bits(restore_once(tmp_path).state, state)


@pytest.mark.parametrize("writer", WRITERS)
def test_an_array_larger_than_a_real_shard_comes_back(tmp_path, writer):
    state = {"a": random_array((70, 1 << 20), "uint8"), "b": random_array((3,), "float64")}
    save_once(tmp_path, state, writer=writer)
    assert len(os.listdir(tmp_path / "1/pytree/d/c")) == 2
    assert_same_bits(restore_once(tmp_path).state, state)


def test_ten_thousand_small_arrays_come_back(tmp_path):
    state = {
        f"layer{i}": {name: random_array((i % 7,), name, seed=i) for name in ("float32", "int8")}
        for i in range(5000)
    }
    save_once(tmp_path, state)
    assert_same_bits(restore_once(tmp_path).state, state)


@pytest.mark.parametrize(
    "state",
    [{}, {"e": np.zeros(0)}, {"a": {"b": np.zeros((3, 0, 5), np.int8)}}],
    ids=["no arrays", "one empty array", "no bytes"],
)
def test_a_state_without_any_bytes_comes_back(tmp_path, state):
    save_once(tmp_path, state, step=3, metadata={"epoch": 1})
    backup = restore_once(tmp_path)
    assert_same_bits(backup.state, state)
    assert (backup.step, backup.metadata) == (3, {"epoch": 1})


def test_odd_names_come_back_in_their_order(tmp_path):
    names = [
        "z",
        "ünï",
        "a/b",
        "/a",
        "a b",
        "日本",
        "..",
        ".",
        "c/0",
        "zarr.json",
        "a\0b",
        '"',
        "🎉",
    ]
    state = {"top": {name: random_array((5,), "int16", seed=i) for i, name in enumerate(names)}}
    save_once(tmp_path, state)
    assert_same_bits(restore_once(tmp_path).state, state)


def test_a_name_that_is_no_text_is_refused_as_a_state_error(tmp_path):
    with pytest.raises(stepsave.InvalidStateError):
        save_once(tmp_path, {"\ud800": np.zeros(3)})


def test_restored_arrays_may_be_changed_without_harm(tmp_path):
    save_once(tmp_path, {"a": np.arange(5), "b": np.arange(5)})
    with stepsave.Checkpointer(tmp_path) as saver:
        first = saver.restore()
        first.state["a"][:] = 9
        assert (first.state["b"] == np.arange(5)).all()
        assert (saver.restore().state["a"] == np.arange(5)).all()


def test_metadata_comes_back_as_json_keeps_it(tmp_path):
    metadata = {"epoch": 3, "nested": {"ü": [1, 2.5, None, True, "x"]}, "big": 2**70, "t": (1, 2)}
    save_once(tmp_path, {"a": np.zeros(1)}, metadata=metadata)
    assert restore_once(tmp_path).metadata == {**metadata, "t": [1, 2]}
