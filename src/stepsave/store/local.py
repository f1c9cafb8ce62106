"""A directory on a local file system, with each step made durable on purpose.

Every `fsync` here names the crash that it prevents. The order in which they are called
belongs to `stepsave.engine.commit`; this module only makes single operations trustworthy.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stepsave.errors import BackupDirectoryError, CorruptBackupError
from stepsave.store.direct import BLOCK_BYTES, Piece, fill, overwrite
from stepsave.store.lock import DirectoryLock
from stepsave.store.whole_file import opened, sync_path

__all__ = ("LocalStore",)

TEMPORARY_SUFFIX = ".tmp"
PROBE_NAME = ".stepsave-probe"


class LocalStore:
    """Files below one directory. Paths are relative to it and use `/`.

    Attributes:
        root: The directory.
        is_remote: False: one call after the other is as fast as many at once.
        lanes: Threads that write one save: enough to keep a disk busy, as they mostly sleep.
    """

    is_remote = False
    keeps_data = False
    lanes = 3

    def __init__(self, root: str | os.PathLike[str]) -> None:
        # Resolved once: a later change of the working directory must not move the backup.
        self.root = Path(os.path.realpath(root))

    def make_hold(self) -> DirectoryLock:
        """Returns what keeps all others away."""
        return DirectoryLock(self.root, self.create)

    def create(self) -> None:
        """Makes the directory with its parents, durably.

        Raises:
            BackupDirectoryError: If it cannot be made, or is a file.
        """
        try:
            missing: list[Path] = []
            path = self.root
            while not path.exists():
                missing.append(path)
                path = path.parent
            for path in reversed(missing):
                path.mkdir(exist_ok=True)
                # Without it a power cut can lose the new directory with all it holds.
                sync_path(path.parent)
        except OSError as e:
            raise BackupDirectoryError(
                f"{self.root}: cannot create the backup directory: {e.strerror or e}. Choose "
                "a directory on a writable file system."
            ) from e
        with contextlib.suppress(FileNotFoundError):  # removed just now, by another who held it
            if stat.S_ISDIR(os.stat(self.root).st_mode):
                return
            raise BackupDirectoryError(
                f"{self.root}: expected a directory, found a file. Choose another `backup_dir` "
                "or move the file away."
            )

    def check_directory(self) -> None:
        """Makes sure that it is there, and makes nothing.

        Raises:
            BackupDirectoryError: If it is not, or is a file.
        """
        try:
            if stat.S_ISDIR(os.stat(self.root).st_mode):
                return
            found = "a file"
        except OSError as e:
            found = e.strerror or str(e)
        raise BackupDirectoryError(
            f"{self.root}: expected a backup directory to read, found: {found}. Look for a typing "
            "error, or mount what is missing."
        )

    def path(self, path: str) -> Path:
        return self.root / path

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.root / path)

    def list(self, path: str = "") -> list[str]:
        """Names in a directory, sorted; none if it does not exist."""
        try:
            return sorted(os.listdir(self.root / path))
        except FileNotFoundError:
            return []

    def walk(self, path: str) -> Iterator[str]:
        """Yields the files below a directory, relative to it."""
        top = self.root / path
        for directory, _, names in os.walk(top):
            yield from (os.path.relpath(os.path.join(directory, name), top) for name in names)

    def is_directory(self, path: str) -> bool:
        """Whether a path is a directory, and no link to one."""
        try:
            return stat.S_ISDIR(os.lstat(self.root / path).st_mode)
        except FileNotFoundError:
            return False

    def has_links(self, path: str) -> bool:
        """Whether something below a directory is a link, or a file that has another name too."""
        for directory, names, files in os.walk(self.root / path):
            for name in (*names, *files):
                found = os.lstat(os.path.join(directory, name))
                has_two_names = stat.S_ISREG(found.st_mode) and found.st_nlink > 1
                if has_two_names or stat.S_ISLNK(found.st_mode):
                    return True
        return False

    def read(self, path: str, limit_bytes: int) -> bytes:
        """Reads a regular file, refusing links and anything larger than the limit.

        Raises:
            FileNotFoundError: If there is none.
            CorruptBackupError: If it is no regular file or too large.
            OSError: If it cannot be read.
        """
        with self._open_regular(path) as (fd, size_bytes):
            if size_bytes > limit_bytes:
                raise CorruptBackupError(
                    f"{self.root / path}: expected at most {limit_bytes} bytes, found {size_bytes}."
                )
            with os.fdopen(os.dup(fd), "rb") as file:
                return file.read()

    def read_into(
        self,
        path: str,
        size_bytes: int,
        pieces: Iterable[Piece],
        on_read: Callable[[int], object] | None = None,
    ) -> None:
        """Reads pieces of a file of exactly that size.

        As far as their heads are in the page cache already, they are taken from there. The rest
        bypasses that where the file system lets it: what is read once needs no copy of it kept,
        and a restore must not push out what others have cached.

        Args:
            path: The file.
            size_bytes: How large it is.
            pieces: Where in the file to begin, and where to; whole blocks of the file and
                page-aligned memory for a direct read.
            on_read: Told the size of each piece that was read.

        Raises:
            FileNotFoundError: If there is none.
            CorruptBackupError: If its size differs.
            OSError: If it cannot be read.
        """
        with self._open_regular(path) as (fd, found_bytes):
            if found_bytes != size_bytes:
                raise CorruptBackupError(
                    f"{self.root / path}: expected {size_bytes} bytes, found {found_bytes}."
                )
            for begin, buffer in pieces:
                done = fill(fd, buffer, begin)
                if done < len(buffer):
                    raise CorruptBackupError(
                        f"{self.root / path}: expected {size_bytes} bytes, but it ended "
                        f"after {begin + done} while being read."
                    )
                if on_read is not None:
                    on_read(done)

    def write(self, path: str, data: bytes) -> None:
        """Writes a file and syncs its contents; its directory entry is not synced."""
        target = self.root / path
        with opened(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW) as fd:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            # Without it a power cut can leave the file empty or torn under its name.
            os.fsync(fd)

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Writes files, as `write` does."""
        for path, data in files.items():
            self.write(path, data)

    def replace(self, path: str, data: bytes) -> None:
        """Replaces a file's contents atomically and durably: readers see old or new."""
        temporary = path + TEMPORARY_SUFFIX
        self.write(temporary, data)
        os.replace(self.root / temporary, self.root / path)
        # Without it a power cut can undo the rename after it was acknowledged.
        sync_path((self.root / path).parent)

    def make_directory(self, path: str) -> None:
        """Makes a directory and its missing parents below the root; not synced.

        Not the root itself: if that is gone, so is its lock, and somebody removed it.
        """
        made = self.root
        for part in path.split("/"):
            made /= part
            made.mkdir(exist_ok=True)

    def sync_directory(self, path: str = "") -> None:
        """Makes the entries of a directory durable."""
        sync_path(self.root / path)

    def sync_tree(self, path: str) -> None:
        """Makes the entries of a directory and of all directories below it durable."""
        for directory, _, _ in os.walk(self.root / path):
            sync_path(directory)

    def rename(self, source: str, target: str) -> None:
        """Renames within the root, durably. The target must not exist."""
        if self.exists(target):
            raise FileExistsError(errno.EEXIST, "rename target exists", str(self.root / target))
        os.rename(self.root / source, self.root / target)
        # Without it a power cut can bring the old name back.
        sync_path(self.root)

    def remove(self, path: str) -> None:
        """Removes a file if it is there; not synced."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.root / path)

    def remove_empty_root(self) -> bool:
        """Removes the directory itself if nothing is in it; tells whether it is gone.

        One that was given to us, a mounted volume say, may lie where we may remove nothing.
        """
        try:
            return self.remove_empty_directory("")
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return False
            raise

    def remove_empty_directory(self, path: str) -> bool:
        """Removes a directory if nothing is in it; tells whether it is gone."""
        try:
            os.rmdir(self.root / path)
        except FileNotFoundError:
            return True
        except OSError as e:
            if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                return False
            raise
        return True

    def size_bytes(self, path: str) -> int | None:
        """Size of a regular file, or None if there is none."""
        try:
            found = os.lstat(self.root / path)
        except FileNotFoundError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def used_bytes(self, path: str) -> int:
        """Space on the disk that a file takes, or all files below a directory."""
        top = self.root / path
        paths = [top, *(top / below for below in self.walk(path))]
        used = 0
        for one in paths:
            with contextlib.suppress(FileNotFoundError):  # removed or renamed meanwhile
                used += os.lstat(one).st_blocks * 512
        return used

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Makes sure that regular files are there and have these sizes.

        Raises:
            CorruptBackupError: Naming one that has not.
        """
        for path, expected in sizes.items():
            found = self.size_bytes(path)
            if found != expected:
                what = "no such file" if found is None else f"{found} bytes"
                raise CorruptBackupError(
                    f"{self.root / path}: expected {expected} bytes, found {what}."
                )

    def kvstore(self, directory: str) -> dict[str, Any]:
        """Returns the spec of a key-value store of tensorstore in a directory."""
        return {
            "driver": "file",
            "path": f"{self.root / directory}/",
            "file_io_sync": True,
            # The directory is locked and not yet valid: no reader, no second writer.
            "file_io_locking": {"mode": "none"},
        }

    context = None  # of tensorstore: nothing is shared

    def write_array(self, path: str, array: Any, data: Any) -> None:
        """Writes a file as a part of an array of tensorstore; on return it is durable.

        Args:
            path: The file.
            array: The part of the array that is there.
            data: Its bytes. Must not change meanwhile.
        """
        written = array.write(data, can_reference_source_data_indefinitely=True).commit
        self.wait(written, f"write {path}", len(data))

    def wait(self, future: Any, what: str, size_bytes: int) -> Any:
        """Returns what a future of tensorstore comes to; the kernel ends what cannot go on."""
        del what, size_bytes
        return future.result()

    def probe(self) -> None:
        """Writes a file and removes it.

        Raises:
            OSError: If that cannot be done.
        """
        try:
            self.write(PROBE_NAME, b"")
        finally:
            self.remove(PROBE_NAME)

    def can_write_direct(self) -> bool:
        """Probes whether this file system takes direct writes, by making one.

        Raises:
            OSError: For faults that are no answer to the question, such as a full disk.
        """
        if not hasattr(os, "O_DIRECT"):
            return False
        block = mmap.mmap(-1, BLOCK_BYTES)
        try:
            self.write_direct(PROBE_NAME, memoryview(block))
        except OSError as e:
            if e.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
                return False
            raise
        finally:
            self.remove(PROBE_NAME)
        return True

    def write_direct(
        self,
        path: str,
        data: memoryview,
        ranges: Iterable[tuple[int, int]] | None = None,
    ) -> int:
        """Writes a file with `O_DIRECT` and syncs it, in place if it has the right size.

        In place nothing is allocated, so the sync writes no metadata but the time.

        Args:
            path: The file. Created, or overwritten without truncation.
            data: Page-aligned memory of whole blocks.
            ranges: Yields what to write next, from and to; widened to whole blocks. Together
                all of the data, some of it perhaps twice, or what a file of the right size does
                not have yet. None if all of it is there.

        Returns:
            How many bytes it wrote.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_DIRECT | os.O_NOFOLLOW
        with opened(self.root / path, flags) as fd:
            return overwrite(fd, data, ranges or ((0, len(data)),))

    @contextlib.contextmanager
    def _open_regular(self, path: str):  # noqa: ANN202
        """Opens for reading; a link or a FIFO could lead outside or block for ever."""
        target = self.root / path
        try:
            with opened(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as fd:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise CorruptBackupError(f"{target}: expected a regular file.")
                yield fd, found.st_size
        except OSError as e:
            if e.errno == errno.ELOOP:
                raise CorruptBackupError(
                    f"{target}: expected a regular file, found a symbolic link."
                ) from e
            raise
