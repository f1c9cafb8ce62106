"""One user per backup directory: a lock that dies with its process.

POSIX record locks (`fcntl.lockf`) fit: the kernel drops them when the process ends, however
it ends, and `fork` does not hand them to children, so an orphaned data-loader worker cannot
keep a directory busy. They do not exclude within a process; a registry does that.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from stepsave.errors import (
    BackupDirectoryError,
    CheckpointerClosedError,
    DirectoryBusyError,
)

__all__ = (
    "LOCK_LIMIT_BYTES",
    "LOCK_NAME",
    "READ_ONLY_ADVICE",
    "DirectoryLock",
    "ProcessHold",
    "find_holder",
)

LOCK_NAME = "LOCK"
LOCK_LIMIT_BYTES = 1024
READ_ONLY_ADVICE = (
    "To read a backup from it, use `stepsave.restore(directory)` or `Checkpointer(directory, "
    "read_only=True)`."
)

_FLOCK = "hhqqi4x"  # Linux's `struct flock`: kind, whence, start, length, process

_ATTEMPTS = 100  # each lost to another process that has removed the file just then

_held: set[Path | str] = set()
_held_guard = threading.Lock()


def _forget_in_child() -> None:
    """A forked child holds nothing, and none of its threads has the guard."""
    global _held_guard  # noqa: PLW0603  whoever had it stayed in the parent
    _held_guard = threading.Lock()
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class ProcessHold:
    """Holds a place from `reserve` until `release`, against others in this process alone.

    Attributes:
        is_released: Whether it was let go of.
        nonce: What those who see the same place find in it while it is held; empty if nothing.
    """

    nonce = ""

    def __init__(self, place: Path | str) -> None:
        """Takes nothing yet."""
        self._place = place
        self._pid = os.getpid()
        self._is_reserved = self._is_acquired = False
        self.is_released = False

    def reserve(self) -> None:
        """Takes the place within this process.

        Raises:
            DirectoryBusyError: If this process holds it already.
        """
        with _held_guard:
            if self._place in _held:
                raise DirectoryBusyError(
                    f"{self._place}: another checkpointer of this process uses this "
                    "directory. Close it first, or give each its own directory."
                )
            _held.add(self._place)
            self._is_reserved = True

    def acquire(self) -> None:
        """Takes a place that is reserved.

        Raises:
            DirectoryBusyError: If another live process holds it.
            BackupDirectoryError: If it cannot be taken.
        """
        assert self._is_reserved
        self._is_acquired = True

    def check(self) -> None:
        """Makes sure that nobody else can have taken the place meanwhile.

        Raises:
            CheckpointerClosedError: If it was let go of.
            DirectoryBusyError: If somebody can have taken it all the same.
        """
        if not self.is_held:
            raise CheckpointerClosedError(
                f"The checkpointer of {self._place} is closed. Make a new one."
            )

    @property
    def is_held(self) -> bool:
        """False after `release` and in a forked child, which does not own it."""
        return self._is_acquired and os.getpid() == self._pid

    def release(self, *, remove: bool = False) -> None:
        """Lets go of the place.

        Args:
            remove: Whether to remove what marks it as held too, while it still is.
        """
        if not self._is_reserved or os.getpid() != self._pid:
            self.is_released = True  # never held; or held by the parent of this forked process
            return
        with _held_guard:
            if self._is_acquired:
                self._let_go(remove=remove)
            self._is_acquired = self._is_reserved = False
            self.is_released = True
            _held.discard(self._place)

    def _let_go(self, *, remove: bool) -> None:
        """Undoes what `acquire` did beyond this process."""


class DirectoryLock(ProcessHold):
    """Holds a directory against all processes, until it is released or its own one dies.

    Nobody may open the lock file without `reserve`: closing *any* descriptor of it would drop the
    lock that this process may hold.
    """

    def __init__(self, directory: Path, make: Callable[[], None] | None = None) -> None:
        """Takes nothing yet.

        Args:
            directory: What to hold.
            make: Makes it again, if who held it before has removed it meanwhile.
        """
        super().__init__(directory)
        self._directory = directory
        self._make = make
        self._path = directory / LOCK_NAME
        self._fd: int | None = None
        self.nonce = os.urandom(16).hex()

    def acquire(self) -> None:
        """Takes the lock of a directory that is reserved.

        Raises:
            DirectoryBusyError: If another live process holds it.
            BackupDirectoryError: If the lock file cannot be used.
        """
        assert self._is_reserved
        for _ in range(_ATTEMPTS):
            fd = self._open()
            if fd is None:
                continue
            try:
                self._lock(fd)
                # One who ends and deletes his backup removes the file. Who had opened it before
                # would hold what nobody else finds, and the next one a new file of that name.
                is_there = self._is_at_its_name(fd)
            except BaseException:
                os.close(fd)
                raise
            if is_there:
                self._fd = fd
                self._is_acquired = True
                return
            os.close(fd)
        raise DirectoryBusyError(
            f"{self._directory}: other processes open this backup directory and delete it, again "
            "and again. Give each its own directory."
        )

    def check(self) -> None:
        """Makes sure that it is held, by a lock file that is where others look for it.

        Raises:
            CheckpointerClosedError: If it was let go of.
            DirectoryBusyError: If the file is not there: another process can have taken the
                directory.
        """
        super().check()
        assert self._fd is not None
        if not self._is_at_its_name(self._fd):
            raise DirectoryBusyError(
                f"{self._path}: was removed or replaced, or the directory moved, while this "
                "process uses it: another one may have taken it. Nothing more is saved there. Let "
                "one process use it, start that again, and leave the file alone: a lock ends with "
                "its process."
            )

    def _is_at_its_name(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self._path))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _open(self) -> int | None:
        """Returns a descriptor of the lock file; None if the directory was gone, and is made."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(self._path, flags, 0o666)
        except OSError as e:
            if isinstance(e, FileNotFoundError) and self._make is not None:
                self._make()
                return None
            raise BackupDirectoryError(
                f"{self._directory}: cannot write to the backup directory: cannot open "
                f"{LOCK_NAME} in it: {e.strerror}. Make it writable or choose another. "
                f"{READ_ONLY_ADVICE}"
            ) from e
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise BackupDirectoryError(
                f"{self._path}: expected the lock file of a backup directory, found something else "
                "than a file. Remove it, or choose another directory."
            )
        return fd

    def _lock(self, fd: int) -> None:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {self._pid}\n{self.nonce}\n".encode(), 0)
        except OSError as e:
            told = os.pread(fd, 100, 0).decode(errors="replace").partition("\n")[0]
            holder = told or "unknown process"
            if e.errno in (errno.EACCES, errno.EAGAIN):
                raise DirectoryBusyError(
                    f"{self._directory}: another live process uses this backup directory "
                    f"({holder}). Wait until it ends, stop it, or choose another directory."
                ) from e
            raise BackupDirectoryError(
                f"{self._path}: cannot lock: {e.strerror}. Choose a directory on a file system "
                "that supports POSIX locks."
            ) from e

    def _let_go(self, *, remove: bool) -> None:
        assert self._fd is not None
        if remove and self._is_at_its_name(self._fd):  # else it is another's
            self._path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = None


def find_holder(directory: Path) -> int | None:
    """Returns which process holds a directory, without taking the lock; None if none does.

    The number is 0 for one that has no number here: on another machine, or in another container.

    Raises:
        OSError: If that cannot be asked.
    """
    with _held_guard:
        if directory in _held:
            return os.getpid()  # and to open and close the file would drop the lock
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(directory / LOCK_NAME, flags)
        try:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            found = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
        finally:
            os.close(fd)
    return None if found[0] == fcntl.F_UNLCK else found[4]
