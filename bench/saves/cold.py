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


def files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _residency(fd: int, size_bytes: int) -> np.ndarray:
    """For each page of a file whether it is in the page cache, by `mincore`."""
    if size_bytes == 0:
        return np.zeros(0, bool)
    found = np.zeros(-(-size_bytes // PAGE_BYTES), np.uint8)
    with mmap.mmap(fd, size_bytes, access=mmap.ACCESS_READ) as memory:
        mapped = np.frombuffer(memory, np.uint8)
        address = ctypes.c_void_p(mapped.ctypes.data)
        failed = _libc.mincore(
            address, ctypes.c_size_t(size_bytes), ctypes.c_void_p(found.ctypes.data)
        )
        error = ctypes.get_errno()
        del mapped, address
    if failed:
        raise OSError(error, f"mincore: {os.strerror(error)}")
    return (found & 1).astype(bool)
