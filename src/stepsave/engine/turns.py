"""One call at a time on a checkpointer, whichever threads make them."""

from __future__ import annotations

import contextlib
import sys
import threading
from types import CodeType

from stepsave.threads import Latch, is_running

__all__ = ("Turns",)

_LOOK_AGAIN_S = 0.05
"""How long a call that was interrupted can hold up those of other threads, once it is over."""


_frame = sys._getframe  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
_frames = sys._current_frames  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


class _Turn:
    """One call. A turn is given up by leaving it; or by nothing, when the call was interrupted."""

    __slots__ = ("_code", "_thread", "later", "over")

    def __init__(self, code: CodeType) -> None:
        self._thread = threading.get_ident()
        self._code = code
        self.over = Latch()
        self.later: dict[None, _Turn] = {}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.over.open()

    def is_of_this_thread(self) -> bool:
        return self._thread == threading.get_ident()

    def goes_on(self, owner: object) -> bool:
        """Whether its thread is in the midst of the call; of this thread, of one further out."""
        if self.over.is_open:
            return False
        if self.is_of_this_thread():
            frame = _frame(2).f_back
        else:
            frame = _frames().get(self._thread)
        return is_running(frame, self._code, "self", owner)


class Turns:
    """Has the calls of several threads on one object wait for each other.

    Who calls may be interrupted anywhere, so there is no lock to be left taken: turns are a chain,
    each is put behind the last one in a single step, and that is over when it was given up, or when
    its thread has left the call by an exception that gave up nothing.
    """

    def __init__(self) -> None:
        # Some turn of the chain; those behind it are found from there.
        self._some = _Turn(Turns.__init__.__code__)
        self._some.over.open()

    def take(self, owner: object) -> contextlib.AbstractContextManager[None]:
        """Waits for the turn of the method that calls this; use it by `with`.

        A call within a call of the same thread goes on at once, a signal handler's too.

        Args:
            owner: Whose method it is.
        """
        mine = _Turn(_frame(1).f_code)
        while True:
            last = self._some
            while last.later:
                last = last.later[None]
            if last.goes_on(owner):
                if last.is_of_this_thread():
                    return contextlib.nullcontext()
                last.over.wait(_LOOK_AGAIN_S)
            elif last.later.setdefault(None, mine) is mine:
                self._some = mine
                return mine
