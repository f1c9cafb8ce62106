"""Shows how far a restore is that takes long, as Keras shows how far an epoch is."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator

import keras

from stepsave.engine.extents import Needs
from stepsave.fit.passing_over import tell

__all__ = ("showing_progress",)

_SHOWN_AFTER_S = 2.0
_MB = 1e6


@contextlib.contextmanager
def showing_progress(needs: Needs | None, *, verbose: int) -> Generator[Needs | None]:
    """Has a restore say how far it is: nothing if that takes less than two seconds.

    Args:
        needs: What it needs.
        verbose: 0 to say nothing in any case.

    Yields:
        The needs with which to restore.
    """
    if not verbose:
        yield needs
        return
    display = _Display()
    try:
        yield dataclasses.replace(needs or Needs(), on_read=display.show)
    finally:
        display.end()


class _Display:
    """One line that is written again and again; a single log line if Keras is to write none."""

    def __init__(self) -> None:
        self._is_live = keras.config.is_interactive_logging_enabled()
        self._bar: keras.utils.Progbar | None = None
        self._done_bytes = 0
        self._is_line_open = False
        self._began_s = time.monotonic()

    @property
    def _is_long(self) -> bool:
        return time.monotonic() - self._began_s > _SHOWN_AFTER_S

    def show(self, done_bytes: int, of_bytes: int) -> None:
        """Called by the threads that read. What it raised they would take for a fault in the
        backup, and restore an older one; so where nothing can be written, nothing is shown.
        """
        if not self._is_live:
            self._done_bytes = done_bytes
            return
        try:
            self._write(done_bytes, of_bytes)
        except (OSError, ValueError):  # the terminal is gone, or its file closed
            self._is_live = False

    def _write(self, done_bytes: int, of_bytes: int) -> None:
        if self._bar is None or done_bytes < self._done_bytes:  # or another backup
            self._end_line()
            self._bar = keras.utils.Progbar(max(1, round(of_bytes / _MB)), unit_name="MB restored")
        self._done_bytes = done_bytes
        if self._is_long:
            self._bar.update(min(round(done_bytes / _MB), self._bar.target), finalize=False)
            self._is_line_open = True

    def _end_line(self) -> None:
        if self._bar is not None and self._is_line_open:
            self._bar.update(min(round(self._done_bytes / _MB), self._bar.target), finalize=True)
        self._is_line_open = False

    def end(self) -> None:
        """Called by the caller, when nothing is read any more."""
        if self._is_live:
            self._end_line()
        elif self._done_bytes and self._is_long:
            took_s = time.monotonic() - self._began_s
            tell(f"Read {self._done_bytes / _MB:.0f} MB of a backup in {took_s:.1f} s")
