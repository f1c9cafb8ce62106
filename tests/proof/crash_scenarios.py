"""What savers do while the power fails: each scenario runs in this process or in a traced one.

    python -m proof.crash_scenarios DIRECTORY SCENARIO WRITER

A scenario prepares what must be there, says `look`, and does what is to be recorded.
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
import os
import shutil
import sys
import threading
import warnings
from pathlib import Path

import engine_support

import stepsave
from stepsave.format import planning
from stepsave.testing.crashes import ACKNOWLEDGED, DELETED, FAILED_SYNC, LOOK
from stepsave.testing.strace_log import mark_in_trace

NAME = "new/backup"  # below the directory that is recorded: two levels are made


def tiny_state(step, leaves=2):
    return engine_support.state_of(step, leaves=leaves, shape=(4, 5))


def use_tiny_shards():
    planning.SHARD_TARGET_BYTES = 64 << 10
    planning.CHUNK_LIMIT_BYTES = 16 << 10


@dataclasses.dataclass(slots=True)
class Run:
    """One run of a scenario.

    Attributes:
        top: The directory that is recorded.
        writer: Of the checkpointers.
        mark: Called with what happens, and with the step.
    """

    top: Path
    writer: str
    mark: object

    @property
    def directory(self):
        return self.top / NAME

    def open(self, **options):
        return stepsave.Checkpointer(self.directory, writer=self.writer, **options)

    def save(self, saver, *steps, leaves=2):
        for step in steps:
            saver.save(step, tiny_state(step, leaves), {"of": step}).wait()
            self.mark(ACKNOWLEDGED, step)

    def look(self):
        self.mark(LOOK)

    def prepare(self, *steps, **options):
        with self.open(**options) as saver:
            self.save(saver, *steps)


def first_save(run):
    run.look()
    with run.open() as saver:
        run.save(saver, 1)


def second_save(run):
    with run.open() as saver:
        run.save(saver, 1)
        run.look()
        run.save(saver, 2)


def save_into_a_spare(run):
    """What has not changed since the save before the last is not written."""
    with run.open() as saver:
        run.save(saver, 1, 2, 3)
        run.look()
        run.save(saver, 4)


def another_layout(run):
    with run.open() as saver:
        run.save(saver, 1, 2, 3)
        run.look()
        run.save(saver, 4, leaves=3)


def double_checkpoint(run):
    with run.open(double_checkpoint=True) as saver:
        run.save(saver, 1, 2, 3)
        run.look()
        run.save(saver, 4)


def keep_two(run):
    with run.open(keep=2) as saver:
        run.save(saver, 1, 2, 3, 4)
        run.look()
        run.save(saver, 5)


def resume(run):
    with run.open() as saver:
        saver.restore()
        run.save(saver, 4, 5)


def restore_and_save(run):
    with run.open() as saver:
        saver.restore()
        run.save(saver, 3)


def prepare_a_kill(run):
    """Leaves a save that was all but published, a torn marker, and a probe."""
    run.prepare(1, 2)
    shutil.copytree(run.directory / "2", run.directory / "3")
    (run.directory / "COMMIT.tmp").write_bytes(b"stepsave-commit 1")
    (run.directory / ".stepsave-probe").touch()


def prepare_damage(run):
    """Makes the newest unreadable, so that the one before it is gone back to."""
    run.prepare(1, 2, 3, double_checkpoint=True)
    engine_support.flip_bit(run.directory / "3/pytree/d/c/3", 50)


def go_back(run):
    with run.open(double_checkpoint=True) as saver:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert saver.restore().step == 2
        run.save(saver, 4)


def delete(run):
    saver = run.open()
    run.save(saver, 1, 2)
    run.look()
    run.mark(DELETED)
    saver.close(delete_backup=True)


def delete_several(run):
    saver = run.open(keep=2)
    run.save(saver, 1, 2, 3)
    run.look()
    run.mark(DELETED)
    saver.close(delete_backup=True)


def end(run):
    saver = run.open(double_checkpoint=True)
    run.save(saver, 1, 2)
    run.look()
    saver.close(ended=True)


@contextlib.contextmanager
def failing_sync(mark, countdown, path=""):
    """The sync with that number fails, of what has such a path."""
    left = itertools.count(1)

    def failing(real):
        def sync(fd):
            found = os.readlink(f"/proc/self/fd/{fd}")
            if not found.endswith(path) or next(left) != countdown:
                return real(fd)
            mark(f"{FAILED_SYNC}{found}")
            raise OSError(errno.EIO, "injected")

        return sync

    real = os.fsync, os.fdatasync
    os.fsync, os.fdatasync = map(failing, real)
    try:
        yield
    finally:
        os.fsync, os.fdatasync = real


def save_with_a_fault(run, countdown, before=(1, 2, 3), path=""):
    with run.open() as saver:
        run.save(saver, *before)
        run.look()
        with failing_sync(run.mark, countdown, path):
            try:
                saver.save(4, tiny_state(4), {"of": 4}).wait()
                run.mark(ACKNOWLEDGED, 4)
            except stepsave.SaveFailedError:
                run.mark("failed", 4)
        run.save(saver, 5)


class Died(BaseException):
    """Not an `Exception`, as the end of a process is none."""


CHANGES = (
    "open",
    "write",
    "pwrite",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "fdatasync",
    "rename",
    "replace",
    "unlink",
    "rmdir",
    "mkdir",
)


@contextlib.contextmanager
def dying(countdown, path=""):
    """From the sync with that number on, of what has such a path, nothing is done any more."""
    left = itertools.count(1)
    dead = threading.Event()

    def mortal(name, real):
        def call(*args, **options):
            if name in ("fsync", "fdatasync"):
                is_meant = os.readlink(f"/proc/self/fd/{args[0]}").endswith(path)
                if is_meant and next(left) == countdown:
                    dead.set()
            if dead.is_set():
                raise Died
            return real(*args, **options)

        return call

    real = {name: getattr(os, name) for name in CHANGES}
    for name, one in real.items():
        setattr(os, name, mortal(name, one))
    try:
        yield
    finally:
        for name, one in real.items():
            setattr(os, name, one)


def power_cut_after_a_kill(run, countdown, before=(), path=""):
    """What the dead process had not synced is as pending as what the next one does."""
    saver = run.open()
    run.save(saver, *before)
    with dying(countdown, path):
        with contextlib.suppress(stepsave.SaveFailedError):
            saver.save(4, tiny_state(4), {"of": 4}).wait()
            run.mark(ACKNOWLEDGED, 4)
        with contextlib.suppress(stepsave.SaveFailedError):
            saver.close()
    run.look()
    with run.open() as saver:
        backup = saver.restore()
        run.save(saver, (backup.step if backup else 0) + 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """What is done while it is recorded.

    Attributes:
        act: That.
        prepare: What is done before, durably.
        acknowledged: The newest step that is acknowledged then.
        options: Of the checkpointer that recovers.
        may_fall_back: Whether that may meet a backup that was damaged on purpose.
    """

    act: object
    prepare: object = None
    acknowledged: int = -1
    options: dict = dataclasses.field(default_factory=dict)
    may_fall_back: bool = False


SCENARIOS = {
    "first save": Scenario(first_save),
    "second save": Scenario(second_save),
    "save into a spare": Scenario(save_into_a_spare),
    "save of another layout": Scenario(another_layout),
    "double_checkpoint": Scenario(double_checkpoint, options={"double_checkpoint": True}),
    "keep=2": Scenario(keep_two, options={"keep": 2}),
    "keep fewer": Scenario(resume, lambda run: run.prepare(1, 2, 3, keep=2), 3),
    "resume": Scenario(resume, lambda run: run.prepare(1, 2, 3), 3),
    "after a kill": Scenario(restore_and_save, prepare_a_kill, 2),
    "after damage": Scenario(
        go_back, prepare_damage, 2, {"double_checkpoint": True}, may_fall_back=True
    ),
    "delete": Scenario(delete),
    "delete several": Scenario(delete_several),
    "mark ended": Scenario(end, options={"double_checkpoint": True}),
    "a sync of a new spare fails": Scenario(
        functools.partial(
            save_with_a_fault, countdown=1, before=(1,), path="spare/commit_success.txt"
        )
    ),
    "a spare that was not synced is taken over": Scenario(
        functools.partial(power_cut_after_a_kill, countdown=1, path="spare/commit_success.txt")
    ),
    "a marker that was not synced is taken over": Scenario(
        functools.partial(power_cut_after_a_kill, countdown=2, before=(1, 2, 3), path=NAME)
    ),
}
FAULTS = {
    f"sync {number} fails": Scenario(functools.partial(save_with_a_fault, countdown=number))
    for number in range(1, 13)
}
KILLS = {
    f"killed before sync {number} of save {len(before) + 1}, and another goes on": Scenario(
        functools.partial(power_cut_after_a_kill, countdown=number, before=before)
    )
    for before in ((), (1, 2, 3))
    for number in range(1, 29 if not before else 15)
}
ALL = {**SCENARIOS, **FAULTS, **KILLS}
"""By name. Where there are fewer syncs than one counts, nothing fails and nobody dies."""


def main():
    """Carries one out in a process that is traced."""
    top, name, writer = sys.argv[1:]
    warnings.simplefilter("error")
    use_tiny_shards()
    ALL[name].act(Run(Path(top), writer, mark_in_trace))


if __name__ == "__main__":
    main()
