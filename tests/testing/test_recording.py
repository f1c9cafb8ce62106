import os
import threading
from pathlib import Path

import pytest

from stepsave.testing.posix_model import Sync
from stepsave.testing.recording import files_below, record


def said(log):
    return [f"{one.kind} {one.path}".strip() for one in log.operations]


def test_calls_of_all_threads_are_seen_with_what_they_wrote(tmp_path):
    root = tmp_path / "root"
    (root / "old").mkdir(parents=True)
    (root / "old/a").write_bytes(b"12345")

    def act():
        fd = os.open(root / "new", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"abc")
        os.writev(fd, [b"d", b"ef"])
        os.pwrite(fd, b"X", 1)
        os.pwritev(fd, [b"Y", b"Z"], 2)
        os.posix_fallocate(fd, 0, 20)
        os.ftruncate(fd, 10)
        os.fsync(fd)
        os.close(fd)

    with record(root) as recorder:
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
        os.rename(root / "old", root / "moved")
        os.link(root / "new", root / "linked")
        os.replace(root / "new", root / "moved/a")
        fd = os.open(root / "linked", os.O_WRONLY | os.O_APPEND | os.O_TRUNC)
        os.write(fd, b"1")
        os.write(fd, b"2")
        os.fdatasync(fd)
        os.close(fd)
        Path(root, "moved/a").unlink()
        os.rmdir(root / "moved")
        Path(root, "d").mkdir()
        (tmp_path / "elsewhere").mkdir()
        recorder.mark("acknowledged", 7)
    assert said(recorder.log) == [
        "create new",
        *["write new"] * 4,
        "allocate new",
        "truncate new",
        "sync new",
        "rename moved",
        "link linked",
        "rename moved/a",
        "truncate linked",
        *["write linked"] * 2,
        "sync linked",
        "unlink moved/a",
        "rmdir moved",
        "mkdir d",
        "acknowledged step 7",
    ]
    assert files_below(root) == {"linked": b"12", "d": None}


def test_a_sync_that_fails_is_noted_as_such_and_raised(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(5, "injected")

    monkeypatch.setattr(os, "fsync", fail)
    with record(tmp_path, syncs=True) as recorder:
        fd = os.open(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="injected"):
            os.fsync(fd)
        os.close(fd)
    last = recorder.log.operations[-1]
    assert isinstance(last, Sync)
    assert last.failed


def test_what_is_written_past_the_functions_of_os_is_noticed(tmp_path):
    noticed = pytest.raises(AssertionError, match="a: what is there is not what was recorded")
    with noticed, record(tmp_path):
        (tmp_path / "a").write_bytes(b"by open")


def test_afterwards_os_is_as_it_was(tmp_path):
    before = {name: getattr(os, name) for name in dir(os)}
    with pytest.raises(ZeroDivisionError), record(tmp_path):
        raise ZeroDivisionError
    assert {name: getattr(os, name) for name in dir(os)} == before
