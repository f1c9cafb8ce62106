"""Spoiled and hostile backups: each an error that names the path, and nothing is deleted."""

import ast
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c
from engine_support import (
    assert_same_bits,
    change_json,
    flip_bit,
    random_array,
    read_marker,
    replace_proved,
    restore_once,
    save_once,
    tree_bytes,
    write_marker,
)

import stepsave
from stepsave.errors import CorruptBackupError, FormatVersionError
from stepsave.format.marker import decode_marker

STATE = {
    "a": random_array((90, 200), "float32"),
    "b": {"c": random_array((7,), "int8")},
    "z": np.zeros((60, 300), np.float32),
}


@pytest.fixture
def backup(tmp_path, small_shards):  # noqa: ARG001
    """A directory with the backup of step 5, in several shards."""
    save_once(tmp_path, STATE, step=5, metadata={"epoch": 1})
    assert len(os.listdir(tmp_path / "5/pytree/d/c")) > 1
    return tmp_path


def assert_refused(directory, path, error=CorruptBackupError, match=None):
    before = tree_bytes(directory)
    with pytest.raises(error, match=match) as caught:
        restore_once(directory)
    assert str(directory / path) in str(caught.value)
    after = tree_bytes(directory)
    assert {**after, "LOCK": None} == {**before, "LOCK": None}


SPOILT_MARKER = "the/path: expected (a commit marker, found .* bytes that|.*bytes after the first)"


def test_every_truncation_of_a_marker_is_refused(backup):
    encoded = (backup / "COMMIT").read_bytes()
    for length in range(len(encoded)):
        with pytest.raises(CorruptBackupError, match=SPOILT_MARKER):
            decode_marker(encoded[:length], "the/path")
    for length in (0, 1, len(encoded) // 2, len(encoded) - 1):
        (backup / "COMMIT").write_bytes(encoded[:length])
        assert_refused(backup, "COMMIT")


def test_every_flipped_byte_of_a_marker_is_refused(backup):
    encoded = (backup / "COMMIT").read_bytes()
    accepted, told = [], []
    for i in range(len(encoded)):
        spoiled = bytearray(encoded)
        spoiled[i] ^= 1 << i % 8
        try:
            decode_marker(bytes(spoiled), "the/path")
            accepted.append((i, encoded[i : i + 1], bytes(spoiled[i : i + 1])))
        except CorruptBackupError as e:
            told.append("the/path" in str(e))
    assert accepted == []
    assert all(told)
    flip_bit(backup / "COMMIT", 70)
    assert_refused(backup, "COMMIT")


def test_a_marker_with_something_after_it_is_refused(backup):
    with open(backup / "COMMIT", "ab") as file:
        file.write(b"\n")
    assert_refused(backup, "COMMIT")


@pytest.mark.parametrize(
    "path",
    ["layout.json", "training.json", "pytree/d/index", "pytree/manifest.ocdbt", "pytree/_METADATA"],
)
def test_every_file_is_proved(backup, path):
    file = backup / "5" / path
    data = file.read_bytes()
    for length in sorted({0, 1, len(data) // 2, len(data) - 1}):
        file.write_bytes(data[:length])
        assert_refused(backup, f"5/{path}", match=f"expected {len(data)} bytes, found {length}")
    file.write_bytes(data + b"\n")
    assert_refused(backup, f"5/{path}")
    file.write_bytes(data)
    for at in np.linspace(0, len(data) - 1, 15, dtype=int):
        flip_bit(file, at, bit=int(at) % 8)
        assert_refused(backup, f"5/{path}", match=r": expected CRC-32C \w+, found")
        flip_bit(file, at, bit=int(at) % 8)
    file.unlink()
    assert_refused(backup, f"5/{path}", match="no such file")
    file.write_bytes(data)
    assert_same_bits(restore_once(backup).state, STATE)


def test_every_shard_is_proved(backup):
    for number in os.listdir(backup / "5/pytree/d/c"):
        path = f"5/pytree/d/c/{number}"
        data = (backup / path).read_bytes()
        for length in (0, 4096, len(data) - 1):
            (backup / path).write_bytes(data[:length])
            assert_refused(backup, path, match=f"expected {len(data)} bytes")
        (backup / path).write_bytes(data + b"\0")
        assert_refused(backup, path, match=f"expected {len(data)} bytes")
        (backup / path).unlink()
        assert_refused(backup, path, match="no such file")
        (backup / path).write_bytes(bytes(len(data)))
        assert_refused(backup, path, match=r"bytes \d+ to \d+\): expected CRC-32C \w+, found")
        (backup / path).write_bytes(data)
    assert_same_bits(restore_once(backup).state, STATE)


def test_swapped_shards_are_refused(backup):
    shards = backup / "5/pytree/d/c"
    os.rename(shards / "0", shards / "x")
    os.rename(shards / "1", shards / "0")
    os.rename(shards / "x", shards / "1")
    assert_refused(backup, "5/pytree/d/c")


@pytest.mark.usefixtures("small_shards")
def test_a_shard_of_another_save_is_refused(tmp_path):
    """Each of its chunks proves itself; the marker knows better."""
    for name, value in (("one", 1.0), ("two", 2.0)):
        save_once(tmp_path / name, {"a": np.full((90, 200), value)}, step=5)
    for number in ("0", "1"):
        path = f"5/pytree/d/c/{number}"
        data = (tmp_path / "one" / path).read_bytes()
        (tmp_path / "one" / path).write_bytes((tmp_path / "two" / path).read_bytes())
        assert_refused(tmp_path / "one", path, match="another save")
        (tmp_path / "one" / path).write_bytes(data)


@pytest.mark.parametrize("path", ["COMMIT", "5/layout.json", "5/training.json", "5/pytree/d/c/0"])
@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_only_regular_files_are_taken(backup, path, kind):
    file = backup / path
    moved = backup.parent / f"{backup.name} moved"
    os.rename(file, moved)
    if kind == "link":
        file.symlink_to(moved)
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.mkdir()
    no_marker = kind == "directory" and path == "COMMIT"
    assert_refused(backup, path, match=None if no_marker else "regular file|no such file")


def change_marker(directory, change, version=1):
    document = read_marker(directory)
    changed = change(document)
    write_marker(directory, document if changed is None else changed, version)


MARKERS = {
    "directory above": lambda d: d.update(directory=".."),
    "absolute directory": lambda d: d.update(directory="/"),
    "directory of another step": lambda d: d.update(directory="6"),
    "path above": lambda d: d["files"][0].__setitem__(0, "../../secret"),
    "absolute path": lambda d: d["files"][0].__setitem__(0, "/etc/hostname"),
    "path with a null": lambda d: d["files"][0].__setitem__(0, "a\0b"),
    "path is a list": lambda d: d["files"].__setitem__(0, [["a"], [], {}]),
    "file of three": lambda d: d["files"].__setitem__(0, ["layout.json", 3]),
    "step is text": lambda d: d.update(step="five"),
    "step is null": lambda d: d.update(step=None),
    "step is infinite": lambda d: d.update(step=float("inf")),
    "step is below zero": lambda d: d.update(step=-5, directory="-5"),
    "no files": lambda d: {key: d[key] for key in d if key != "files"},
    "files are a number": lambda d: d.update(files=7),
    "digests are null": lambda d: d.update(shard_digests=None),
    "a list": lambda _: [],
    "a number": lambda _: 7,
    "huge numbers": lambda _: ("1" * 5000).encode(),
    "deep nesting": lambda _: b"[" * 100_000,
    "no text": lambda _: b"\xff\xfe",
    "nothing": lambda _: b"null",
}


@pytest.mark.parametrize("name", MARKERS)
def test_a_marker_that_proves_itself_is_still_not_trusted(backup, name):
    change_marker(backup, MARKERS[name])
    assert_refused(backup, "COMMIT")


BEYOND = {
    "fewer files": (lambda d: d.update(files=d["files"][:2]), "5"),
    "fewer shards": (lambda d: d.update(shard_digests=d["shard_digests"][:-1]), "5/layout.json"),
    "more shards": (lambda d: d["shard_digests"].append(7), "5/layout.json"),
    "another size of shards": (lambda d: d.update(shard_bytes=1 << 62), "5/layout.json"),
    "negative size of shards": (lambda d: d.update(shard_bytes=-1), "5/layout.json"),
    "huge file": (lambda d: d["files"][0].__setitem__(1, 1 << 70), "5"),
    "step that is not there": (lambda d: d.update(step=6, directory="6"), "6"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_marker_that_does_not_fit_its_backup_is_refused(backup, name):
    change, path = BEYOND[name]
    change_marker(backup, change)
    assert_refused(backup, path)


def test_a_marker_of_a_future_format_is_refused_with_both_versions(backup):
    change_marker(backup, lambda _: None, version=3)
    assert_refused(backup, "COMMIT", FormatVersionError, "format 3.*format 2.*newer stepsave")
    with (
        stepsave.Checkpointer(backup) as saver,
        pytest.raises(stepsave.SaveFailedError) as caught,
    ):
        saver.save(6, STATE).wait()
    assert isinstance(caught.value.__cause__, FormatVersionError)
    assert (backup / "5/pytree/d/c/0").exists()


def test_a_marker_beyond_the_limit_is_not_read(backup):
    with open(backup / "COMMIT", "r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CorruptBackupError, match=f"{backup / 'COMMIT'}.*at most"):
        restore_once(backup)


def leaf_change(number, **fields):
    return lambda d: d["leaves"][number].update(fields)


LAYOUTS = {
    "future format": lambda d: d.update(format=3),
    "unknown dtype": leaf_change(0, dtype="object"),
    "code for a dtype": leaf_change(0, dtype="O,i4"),
    "overlapping chunks": leaf_change(1, offsets=[0]),
    "chunk outside": leaf_change(1, offsets=[1 << 62]),
    "negative offset": leaf_change(1, offsets=[-64]),
    "huge shape": leaf_change(1, shape=[1 << 62], chunk_shape=[1 << 62]),
    "larger than it is": leaf_change(1, shape=[1 << 16], chunk_shape=[1 << 16]),
    "shape NumPy cannot make": leaf_change(1, shape=[0, 1 << 62, 1 << 62], offsets=[]),
    "other chunks": leaf_change(0, chunk_shape=[1, 200]),
    "another number of shards": lambda d: d.update(shard_count=1),
    "a path that is a parent of another": leaf_change(1, path=["a", "b"]),
    "no path": leaf_change(1, path=[]),
    "not a dict": lambda _: [1],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_is_proved_is_still_not_trusted(backup, name):
    change_json(backup, "layout.json", LAYOUTS[name])
    assert_refused(backup, "")


def test_a_layout_that_moves_a_leaf_is_refused(backup):
    """The bytes there are proved as another chunk, or not at all."""
    change_json(backup, "layout.json", lambda d: d["leaves"][1]["offsets"].__setitem__(0, 40_000))
    assert_refused(backup, "")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b"{", b'{"metadata": 1', b"7"])
def test_a_position_that_is_proved_is_still_not_trusted(backup, data):
    replace_proved(backup, "training.json", data)
    assert_refused(backup, "")


def test_a_huge_claim_costs_no_memory(backup):
    import resource

    change_json(backup, "layout.json", leaf_change(1, shape=[1 << 40], chunk_shape=[1 << 40]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(backup, "")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.usefixtures("small_shards")
def test_with_a_second_backup_a_spoiled_one_costs_one_save(tmp_path):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        saver.save(5, STATE).wait()
        saver.save(8, {"other": np.arange(3)}).wait()
    (tmp_path / "8/layout.json").write_bytes(b"[" * 3)
    with (
        stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver,
        pytest.warns(UserWarning, match=r"step 8.*cannot be read.*step 5.*3 steps"),
    ):
        backup = saver.restore()
    assert backup.step == 5
    assert_same_bits(backup.state, STATE)


@pytest.mark.parametrize("path", ["layout.json", "training.json", "pytree", "."])
def test_with_a_second_backup_a_missing_part_costs_one_save(tmp_path, path):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (1, 2):
            saver.save(step, STATE).wait()
    missing = tmp_path / "2" / path
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    with (
        stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver,
        pytest.warns(UserWarning, match="step 2.*cannot be read"),
    ):
        backup = saver.restore()
    assert_same_bits(backup.state, STATE)


def test_when_both_backups_are_spoiled_both_are_named_and_kept(tmp_path):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (1, 2):
            saver.save(step, STATE).wait()
    for step in (1, 2):
        flip_bit(tmp_path / str(step) / "pytree/d/c/0", 10)
    before = tree_bytes(tmp_path)
    with pytest.raises(CorruptBackupError, match=str(tmp_path / "2")) as caught:
        restore_once(tmp_path, double_checkpoint=True)
    assert any(str(tmp_path / "1") in note for note in caught.value.__notes__)
    assert {**tree_bytes(tmp_path), "LOCK": None} == {**before, "LOCK": None}


def test_nothing_in_the_source_could_execute_a_backup():
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy"}
    files = list(Path(stepsave.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not modules & {alias.name.partition(".")[0] for alias in node.names}, file
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in modules, file
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "__import__"}, file
                assert "allow_pickle" not in {word.arg for word in node.keywords}, file


def test_a_pickle_in_a_backup_is_never_loaded(backup, monkeypatch):
    import pickle

    def loads(*_, **__):
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, loads)
    np.save(backup / "5/evil.npy", np.array([{}], object), allow_pickle=True)
    assert_same_bits(restore_once(backup).state, STATE)


def test_the_helper_that_seals_markers_makes_valid_ones(backup):
    """Or the tests above would test only the checksum of the marker."""
    change_marker(backup, lambda _: None)
    assert_same_bits(restore_once(backup).state, STATE)
    text = json.dumps({"format": 1, "step": 5, "metadata": {"x": 1}}).encode()
    replace_proved(backup, "training.json", text)
    assert restore_once(backup).metadata == {"x": 1}
    proved = {path: crc for path, _, crc in read_marker(backup)["files"]}
    assert proved["training.json"] == crc32c(text)
