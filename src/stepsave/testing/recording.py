"""Records what a process asks of a file system: the very calls of `os`, from all threads.

What does not go through `os` is not seen: files that `open` writes, and what C++ does. Then what
was recorded does not explain what is there, and the recorder says so at its end.
`stepsave.testing.strace_log` sees everything.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepsave.testing.crashes import FAILED_SYNC, OperationLog
from stepsave.testing.posix_model import (
    ROOT,
    Blob,
    DropEntry,
    Effect,
    Grow,
    Mark,
    Operation,
    Rename,
    Resize,
    SetEntry,
    Sync,
    Tree,
    Write,
)

__all__ = ("LogBuilder", "Recorder", "files_below", "record")


def files_below(root: str | os.PathLike[str]) -> dict[str, bytes | None]:
    """Contents of all files below a directory by path; None for directories."""
    top = Path(root)
    found: dict[str, bytes | None] = {}
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            path = Path(directory, name)
            data = None if stat.S_ISDIR(path.lstat().st_mode) else path.read_bytes()
            found[str(path.relative_to(top))] = data
    return found


class LogBuilder:
    """Makes a log out of calls that have succeeded, in their order.

    Attributes:
        log: What was recorded up to now.
    """

    def __init__(self, root: str | os.PathLike[str], files: Mapping[str, bytes | None]) -> None:
        """Begins.

        Args:
            root: The directory. What happens elsewhere is passed over.
            files: What is below it, all of it durable.
        """
        self._root = os.path.abspath(root)
        self._now, self._free = Tree.of(files)
        self._paths: dict[int, str] = {ROOT: ""}
        self.log = OperationLog(self._now.copy(), [])

    def below(self, path: Any) -> str | None:
        """The path relative to the root; None if it is elsewhere."""
        absolute = os.path.abspath(os.fsdecode(path))
        if absolute == self._root:
            return ""
        prefix = self._root + "/"
        return absolute.removeprefix(prefix) if absolute.startswith(prefix) else None

    def size_bytes(self, node: int) -> int:
        return len(self._now.contents[node].data)

    def opened(self, path: str, flags: int) -> int:
        """Returns the number of what was opened."""
        node = self._now.find(path)
        if node is None:
            assert flags & os.O_CREAT, f"{path} came from nowhere"
            return self._make("create", path)
        self._paths[node] = path
        if flags & os.O_TRUNC and self.size_bytes(node):
            self.truncated(node, 0)
        return node

    def made_directory(self, path: str) -> None:
        self._make("mkdir", path)

    def wrote(self, node: int, offset: int, data: bytes) -> None:
        self._note("write", self._path(node), Write(node, offset, data))

    def truncated(self, node: int, size_bytes: int) -> None:
        self._note("truncate", self._path(node), Resize(node, size_bytes))

    def allocated(self, node: int, size_bytes: int) -> None:
        self._note("allocate", self._path(node), Grow(node, size_bytes))

    def renamed(self, source: str, target: str) -> None:
        old_directory, old_name, child = self._found(source)
        directory, name = self._parent(target)
        self._note("rename", target, Rename(directory, name, child, old_directory, old_name))
        self._paths[child] = target

    def linked(self, source: str, target: str) -> None:
        directory, name = self._parent(target)
        self._note("link", target, SetEntry(directory, name, self._found(source)[2]))

    def removed(self, path: str) -> None:
        directory, name, child = self._found(path)
        kind = "rmdir" if child in self._now.entries else "unlink"
        self._note(kind, path, DropEntry(directory, name, child))

    def synced(self, node: int, *, began: int | None = None, failed: bool = False) -> None:
        """Notes a sync; `began` is how long the log was then."""
        covers = len(self.log.operations) if began is None else began
        self.log.operations.append(Sync(self._path(node), node, covers, failed))

    def failed_sync_of(self, path: str) -> None:
        """Notes a sync that a test has failed by itself."""
        below = self.below(path)
        node = None if below is None else self._now.find(below)
        if node is not None:
            self.synced(node, failed=True)

    def mark(self, what: str, step: int = -1) -> None:
        """Notes what whoever records says; `FAILED_SYNC` as a sync."""
        if what.startswith(FAILED_SYNC):
            self.failed_sync_of(what.removeprefix(FAILED_SYNC))
        else:
            self.log.operations.append(Mark(what, step))

    def check_complete(self, files: Mapping[str, bytes | None]) -> None:
        """Makes sure that what is there is what was recorded.

        Raises:
            AssertionError: Naming a file that something else has changed.
        """
        explained = {p: None if b is None else b.data for p, b in self._now.walk()}
        for path in sorted(explained.keys() | files.keys()):
            same = path in explained and path in files and explained[path] == files[path]
            assert same, f"{path}: what is there is not what was recorded"

    def _make(self, kind: str, path: str) -> int:
        directory, name = self._parent(path)
        node, self._free = self._free, self._free + 1
        if kind == "mkdir":
            self._now.entries[node] = {}
        else:
            self._now.contents[node] = Blob(b"")
        self._paths[node] = path
        self._note(kind, path, SetEntry(directory, name, node))
        return node

    def _note(self, kind: str, path: str, effect: Effect) -> None:
        self._now.apply(effect)
        self.log.operations.append(Operation(kind, path, (effect,)))

    def _parent(self, path: str) -> tuple[int, str]:
        directory, _, name = path.rpartition("/")
        node = self._now.find(directory)
        assert node is not None, f"{path} is in no directory that is known"
        return node, name

    def _found(self, path: str) -> tuple[int, str, int]:
        directory, name = self._parent(path)
        return directory, name, self._now.entries[directory][name]

    def _path(self, node: int) -> str:
        return self._paths.get(node, f"number {node}")


class Recorder:
    """Stands before the functions of `os` while it is told to.

    Attributes:
        builder: Makes the log.
        syncs: Whether syncs are carried out, too; the model does not need it.
    """

    def __init__(self, root: str | os.PathLike[str], *, syncs: bool = False) -> None:
        self.builder = LogBuilder(root, files_below(root))
        self.syncs = syncs
        self._guard = threading.RLock()
        self._nodes: dict[int, int] = {}  # by descriptor
        self._appends: set[int] = set()
        self._real: dict[str, Callable[..., Any]] = {}

    @property
    def log(self) -> OperationLog:
        return self.builder.log

    def mark(self, what: str, step: int = -1) -> None:
        with self._guard:
            self.builder.mark(what, step)

    def install(self) -> None:
        """Puts itself before the functions."""
        calls: dict[str, Callable[..., Any]] = {
            "open": self._open,
            "close": self._close,
            "write": self._write,
            "writev": self._writev,
            "pwrite": self._pwrite,
            "pwritev": self._pwritev,
            "ftruncate": self._ftruncate,
            "truncate": self._truncate,
            "posix_fallocate": self._allocate,
            "fsync": functools.partial(self._sync, "fsync"),
            "fdatasync": functools.partial(self._sync, "fdatasync"),
            "rename": functools.partial(self._move, "rename"),
            "replace": functools.partial(self._move, "replace"),
            "link": self._link,
            "unlink": functools.partial(self._remove, "unlink"),
            "remove": functools.partial(self._remove, "remove"),
            "rmdir": functools.partial(self._remove, "rmdir"),
            "mkdir": self._mkdir,
        }
        for name, call in calls.items():
            self._real[name] = getattr(os, name)
            setattr(os, name, self._guarded(call))

    def uninstall(self) -> None:
        """Puts the functions back."""
        for name, real in self._real.items():
            setattr(os, name, real)

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def one(*args: Any, **options: Any) -> Any:
            with self._guard:  # what is done, and what is noted of it, in one order
                return call(*args, **options)

        return one

    def _open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        fd = self._real["open"](path, flags, mode, **options)
        self._nodes.pop(fd, None)
        self._appends.discard(fd)
        below = None if options.get("dir_fd") is not None else self.builder.below(path)
        if below is not None:
            self._nodes[fd] = self.builder.opened(below, flags)
            if flags & os.O_APPEND:
                self._appends.add(fd)
        return fd

    def _close(self, fd: int) -> None:
        self._nodes.pop(fd, None)
        self._real["close"](fd)

    def _write(self, fd: int, data: Any) -> int:
        return self._append("write", fd, data, data)

    def _writev(self, fd: int, parts: Sequence[Any]) -> int:
        return self._append("writev", fd, parts, b"".join(map(bytes, parts)))

    def _append(self, call: str, fd: int, given: Any, data: Any) -> int:
        """Writes where the descriptor is."""
        node = self._nodes.get(fd)
        offset = 0
        if node is not None:
            at_end = fd in self._appends
            offset = self.builder.size_bytes(node) if at_end else os.lseek(fd, 0, os.SEEK_CUR)
        done = self._real[call](fd, given)
        self._wrote(node, offset, data, done)
        return done

    def _pwrite(self, fd: int, data: Any, offset: int) -> int:
        done = self._real["pwrite"](fd, data, offset)
        self._wrote(self._nodes.get(fd), offset, data, done)
        return done

    def _pwritev(self, fd: int, parts: Sequence[Any], offset: int, flags: int = 0) -> int:
        done = self._real["pwritev"](fd, parts, offset, flags)
        self._wrote(self._nodes.get(fd), offset, b"".join(map(bytes, parts)), done)
        return done

    def _wrote(self, node: int | None, offset: int, data: Any, done: int) -> None:
        if node is not None and done:
            self.builder.wrote(node, offset, bytes(memoryview(data).cast("B")[:done]))

    def _ftruncate(self, fd: int, length: int) -> None:
        self._real["ftruncate"](fd, length)
        node = self._nodes.get(fd)
        if node is not None and self.builder.size_bytes(node) != length:
            self.builder.truncated(node, length)

    def _truncate(self, path: Any, length: int) -> None:
        if isinstance(path, int):
            return self._ftruncate(path, length)
        fd = os.open(path, os.O_WRONLY)
        try:
            self._ftruncate(fd, length)
        finally:
            os.close(fd)

    def _allocate(self, fd: int, offset: int, length: int) -> None:
        self._real["posix_fallocate"](fd, offset, length)
        node = self._nodes.get(fd)
        if node is not None and self.builder.size_bytes(node) < offset + length:
            self.builder.allocated(node, offset + length)

    def _sync(self, call: str, fd: Any) -> None:
        number = fd if isinstance(fd, int) else fd.fileno()
        node = self._nodes.get(number)
        try:
            if node is None or self.syncs:
                self._real[call](fd)
        except OSError:
            if node is not None:
                self.builder.synced(node, failed=True)
            raise
        if node is not None:
            self.builder.synced(node)

    def _move(self, call: str, source: Any, target: Any, **options: Any) -> None:
        self._real[call](source, target, **options)
        old, new = self.builder.below(source), self.builder.below(target)
        assert (old is None) == (new is None), f"{source} moved over the border"
        if old is not None and new is not None:
            self.builder.renamed(old, new)

    def _link(self, source: Any, target: Any, **options: Any) -> None:
        self._real["link"](source, target, **options)
        old, new = self.builder.below(source), self.builder.below(target)
        if old is not None and new is not None:
            self.builder.linked(old, new)

    def _remove(self, call: str, path: Any, *, dir_fd: int | None = None) -> None:
        self._real[call](path, dir_fd=dir_fd)
        below = None if dir_fd is not None else self.builder.below(path)
        if below is not None:
            self.builder.removed(below)

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._real["mkdir"](path, mode, dir_fd=dir_fd)
        below = None if dir_fd is not None else self.builder.below(path)
        if below is not None:
            self.builder.made_directory(below)


@contextlib.contextmanager
def record(root: str | os.PathLike[str], *, syncs: bool = False) -> Generator[Recorder]:
    """Records what all threads of this process do below a directory.

    Args:
        root: The directory.
        syncs: Whether to carry syncs out.

    Yields:
        The recorder, whose `log` grows.

    Raises:
        AssertionError: If something was changed there past the functions of `os`.
    """
    recorder = Recorder(root, syncs=syncs)
    recorder.install()
    try:
        yield recorder
    finally:
        recorder.uninstall()
    recorder.builder.check_complete(files_below(root))
