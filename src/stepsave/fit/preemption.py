"""Signals that announce the end of the process, noted while `fit` runs."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from stepsave.engine.peers import Board, find_peers
from stepsave.errors import Preempted
from stepsave.fit.stopping import StopAgreement

__all__ = ("PreemptionSignals", "check_signals")

_NO_SIGNALS = (
    "Signals are not handled: `fit` does not run on the main thread, where alone Python can. None "
    "will end it with a save (`save_before_preemption`). Call `fit` on the main thread."
)

_logger = logging.getLogger("stepsave")

_REFUSED = (signal.SIGKILL, signal.SIGSTOP)


def check_signals(signals: Sequence[int | str]) -> tuple[signal.Signals, ...]:
    """Returns the signals that were named.

    Args:
        signals: Numbers or names, such as `signal.SIGTERM` or `"SIGTERM"`.

    Raises:
        ValueError: If one is not a signal, or one that no process can handle.
    """
    checked: list[signal.Signals] = []
    for given in [signals] if isinstance(signals, (str, int)) else signals:
        try:
            found = signal.Signals[given] if isinstance(given, str) else signal.Signals(given)
        except (KeyError, ValueError):
            found = None
        if found is None or found in _REFUSED:
            raise ValueError(
                "Invalid value for argument `preemption_signals`. Received: "
                f"{given!r}. Expected signals that a process can handle, such as 'SIGTERM', "
                "'SIGUSR1' or 'SIGINT'."
            )
        checked.append(found)
    return tuple(checked)


class PreemptionSignals:
    """Handlers that note a signal while `fit` runs, and leave it alone otherwise.

    A handler that was installed before is called when the training is saved, and put back at
    the end. A second SIGINT goes to it at once: somebody does not want to wait.
    """

    def __init__(self, is_in_fit: Callable[[FrameType | None], bool]) -> None:
        """Installs nothing yet.

        Args:
            is_in_fit: Whether the code at a frame was called by `fit`. When `fit` raises,
                nobody tells its callbacks.
        """
        self._is_in_fit = is_in_fit
        self._unsaved: set[int] = set()
        self._previous: dict[int, Any] = {}
        self.is_removed = False
        self.received: int | None = None
        self._received_s = 0.0
        self._agreement: StopAgreement | None = None  # if there are several processes

    def install(self, signals: Sequence[signal.Signals], saver: Any) -> bool:
        """Installs handlers; returns False, with a warning, off the main thread: nobody can there.

        Args:
            signals: The signals, beside those that are handled already.
            saver: Who is to save before the end, beside those who are already.
        """
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(_NO_SIGNALS, stacklevel=4)
            return False
        peers = find_peers()
        if peers is not None and self._agreement is None:
            self._agreement = StopAgreement(Board(peers, "fit"))
        self._unsaved.add(id(saver))
        if self.is_removed:
            self.is_removed, self._previous = False, {}
        _installed.add(self)
        for signum in signals:
            if signum not in self._previous:
                # Noted first: interrupted in between, `remove` finds nothing of ours to undo.
                self._previous[signum] = signal.getsignal(signum)
                signal.signal(signum, self._note)
        return True

    def remove(self) -> None:
        """Puts the handlers before back, where nobody else has replaced ours since."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.is_removed = True
        if self._agreement is not None:
            self._agreement.close()
            self._agreement = None
        for signum in self._previous:
            if signal.getsignal(signum) == self._note:
                # None: a handler that was not installed from Python, and cannot be put back.
                previous = self.handler_before(signum)
                signal.signal(signum, signal.SIG_DFL if previous is None else previous)

    def leave_to_parent(self) -> None:
        """Puts the handlers before back in a forked child, and tells nobody."""
        self._agreement = None
        self.remove()

    def handler_before(self, signum: int) -> Any:
        """The handler to put back: not one of ours that was removed while this one lay over it."""
        previous = self._previous.get(signum)
        owner = getattr(previous, "__self__", None)
        if isinstance(owner, PreemptionSignals) and owner.is_removed:
            return owner.handler_before(signum)
        return previous

    def is_due(self, step: int) -> bool:
        """Whether to save and end when so many steps have been made."""
        if self._agreement is None:
            return self.received is not None
        is_due = self._agreement.is_due(step, self.received)
        if is_due and self.received is None:  # the signal came to another process
            self.received, self._received_s = self._agreement.signum, time.monotonic()
        return is_due

    def end(self, saver: Any, saved_step: int, grace_period_s: float | None) -> None:
        """Ends the training when all have saved: tells the handler before, raises `Preempted`.

        Args:
            saver: Who has saved.
            saved_step: The step that is durable.
            grace_period_s: Seconds that there were, if known; a longer save is logged.
        """
        self._unsaved.discard(id(saver))
        if self._unsaved:
            return
        assert self.received is not None
        if self._agreement is not None:
            self._agreement.end()
        waited_s = time.monotonic() - self._received_s
        if grace_period_s is not None and waited_s > grace_period_s:
            _logger.warning(
                "The save before preemption was durable %.1f s after the signal, but the grace "
                "period is %.1f s. Save more often, or a smaller state.",
                waited_s,
                grace_period_s,
            )
        previous = self.handler_before(self.received)
        self.remove()
        # Python's own for SIGINT is not called: it would only raise `KeyboardInterrupt`.
        if callable(previous) and previous is not signal.default_int_handler:
            previous(self.received, None)
        raise Preempted(self.received, saved_step, waited_s)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        again = self.received is not None
        if not self._is_in_fit(frame) or (again and signum == signal.SIGINT):
            self.remove()
            signal.raise_signal(signum)  # to whom it would have gone without us
            return
        if not again:
            self._received_s = time.monotonic()
            self.received = signum


_installed: weakref.WeakSet[PreemptionSignals] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for handlers in list(_installed):
        handlers.leave_to_parent()


# Workers that load data inherit our handlers. A pool ends them by SIGTERM, and Python runs its
# handlers only between two steps of its own: one that is about to wait for a lock would sleep on,
# and the pool, and so `fit`, wait for it for ever.
os.register_at_fork(after_in_child=_leave_to_parent)
