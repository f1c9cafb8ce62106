"""One user per backup directory: a lock that dies with its process.

POSIX record locks (`fcntl.lockf`) fit: the kernel drops them when the process ends, however
it ends, and `fork` does not hand them to children, so an orphaned data-loader worker cannot
keep a directory busy. They do not exclude within a process; a registry does that.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from pathlib import Path

from stepsave.errors import BackupDirectoryError, DirectoryBusyError

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

_held: set[Path | str] = set()
_held_guard = threading.Lock()


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

    def __init__(self, directory: Path) -> None:
        """Takes nothing yet."""
        super().__init__(directory)
        self._directory = directory
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
        self._fd = self._open()
        self._is_acquired = True

    def _open(self) -> int:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as e:
            raise BackupDirectoryError(
                f"{self._directory}: cannot write to the backup directory: cannot open "
                f"{LOCK_NAME} in it: {e.strerror}. Make it writable or choose another. "
                f"{READ_ONLY_ADVICE}"
            ) from e
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {self._pid}\n{self.nonce}\n".encode(), 0)
        except OSError as e:
            told = os.pread(fd, 100, 0).decode(errors="replace").partition("\n")[0]
            holder = told or "unknown process"
            os.close(fd)
            if e.errno in (errno.EACCES, errno.EAGAIN):
                raise DirectoryBusyError(
                    f"{self._directory}: another live process uses this backup directory "
                    f"({holder}). Wait until it ends, stop it, or choose another directory."
                ) from e
            raise BackupDirectoryError(
                f"{self._path}: cannot lock: {e.strerror}. Choose a directory on a file system "
                "that supports POSIX locks."
            ) from e
        return fd

    def check_in_place(self) -> None:
        """Makes sure that the directory is the one that was locked.

        Raises:
            BackupDirectoryError: If it was removed or moved away, or its lock file was. Another
                one of that name may be somebody else's, whom this lock does not keep away.
        """
        if not self._is_in_place():
            raise BackupDirectoryError(
                f"{self._directory}: expected the directory that was locked, but it or its "
                f"{LOCK_NAME} was removed, replaced or moved away. Nothing was changed. Move it "
                "back, or close this checkpointer and make a new one."
            )

    def _is_in_place(self) -> bool:
        assert self._fd is not None
        try:
            return os.path.samestat(os.lstat(self._path), os.fstat(self._fd))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _let_go(self, *, remove: bool) -> None:
        assert self._fd is not None
        if remove and self._is_in_place():
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
