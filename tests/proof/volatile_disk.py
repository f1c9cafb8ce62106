"""A disk with a write cache that a power cut empties, as real ones have.

The image of the file system is a file that this process serves to the kernel, by the protocol of
FUSE (`linux/fuse.h`), and a loop device on it is mounted. So every write and flush that a file
system sends to its disk passes through here. What was written and not flushed since may be lost, in
part and in any order, torn at the sectors.
"""

import ctypes
import errno
import json
import mmap
import os
import random
import select
import socket
import stat
import struct
import typing

from proof.disks import LIMIT_S, Disk, detach

SECTOR_BYTES = 512
MAX_WRITE_BYTES = 1 << 17
PAGE_BYTES = 4096

_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE = 1, 2, 3, 4, 14, 15, 16
_RELEASE, _FSYNC, _FLUSH, _INIT, _INTERRUPT, _DESTROY, _BATCH_FORGET = 18, 20, 25, 26, 36, 38, 42
_ROOT, _FILE = 1, 2
_DIRECT_IO, _BIG_WRITES = 1, 1 << 5
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS

HEADER = struct.Struct("<IIQQIIIHH")
TRANSFER = struct.Struct("<QQIIQII")


class Cached:
    """What is on a disk, and which writes are still in its cache."""

    def __init__(self, image):
        with image.open("rb") as file:
            self.size_bytes = os.fstat(file.fileno()).st_size
            # A copy of its own, of the pages that are written.
            self.memory = mmap.mmap(
                file.fileno(),
                self.size_bytes,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        self._unflushed = []  # (where, what was there, what was written)
        self._surviving = None  # after a cut, until the disk is started again

    def write(self, begin, data):
        end = begin + len(data)
        self._unflushed.append((begin, self.memory[begin:end], data))
        self.memory[begin:end] = data

    def flush(self):
        if self._surviving is None:
            self._unflushed.clear()

    def cut(self, keep, seed):
        """Settles what will be there when it is started again; until then nobody notices.

        Args:
            keep: Which share of the sectors in the cache survives.
            seed: For which ones.
        """
        rng = random.Random(seed)
        self._surviving = [
            (begin + at, data[at : at + SECTOR_BYTES])
            for begin, _, data in self._unflushed
            # Whole writes and torn ones: some are decided as a whole.
            for share in [keep if rng.random() < 0.5 else float(rng.random() < keep)]
            for at in range(0, len(data), SECTOR_BYTES)
            if rng.random() < share
        ]

    def start(self):
        """Starts again after a cut."""
        for begin, before, _ in reversed(self._unflushed):
            self.memory[begin : begin + len(before)] = before
        for begin, data in self._surviving:
            self.memory[begin : begin + len(data)] = data
        self._unflushed, self._surviving = [], None


class VolatileDisk(Disk):
    """A file system on such a disk, which a process of ours plays."""

    WAYS: typing.ClassVar = {
        "all that was not flushed is lost": (0.0, False),
        "the same, but somebody has just synced": (0.0, True),
        "half of what was not flushed is lost": (0.5, False),
        "a tenth of it is lost": (0.9, False),
    }
    goes_on = False

    def __init__(self, folder, kind, options=""):
        super().__init__(folder, kind, options)
        self._served = folder / "served"
        self._served.mkdir()
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        how = f"fd={fuse},rootmode=40000,user_id=0,group_id=0"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"disk", str(self._served).encode(), b"fuse", 0, how.encode()):
            raise OSError(ctypes.get_errno(), "cannot mount a FUSE file system")
        self._control, theirs = socket.socketpair()
        self._control.settimeout(LIMIT_S)
        if os.fork() == 0:
            status = 1
            try:
                self._control.close()
                # Were this the last to hold the mounts of the others when all are killed, it would
                # unmount the file system at its end, and wait for itself to answer.
                if libc.unshare(_NEW_MOUNTS):
                    raise OSError(ctypes.get_errno(), "cannot have mounts of its own")
                _serve(fuse, theirs, Cached(self.image))
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        os.close(fuse)
        self._ask("flush")  # it is there, and has its own mounts

    def mount(self):
        self._mount_file(self._served / "disk")

    def cut(self, keep, seed):
        """Cuts its power; that share of what was not flushed survives, chosen by the seed."""
        self._ask("cut", keep=keep, seed=seed)

    def start_again(self):
        self.unmount()
        self._ask("start")
        self.mount()

    def close(self):
        super().close()
        detach(self._served)
        self._control.close()

    def _ask(self, what, **arguments):
        self._control.sendall(json.dumps([what, arguments]).encode())
        return json.loads(self._control.recv(1024))


def _serve(fuse, control, disk):
    """Answers the kernel, and who cuts the power, until either has gone."""
    while True:
        ready, _, _ = select.select([fuse, control], [], [])
        if control in ready:
            asked = control.recv(1024)
            if not asked:
                return
            what, arguments = json.loads(asked)
            control.sendall(json.dumps(getattr(disk, what)(**arguments)).encode())
        if fuse in ready:
            try:
                request = os.read(fuse, MAX_WRITE_BYTES + PAGE_BYTES)
            except OSError as e:
                if e.errno == errno.ENODEV:  # unmounted
                    return
                raise
            _, operation, unique, node, *_ = HEADER.unpack_from(request)
            if operation in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue  # want no answer
            error, answer = _answer(disk, operation, node, memoryview(request)[HEADER.size :])
            os.write(fuse, struct.pack("<IiQ", 16 + len(answer), -error, unique) + answer)


def _answer(disk, operation, node, body):
    """Returns an error number and the answer to a request of the kernel."""
    if operation == _INIT:
        major, minor, readahead, _ = struct.unpack_from("<IIII", body)
        limits = 16, 12, MAX_WRITE_BYTES, 1, MAX_WRITE_BYTES // PAGE_BYTES
        head = struct.pack("<IIII", major, min(minor, 38), readahead, _BIG_WRITES)
        return 0, head + struct.pack("<HHIIHHII6I", *limits, 0, 0, 0, *[0] * 6)
    if operation == _LOOKUP:
        if bytes(body).rstrip(b"\0") != b"disk":
            return errno.ENOENT, b""
        return 0, struct.pack("<QQQQII", _FILE, 0, 3600, 3600, 0, 0) + _attributes(disk, _FILE)
    if operation in (_GETATTR, _SETATTR):
        return 0, struct.pack("<QII", 3600, 0, 0) + _attributes(disk, node)
    if operation == _OPEN:
        return 0, struct.pack("<QII", 0, _DIRECT_IO, 0)
    if operation in (_READ, _WRITE):
        _, begin, size_bytes, *_ = TRANSFER.unpack_from(body)
        if operation == _READ:
            return 0, disk.memory[begin : begin + size_bytes]
        disk.write(begin, bytes(body[TRANSFER.size : TRANSFER.size + size_bytes]))
        return 0, struct.pack("<II", size_bytes, 0)
    if operation == _FSYNC:
        disk.flush()
        return 0, b""
    if operation in (_FLUSH, _RELEASE, _DESTROY):
        return 0, b""
    return errno.ENOSYS, b""


def _attributes(disk, node):
    is_file = node == _FILE
    mode, size_bytes = (
        (stat.S_IFREG | 0o600, disk.size_bytes) if is_file else (stat.S_IFDIR | 0o700, 0)
    )
    numbers = node, size_bytes, -(-size_bytes // 512), 0, 0, 0
    return struct.pack("<6Q10I", *numbers, 0, 0, 0, mode, 1, 0, 0, 0, PAGE_BYTES, 0)
