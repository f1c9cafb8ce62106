"""What callers pass to a checkpointer, checked before anything else happens."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stepsave.errors import InvalidStateError
from stepsave.format.records import FORMAT_VERSION
from stepsave.format.tree import Note, encode_structure

__all__ = (
    "StructureText",
    "check_choices",
    "check_step",
    "check_threads",
    "encode_training",
    "parse_time_s",
)


_CHOICES = {
    "when_busy": ("wait", "skip"),
    "writer": ("auto", "direct", "tensorstore"),
    "snapshot": ("auto", "device", "host"),
    "arrays": ("numpy", "torch"),
    "resume": ("batch", "epoch"),
    "history": ("new", "all"),
}


def check_choices(**given: object) -> None:
    """Raises `ValueError` unless each argument, by its name, is one of its choices."""
    for name, value in given.items():
        if value not in _CHOICES[name]:
            expected = " or ".join(map(repr, _CHOICES[name]))
            raise ValueError(
                f"Invalid value for argument `{name}`. Received: {name}={value!r}. Expected "
                f"{expected}."
            )


_UNITS_S = {"s": 1, "min": 60, "h": 3600}


def parse_time_s(text: object) -> float | None:
    """Returns the seconds of a time such as `"30s"`, `"5min"` or `"1.5h"`; None if it is none."""
    form = r"(\d+(?:\.\d+)?) ?(s|min|h)"
    if isinstance(text, str) and (match := re.fullmatch(form, text, re.ASCII)) is not None:
        return float(match[1]) * _UNITS_S[match[2]]
    return None


def check_threads(count: object) -> int:
    """Returns a number of threads, or raises `ValueError`."""
    if isinstance(count, int) and not isinstance(count, bool) and count >= 1:
        return count
    raise ValueError(
        f"Invalid value for argument `writer_threads`. Received: writer_threads={count!r}. "
        "Expected a positive integer or None."
    )


def check_step(step: int, last_step: int, directory: str) -> int:
    """Returns the number of a step, or raises `ValueError` if it is not after the last one."""
    step = operator.index(step)
    if step < 0 or step <= last_step:
        raise ValueError(
            f"Invalid value for argument `step`. Received: step={step}. Expected one "
            f"greater than {last_step}, the step of the newest backup in {directory}. Go on from "
            "`restore()`, or use another directory."
        )
    return step


def encode_training(step: int, metadata: Mapping[str, Any] | None, structure: str = "") -> bytes:
    """Returns the contents of `training.json`.

    Args:
        step: Number of the step.
        metadata: The user's.
        structure: What `tree.encode_structure` made.

    Raises:
        InvalidStateError: If JSON cannot hold the metadata.
    """
    try:
        document = {"format": FORMAT_VERSION, "step": step, "metadata": dict(metadata or {})}
        text = json.dumps(document, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidStateError(
            f"Invalid value for argument `metadata`. Expected what JSON can hold (strings, "
            f"finite numbers, booleans, None, lists, dicts), found: {e}."
        ) from e
    if structure:
        text = f'{text[:-1]}, "structure": {structure}}}'
    return text.encode()


class StructureText:
    """The structure of the last state as JSON, encoded anew only when it changes."""

    def __init__(self) -> None:
        self._last: tuple[Sequence[Note], str] = (), ""  # one object: both change in one step

    def encode(self, notes: Sequence[Note]) -> str:
        """Returns what `tree.encode_structure` makes of the notes."""
        last, text = self._last
        if notes != last:
            text = encode_structure(notes)
            self._last = notes, text
        return text
