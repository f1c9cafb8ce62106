"""What a figure must be read with: the machine, its software, the file system."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

PACKAGES = (
    "stepsave",
    "numpy",
    "tensorstore",
    "awscrt",
    "ml-dtypes",
    "keras",
    "h5py",
    "jax",
    "jaxlib",
    "orbax-checkpoint",
    "torch",
    "tensorflow-cpu",
    "grain",
    "torchdata",
)


def describe(directory: Path) -> dict[str, object]:
    """Returns facts about this machine; nothing in it names a path or a host."""
    return {
        "name": name(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file_system": _file_system(directory),
        "packages": {package: _version(package) for package in PACKAGES},
    }


def name() -> str:
    """A folder name for results of machines like this one."""
    model = re.sub(r"\((r|tm)\)|@.*", "", _cpu_model().lower())
    slug = re.sub(r"[^a-z0-9]+", "-", model).strip("-")
    return f"{slug}-{len(os.sched_getaffinity(0))}cpu"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file_system(directory: Path) -> str:
    """Type of the file system that holds a directory: the longest mount point above it."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split()
        inside = str(directory).startswith(mount.rstrip("/") + "/")
        if inside and len(mount) > len(best):
            best, kind = mount, found
    return kind


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
