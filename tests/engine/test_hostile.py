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
from stepsave.format import marker
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


BEYOND = {
    "fewer files": (lambda d: d.update(files=d["files"][:2]), "5"),
    "fewer shards": (lambda d: d.update(shard_digests=d["shard_digests"][:-1]), "5/layout.json"),
    "more shards": (lambda d: d["shard_digests"].append(7), "5/layout.json"),
    "another size of shards": (lambda d: d.update(shard_bytes=1 << 62), "5/layout.json"),
    "large file": (lambda d: d["files"][0].__setitem__(1, 1 << 30), "5"),
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


def test_a_layout_that_moves_a_leaf_is_refused(backup):
    """The bytes there are proved as another chunk, or not at all."""
    change_json(backup, "layout.json", lambda d: d["leaves"][1]["offsets"].__setitem__(0, 40_000))
    assert_refused(backup, "")


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


@pytest.mark.parametrize("link", ["spare/pytree/d/c", "spare/pytree", "5/pytree/d/c", "5/pytree"])
def test_nothing_is_written_where_a_link_leads_to(backup, tmp_path_factory, link):
    """Not by a save into what is left of an older backup, which may have come from elsewhere."""
    outside = tmp_path_factory.mktemp("outside") / "there"
    if link.startswith("spare"):
        shutil.copytree(backup / "5", backup / "spare")
    os.rename(backup / link, outside)
    (backup / link).symlink_to(outside)
    before = tree_bytes(outside)
    save_more(backup)
    assert tree_bytes(outside) == before


def test_a_flipped_bit_is_told_by_its_array_its_chunk_and_its_bytes(backup):
    flip_bit(backup / "5/pytree/d/c/0", 50)
    with pytest.raises(CorruptBackupError) as caught:
        restore_once(backup)
    told = "5/pytree/d/c/0: data of 'a' (chunk (0, 0), bytes 0 to 14400): expected CRC-32C "
    assert told in str(caught.value)


def test_a_copy_by_hard_links_stays_as_it_was(backup, tmp_path_factory):
    """As `cp -al` makes it, and programs that keep many generations of a directory."""
    copies = [tmp_path_factory.mktemp("copy") / "there" for _ in range(2)]
    shutil.copytree(backup, copies[0], copy_function=os.link)
    with stepsave.Checkpointer(backup) as saver:
        saver.save(6, OTHER).wait()
        shutil.copytree(backup, copies[1], copy_function=os.link)  # with what is spare
        before = list(map(tree_bytes, copies))
        saver.save(7, STATE).wait()
    save_more(backup)
    for copy, expected in zip(copies, before, strict=True):
        assert {**tree_bytes(copy), "LOCK": None} == {**expected, "LOCK": None}
    for copy, state in zip(copies, (STATE, OTHER), strict=True):
        assert_same_bits(stepsave.restore(copy).state, state)


OTHER = {**STATE, "a": STATE["a"][::-1].copy()}


def save_more(directory):
    with stepsave.Checkpointer(directory) as saver:
        for step in (16, 17, 18):
            saver.save(step, OTHER).wait()
    assert_same_bits(restore_once(directory).state, OTHER)


def test_what_could_not_be_read_back_is_not_committed(backup, monkeypatch):
    monkeypatch.setattr(marker, "FILE_LIMIT_BYTES", 10_000)
    with stepsave.Checkpointer(backup) as saver:
        with pytest.raises(stepsave.SaveFailedError) as caught:
            saver.save(6, STATE, {"much": "x" * 10_000}).wait()
        assert isinstance(caught.value.__cause__, stepsave.InvalidStateError)
        assert "training.json: expected at most 10000 bytes" in str(caught.value.__cause__)
        assert_same_bits(saver.restore().state, STATE)
        saver.save(7, OTHER).wait()
    assert_same_bits(restore_once(backup).state, OTHER)


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
