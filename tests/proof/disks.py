"""Disks of our own, as image files on loop devices, that can lose power. For root, on Linux."""

import contextlib
import fcntl
import functools
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

MIB = 1 << 20
LIMIT_S = 60

FORMATS = {
    # The smallest that their tools make, about; what is not written takes no room.
    "ext4": (["mkfs.ext4", "-q", "-F"], 64 * MIB),
    "xfs": (["mkfs.xfs", "-q", "-f"], 320 * MIB),
    "btrfs": (["mkfs.btrfs", "-q", "-f"], 128 * MIB),
}

SHUTDOWN = 0x8004587D
"""FS_IOC_SHUTDOWN of ext4, and XFS_IOC_GOINGDOWN: from then on nothing reaches the disk."""

ISOLATED = [
    # Mounts and processes that end with their first one, which ends with us, however we end. The
    # kernel detaches a loop device that `mount` made when nothing is mounted from it any more.
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
]


@functools.cache
def reason_not_to():
    """Says why disks cannot be made here; an empty text if they can."""
    if sys.platform != "linux":
        return "power cuts need Linux"
    needed = [ISOLATED[0], ISOLATED[3], "mount", "umount", "mkfs.ext4"]
    if missing := [tool for tool in needed if not shutil.which(tool)]:
        return f"power cuts need {missing[0]}"
    tried = subprocess.run(
        [*ISOLATED, "sh", "-ec", _TRY], capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    if tried.returncode:
        return f"power cuts need root and loop devices: {tried.stderr.strip()[-200:]}"
    return ""


_TRY = """
mount -t tmpfs none /mnt
truncate -s 16M /mnt/image
mkfs.ext4 -q -F /mnt/image
mkdir /mnt/disk
mount -o loop /mnt/image /mnt/disk
"""


class Disk:
    """A file system on a loop device. Its power is cut by having it shut down.

    Attributes:
        WAYS: How that can be: what to pass to `cut`, and whether another program is to have synced
            a file of its own before. The first loses most.
        goes_on: Whether programs notice the cut, by errors, and are to go on then.
        root: Where it is mounted.
    """

    WAYS: typing.ClassVar = {
        "nothing more is written": (2, False),
        "nothing more, but somebody has just synced": (2, True),
        "the journal is still written": (1, False),
        "all is still written": (0, False),
    }
    goes_on = True

    def __init__(self, folder, kind, options=""):
        """Makes the file system; mounts nothing.

        Args:
            folder: A new one, for the image and to mount at.
            kind: Of the file system.
            options: To mount it with.
        """
        command, size_bytes = FORMATS[kind]
        self.kind, self.options = kind, options
        self.image = folder / "image"
        self.root = folder / "root"
        self.root.mkdir(parents=True)
        with self.image.open("wb") as file:
            file.truncate(size_bytes)
        _run(*command, self.image)

    def mount(self):
        self._mount_file(self.image)

    def _mount_file(self, image):
        options = ",".join(filter(None, ["loop", self.options]))
        _run("mount", "-t", self.kind, "-o", options, image, self.root)

    def unmount(self):
        # A killed process may still be letting go of its files.
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                return _run("umount", self.root)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def cut(self, flush, seed):
        """Cuts its power, for all who use it; `flush` is the argument of the call."""
        del seed  # nothing of it is random
        fd = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", flush))
        finally:
            os.close(fd)

    def start_again(self):
        """What happens after a cut: everybody has died, and it is mounted again."""
        self.unmount()
        self.mount()

    def close(self):
        detach(self.root)


@contextlib.contextmanager
def folder_in_memory(parent=None):
    """A directory for images, of which nothing stays, and on which no sync takes time.

    Args:
        parent: Where its name is; a temporary directory if None.
    """
    with tempfile.TemporaryDirectory(dir=parent, prefix="stepsave-disks-") as name:
        _run("mount", "-t", "tmpfs", "-o", "size=2g", "none", name)
        try:
            yield Path(name)
        finally:
            detach(name)


def detach(path):
    """Unmounts something as soon as nobody uses it any more."""
    _run("umount", "--lazy", path)


def _run(*command):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
