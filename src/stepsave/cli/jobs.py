"""Work that takes long: with its progress on a terminal, and signals that end it cleanly."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from stepsave.errors import BackupDirectoryError
from stepsave.threads import Crew

__all__ = ("Job", "do")

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_WAIT_S = 0.5
"""How long the main thread waits at a time. A signal that comes right before a wait does not end
it: Python has it handled when the thread runs again."""


class _StoppedError(BaseException):
    """Raised within work that is to end. No fault of a backup, so not an `Exception`."""


class Job:
    """What work knows of those who wait for it. Used by any thread.

    Attributes:
        done_bytes: How much was noted since something was begun with.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self.done_bytes = 0
        self._bar: Any = None
        self._task: Any = None
        self._signum = 0

    def begin(self, title: str, total_bytes: int | None) -> None:
        """Says what comes now, and how much that is; None if nobody knows."""
        self.check()
        self.done_bytes = 0
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(title, total=total_bytes)

    def note(self, size_bytes: int) -> None:
        """Takes note of what was done."""
        self.check()
        with self._guard:
            self.done_bytes += size_bytes
        if self._bar is not None:
            self._bar.advance(self._task, size_bytes)

    def reach(self, done_bytes: int, of_bytes: int) -> None:
        """Takes note of how far it is, and of how much that is."""
        self.check()
        if self._bar is not None:
            self._bar.update(self._task, completed=done_bytes, total=of_bytes)

    def check(self) -> None:
        """Raises if the work is to end, for whoever does it to clean up."""
        if self._signum:
            raise _StoppedError

    def show(self) -> Any:
        """Returns what shows the progress, as a context; on a terminal only."""
        if not sys.stderr.isatty():
            return contextlib.nullcontext()
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
            TextColumn("{task.description}"),
            BarColumn(20),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        return self._bar

    def stop(self, signum: int, _: object) -> None:
        """Handles a signal: the work ends at its next note. A second one ends the process."""
        if self._signum:
            os._exit(128 + signum)
        self._signum = signum

    @property
    def status(self) -> int:
        """The exit status that tells of the signal."""
        return 128 + self._signum


def do(work: Callable[[Job, Crew], T], helpers: int) -> T:
    """Has a thread of its own do something, which no signal interrupts in the midst of a step.

    Args:
        work: Given who waits for it, and threads that help.
        helpers: How many.

    Raises:
        typer.Exit: If a signal has ended it.
        BackupDirectoryError: If so many threads cannot be started.
        BaseException: What it raised.
    """
    job = Job()
    try:
        crew = Crew(1 + helpers, "stepsave-job")
    except RuntimeError as e:
        raise BackupDirectoryError(
            f"Cannot start {1 + helpers} threads to read: {e}. Raise the limit on threads "
            "(ulimit -u)."
        ) from e
    # One that is ignored stays so: `nohup` has a command outlive its terminal.
    heard = [one for one in _SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, job.stop) for signum in heard}
    try:
        with job.show():
            call = crew.begin(lambda: work(job, crew))
            while not call.done.wait(_WAIT_S):
                pass
            return call.take()
    except _StoppedError:
        print("stepsave: stopped.", file=sys.stderr)  # noqa: T201
        raise typer.Exit(job.status) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        crew.end()
