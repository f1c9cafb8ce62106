"""Transfers between open files and page-aligned memory that go around the page cache."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable

__all__ = ("BLOCK_BYTES", "Piece", "fill", "overwrite")

BLOCK_BYTES = 4096
"""What O_DIRECT transfers is whole blocks, at most a page in practice."""

Piece = tuple[int, memoryview]
"""Where in a file some bytes begin, and memory for them."""


def fill(fd: int, buffer: memoryview, begin: int = 0) -> int:
    """Fills a buffer from some place in an open file.

    As far as its head is in the page cache already, it is taken from there. The rest bypasses that
    where the file system lets it.

    Args:
        fd: The file.
        buffer: Page-aligned memory of whole blocks, for a direct read.
        begin: Where to begin, at a whole block.

    Returns:
        How many bytes there were.
    """
    done = _read_cached(fd, buffer, begin)
    # An open file keeps what the piece before it was read with.
    is_direct = _set_direct(fd, wanted=len(buffer) % BLOCK_BYTES == 0)
    while done < len(buffer):
        try:
            got = os.preadv(fd, [buffer[done:]], begin + done)
        except OSError as e:
            if not is_direct or e.errno != errno.EINVAL:
                raise
            # Some file systems take the flag and refuse the read, or part of it.
            is_direct = _set_direct(fd, wanted=False)
            continue
        if got == 0:
            break
        done += got
    return done


def overwrite(fd: int, data: memoryview, ranges: Iterable[tuple[int, int]]) -> int:
    """Writes ranges of a file that was opened with `O_DIRECT`, and syncs it.

    See `LocalStore.write_direct`.

    Returns:
        How many bytes it wrote.
    """
    if os.fstat(fd).st_size != len(data):
        os.ftruncate(fd, 0)
        # Reserves the space, so that a full disk is found before bytes are written.
        os.posix_fallocate(fd, 0, len(data))
    written_bytes = 0
    for begin, end in ranges:
        first_block = done = begin // BLOCK_BYTES * BLOCK_BYTES
        end_block = -(-end // BLOCK_BYTES) * BLOCK_BYTES
        while done < end_block:
            done += os.pwrite(fd, data[done:end_block], done)
        written_bytes += done - first_block
    # Without it the drive's cache, and a new file's extents, can be lost.
    os.fdatasync(fd)
    return written_bytes


def _read_cached(fd: int, buffer: memoryview, begin: int) -> int:
    """Reads whole blocks from some place in a file, as far as they are in the page cache.

    Returns:
        How many bytes that were.
    """
    done = 0
    if hasattr(os, "RWF_NOWAIT"):
        # No more is there, or the file system cannot tell; what is wrong, a read that waits finds.
        with contextlib.suppress(OSError):
            while got := os.preadv(fd, [buffer[done:]], begin + done, os.RWF_NOWAIT):
                done += got
    return done - done % BLOCK_BYTES


def _set_direct(fd: int, *, wanted: bool = True) -> bool:
    """Has an open file bypass the page cache, or not; tells whether it does now."""
    if not hasattr(os, "O_DIRECT"):
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    except OSError as e:
        if e.errno != errno.EINVAL:  # what a file system says that has no such mode
            raise
        return False
    return wanted
