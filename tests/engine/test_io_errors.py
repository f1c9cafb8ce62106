"""Errors of disks and of the system around them, and what is left of a backup, and of the process.

`proof.errors` tries many more.
"""

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import threading
import time

import pytest
from engine_support import (
    SMALL_SHARDS,
    assert_is_state_of,
    check_python,
    in_own_mounts,
    restore_once,
    state_of,
    tree_bytes,
)
from proof import injected
from proof.faults import Held, Sufferer
from proof.slowness import train_on_one_that_stands_still

import stepsave
from stepsave.engine import timeline

WRITERS = ["auto", "tensorstore"]

pytestmark = pytest.mark.usefixtures("small_shards")

HEAD = (
    SMALL_SHARDS
    + """
import os, sys, time
import numpy as np, stepsave
from engine_support import assert_is_state_of, restore_once, state_of
directory = sys.argv[1]
"""
)


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("leaves", [None, 13])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_any_operation_of_a_save_may_fail(tmp_path, writer, double, leaves):
    """And each says something else at each run; in place, or with a directory made anew."""
    turn = random.randrange(100)
    print("turn", turn)  # noqa: T201
    sufferer = Sufferer(tmp_path / "backup", writer=writer, double_checkpoint=double)
    step = 1 if leaves is None else 4
    for number in itertools.count(1, step):
        if not sufferer.suffer(number, turn + number, leaves=leaves):
            break
    assert sufferer.cases > 15
    sufferer.close()


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("writer", WRITERS)
def test_all_operations_may_fail_until_the_cause_is_gone(tmp_path, writer):
    sufferer = Sufferer(tmp_path / "backup", writer=writer)
    for number in itertools.count(1, 5):
        if not sufferer.suffer(number, number, leaves=12 + number % 2, lasts=True):
            break
    assert sufferer.cases > 3
    sufferer.close()


@pytest.mark.parametrize(
    ("writer", "calls", "error"),
    [
        ("auto", "pwrite64", "EIO"),
        ("auto", "fdatasync", "EIO"),
        ("tensorstore", "write,writev,pwrite64", "EDQUOT"),
        ("tensorstore", "fsync,fdatasync", "EIO"),
    ],
)
def test_a_kernel_that_refuses_fails_the_save_and_the_next_one_works(
    tmp_path, writer, calls, error
):
    if reason := injected.reason_not_to():
        pytest.skip(reason)
    outcome, failed = injected.fail_a_save(tmp_path / "backup", writer, calls, error, tmp_path)
    assert outcome.startswith("failed"), outcome
    assert os.strerror(getattr(errno, error)) in outcome
    assert "/d/c/" in failed[0], failed
    assert failed[0].partition("_")[0] in outcome


@pytest.mark.parametrize("writer", WRITERS)
def test_short_writes_are_gone_on_with(tmp_path, monkeypatch, writer):
    shortened = []
    real_write, real_pwrite = os.write, os.pwrite

    def write(fd, data):
        shortened.append(len(data))
        return real_write(fd, memoryview(data)[: max(1, len(data) // 3)])

    def pwrite(fd, data, offset):
        shortened.append(len(data))
        return real_pwrite(fd, memoryview(data)[: max(4096, len(data) // 3 // 4096 * 4096)], offset)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with stepsave.Checkpointer(tmp_path / "backup", writer=writer) as saver:
        for step in range(1, 5):
            saver.save(step, state_of(step)).wait()
            assert_is_state_of(saver.restore())
    assert len(shortened) > 20
    monkeypatch.undo()
    assert restore_once(tmp_path / "backup").step == 4


@pytest.mark.parametrize("writer", WRITERS)
def test_a_storm_of_signals_changes_nothing(tmp_path, writer):
    """Each of our threads is interrupted in whatever call of the kernel it is."""
    came = []
    before = signal.signal(signal.SIGUSR1, lambda *_: came.append(1))
    over = threading.Event()

    def storm():
        while not over.is_set():
            for thread in threading.enumerate():
                if thread.name.startswith("stepsave-"):
                    signal.pthread_kill(thread.ident, signal.SIGUSR1)
            time.sleep(0.0005)

    try:
        with stepsave.Checkpointer(tmp_path / "backup", writer=writer) as saver:
            thread = threading.Thread(target=storm)
            thread.start()
            try:
                for step in range(1, 30):
                    saver.save(step, state_of(step))
                saver.wait(60)
                assert_is_state_of(saver.restore())
                assert saver.stats().committed == 29
            finally:
                over.set()
                thread.join(60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came
    assert restore_once(tmp_path / "backup").step == 29


@pytest.mark.parametrize("writer", WRITERS)
def test_a_process_without_descriptors_fails_the_save_and_not_the_next_one(tmp_path, writer):
    with stepsave.Checkpointer(tmp_path / "backup", writer=writer) as saver:
        for step in range(1, 4):
            saver.save(step, state_of(step)).wait()
        held = Held.by(saver)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = [os.open(os.devnull, os.O_RDONLY)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, limits[1]))
        try:
            handle = saver.save(4, state_of(4))
            with pytest.raises(stepsave.SaveFailedError, match=r"Too many open files.*backup"):
                handle.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            os.close(taken[0])
        assert saver.restore().step == 3
        assert_is_state_of(saver.restore())
        for step in range(5, 9):
            saver.save(step, state_of(step)).wait()
        assert_is_state_of(saver.restore())
        assert Held.by(saver) == held


FULL = (
    HEAD
    + """
from pathlib import Path
writer, double = sys.argv[2], sys.argv[3] == "True"
SHAPE = (400, 250)  # 4.8 MB for twelve arrays
with stepsave.Checkpointer(directory + "/b", writer=writer, double_checkpoint=double) as saver:
    for step in (1, 2):
        saver.save(step, state_of(step)).wait()
    ballast = Path(directory, "ballast")
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as e:
            assert e.errno == 28
    handle = saver.save(3, state_of(3, shape=SHAPE))
    try:
        handle.wait()
        raise AssertionError("a save on a full disk succeeded")
    except stepsave.SaveFailedError as e:
        assert "step 3" in str(e)
    backup = saver.restore()
    assert backup.step == 2
    assert_is_state_of(backup)
    saver.save(4, state_of(4, shape=SHAPE))
    saver.drain()
    try:
        saver.save(5, state_of(5, shape=SHAPE))
        raise AssertionError("the next save does not tell of the failure")
    except stepsave.SaveFailedError as e:
        assert "step 4" in str(e)
    ballast.unlink()
    saver.save(5, state_of(5, shape=SHAPE)).wait()
    assert saver.restore().step == 5
    assert_is_state_of(saver.restore())
    assert saver.stats().failed == 2
    print(saver.stats().writer)

saver = stepsave.Checkpointer(directory + "/c", writer=writer)
saver.save(1, state_of(1)).wait()
with open(ballast, "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
saver.save(2, state_of(2, shape=SHAPE))
try:
    saver.close()
    raise AssertionError("closing does not tell of the failure")
except stepsave.SaveFailedError as e:
    assert "step 2" in str(e)
ballast.unlink()
assert restore_once(directory + "/c").step == 1
assert_is_state_of(restore_once(directory + "/c"))
"""
)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("writer", ["auto", "tensorstore"])
def test_a_full_disk_fails_the_save_and_keeps_the_old_backup(tmp_path, writer, double):
    prefix = in_own_mounts(f"mount -t tmpfs -o size=20m none {tmp_path}")
    check_python(FULL, tmp_path, writer, double, prefix=prefix)


@pytest.mark.parametrize("writer", ["auto", "tensorstore"])
def test_a_limit_on_the_size_of_files_fails_the_save_and_keeps_the_old_backup(tmp_path, writer):
    check_python(
        """
import resource, sys
import numpy as np, stepsave
from engine_support import assert_is_state_of, restore_once, state_of
directory, writer = sys.argv[1:]
with stepsave.Checkpointer(directory, writer=writer) as saver:
    saver.save(1, state_of(1)).wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        saver.save(2, state_of(2, shape=(400, 250))).wait()
        raise AssertionError("more was written than may be")
    except stepsave.SaveFailedError as e:
        print(e)
    assert saver.restore().step == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saver.save(2, state_of(2, shape=(400, 250))).wait()
assert restore_once(directory).step == 2
assert_is_state_of(restore_once(directory))
""",
        tmp_path / "backup",
        writer,
    )


def test_a_directory_that_becomes_read_only_fails_the_save(tmp_path):
    prefix = in_own_mounts("true")
    check_python(
        HEAD
        + """
import subprocess
saver = stepsave.Checkpointer(directory)
saver.save(1, state_of(1)).wait()
# A second mount on top, as the first is kept busy by the lock.
subprocess.run(["mount", "--bind", directory, directory], check=True)
subprocess.run(["mount", "-o", "remount,ro,bind", directory], check=True)
try:
    saver.save(2, state_of(2)).wait()
    raise AssertionError
except stepsave.SaveFailedError as e:
    assert "Read-only" in str(e)
assert_is_state_of(saver.restore())
try:
    stepsave.Checkpointer(directory + "/new")
    raise AssertionError
except stepsave.BackupDirectoryError as e:
    assert directory + "/new" in str(e)
subprocess.run(["umount", directory], check=True)
saver.save(2, state_of(2)).wait()
saver.close()
assert restore_once(directory).step == 2
""",
        tmp_path,
        prefix=prefix,
    )


SAVE_ANOTHER = HEAD + "with stepsave.Checkpointer(directory) as s: s.save(7, state_of(7)).wait()"


@pytest.mark.parametrize("comes_another", [False, True])
def test_a_directory_that_is_moved_away_fails_the_save_loudly(tmp_path, comes_another):
    """Another one of its name may be somebody else's by now: nothing is changed there."""
    directory = tmp_path / "backup"
    with stepsave.Checkpointer(directory) as saver:
        saver.save(1, state_of(1)).wait()
        os.rename(directory, tmp_path / "moved")
        if comes_another:
            check_python(SAVE_ANOTHER, directory)
            there = tree_bytes(directory)
        for step in (2, 3):
            with pytest.raises(stepsave.SaveFailedError, match=f"step {step} .*{directory}.*moved"):
                saver.save(step, state_of(step)).wait()
        if comes_another:
            assert tree_bytes(directory) == there
            os.rename(directory, tmp_path / "other")
        os.rename(tmp_path / "moved", directory)
        assert saver.restore().step == 1
        assert_is_state_of(saver.restore())
        saver.save(4, state_of(4)).wait()
    assert restore_once(directory).step == 4
    assert_is_state_of(restore_once(directory))


def test_one_who_closes_and_removes_leaves_alone_what_came_in_place_of_his(tmp_path):
    directory = tmp_path / "backup"
    saver = stepsave.Checkpointer(directory)
    saver.save(1, state_of(1)).wait()
    shutil.rmtree(directory)
    check_python(SAVE_ANOTHER, directory)
    there = tree_bytes(directory)
    with pytest.raises(stepsave.BackupDirectoryError, match=str(directory)):
        saver.close(delete_backup=True)
    assert tree_bytes(directory) == there
    assert_is_state_of(restore_once(directory))


def test_a_full_disk_at_the_start_is_a_stepsave_error(tmp_path):
    prefix = in_own_mounts(f"mount -t tmpfs -o size=1m none {tmp_path}")
    check_python(
        HEAD
        + """
os.mkdir(directory + "/b")
with stepsave.Checkpointer(directory + "/b") as saver:
    saver.save(1, {"a": np.zeros(3)}).wait()
try:
    with open(directory + "/ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
except OSError:
    pass
try:
    backup = restore_once(directory + "/b")
    assert backup.step == 1
except stepsave.StepsaveError as e:
    assert directory + "/b" in str(e)
os.unlink(directory + "/ballast")
assert restore_once(directory + "/b").step == 1
""",
        tmp_path,
        prefix=prefix,
    )


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_stands_still_for_ten_minutes_costs_no_memory_and_is_told_of(
    tmp_path, monkeypatch, writer
):
    passed_s = [0.0]
    real = time.perf_counter
    monkeypatch.setattr(timeline.time, "perf_counter", lambda: real() + passed_s[0])

    def let_pass(some_s):
        passed_s[0] += some_s

    train_on_one_that_stands_still(tmp_path / "backup", writer, let_pass)
