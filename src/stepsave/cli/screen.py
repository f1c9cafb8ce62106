"""What people see: lines in color, and columns."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence

import typer

__all__ = ("BAD", "GOOD", "lay_out", "say", "shape_text")

GOOD, BAD = "green", "red"

_LEAST_PATH = 20  # columns; a path has at least so many beside its numbers
_GAP = "  "


def say(text: str = "", color: str | None = None) -> None:
    """Prints a line, in color if somebody sees it who has not said that he wants none."""
    if color is None or os.environ.get("NO_COLOR"):
        typer.echo(text)
    else:
        typer.secho(text, fg=color)


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
