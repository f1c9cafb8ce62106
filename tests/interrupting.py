"""Exceptions in the midst of code of ours, as a signal handler raises them."""

import contextlib
import os
import signal
import sys

import stepsave

SOURCE = os.path.dirname(stepsave.__file__) + os.sep


class Interrupted(BaseException):
    """Like `KeyboardInterrupt`: no `Exception`, raised where nobody expects it."""


class Countdown:
    """How many lines are left, and where it was raised."""

    def __init__(self, left):
        self.left = left
        self.raised_at = None


@contextlib.contextmanager
def interrupted_at_line(number):
    """Raises `Interrupted` when this thread begins the n-th line of stepsave in the body."""
    countdown = Countdown(number)

    def trace_lines(frame, event, _):
        if event == "line":
            countdown.left -= 1
            if countdown.left == 0:
                countdown.raised_at = frame.f_code.co_filename, frame.f_lineno
                raise Interrupted
        return trace_lines

    def trace_calls(frame, event, _):
        del event
        return trace_lines if frame.f_code.co_filename.startswith(SOURCE) else None

    before = sys.gettrace()
    sys.settrace(trace_calls)
    try:
        yield countdown
    finally:
        sys.settrace(before)


class InterruptedAfter:
    """Raises `Interrupted` in the main thread after a time, and again and again if asked for.

    The body alone is interrupted, never the beginning and the end of this here. The handler stays
    when it is over, and does nothing: a signal can be on its way when the timer is stopped, and
    would kill the process if it found the default.
    """

    def __init__(self, first_s, again_s=0.0):
        self._timer = first_s, again_s
        self._armed = False
        self.raised = False

    def __enter__(self):
        signal.signal(signal.SIGALRM, self._interrupt)
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, *self._timer)
        return self

    def __exit__(self, *_):
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _interrupt(self, _, frame):
        if not self._armed or frame.f_code is InterruptedAfter.__exit__.__code__:
            return
        if frame.f_code is InterruptedAfter.__enter__.__code__:
            # Before what is to be interrupted has begun; a slow machine is still about the timer.
            signal.setitimer(signal.ITIMER_REAL, 0.001, self._timer[1])
            return
        # Nor is what pytest does about an interrupt that came in a finalizer: on a slow machine the
        # next would come before it is done, again and again, and end pytest itself.
        while frame is not None:
            if frame.f_code.co_filename.endswith("unraisableexception.py"):
                return
            frame = frame.f_back
        self.raised = True
        raise Interrupted
