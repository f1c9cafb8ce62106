"""The floors that saving and restoring are compared with, measured beside them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from awscrt.checksums import crc32c

PAGE_BYTES = 4096
CACHED_BYTES = 512 << 10
READ_THREADS = 2
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


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

    def checked_s(self) -> float:
        """The same with the CRC-32C of each piece, taken while it is in a core's cache."""
        half = len(self._source) // 2
        begin_s = time.perf_counter()
        other = self._executor.submit(self._copy_checked, half, len(self._source))
        self._copy_checked(0, half)
        other.result()
        return time.perf_counter() - begin_s

    def _copy_checked(self, begin: int, end: int) -> None:
        for at in range(begin, end, CACHED_BYTES):
            piece = self._target[at : min(at + CACHED_BYTES, end)]
            np.copyto(piece, self._source[at : min(at + CACHED_BYTES, end)])
            crc32c(piece.data)

    def close(self) -> None:
        self._executor.shutdown()


class RawWrite:
    """One `O_DIRECT` write over an existing file, and its sync: what the disk itself takes."""

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self._path = directory / "raw"
        self._memory = private_memory(size_bytes)
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


class RawRead:
    """`O_DIRECT` reads of one file by two threads, half each: what the disk itself gives.

    Into warm memory, which is the disk alone; or into fresh memory, whose pages the kernel
    must find and clear first. A restore hands out new arrays, so it needs fresh memory too.
    """

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path = path
        self._size_bytes = len(data)
        self._memory = private_memory(len(data))
        np.frombuffer(self._memory, np.uint8)[: len(data)] = data
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            with memoryview(self._memory) as view:
                done = 0
                while done < len(view):
                    done += os.pwrite(fd, view[done:], done)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._executor = concurrent.futures.ThreadPoolExecutor(READ_THREADS)
        np.frombuffer(self._memory, np.uint8)[:] = 0  # touched, and for `check` empty

    def warm_s(self) -> float:
        """Seconds to read everything into memory that was touched before."""
        begin_s = time.perf_counter()
        self._read(self._memory)
        return time.perf_counter() - begin_s

    def fresh_s(self) -> float:
        """Seconds to read everything into a new mapping; giving it back is not in it."""
        begin_s = time.perf_counter()
        memory = private_memory(self._size_bytes)
        self._read(memory)
        taken_s = time.perf_counter() - begin_s
        memory.close()
        return taken_s

    def check(self, data: np.ndarray) -> None:
        """What was read last into warm memory is what was written."""
        found = np.frombuffer(self._memory, np.uint8)[: len(data)]
        assert np.array_equal(found, data), "the raw file gave other bytes than were written"

    def close(self) -> None:
        self._executor.shutdown()
        self._memory.close()

    def _read(self, memory: mmap.mmap) -> None:
        half = len(memory) // READ_THREADS // PAGE_BYTES * PAGE_BYTES
        parts = (0, half), (half, len(memory))
        with self._opened() as fd, memoryview(memory) as view:
            reads = [self._executor.submit(_read_part, fd, view, *part) for part in parts]
            for read in reads:
                read.result()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        try:
            yield fd
        finally:
            os.close(fd)


def _read_part(fd: int, view: memoryview, begin: int, end: int) -> None:
    while begin < end:
        with view[begin:end] as part:
            got = os.preadv(fd, [part], begin)
        if got == 0:
            raise EOFError(f"the raw file ends at {begin}")
        begin += got


def private_memory(size_bytes: int) -> mmap.mmap:
    """Memory as the kernel moves it fastest: private, and in huge pages where it has them."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, -(-size_bytes // PAGE_BYTES) * PAGE_BYTES, flags=flags)
    if HUGE_PAGES.exists():
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
