import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from engine_support import check_python

from stepsave.errors import (
    BackupDirectoryError,
    CheckpointerClosedError,
    DirectoryBusyError,
)
from stepsave.store.lock import LOCK_NAME, DirectoryLock, find_holder

LOOK = """
import sys
from pathlib import Path
from stepsave.store.lock import find_holder
print(find_holder(Path(sys.argv[1])))
"""

HOLD = """
import sys
from pathlib import Path
from stepsave.store.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
lock.reserve()
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""

TRY = """
import sys
from pathlib import Path
from stepsave.errors import DirectoryBusyError
from stepsave.store.lock import DirectoryLock
try:
    lock = DirectoryLock(Path(sys.argv[1]))
    lock.reserve()
    lock.acquire()
    lock.release()
    print("free")
except DirectoryBusyError as e:
    print(e)
"""


def taken(directory):
    lock = DirectoryLock(directory)
    lock.reserve()
    try:
        lock.acquire()
    except BackupDirectoryError:
        lock.release()  # as one who opens does
        raise
    return lock


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_one_process_gets_a_directory_once(tmp_path):
    lock = taken(tmp_path)
    try:
        with pytest.raises(DirectoryBusyError, match="another checkpointer of this process"):
            taken(tmp_path)
        DirectoryLock(tmp_path).release()  # of one that was refused
        with pytest.raises(DirectoryBusyError, match="another checkpointer of this process"):
            taken(tmp_path)
        assert str(tmp_path) in check_python(TRY, tmp_path)  # and no other process gets it
    finally:
        lock.release()
    assert check_python(TRY, tmp_path) == "free\n"
    taken(tmp_path).release()


def test_a_refused_process_is_told_the_directory_and_the_holder(tmp_path, holder):
    with pytest.raises(DirectoryBusyError, match="another live process uses this") as caught:
        taken(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert f"pid {holder.pid}" in str(caught.value)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = taken(tmp_path)
    assert lock.is_held
    lock.release()


def test_two_directories_are_two_locks(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    locks = [taken(tmp_path / "a"), taken(tmp_path / "b")]
    for lock in locks:
        lock.release()
        lock.release()  # twice does no harm
        assert not lock.is_held


FORK = """
import os, sys, time
from pathlib import Path
from stepsave.store.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
lock.reserve()
lock.acquire()
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    ok = not lock.is_held
    lock.release(remove=True)  # not the child's to release or remove
    for fd in (1, 2):
        os.close(fd)
    os.write(writer, b"y" if ok else b"n")
    time.sleep(60)
    os._exit(0)
assert os.read(reader, 1) == b"y"
assert lock.is_held
assert Path(sys.argv[1], "LOCK").exists()
print(child)
"""


def test_a_forked_child_holds_nothing_and_keeps_nothing_busy(tmp_path):
    child = int(check_python(FORK, tmp_path))
    try:
        assert check_python(TRY, tmp_path) == "free\n"  # though the child lives on
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_link_in_place_of_the_lock_is_refused(tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / LOCK_NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(BackupDirectoryError, match=LOCK_NAME):
        taken(tmp_path / "directory")
    assert (tmp_path / "precious").read_text() == "text"


def test_release_removes_the_file_only_when_asked(tmp_path):
    taken(tmp_path).release()
    assert (tmp_path / LOCK_NAME).exists()
    taken(tmp_path).release(remove=True)
    assert not (tmp_path / LOCK_NAME).exists()


def test_who_waited_for_a_lock_file_that_is_removed_takes_the_one_that_others_find(
    tmp_path, monkeypatch
):
    """Or two would hold the directory: one a file without a name, one the next of that name."""
    before = taken(tmp_path)
    lock = DirectoryLock(tmp_path)
    lock._place = "as in another process"
    lock.reserve()
    with monkeypatch.context() as patch:

        def lockf(*arguments):  # by now the file is open
            patch.setattr(fcntl, "lockf", real)
            before.release(remove=True)
            real(*arguments)

        real = fcntl.lockf
        patch.setattr(fcntl, "lockf", lockf)
        lock.acquire()
    try:
        assert os.path.samestat(os.fstat(lock._fd), os.stat(tmp_path / LOCK_NAME))
        assert f"pid {os.getpid()}" in check_python(TRY, tmp_path)
    finally:
        lock.release()


def test_one_that_never_finds_its_file_gives_up(tmp_path, monkeypatch):
    lock = DirectoryLock(tmp_path)
    lock.reserve()
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (tmp_path / LOCK_NAME).unlink())
    with pytest.raises(DirectoryBusyError, match="open this backup directory and delete it"):
        lock.acquire()
    lock.release()


def test_the_directory_that_was_removed_with_its_lock_is_made_again(tmp_path):
    directory = tmp_path / "backup"
    lock = DirectoryLock(directory, directory.mkdir)
    lock.reserve()
    lock.acquire()
    lock.check()
    lock.release()
    with pytest.raises(CheckpointerClosedError):
        lock.check()


SPOILT = {
    "removed": lambda path: (path / LOCK_NAME).unlink(),
    "replaced": lambda path: ((path / LOCK_NAME).unlink(), (path / LOCK_NAME).touch()),
    "moved": lambda path: path.rename(path.with_name("elsewhere")),
    "exchanged": lambda path: (path.rename(path.with_name("elsewhere")), path.mkdir()),
    "become a file": lambda path: (path.rename(path.with_name("elsewhere")), path.touch()),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_lock_file_that_others_do_not_find_is_noticed(tmp_path, how):
    directory = tmp_path / "backup"
    directory.mkdir()
    lock = taken(directory)
    lock.check()
    SPOILT[how](directory)
    with pytest.raises(DirectoryBusyError, match="was removed or replaced"):
        lock.check()
    lock.release(remove=True)
    assert (directory / LOCK_NAME).exists() == (how == "replaced"), "that is another's"


STALE = {
    "empty": b"",
    "of a dead process": b"pid 4194305\n",
    "of a live one": f"pid {os.getppid()}\n".encode(),  # whose number is that of another boot, say
    "of the first": b"pid 1\n",
    "garbage": bytes(range(256)) * 8,
    "no number": b"pid \xff\n",
}


@pytest.mark.parametrize("content", STALE.values(), ids=STALE)
def test_what_a_lock_file_says_keeps_nobody_out(tmp_path, content):
    (tmp_path / LOCK_NAME).write_bytes(content)
    assert find_holder(tmp_path) is None
    lock = taken(tmp_path)
    assert (tmp_path / LOCK_NAME).read_bytes() == f"pid {os.getpid()}\n{lock.nonce}\n".encode()
    lock.release()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_in_place_of_the_lock_is_refused(tmp_path, make):
    make(tmp_path / LOCK_NAME)
    with pytest.raises(BackupDirectoryError, match=r"cannot open LOCK|something else than a file"):
        taken(tmp_path)


def test_a_stopped_process_holds_its_lock(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    os.waitpid(holder.pid, os.WUNTRACED)
    with pytest.raises(DirectoryBusyError, match=f"pid {holder.pid}"):
        taken(tmp_path)
    holder.send_signal(signal.SIGCONT)
    holder.kill()
    holder.wait(60)
    taken(tmp_path).release()


def test_one_who_looks_is_told_who_holds_a_directory(tmp_path, holder):
    assert find_holder(tmp_path) == holder.pid
    holder.kill()
    holder.wait()
    assert find_holder(tmp_path) is None


def test_to_look_in_the_process_that_holds_a_directory_does_not_drop_its_lock(tmp_path):
    lock = taken(tmp_path)
    assert find_holder(tmp_path) == os.getpid()
    told = check_python(TRY, tmp_path)
    assert f"pid {os.getpid()}" in told
    lock.release()
    assert find_holder(tmp_path) is None


def test_nobody_is_known_to_hold_what_has_no_lock_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        find_holder(tmp_path)


def test_a_forked_child_that_lets_go_removes_nothing_of_its_parent(tmp_path):
    lock = taken(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            lock.release(remove=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK_NAME).exists()
    assert str(tmp_path) in check_python(TRY, tmp_path)
    lock.release(remove=True)
    assert os.listdir(tmp_path) == []


def test_the_file_is_removed_while_the_lock_is_held(tmp_path, monkeypatch):
    """Removed later, it might be that of a process that has taken the lock meanwhile."""
    lock = taken(tmp_path)
    real, holders = Path.unlink, []

    def unlink(path, **options):
        holders.append(check_python(LOOK, tmp_path))
        real(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    lock.release(remove=True)
    assert holders == [f"{os.getpid()}\n"]
    assert os.listdir(tmp_path) == []
