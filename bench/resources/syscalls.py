"""Counts the system calls of a process and all its threads, by `strace`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SYNCS = ("fsync", "fdatasync", "sync", "syncfs", "sync_file_range", "msync")
WAITS = ("futex", "sched_yield", "clock_nanosleep", "restart_syscall")


def command(output: Path) -> list[str]:
    """What to put before a command; the counts are written to a file."""
    return ["strace", "-f", "-c", "-o", str(output)]


def problem(where: Path) -> str | None:
    """Why system calls cannot be counted here; None if they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(
        [*command(where / "strace"), "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        return f"strace does not work here: {tried.stderr.strip()[-200:]}"
    return None


def read(output: Path) -> dict[str, int]:
    """Calls by name, from strace's table: % time, seconds, usecs/call, calls, [errors,] name."""
    counts: dict[str, int] = {}
    for line in output.read_text().splitlines():
        columns = line.split()
        if len(columns) in (5, 6) and columns[3].isdigit() and columns[-1] != "total":
            counts[columns[-1]] = int(columns[3])
    if not counts:
        raise ValueError(f"strace counted nothing: {output.read_text()[:200]!r}")
    return counts


def per_save(fewer: dict[str, int], more: dict[str, int], saves: int) -> dict[str, object]:
    """What so many more saves called more, per save. Waiting is left out of one total."""
    by_name = {
        name: (more.get(name, 0) - fewer.get(name, 0)) / saves for name in sorted(fewer | more)
    }
    by_name = {name: count for name, count in by_name.items() if count}
    return {
        "syncs": sum(by_name.get(name, 0.0) for name in SYNCS),
        "all": sum(by_name.values()),
        "all_but_waits": sum(n for name, n in by_name.items() if name not in WAITS),
        "by_name": by_name,
    }
