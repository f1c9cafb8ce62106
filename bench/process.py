"""What this process has used so far, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


def status_bytes(key: str) -> int:
    """A size of `/proc/self/status`: `VmRSS`, or `VmHWM`, its peak."""
    return _number(Path("/proc/self/status"), key) * 1024


def reset_peak() -> None:
    """`VmHWM` begins anew, from what is in use now."""
    Path("/proc/self/clear_refs").write_text("5")


def disk_write_bytes() -> int:
    """What all threads had written to a disk.

    Direct writes when they are made, others when a page becomes dirty. A system that says how
    much it has written is compared with this.
    """
    return _number(Path("/proc/self/io"), "write_bytes")


def _number(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise KeyError(key)
