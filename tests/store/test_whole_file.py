"""A file that is there as a whole, durably, or not at all."""

import os

import pytest

from stepsave.store.whole_file import new_file
from stepsave.testing.crashes import Sampling, crash_states, distinct
from stepsave.testing.recording import record


def test_it_appears_when_it_is_complete_and_synced(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, original=original: calls.append(name) or original(*a)
        )
    out = tmp_path / "out.npz"
    with new_file(out, ".npz", overwrite=False) as path:
        assert path.endswith(".npz")
        assert os.path.dirname(path) == str(tmp_path)
        with open(path, "wb") as file:
            file.write(b"all")
        assert not out.exists()
    assert out.read_bytes() == b"all"
    assert os.listdir(tmp_path) == ["out.npz"]
    assert calls == ["fsync", "replace", "fsync"]


def write(out, data, *, overwrite, before_the_end):
    with new_file(out, ".npz", overwrite=overwrite) as path:
        with open(path, "wb") as file:
            file.write(data)
        before_the_end()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_what_was_there_is_there(tmp_path, error):
    out = tmp_path / "out.npz"
    out.write_bytes(b"old")

    def fail():
        raise error

    with pytest.raises(error):
        write(out, b"half", overwrite=True, before_the_end=fail)
    assert out.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.npz"]


def test_one_that_is_there_is_refused_even_if_it_came_meanwhile(tmp_path):
    out = tmp_path / "out.npz"

    def come():
        out.write_bytes(b"of somebody else")

    def never():
        raise AssertionError("it was begun")

    with pytest.raises(FileExistsError, match="--overwrite"):
        write(out, b"all", overwrite=False, before_the_end=come)
    assert out.read_bytes() == b"of somebody else"
    with pytest.raises(FileExistsError, match="--overwrite"):
        write(out, b"all", overwrite=False, before_the_end=never)
    with pytest.raises(IsADirectoryError, match=f"{tmp_path}: expected the name of a file"):
        write(tmp_path, b"all", overwrite=True, before_the_end=never)
    assert os.listdir(tmp_path) == ["out.npz"]


def test_a_power_cut_leaves_the_old_file_or_the_new_one_and_the_new_one_when_it_was_told(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "out.npz").write_bytes(b"old")
    with record(root) as recorder:
        with new_file(root / "out.npz", ".npz", overwrite=True) as path:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT)
            os.write(fd, bytes(range(256)) * 8)
            os.close(fd)
        recorder.mark("acknowledged", 1)
    states = distinct(crash_states(recorder.log, Sampling()))
    told = [state for state in states if state.acknowledged == 1]
    assert {state.files["out.npz"].data for state in states} == {b"old", bytes(range(256)) * 8}
    assert {state.files["out.npz"].data for state in told} == {bytes(range(256)) * 8}
    assert len(states) > 5  # with what lies beside it
