"""Reads what was trained before an interruption, up to where training goes on."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import keras

from stepsave import rng
from stepsave.errors import BackupMismatchError, UnreproducibleDataWarning
from stepsave.fit import keras_data
from stepsave.fit.data_position import Stream
from stepsave.fit.keras_data import EpochData
from stepsave.fit.sources import Source
from stepsave.rng import RngState

__all__ = ("pass_over", "tell", "warn_of_data")

_logger = logging.getLogger("stepsave")

_TOLD_EVERY_S = 5.0  # progress of a long way through the data


def pass_over(
    iterator: Any,
    stream: Stream,
    to_read: int,
    data: EpochData,
    source: Source,
    *,
    on_read: Callable[[], None],
) -> frozenset[str]:
    """Reads batches from the start of a stream, with the random generators as they were there.

    Args:
        iterator: What to read from.
        stream: How far it was read before.
        to_read: How many batches of it to read; the others were passed over without.
        data: The data, as Keras reads it.
        source: The same, as it is positioned.
        on_read: Called after each.

    Returns:
        The global random generators (`rng.moved`) that the data draws from in the background. It
        draws from them at any time now, and has brought them to their place by that: they are not
        to be put back to where they were when the backup was made.

    Raises:
        BackupMismatchError: If the data ends before.
    """
    if stream.first is not None:
        rng.restore(RngState.from_json(stream.first))
    if stream.batches == 0:
        return frozenset()
    marks = [rng.capture(keras=False)]
    told_s = time.monotonic()
    for read in range(to_read):
        try:
            next(iterator)
        except StopIteration:
            if read + data.steps_per_execution > to_read:
                break  # an execution may be shorter, where the data ends
            raise BackupMismatchError(
                f"The data ends after {read} batches, and the backup was made after "
                f"{stream.batches} batches of it. Use the data that the backup was made with."
            ) from None
        if read == 0:
            marks.append(rng.capture(keras=False))
        on_read()
        if time.monotonic() - told_s > _TOLD_EVERY_S:
            told_s = time.monotonic()
            tell(f"Passing over {to_read} batches to where training goes on: {read + 1}")
    return _drawn_ahead(marks, data, source) if keras_data.reads_in_background() else frozenset()


def _drawn_ahead(marks: list[RngState], data: EpochData, source: Source) -> frozenset[str]:
    marks = [*marks, rng.capture(keras=False)]
    drawn = rng.moved(marks[0], marks[-1]) - source.draws_first | rng.moved(marks[1], marks[-1])
    if drawn and data.streams_last:
        warn_of_data(
            source,
            "it draws in the background, past the end of an epoch, from the global generator of "
            f"{' and '.join(sorted(drawn))}, and comes again only if nothing else draws from "
            "that. Give it a generator of its own",
        )
    return drawn


def warn_of_data(source: Source, doubt: str) -> None:
    """Warns that a resumed run may see other data, and says why."""
    warnings.warn(
        f"After an interruption the data may come in another order: {doubt}. Training goes on at "
        f"the right batch all the same. (x is a {source.name}.)",
        UnreproducibleDataWarning,
        stacklevel=3,
    )


def tell(message: str) -> None:
    """Says something to the user, where Keras's callbacks say it."""
    if keras.config.is_interactive_logging_enabled():
        print(message, flush=True)  # noqa: T201
    else:
        _logger.info("%s", message.lstrip())
