"""Makes files cold: drops them from the page cache, and sees to it that they are gone.

Needs no privileges. What stays warm are names and sizes, and whatever a host below a virtual
machine caches; both are the same for all that is compared.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

PAGE_BYTES = mmap.PAGESIZE
WARM_BYTES = 8 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def drop(paths: Iterable[Path]) -> float:
    """Drops files from the page cache; returns the part of their pages that is left in it."""
    resident = pages = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # a dirty page is not dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            found = _residency(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        resident += int(found.sum())
        pages += len(found)
    return resident / pages if pages else 0.0


def warm(paths: Iterable[Path]) -> None:
    """Reads files into the page cache; what was written past it is not there."""
    buffer = bytearray(WARM_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _residency(fd: int, size_bytes: int) -> np.ndarray:
    """For each page of a file whether it is in the page cache, by `mincore`."""
    if size_bytes == 0:
        return np.zeros(0, bool)
    with mmap.mmap(fd, size_bytes, access=mmap.ACCESS_READ) as memory:
        mapped = np.frombuffer(memory, np.uint8)
        found = present(mapped)
        del mapped
    return found


def present(memory: np.ndarray) -> np.ndarray:
    """For each page of memory, which begins at one, whether it is there, by `mincore`.

    Of a file: in the page cache. Of a buffer: touched.
    """
    found = np.zeros(-(-memory.nbytes // PAGE_BYTES), np.uint8)
    address = ctypes.c_void_p(memory.ctypes.data)
    size_bytes = ctypes.c_size_t(memory.nbytes)
    if _libc.mincore(address, size_bytes, ctypes.c_void_p(found.ctypes.data)):
        error = ctypes.get_errno()
        raise OSError(error, f"mincore: {os.strerror(error)}")
    return (found & 1).astype(bool)
