"""The same log as `stepsave.testing.recording` makes, from what `strace` saw of a process.

So what C++ does is seen too: tensorstore's driver for files writes, syncs and renames by itself.

    strace -f --seccomp-bpf -xx -s 1000000 -o FILE -e trace=TRACED python …
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from stepsave.testing.crashes import OperationLog
from stepsave.testing.recording import LogBuilder

__all__ = ("MARK", "TRACED", "mark_in_trace", "parse_strace", "strace_command")

TRACED = (
    "openat,open,creat,close,write,writev,pwrite64,pwritev,pwritev2,ftruncate,truncate,fallocate,"
    "fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "dup,dup2,dup3,lseek,access,faccessat,faccessat2"
)
MARK = "/dev/null/stepsave-mark"
"""A path that nothing can be at: to ask for one below it leaves a mark in the trace."""

_CALL = re.compile(r"(\d+) +(\w+)\((.*)\) += +(-?\d+|\?)(.*)")
_UNFINISHED = re.compile(r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)\) += +(-?\d+|\?)(.*)")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


def strace_command(output: str | os.PathLike[str]) -> list[str]:
    """The beginning of a command line that traces the rest of it into a file."""
    options = ["-f", "--seccomp-bpf", "-qq", "-xx", "-s", "1000000", "-e", "signal=none"]
    return ["strace", *options, "-o", os.fspath(output), "-e", f"trace={TRACED}"]


def mark_in_trace(what: str, step: int = -1) -> None:
    """Leaves a mark in the trace of this process."""
    os.access(f"{MARK}/{step}/{what}", os.F_OK)


def parse_strace(
    text: str, root: str | os.PathLike[str], files: Mapping[str, bytes | None]
) -> LogBuilder:
    """Returns what a trace says about a directory.

    Args:
        text: What strace has written: of one process, and all of its threads.
        root: The directory, absolute and without links: paths are compared as texts.
        files: What was below it before.

    Raises:
        AssertionError: If a call is not understood.
    """
    trace = _Trace(LogBuilder(root, files))
    for name, arguments, result, began in _calls(text, trace.builder.log):
        trace.take(name, arguments, result, began)
    return trace.builder


def _calls(text: str, log: OperationLog) -> Iterator[tuple[str, str, int, int]]:
    """Yields calls in the order in which they ended, and how long the log was when they began."""
    unfinished: dict[str, tuple[str, int]] = {}
    for line in text.splitlines():
        if found := _UNFINISHED.fullmatch(line):
            unfinished[found[1]] = found[3], len(log.operations)
            if found[2] == "close":
                # At its end the number may be another file's already, which was opened meanwhile.
                yield found[2], found[3], 0, len(log.operations)
        elif found := _RESUMED.fullmatch(line):
            head, began = unfinished.pop(found[1])
            if found[4] != "?" and found[2] != "close":
                yield found[2], head + found[3], int(found[4]), began
        elif (found := _CALL.fullmatch(line)) and found[4] != "?":
            yield found[2], found[3], int(found[4]), len(log.operations)


class _Trace:
    """Descriptors of a process, and where in their files they are."""

    def __init__(self, builder: LogBuilder) -> None:
        self.builder = builder
        self._nodes: dict[int, int] = {}
        self._places: dict[int, int] = {}

    def take(self, name: str, arguments: str, result: int, began: int) -> None:
        """Notes one call."""
        if name in ("fsync", "fdatasync"):
            node = self._nodes.get(int(arguments))
            if node is not None:
                self.builder.synced(node, began=began, failed=result < 0)
        elif name in ("access", "faccessat", "faccessat2"):
            path = _texts(arguments)[0].decode()
            if path.startswith(f"{MARK}/"):
                step, _, what = path.removeprefix(f"{MARK}/").partition("/")
                self.builder.mark(what, int(step))
        elif (
            result >= 0
            and _texts(arguments)
            and "iov_base" not in arguments
            and name not in ("write", "pwrite64")
        ):
            self._take_paths(name, arguments, result)
        elif result >= 0:
            self._take_descriptor(name, arguments, result)

    def _take_paths(self, name: str, arguments: str, result: int) -> None:
        texts = [os.fsdecode(text) for text in _texts(arguments)]
        paths = [self.builder.below(text) if text.startswith("/") else None for text in texts]
        if name in ("open", "openat", "creat"):
            self._nodes.pop(result, None)
        if paths[-1] is None:
            assert all(path is None for path in paths), f"{texts}: moved over the border"
            return
        path = paths[0] or ""
        if name in ("open", "openat", "creat"):
            self._nodes[result] = self.builder.opened(path, _flags(name, arguments))
            self._places[result] = 0
        elif name in ("rename", "renameat", "renameat2"):
            self.builder.renamed(path, paths[-1])
        elif name in ("link", "linkat"):
            self.builder.linked(path, paths[-1])
        elif name in ("unlink", "unlinkat", "rmdir"):
            self.builder.removed(path)
        elif name in ("mkdir", "mkdirat"):
            self.builder.made_directory(path)
        else:
            raise AssertionError(f"{name} is not in the model")

    def _take_descriptor(self, name: str, arguments: str, result: int) -> None:
        fd = int(arguments.partition(",")[0])
        node = self._nodes.get(fd)
        if node is None:
            return
        if name == "close":
            del self._nodes[fd]
        elif name in ("dup", "dup2", "dup3"):
            self._nodes[result], self._places[result] = node, self._places[fd]
        elif name == "lseek":
            self._places[fd] = result
        elif name in ("write", "writev"):
            self.builder.wrote(node, self._places[fd], _data(arguments, result))
            self._places[fd] += result
        else:
            self._take_placed(name, node, arguments, result)

    def _take_placed(self, name: str, node: int, arguments: str, result: int) -> None:
        """Notes what says by itself where in a file it is."""
        numbers = [int(one) for one in re.findall(r"(?<=, )\d+(?=,|$)", arguments)]
        if name in ("pwrite64", "pwritev", "pwritev2"):
            offset = numbers[-2 if name == "pwritev2" else -1]
            self.builder.wrote(node, offset, _data(arguments, result))
        elif name == "ftruncate":
            if self.builder.size_bytes(node) != numbers[0]:
                self.builder.truncated(node, numbers[0])
        elif name == "fallocate":
            end = numbers[-2] + numbers[-1]
            if self.builder.size_bytes(node) < end:
                self.builder.allocated(node, end)
        else:
            raise AssertionError(f"{name} is not in the model")


def _texts(arguments: str) -> list[bytes]:
    return [bytes.fromhex(found.replace("\\x", "")) for found in _TEXT.findall(arguments)]


def _data(arguments: str, size_bytes: int) -> bytes:
    data = b"".join(_texts(arguments))[:size_bytes]
    assert len(data) == size_bytes, "strace has cut what was written: give it a longer -s"
    return data


def _flags(name: str, arguments: str) -> int:
    if name == "creat":
        return os.O_CREAT | os.O_TRUNC | os.O_WRONLY
    found = re.search(r"O_[A-Z_|]+", arguments)
    named = found[0].split("|") if found else []
    return sum(getattr(os, one) for one in named if one in ("O_CREAT", "O_TRUNC"))
