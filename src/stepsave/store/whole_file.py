"""A file that is there as a whole, durably, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

__all__ = ("new_file", "opened", "sync_path")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], flags: int) -> Generator[int]:
    """Opens a file or directory by its descriptor; what fails meanwhile tells its name.

    Yields:
        The descriptor.
    """
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield fd
    except OSError as e:
        if e.filename is None or isinstance(e.filename, int):
            e.filename = os.fspath(path)  # what writes to descriptors does not know it
        raise
    finally:
        os.close(fd)


def sync_path(path: str | os.PathLike[str]) -> None:
    """Makes what is in a file, or the entries of a directory, durable."""
    with opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)


@contextlib.contextmanager
def new_file(path: Path, suffix: str, *, overwrite: bool) -> Generator[str]:
    """Has a file written beside its place, and puts it there when it is complete.

    Args:
        path: Its place.
        suffix: What the name of the one beside it must end with.
        overwrite: Whether it may replace one.

    Yields:
        The name of the file to make and to write. It is gone after an error.

    Raises:
        FileExistsError: If there is one, and it is not to be replaced.
        OSError: If it cannot be written.
    """
    _check_free(path, overwrite=overwrite)
    beside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial{suffix}")
    try:
        yield str(beside)
        # Without it a power cut can leave the file empty or torn under its final name.
        sync_path(beside)
        _check_free(path, overwrite=overwrite)
        os.replace(beside, path)
        # Without it a power cut can undo the rename.
        sync_path(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)


def _check_free(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise IsADirectoryError(
            f"{path}: expected the name of a file, found a directory. Name a file in it."
        )
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(
            f"{path}: there is such a file already. Choose another name, or say --overwrite."
        )
