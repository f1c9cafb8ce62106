import errno
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from engine_support import (
    assert_is_state_of,
    assert_same_bits,
    check_python,
    child_environment,
    flip_bit,
    in_own_mounts,
    random_array,
    restore_once,
    save_once,
    state_of,
    tree_bytes,
)

import stepsave
from stepsave.engine import attempts
from stepsave.engine.commit import CommitProtocol
from stepsave.store.local import LocalStore

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@pytest.fixture
def no_writes(monkeypatch):
    """Has every call fail that would change a file, as for a user without permission to."""
    real = os.open

    def deny(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def only_read(path, flags, *args, **options):
        return deny(path) if flags & WRITES else real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", only_read)
    for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "truncate", "utime"):
        monkeypatch.setattr(os, name, deny)


def times_of(directory):
    return {str(path): os.lstat(path).st_mtime_ns for path in [directory, *directory.rglob("*")]}


@pytest.mark.parametrize("double", [False, True])
def test_a_directory_is_read_that_must_not_be_written(tmp_path, request, double):
    state = {"a": [random_array((30, 40), "bfloat16"), None], "n": 3}
    for step in (1, 2, 3):
        save_once(tmp_path, state, step=step, metadata={"x": step}, double_checkpoint=double)
    (tmp_path / "notes.txt").write_text("beside it may be anything")
    before, times = tree_bytes(tmp_path), times_of(tmp_path)
    request.getfixturevalue("no_writes")
    with stepsave.Checkpointer(tmp_path, read_only=True) as reader:
        found = [reader.restore(), reader.restore(like=state)]
        assert reader.committed.step == 3
        assert (reader.previous and reader.previous.step) == (2 if double else None)
    found += [stepsave.restore(tmp_path), stepsave.restore(tmp_path, like=state)]
    for backup in found:
        assert (backup.step, backup.metadata) == (3, {"x": 3})
        assert_same_bits(backup.state, state)
    assert tree_bytes(tmp_path) == before
    assert times_of(tmp_path) == times


def test_a_read_only_file_system_is_read(tmp_path):
    save_once(tmp_path / "there", {"a": np.arange(5)})
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}"
    script = """
import sys, stepsave
assert stepsave.restore(sys.argv[1]).state["a"].tolist() == [0, 1, 2, 3, 4]
for writer in ("auto", "tensorstore"):
    try:
        stepsave.Checkpointer(sys.argv[1], writer=writer)
    except stepsave.BackupDirectoryError as e:
        print(e)
"""
    lines = check_python(script, tmp_path / "there", prefix=in_own_mounts(mount)).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"{tmp_path / 'there'}:")
        assert "Read-only file system" in line
        assert "read_only=True" in line
    assert_same_bits(restore_once(tmp_path / "there").state, {"a": np.arange(5)})


@pytest.mark.parametrize("writer", ["auto", "direct", "tensorstore"])
@pytest.mark.parametrize("has_lock", [True, False])
def test_without_read_only_a_directory_that_cannot_be_written_is_refused(
    tmp_path, monkeypatch, request, writer, has_lock
):
    save_once(tmp_path, state_of(1))
    before = tree_bytes(tmp_path)
    if has_lock:  # one that everybody may write, in a directory that nobody may write to
        monkeypatch.setattr("stepsave.store.lock.DirectoryLock.acquire", lambda _: None)
    request.getfixturevalue("no_writes")
    with pytest.raises(stepsave.BackupDirectoryError, match=str(tmp_path)) as caught:
        stepsave.Checkpointer(tmp_path, writer=writer)
    assert "cannot write" in str(caught.value)
    assert "Permission denied" in str(caught.value)
    assert "read_only=True" in str(caught.value)
    assert_is_state_of(stepsave.restore(tmp_path))
    assert tree_bytes(tmp_path) == before


def test_nothing_is_saved_or_removed_by_one_that_only_reads(tmp_path):
    save_once(tmp_path, state_of(1))
    before = tree_bytes(tmp_path)
    with stepsave.Checkpointer(tmp_path, read_only=True) as reader:
        for ask in (lambda: reader.save(2, state_of(2)), lambda: reader.prepare(state_of(2))):
            with pytest.raises(stepsave.BackupDirectoryError, match=f"{tmp_path}.*read_only=True"):
                ask()
        reader.wait()
        assert (reader.in_flight, reader.stats().started, reader.stats().writer) == (0, 0, "")
        assert_is_state_of(reader.restore())
        with pytest.raises(stepsave.BackupDirectoryError, match=f"{tmp_path}.*read_only=True"):
            reader.close(delete_backup=True)
        assert reader.closed
        with pytest.raises(stepsave.CheckpointerClosedError):
            reader.restore()
    assert tree_bytes(tmp_path) == before
    assert_is_state_of(restore_once(tmp_path))


def test_a_directory_without_a_backup_gives_none_and_a_missing_one_an_error(tmp_path):
    assert stepsave.restore(tmp_path) is None
    assert os.listdir(tmp_path) == []
    missing = tmp_path / "missing"
    with pytest.raises(stepsave.BackupDirectoryError, match=f"{missing}: .*No such file"):
        stepsave.restore(missing)
    missing.write_text("a file")
    with pytest.raises(stepsave.BackupDirectoryError, match=f"{missing}: .*found: a file"):
        stepsave.Checkpointer(missing, read_only=True)
    assert missing.read_text() == "a file"


def test_a_directory_in_use_is_read_and_stays_locked(tmp_path):
    refused = """
import sys, stepsave
try:
    stepsave.Checkpointer(sys.argv[1]).close()
except stepsave.DirectoryBusyError:
    print("refused")
"""
    with (
        stepsave.Checkpointer(tmp_path) as saver,
        stepsave.Checkpointer(tmp_path, read_only=True) as reader,
    ):
        assert reader.restore() is None
        for step in (1, 2, 3):
            saver.save(step, state_of(step)).wait()
            assert reader.committed.step == step
            assert_is_state_of(reader.restore())
            assert reader.restore().step == step
        reader.close()
        assert check_python(refused, tmp_path) == "refused\n"
    assert_is_state_of(stepsave.restore(tmp_path))


WRITE_ON = """
import sys, stepsave
from engine_support import SMALL_SHARDS, state_of
exec(SMALL_SHARDS)
with stepsave.Checkpointer(sys.argv[1], double_checkpoint=sys.argv[2] == "True") as saver:
    saver.save(1, state_of(1, leaves=40)).wait()
    print("saved", flush=True)
    for step in range(2, 10**9):
        saver.save(step, state_of(step, leaves=40)).wait()
"""


@pytest.mark.parametrize("double", [False, True])
def test_while_another_process_saves_each_backup_read_is_of_one_step(tmp_path, double, monkeypatch):
    monkeypatch.setattr(attempts, "ATTEMPTS", 1000)
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_ON, str(tmp_path), str(double)],
        stdout=subprocess.PIPE,
        env=child_environment(),
        text=True,
    ) as writer:
        try:
            assert writer.stdout.readline() == "saved\n"
            steps = []
            with stepsave.Checkpointer(tmp_path, read_only=True) as reader:
                while len(set(steps)) < 25:
                    backup = reader.restore()
                    assert_is_state_of(backup)
                    steps.append(backup.step)
            assert steps == sorted(steps)
        finally:
            writer.send_signal(signal.SIGKILL)
    assert_is_state_of(stepsave.restore(tmp_path))


@pytest.fixture
def replaced(tmp_path, monkeypatch):
    """Has the backup be replaced `count` times, each while its first shard is being read."""
    saver = stepsave.Checkpointer(tmp_path)
    real = LocalStore.read_into
    left = []
    reading = threading.Lock()

    def read_into(self, path, *arguments):
        with reading:
            if left and path.endswith("/0"):
                step = left.pop()
                saver.save(step, state_of(step)).wait()
                saver.save(step + 1, state_of(step + 1)).wait()
        real(self, path, *arguments)

    monkeypatch.setattr(LocalStore, "read_into", read_into)
    saver.save(1, state_of(1)).wait()
    yield lambda count: left.extend(range(2 * count, 0, -2))
    saver.close()


def test_a_backup_that_is_replaced_while_it_is_read_is_read_again(tmp_path, replaced):
    replaced(attempts.ATTEMPTS - 1)
    backup = stepsave.restore(tmp_path)
    assert backup.step == 2 * (attempts.ATTEMPTS - 1) + 1
    assert_is_state_of(backup)


def test_a_reader_gives_up_when_the_backup_is_replaced_each_time(tmp_path, replaced):
    replaced(attempts.ATTEMPTS)
    with pytest.raises(stepsave.BackupDirectoryError, match=f"{tmp_path}.*replaced 10 times") as e:
        stepsave.restore(tmp_path)
    assert isinstance(e.value.__cause__, stepsave.CorruptBackupError)
    assert_is_state_of(stepsave.restore(tmp_path))


def test_a_backup_that_is_removed_while_it_is_read_is_none(tmp_path, monkeypatch):
    saver = stepsave.Checkpointer(tmp_path)
    saver.save(1, state_of(1)).wait()
    assert_is_state_of(stepsave.restore(tmp_path))
    real = LocalStore.read_into

    def read_into(self, path, *arguments):
        saver.close(delete_backup=True)
        real(self, path, *arguments)

    monkeypatch.setattr(LocalStore, "read_into", read_into)
    assert stepsave.restore(tmp_path) is None
    assert not tmp_path.exists()


def test_a_spoiled_backup_is_refused_at_once_and_the_one_before_it_read(tmp_path):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (1, 2):
            saver.save(step, state_of(step)).wait()
    flip_bit(tmp_path / "2/pytree/d/c/0", 100)
    before = tree_bytes(tmp_path)
    with pytest.warns(UserWarning, match="step 2.*cannot be read"):
        backup = stepsave.restore(tmp_path)
    assert backup.step == 1
    assert_is_state_of(backup)
    flip_bit(tmp_path / "1/pytree/d/c/0", 100)
    with pytest.raises(stepsave.CorruptBackupError, match=f"{tmp_path}/2/pytree/d/c/0"):
        stepsave.restore(tmp_path)
    flip_bit(tmp_path / "1/pytree/d/c/0", 100)
    assert tree_bytes(tmp_path) == before


@pytest.mark.parametrize(
    "path", ["COMMIT", "1/layout.json", "1/training.json", "1/pytree/d/index", "1/pytree/d/c/0"]
)
@pytest.mark.parametrize("call", ["open", "read"])
def test_every_error_in_reading_names_its_file(tmp_path, monkeypatch, path, call):
    save_once(tmp_path, state_of(1))
    target = str(tmp_path / path)
    real = {name: getattr(os, name) for name in ("open", "preadv", "fdopen")}

    def is_target(fd):
        return os.readlink(f"/proc/self/fd/{fd}") == target

    def failing_open(name, *args, **options):
        if str(name) == target:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
        return real["open"](name, *args, **options)

    def failing(name):
        def call(fd, *args, **options):
            if is_target(fd):
                os.close(fd) if name == "fdopen" else None
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real[name](fd, *args, **options)

        return call

    with monkeypatch.context() as patch:
        if call == "open":
            patch.setattr(os, "open", failing_open)
        else:
            patch.setattr(os, "preadv", failing("preadv"))
            patch.setattr(os, "fdopen", failing("fdopen"))
        with pytest.raises(stepsave.CorruptBackupError) as caught:
            stepsave.restore(tmp_path)
    assert target in str(caught.value)
    assert os.strerror(errno.EACCES if call == "open" else errno.EIO) in str(caught.value)
    assert_is_state_of(stepsave.restore(tmp_path))


def test_a_reader_finds_nothing_foreign_and_publishes_nothing(tmp_path, monkeypatch):
    """It looks at markers and what they name; the protocol of writers is not its."""
    save_once(tmp_path, state_of(1))

    def refuse(*_, **__):
        raise AssertionError("a reader used the commit protocol")

    monkeypatch.setattr(CommitProtocol, "__init__", refuse)
    assert_is_state_of(stepsave.restore(tmp_path))


def test_a_directory_that_may_not_be_listed_is_refused_at_the_start(tmp_path, monkeypatch):
    save_once(tmp_path, state_of(1))

    def deny(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, deny)
    with pytest.raises(
        stepsave.BackupDirectoryError, match=f"{tmp_path}: cannot look into the backup directory"
    ):
        stepsave.Checkpointer(tmp_path)
    monkeypatch.undo()
    assert_is_state_of(restore_once(tmp_path))
