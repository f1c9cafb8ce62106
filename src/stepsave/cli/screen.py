"""What people see: numbers with units, columns, and how far something is."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence

import typer

__all__ = (
    "BAD",
    "GOOD",
    "Reading",
    "age_text",
    "lay_out",
    "reading",
    "say",
    "shape_text",
    "size_text",
    "time_text",
)

GOOD, BAD = "green", "red"

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_LEAST_PATH = 20  # columns; a path has at least so many beside its numbers
_GAP = "  "


def say(text: str = "", color: str | None = None) -> None:
    """Prints a line, in color if somebody sees it who has not said that he wants none."""
    if color is None or os.environ.get("NO_COLOR"):
        typer.echo(text)
    else:
        typer.secho(text, fg=color)


def size_text(size_bytes: float) -> str:
    """Returns a size in decimal units, with three digits."""
    exponent = 0
    while size_bytes >= 999.5 and exponent < len(_UNITS) - 1:
        size_bytes, exponent = size_bytes / 1000, exponent + 1
    digits = 0 if exponent == 0 or size_bytes >= 99.95 else 1 if size_bytes >= 9.995 else 2
    return f"{size_bytes:.{digits}f} {_UNITS[exponent]}"


def time_text(time_s: float) -> str:
    """Returns how long something took."""
    return f"{time_s:.1f} s" if time_s < 99.95 else age_text(time_s)


def age_text(age_s: float) -> str:
    """Returns how long ago something was, in its largest unit."""
    for unit, unit_s in (("day", 86400), ("h", 3600), ("min", 60)):
        if age_s >= 2 * unit_s:
            count = int(age_s // unit_s)
            return f"{count} {unit}s" if unit == "day" else f"{count} {unit}"
    return f"{max(0, age_s):.0f} s"


def shape_text(shape: Sequence[int]) -> str:
    """Returns a shape, as Keras prints it."""
    return str(tuple(shape))


def lay_out(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yields the lines of a table; the first column to the left, the others to the right.

    On a terminal a path that is too long for it has a line of its own, above its numbers. In a
    pipe each row is one line, whatever its length.
    """
    all_rows = (head, *rows)
    longest, *others = (max(map(len, column)) for column in zip(*all_rows, strict=True))
    width = longest
    if sys.stdout.isatty():
        left = shutil.get_terminal_size().columns - sum(len(_GAP) + size for size in others)
        width = min(longest, max(_LEAST_PATH, left))
    for path, *cells in all_rows:
        numbers = "".join(f"{_GAP}{cell:>{size}}" for cell, size in zip(cells, others, strict=True))
        if len(path) > width:
            yield path
        yield f"{path if len(path) <= width else '':<{width}}{numbers}".rstrip()


class Reading:
    """How far the reading of something is.

    Attributes:
        done_bytes: How much was read.
    """

    def __init__(self, show: Callable[[int], object]) -> None:
        self._show = show
        self._guard = threading.Lock()
        self._is_stopped = False
        self.done_bytes = 0

    def __call__(self, size_bytes: int) -> None:
        """Told of each piece that was read, by any thread.

        Raises:
            InterruptedError: After Ctrl-C, so that nothing is read any more.
        """
        if self._is_stopped:
            raise InterruptedError("Ctrl-C")
        with self._guard:
            self.done_bytes += size_bytes
            self._show(size_bytes)

    def stop(self) -> None:
        """Has it end at the next piece."""
        self._is_stopped = True


@contextlib.contextmanager
def reading(what: str, of_bytes: int) -> Generator[Reading]:
    """Shows how much is read and how fast, if standard error is a terminal."""
    with contextlib.ExitStack() as stack:
        show: Callable[[int], object] = bool
        if sys.stderr.isatty():
            show = stack.enter_context(_bar(what, of_bytes))
        progress = Reading(show)
        try:
            yield progress
        except KeyboardInterrupt:
            progress.stop()
            raise


@contextlib.contextmanager
def _bar(what: str, of_bytes: int) -> Generator[Callable[[int], object]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn(what),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=of_bytes)
        yield lambda size_bytes: progress.update(task, advance=size_bytes)
