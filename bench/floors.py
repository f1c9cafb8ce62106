"""The floors that saving is compared with, measured beside it."""

from __future__ import annotations

import concurrent.futures
import mmap
import os
import time
from pathlib import Path

import numpy as np

PAGE_BYTES = 4096


class Memcpy:
    """A warm copy of some bytes by two threads: no snapshot of them can be faster."""

    def __init__(self, size_bytes: int) -> None:
        self._source = np.ones(size_bytes, np.uint8)
        self._target = np.zeros(size_bytes, np.uint8)
        self._executor = concurrent.futures.ThreadPoolExecutor(1)

    def measure_s(self) -> float:
        half = len(self._source) // 2
        begin_s = time.perf_counter()
        other = self._executor.submit(np.copyto, self._target[half:], self._source[half:])
        np.copyto(self._target[:half], self._source[:half])
        other.result()
        return time.perf_counter() - begin_s

    def close(self) -> None:
        self._executor.shutdown()


class RawWrite:
    """One `O_DIRECT` write over an existing file, and its sync: what the disk itself takes."""

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self._path = directory / "raw"
        self._memory = mmap.mmap(-1, -(-size_bytes // PAGE_BYTES) * PAGE_BYTES)
        np.frombuffer(self._memory, np.uint8)[:] = 1
        self.measure_s()  # allocates the file

    def measure_s(self) -> float:
        begin_s = time.perf_counter()
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            done, view = 0, memoryview(self._memory)
            while done < len(view):
                done += os.pwrite(fd, view[done:], done)
            os.fsync(fd)
        finally:
            os.close(fd)
        return time.perf_counter() - begin_s
