"""Watches what this process does to files, one operation after the other."""

import os

from stepsave.store.shard_array import ShardArray

CALLS = (
    "open", "mkdir", "write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "fdatasync",
    "rename", "replace", "unlink", "rmdir",
)  # fmt: skip
"""What changes a directory or makes a change durable."""


class Operations:
    """While it is entered, calls one function before each operation and another one after it.

    Both are told the name of the call and its first argument, a path or a descriptor. A shard that
    tensorstore writes is one operation, `"tensorstore"`, with the path of its directory: what that
    does in detail is not seen here.
    """

    def __init__(self, before=lambda *_: None, after=lambda *_: None):
        self._before, self._after = before, after
        self._real_write = ShardArray.write

    def __enter__(self):
        self._real = {name: getattr(os, name) for name in CALLS}
        for name, real in self._real.items():
            setattr(os, name, self._watched(name, real))
        real_write = self._real_write

        def write(array, number, data):
            path = array._store.path(array._directory)
            self._before("tensorstore", path)
            real_write(array, number, data)
            self._after("tensorstore", path)

        ShardArray.write = write
        return self

    def __exit__(self, *_):
        for name, real in self._real.items():
            setattr(os, name, real)
        ShardArray.write = self._real_write

    def _watched(self, name, real):
        def call(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            self._before(name, args[0])
            result = real(*args, **kwargs)
            self._after(name, args[0])
            return result

        return call
