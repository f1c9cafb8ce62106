"""`stepsave export`: every value in the file is that of the backup, as stock readers find it."""

import json
import os
import signal
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from cli_support import (
    call,
    check_imports,
    leaves,
    rich_state,
    run,
    start,
    wait_until,
)
from engine_support import (
    assert_same_bits,
    check_python,
    flip_bit,
    in_own_mounts,
    random_array,
    save_once,
    state_of,
    tree_bytes,
)

import stepsave
from stepsave.cli.array_files import write_safetensors
from stepsave.format import layout
from stepsave.format.records import LeafSpec

safetensors = pytest.importorskip("safetensors")

UNKNOWN_TO_SAFETENSORS = (
    "int2", "int4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "complex128"
)  # fmt: skip
OF_KERAS = {
    "trainable_variables": {"dense": {"kernel": np.arange(6.0).reshape(2, 3)}},
    "non_trainable_variables": {"seed": np.arange(2)},
    "optimizer_variables": {"adam": {"iteration": np.int64(4), "m": np.ones(300_000, "float32")}},
    "metrics_variables": {
        "loss": np.float32(2),
        "stepsave": {"callbacks": {"0": np.ones(3)}, "saveables": {"buffer": {"0": np.ones(2)}}},
    },
}
MODEL = {
    "trainable_variables.dense.kernel",
    "non_trainable_variables.seed",
    "metrics_variables.stepsave.saveables.buffer.0",
}


def read_npz(path):
    """As the documentation says."""
    with np.load(path, allow_pickle=False) as archive:
        note = json.loads(archive["__stepsave__"].item())
        arrays = {name: archive[name] for name in archive.files if name != "__stepsave__"}
    for name, dtype in note["dtypes"].items():
        arrays[name] = arrays[name].view(getattr(ml_dtypes, dtype))
    return arrays, note


def assert_same(found, expected):
    assert_same_bits(dict(sorted(found.items())), dict(sorted(expected.items())))


@pytest.mark.usefixtures("small_shards")
def test_an_npz_has_every_array_of_every_type_bit_for_bit(tmp_path, capsys):
    state = rich_state()
    save_once(tmp_path / "backup", state, step=12)
    call("export", tmp_path / "backup", tmp_path / "out.npz", "--json")
    told = json.loads(capsys.readouterr().out)
    arrays, note = read_npz(tmp_path / "out.npz")
    assert_same(arrays, dict(leaves(state)))
    assert note["step"] == "12"
    assert told["arrays"] == told["of_arrays"] == len(arrays)
    assert told["size_bytes"] == os.path.getsize(tmp_path / "out.npz")


@pytest.mark.usefixtures("small_shards")
def test_safetensors_has_every_array_bit_for_bit(tmp_path):
    from safetensors.torch import load_file

    state = {k: v for k, v in rich_state().items() if k not in UNKNOWN_TO_SAFETENSORS}
    save_once(tmp_path / "backup", state, step=12)
    call("export", tmp_path / "backup", tmp_path / "out.safetensors")
    expected = dict(leaves(state))
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys()
    import torch

    for name, array in expected.items():
        tensor = found[name]
        assert str(tensor.dtype).removeprefix("torch.") == array.dtype.name, name
        assert tuple(tensor.shape) == array.shape, name
        bits = tensor.reshape(-1).contiguous().view(torch.uint8).numpy()
        assert bits.tobytes() == array.tobytes(), name
        assert tensor.data_ptr() % array.itemsize == 0, name
    with safetensors.safe_open(tmp_path / "out.safetensors", "np") as file:
        assert file.metadata() == {"step": "12"}


def test_numpys_reader_of_safetensors_reads_it_too(tmp_path):
    from safetensors.numpy import load_file

    state = {name: random_array((4, 3), name) for name in ("float32", "bool", "int8", "uint64")}
    save_once(tmp_path / "backup", state)
    call("export", tmp_path / "backup", tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), state)


@pytest.mark.parametrize("dtype", UNKNOWN_TO_SAFETENSORS)
def test_what_safetensors_does_not_know_is_refused_by_name(tmp_path, capsys, dtype):
    save_once(tmp_path / "backup", {"a": {"b": random_array((3,), dtype)}})
    call("export", tmp_path / "backup", tmp_path / "out.safetensors", status=2)
    assert f"safetensors has no type for a.b ({dtype})" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["backup"]


@pytest.mark.parametrize("name", ["__stepsave__", "a.npy", "a\0b"])
def test_names_that_an_npz_would_change_are_refused(tmp_path, capsys, name):
    save_once(tmp_path / "backup", {name: np.ones(3), "other": np.ones(2)})
    call("export", tmp_path / "backup", tmp_path / "out.npz", status=2)
    assert f"cannot hold arrays of the names {name!r}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["backup"]
    if name == "a.npy":
        call("export", tmp_path / "backup", tmp_path / "out.safetensors")


def test_a_name_that_safetensors_keeps_for_itself_is_refused(tmp_path, capsys):
    save_once(tmp_path / "backup", {"__metadata__": np.ones(3)})
    call("export", tmp_path / "backup", tmp_path / "out.safetensors", status=2)
    assert "keeps the name '__metadata__' for itself" in capsys.readouterr().err


def test_a_header_that_no_reader_of_safetensors_takes_is_refused(tmp_path):
    longest = layout.MAX_NAME_BYTES - 10
    leaves = [LeafSpec((f"{number:010}" + "x" * longest,), (), "int8") for number in range(25_000)]
    arrays = [np.zeros((), np.int8)] * len(leaves)
    out = tmp_path / "out.safetensors"
    with pytest.raises(stepsave.InvalidStateError, match=r"bytes of names.*25000 arrays.*\.npz"):
        write_safetensors(str(out), leaves, arrays, {}, lambda _: None)
    assert not out.exists()


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_of_a_fit_the_models_variables_are_exported_and_all_if_asked(tmp_path, capsys, suffix):
    from safetensors.numpy import load_file

    def read(path):
        return read_npz(path)[0] if suffix == "npz" else load_file(path)

    expected = dict(leaves(OF_KERAS))
    save_once(tmp_path / "backup", OF_KERAS)
    call("export", tmp_path / "backup", tmp_path / f"model.{suffix}")
    assert "--all" in capsys.readouterr().out
    assert_same(read(tmp_path / f"model.{suffix}"), {name: expected[name] for name in MODEL})
    call("export", tmp_path / "backup", tmp_path / f"all.{suffix}", "--all")
    assert "--all" not in capsys.readouterr().out
    assert_same(read(tmp_path / f"all.{suffix}"), expected)


def test_another_backup_than_the_newest_is_chosen_by_its_step(tmp_path, capsys):
    with stepsave.Checkpointer(tmp_path / "backup", keep=1) as saver:
        for step in (3, 8):
            saver.save(step, {"a": np.full(4, step)}).wait()
    for number, (named, step) in enumerate([("", 8), ("@8", 8), ("@3", 3)]):
        call("export", f"{tmp_path}/backup{named}", tmp_path / f"{number}.npz")
        assert read_npz(tmp_path / f"{number}.npz")[0]["a"].tolist() == [step] * 4
    capsys.readouterr()
    call("export", f"{tmp_path}/backup@4", tmp_path / "none.npz", status=2)
    assert "expected a backup of step 4, found step 8, step 3" in capsys.readouterr().err


def test_a_file_that_is_there_is_replaced_only_if_asked(tmp_path, capsys):
    save_once(tmp_path / "backup", {"a": np.ones(3)})
    out = tmp_path / "out.npz"
    out.write_bytes(b"precious")
    call("export", tmp_path / "backup", out, status=2)
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    call("export", tmp_path / "backup", out, "--overwrite")
    assert read_npz(out)[0]["a"].tolist() == [1, 1, 1]


def test_names_of_no_known_format_and_places_without_a_backup_are_refused(tmp_path, capsys):
    save_once(tmp_path / "backup", {"a": np.ones(3)})
    call("export", tmp_path / "backup", tmp_path / "out.h5", status=2)
    assert "expected a name that ends in .weights.h5, .keras" in capsys.readouterr().err
    call("export", tmp_path / "nothing", tmp_path / "out.npz", status=2)
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    call("export", tmp_path / "empty", tmp_path / "out.npz", status=2)
    assert "expected a backup, found none" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["backup", "empty"]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_of_a_damaged_backup_nothing_is_written(tmp_path, capsys, suffix):
    save_once(tmp_path / "backup", OF_KERAS)
    layout = json.loads((tmp_path / "backup/1/layout.json").read_text())
    offsets = {".".join(leaf["path"]): leaf["offsets"][0] for leaf in layout["leaves"]}
    shard = tmp_path / "backup/1/pytree/d/c/0"
    for name in MODEL:
        flip_bit(shard, offsets[name])
        call("export", tmp_path / "backup", tmp_path / f"out.{suffix}", status=1)
        assert name in capsys.readouterr().err
        assert os.listdir(tmp_path) == ["backup"]
        flip_bit(shard, offsets[name])
    call("export", tmp_path / "backup", tmp_path / f"out.{suffix}")
    # What is not exported is not read; in all there is, it is missed.
    flip_bit(shard, offsets["optimizer_variables.adam.m"])
    call("export", tmp_path / "backup", tmp_path / f"out.{suffix}", "--overwrite")
    call("export", tmp_path / "backup", tmp_path / f"all.{suffix}", "--all", status=1)
    assert sorted(os.listdir(tmp_path)) == ["backup", f"out.{suffix}"]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, suffix):
    save_once(tmp_path / "backup", {"a": random_array((1 << 20,), "float32")})
    small = tmp_path / "small"
    small.mkdir()
    mounts = in_own_mounts(f"mount -t tmpfs -o size=1m tmpfs {small}\ntouch {small}/before")
    script = (
        "import os, subprocess, sys; place = sys.argv.pop(1)\n"
        "ended = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        'assert ended.returncode == 2, ended; assert "No space left" in ended.stderr, ended\n'
        'assert os.listdir(place) == ["before"], os.listdir(place)'
    )
    command = [sys.executable, "-m", "stepsave.cli", "export", str(tmp_path / "backup")]
    check_python(script, small, *command, small / f"out.{suffix}", prefix=mounts)


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    save_once(tmp_path / "backup", {"a": np.ones(3)})
    (tmp_path / "place").mkdir()
    mounts = in_own_mounts(f"mount -t tmpfs -o ro tmpfs {tmp_path}/place")
    out = tmp_path / "place" / "out.npz"
    ended = run("export", tmp_path / "backup", out, status=2, prefix=mounts)
    assert "Read-only file system" in ended.stderr
    ended = run("export", tmp_path / "backup", tmp_path / "none" / "out.npz", status=2)
    assert "No such file or directory" in ended.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_in_the_midst_it_leaves_no_file(tmp_path, signum):
    save_once(tmp_path / "backup", {f"a{i}": np.full(1 << 21, i, "float32") for i in range(20)})
    process = start("export", tmp_path / "backup", tmp_path / "out.npz")
    wait_until(lambda: any(".partial" in name for name in os.listdir(tmp_path)))
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0, "it was done before the signal came"
    assert not (tmp_path / "out.npz").exists()
    if signum != signal.SIGKILL:
        assert process.returncode == 128 + signum, err
        assert "stopped" in err
        assert os.listdir(tmp_path) == ["backup"]
    call("export", tmp_path / "backup", tmp_path / "out.npz")
    assert read_npz(tmp_path / "out.npz")[0]["a7"][5] == 7


def test_a_training_may_go_on_in_the_directory(tmp_path):
    stop = threading.Event()

    def train():
        with stepsave.Checkpointer(tmp_path / "backup") as saver:
            step = 0
            while not stop.wait(0.02):
                step += 1
                saver.save(step, state_of(step))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        wait_until((tmp_path / "backup" / "COMMIT").exists)
        for _ in range(5):
            call("export", tmp_path / "backup", tmp_path / "out.npz", "--overwrite")
            arrays, note = read_npz(tmp_path / "out.npz")
            step = int(note["step"])
            assert_same(arrays, dict(leaves(state_of(step))))
    finally:
        stop.set()
        thread.join()


def test_a_bucket_is_read_and_nothing_is_written_there(tmp_path, s3):
    save_once(s3.place, {"a": np.arange(9)}, step=5)
    s3.requests.clear()
    call("export", s3.place, tmp_path / "out.npz")
    assert read_npz(tmp_path / "out.npz")[0]["a"].tolist() == list(range(9))
    assert {method for method, _ in s3.requests} <= {"GET", "HEAD"}


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_neither_keras_nor_a_backend_is_imported_for_files_of_arrays(tmp_path, suffix):
    save_once(tmp_path / "backup", {"a": np.ones(3)})
    before = tree_bytes(tmp_path / "backup")
    check_imports("export", tmp_path / "backup", tmp_path / f"out.{suffix}")
    assert (tmp_path / f"out.{suffix}").exists()
    assert tree_bytes(tmp_path / "backup") == before
