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


@contextlib.contextmanager
def interrupted_after(first_s, again_s=0.0):
    """Raises `Interrupted` in the main thread after a time, and again and again if asked for.

    Yields a list that is not empty once it was raised.
    """
    armed, raised = True, []

    def interrupt(*_):
        if armed:
            raised.append(True)
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, first_s, again_s)
        yield raised
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
