"""Watches what a child asks of the kernel, and kills it on the threshold of one call.

A filter of the child's (seccomp) stops it at the calls that matter, in whichever thread; a tracer
(ptrace) sees it stopped there. Killed then, it never makes that call. What lists the calls and what
kills at one of them is the same, so neither can miss what the other sees; and calls are counted
over all threads.
"""

import collections
import ctypes
import dataclasses
import os
import platform
import re
import signal
import struct
import subprocess
import sys

WRITES = (
    *("creat", "openat", "open", "write", "writev", "pwrite64", "pwritev", "pwritev2"),
    *("ftruncate", "truncate", "fallocate", "fsync", "fdatasync", "sync_file_range"),
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "copy_file_range", "sendfile"),
)
"""Calls that change a file system; those that open do if they create."""

READS = ("openat", "open", "read", "readv", "pread64", "preadv", "preadv2")

# By architecture, as <linux/audit.h> has them: its number, then those of its calls.
_X86_64 = {
    "read": 0, "write": 1, "open": 2, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20,
    "sendfile": 40, "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "rename": 82,
    "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "openat": 257,
    "mkdirat": 258, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266,
    "sync_file_range": 277, "fallocate": 285, "preadv": 295, "pwritev": 296, "renameat2": 316,
    "copy_file_range": 326, "preadv2": 327, "pwritev2": 328,
}  # fmt: skip
_AARCH64 = {
    "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "truncate": 45,
    "ftruncate": 46, "fallocate": 47, "openat": 56, "read": 63, "write": 64, "readv": 65,
    "writev": 66, "pread64": 67, "pwrite64": 68, "preadv": 69, "pwritev": 70, "sendfile": 71,
    "fsync": 82, "fdatasync": 83, "sync_file_range": 84, "renameat2": 276, "copy_file_range": 285,
    "preadv2": 286, "pwritev2": 287,
}  # fmt: skip
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}

# Which arguments are paths: places of directory descriptor (None: the working one) and of text.
_PATHS = {
    "open": [(None, 0)], "creat": [(None, 0)], "openat": [(0, 1)], "truncate": [(None, 0)],
    "rename": [(None, 0), (None, 1)], "renameat": [(0, 1), (2, 3)], "renameat2": [(0, 1), (2, 3)],
    "link": [(None, 0), (None, 1)], "linkat": [(0, 1), (2, 3)], "symlink": [(None, 1)],
    "symlinkat": [(1, 2)], "unlink": [(None, 0)], "unlinkat": [(0, 1)], "mkdir": [(None, 0)],
    "mkdirat": [(0, 1)], "rmdir": [(None, 0)],
}  # fmt: skip
_FD = {"copy_file_range": 2}  # which argument is the descriptor that matters, if not the first

_SEIZE, _CONT, _LISTEN, _CALL_INFO = 0x4206, 7, 0x4208, 0x420E
_OPTIONS = 0x02 | 0x04 | 0x08 | 0x80 | 0x100000  # fork, vfork, clone, seccomp, kill at my exit
_EVENT_SECCOMP, _EVENT_STOP = 7, 128
_WALL = 0x40000000
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_ALLOW, _TRACE = 0x7FFF0000, 0x7FF00000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


@dataclasses.dataclass(frozen=True, slots=True)
class Watched:
    """How a child fared.

    Attributes:
        calls: What it asked for after it said `begin`: name of the call, and role of the path.
        said: The lines that it said.
        killed: Whether it was killed at the call aimed at.
        status: Its exit code, negative for a signal.
    """

    calls: list
    said: list
    killed: bool
    status: int


def reason_against():
    """Why nothing can be traced here; None if it can.

    Asked by a process of its own: who watches waits for all children that he has.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    asked = [sys.executable, "-m", "proof.tracing"]
    answer = subprocess.run(
        asked, capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    if answer.returncode != 0:
        return f"tracing fails here: {answer.stderr[-500:]}"
    return answer.stdout.strip() or None


def _reason_against():
    if platform.machine() not in _MACHINES or sys.platform != "linux":
        return f"the numbers of the calls on {platform.machine()} are not known"

    def body(say):
        say("begin")
        os.rmdir("/nowhere/at/all")

    try:
        watched = watch(lambda say: _ignoring(body, say), "/nowhere", ("rmdir", "unlinkat"))
    except OSError as e:
        return f"nothing may be traced here: {e}"
    names = [name for name, _ in watched.calls]
    return None if names == ["rmdir"] else f"tracing does not see what it should: {watched}"


def _ignoring(body, say):
    try:
        body(say)
    except OSError:
        os._exit(0)


def watch(body, root, names=WRITES, aim=None, started=lambda _: None):
    """Forks a child that runs a body, which gets a function to say a line with.

    Args:
        body: What the child runs; None is returned there when it has, and it is to end.
        root: The directory that matters: calls about other paths are passed over.
        names: Which calls matter.
        aim: A name, a role and a number: the child is killed at the n-th such call, from 0.
        started: Told the number of the child before it does anything.

    For a process that has no other children: it waits for all of them.
    """
    heard, telling = os.pipe()
    waiting, going = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        os.close(going)
        os.read(waiting, 1)
        _install_filter(names)
        # One write: a line is said as a whole or not at all.
        body(lambda line: os.write(telling, line.encode() + b"\n"))
        return None
    os.close(telling)
    os.close(waiting)
    tracer = _Tracer(child, heard, root, names, aim)
    try:
        _ptrace(_SEIZE, child, 0, _OPTIONS)
        started(child)
        os.write(going, b"g")
        os.close(going)
        status = tracer.follow()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    with os.fdopen(heard) as pipe:
        said = pipe.read().splitlines()
    return Watched(tracer.calls, said, tracer.killed, status)


class _Tracer:
    def __init__(self, child, pipe, root, names, aim):
        self.child = child
        self.calls = []
        self.killed = False
        self._pipe = os.readlink(f"/proc/self/fd/{pipe}")
        self._root = os.path.realpath(root)
        _, numbers = _MACHINES[platform.machine()]
        self._names = {numbers[name]: name for name in names if name in numbers}
        self._names[numbers["write"]] = "write"
        self._asked = set(names)
        self._aim = aim and (aim[0], aim[1])
        self._at = aim and aim[2]
        self._begun = False
        self._counts = collections.Counter()

    def follow(self):
        """Sees the child through to its end; returns its exit code."""
        ended = None
        while True:
            try:
                thread, status = os.waitpid(-1, _WALL)
            except ChildProcessError:
                return ended
            if not os.WIFSTOPPED(status):
                if thread == self.child:
                    ended = os.waitstatus_to_exitcode(status)
                continue
            event, number = status >> 16, os.WSTOPSIG(status)
            if event == _EVENT_SECCOMP and self._meet(thread):
                os.kill(self.child, signal.SIGKILL)
                self.killed = True
                continue
            if event == _EVENT_STOP and number != signal.SIGTRAP:
                _ptrace(_LISTEN, thread, 0, 0, may_be_gone=True)  # stopped as a shell would
                continue
            _ptrace(_CONT, thread, 0, 0 if event else number, may_be_gone=True)

    def _meet(self, thread):
        """Takes note of a call; tells whether it is the one aimed at."""
        info = ctypes.create_string_buffer(88)
        if _ptrace(_CALL_INFO, thread, len(info), ctypes.addressof(info), may_be_gone=True) < 0:
            return False
        nr, *arguments = struct.unpack_from("7Q", info.raw, 24)
        name = self._names[nr]
        try:
            paths = self._paths(thread, name, arguments)
        except (FileNotFoundError, ProcessLookupError):
            return False  # a descriptor that is not open: the call will be refused
        if name == "write" and paths == [self._pipe]:
            self._begun = self._begun or _read(thread, arguments[1], arguments[2]) == b"begin\n"
            return False
        if not self._begun or not self._matters(name, paths, arguments):
            return False
        call = name, " > ".join(role_of(path, self._root) for path in paths)
        self.calls.append(call)
        self._counts[call] += 1
        return call == self._aim and self._counts[call] == self._at + 1

    def _matters(self, name, paths, arguments):
        if name not in self._asked or not any(self._is_below(path) for path in paths):
            return False
        if name in ("mkdir", "mkdirat") and os.path.isdir(paths[0]):
            return False  # and so it will be afterwards
        if name in ("open", "openat") and "write" in self._asked:
            return bool(arguments[1 if name == "open" else 2] & os.O_CREAT)
        return True

    def _is_below(self, path):
        return path == self._root or path.startswith(self._root + "/")

    def _paths(self, thread, name, arguments):
        if name not in _PATHS:
            fd = ctypes.c_int(arguments[_FD.get(name, 0)]).value
            return [os.readlink(f"/proc/{thread}/fd/{fd}")]
        found = []
        for at, place in _PATHS[name]:
            path = _read_text(thread, arguments[place])
            if not path.startswith("/"):
                fd = None if at is None else ctypes.c_int(arguments[at]).value
                here = "cwd" if fd in (None, -100) else f"fd/{fd}"
                path = os.path.join(os.readlink(f"/proc/{thread}/{here}"), path)
            found.append(os.path.normpath(path))
        return found


_ROLES = (
    (re.compile(r"^\d+(?=/|$)"), "STEP"),
    (re.compile(r"(?<=/d/c/)\d+"), "N"),
    (re.compile(r"(?<=/d/c/N_)[0-9a-f]+"), "X"),
    (re.compile(r"(?<=spare-)[0-9a-f]{8}"), "X"),
)


def role_of(path, root):
    """A path without what differs from run to run and from shard to shard."""
    role = os.path.relpath(path.removesuffix(" (deleted)"), root)
    for pattern, name in _ROLES:
        role = pattern.sub(name, role)
    return role


def _ptrace(request, thread, address, data, *, may_be_gone=False):
    done = _libc.ptrace(request, thread, address, data)
    error = ctypes.get_errno() if done < 0 else 0
    if done < 0 and not (may_be_gone and error == 3):  # ESRCH: killed meanwhile
        raise OSError(error, f"ptrace: {os.strerror(error)}")
    return done


def _read(thread, address, count):
    with open(f"/proc/{thread}/mem", "rb", 0) as memory:
        return os.pread(memory.fileno(), count, address)


def _read_text(thread, address):
    text = b""
    while b"\0" not in text:
        here = address + len(text)
        text += _read(thread, here, 4096 - here % 4096)
    return os.fsdecode(text.partition(b"\0")[0])


def _install_filter(names):
    """Has this process, and all threads that it will start, stop at these calls."""
    arch, numbers = _MACHINES[platform.machine()]
    wanted = sorted({numbers[name] for name in (*names, "write") if name in numbers})
    load, equal, end = 0x20, 0x15, 0x06  # from the description of the call; jump; return
    code = [(load, 0, 0, 4), (equal, 0, len(wanted) + 1, arch), (load, 0, 0, 0)]
    for place, number in enumerate(wanted):
        code.append((equal, len(wanted) - place, 0, number))
    code += [(end, 0, 0, _ALLOW), (end, 0, 0, _TRACE)]
    raw = b"".join(struct.pack("HBBI", *line) for line in code)
    lines = ctypes.create_string_buffer(raw, len(raw))
    described = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(lines))
    program = ctypes.create_string_buffer(described)
    for asked in ((_NO_NEW_PRIVILEGES, 1, 0), (_SET_SECCOMP, _FILTER, ctypes.addressof(program))):
        what, value, more = asked
        if _libc.prctl(what, ctypes.c_ulong(value), ctypes.c_void_p(more), 0, 0) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"prctl: {os.strerror(error)}")


if __name__ == "__main__":
    print(_reason_against() or "")  # noqa: T201
