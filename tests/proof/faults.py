"""Errors of the operating system in the midst of a save, and what must be true afterwards."""

import dataclasses
import errno
import os
import stat
import threading

from engine_support import assert_is_state_of, read_marker, state_of

import stepsave
from proof.operations import Operations

ERRORS = {
    "open": ("EMFILE", "ENFILE", "ENOSPC", "EDQUOT", "EROFS", "EIO"),
    "mkdir": ("ENOSPC", "EDQUOT", "EROFS", "EIO"),
    "write": ("EIO", "ENOSPC", "EDQUOT", "EFBIG", "EAGAIN"),
    "pwrite": ("EIO", "ENOSPC", "EDQUOT", "EFBIG", "EAGAIN"),
    "ftruncate": ("EIO", "ENOSPC"),
    "posix_fallocate": ("ENOSPC", "EDQUOT", "EIO"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
    "fdatasync": ("EIO", "ENOSPC", "EDQUOT"),
    "rename": ("EIO", "ENOSPC", "EROFS"),
    "replace": ("EIO", "ENOSPC", "EROFS"),
    "unlink": ("EIO", "EROFS"),
    "rmdir": ("EIO", "EROFS"),
    "tensorstore": ("EIO", "ENOSPC"),
}
"""What each call may say, of which one is taken after the other."""


class Fault:
    """Has one operation fail, once, or all from there on.

    Attributes:
        said: Name of the call, where, and name of the error; None before it came to that.
        errors: Names of all errors, if more than one operation failed.
        retried: Files whose sync failed and that were synced again: a kernel may call pages clean
            that it could not write, so a second sync that succeeds tells nothing.
    """

    def __init__(self, number, turn, *, lasts=False):
        self.said = None
        self.errors = set()
        self.retried = []
        self._left, self._turn, self._lasts = number, turn, lasts
        self._guard = threading.Lock()
        self._failed = {}  # inode -> descriptor, which keeps the inode from being used again
        self._operations = Operations(before=self._meet)

    def __enter__(self):
        self._operations.__enter__()
        return self

    def __exit__(self, *_):
        self._operations.__exit__()
        for fd in self._failed.values():
            os.close(fd)
        self._failed.clear()

    def lift(self):
        """What has caused it has gone."""
        self._left, self._lasts = 0, False

    def failed_files(self):
        """Inodes of files whose sync failed."""
        return set(self._failed)

    def _meet(self, name, target):
        with self._guard:
            is_sync = name in ("fsync", "fdatasync")
            if is_sync and os.fstat(target).st_ino in self._failed:
                self.retried.append(_path(target))
            self._left -= 1
            if self._left != 0 and not (self._lasts and self._left < 0):
                return
            errors = ERRORS[name]
            error = errors[self._turn % len(errors)]
            self.said = self.said or (name, _path(target), error)
            self.errors.add(error)
            found = os.fstat(target) if is_sync else None
            if is_sync and stat.S_ISREG(found.st_mode):
                self._failed[found.st_ino] = os.dup(target)
        number = getattr(errno, error)
        named = () if isinstance(target, int) else (str(target),)  # as the real calls do
        raise OSError(number, os.strerror(number), *named)


def _path(target):
    return os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)


@dataclasses.dataclass(frozen=True)
class Held:
    """What a process holds for a checkpointer: all of it must come back after a fault."""

    threads: int
    descriptors: int
    arenas: int
    arena_bytes: int
    entries: int  # files and directories in the backup directory

    @classmethod
    def by(cls, saver):
        saver.drain()
        stats = saver.stats()
        return cls(
            threading.active_count(),
            len(os.listdir("/proc/self/fd")),
            stats.arena_count,
            stats.arena_bytes,
            sum(len(names) + len(files) for _, names, files in os.walk(saver.directory)),
        )


class Sufferer:
    """A checkpointer whose saves fail now and then; after each the promises are checked.

    Attributes:
        cases: How many faults there were.
    """

    def __init__(self, directory, **options):
        self.cases = 0
        self._options = options
        self._directory = directory
        self._saver = stepsave.Checkpointer(directory, **options)
        self._step = 0
        self._leaves = 12

    def save(self, leaves=None):
        """Saves, and restores that."""
        self._leaves = leaves or self._leaves
        self._begin().wait()
        self._check({self._step})

    def _begin(self):
        self._step += 1
        return self._saver.save(self._step, state_of(self._step, self._leaves), {"of": self._step})

    def suffer(self, number, turn, *, leaves=None, lasts=False):
        """Saves while an operation fails; tells whether there were so many operations.

        Args:
            number: Which operation.
            turn: Which of its errors.
            leaves: How many arrays, for another layout than before; None for the same.
            lasts: Whether all operations after it fail too.
        """
        for _ in range(3):  # until saves go in place again
            self.save(12)
        held = Held.by(self._saver)
        self._leaves = leaves or self._leaves
        before = self._step
        with Fault(number, turn, lasts=lasts) as fault:
            handle = self._begin()
            self._saver.drain()
            fault.lift()
            if fault.said is None:
                handle.wait()
                return False
            self.cases += 1
            committed = self._is_told(handle, fault)
            # If what failed was the last sync, the new one may be there as well.
            found = self._check({self._step} if committed else {before, self._step})
            self._step = max(self._step, found)
            self.save(12)
            assert not fault.retried, f"synced again after a failed sync: {fault.retried}"
            self._check_not_used(fault)
        for _ in range(2):
            self.save()
        assert Held.by(self._saver) == held, f"{fault.said}: {Held.by(self._saver)}, before {held}"
        return True

    def _is_told(self, handle, fault):
        """Whether the save was committed all the same; if not, that its error tells the cause.

        Of several threads that fail at once any may be the one that tells it.
        """
        said = fault.said
        causes = [os.strerror(getattr(errno, error)) for error in fault.errors]
        try:
            handle.wait()
        except stepsave.SaveFailedError as e:
            expected = f"step {handle.step}", str(self._directory)
            missing = [one for one in expected if one not in str(e)]
            if missing or not any(cause in str(e) for cause in causes):
                raise AssertionError(f"{said}: {missing or causes} not told") from e
            return False
        # After the commit, what was to be put away stays until the next save.
        newest = int(_newest(self._directory))
        assert newest == handle.step, f"{said}: step {handle.step} is told of, {newest} is there"
        return True

    def _check(self, steps):
        backup = self._saver.restore()
        assert backup is not None
        assert backup.step in steps, f"{backup.step} restored, not one of {steps}"
        assert_is_state_of(backup)
        assert backup.metadata == {"of": backup.step}
        return backup.step

    def _check_not_used(self, fault):
        newest = os.path.join(self._directory, _newest(self._directory))
        used = {
            os.lstat(os.path.join(folder, name)).st_ino
            for folder, _, names in os.walk(newest)
            for name in names
        }
        assert not used & fault.failed_files(), "a file whose sync failed is in a valid backup"

    def close(self):
        """Lets go of the directory, which another one can have then, and removes it."""
        self._saver.close()
        with stepsave.Checkpointer(self._directory, **self._options) as saver:
            backup = saver.restore()
            assert backup.step == self._step
            assert_is_state_of(backup)
            saver.close(delete_backup=True)
        assert not self._directory.exists()


def _newest(directory):
    return read_marker(directory)["directory"]
