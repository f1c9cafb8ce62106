"""Exceptions in the midst of code of ours, as a signal handler raises them."""

import contextlib
import itertools
import os
import signal
import sys

import stepsave

SOURCE = os.path.dirname(stepsave.__file__) + os.sep


class Interrupted(BaseException):
    """Like `KeyboardInterrupt`: no `Exception`, raised where nobody expects it."""


class Countdown:
    """How many lines are left, and where it was raised, each time."""

    def __init__(self, left):
        self.left = left
        self.raised_at = []


@contextlib.contextmanager
def interrupted_at_line(number, *, again=0, instructions=False, error=Interrupted):
    """Raises an exception when this thread begins the n-th line of stepsave in the body.

    Args:
        number: Which line, as they are run: 1 for the first.
        again: After how many lines more it is raised once more, in what still runs then; 0 for
            never.
        instructions: Whether to count instructions of the interpreter, and not lines.
        error: What is raised.
    """
    countdown = Countdown(number)
    kind = "opcode" if instructions else "line"

    def trace_lines(frame, event, _):
        if event == kind:
            countdown.left -= 1
            if countdown.left == 0 or (again and countdown.left == -again):
                countdown.raised_at.append((frame.f_code.co_filename, frame.f_lineno))
                if countdown.left == 0 and again:
                    sys.setprofile(go_on)
                raise error
        return trace_lines

    def go_on(*_):
        """Python ends tracing when a trace function raises; here it begins once more."""
        sys.setprofile(None)
        sys.settrace(trace_calls)

    def trace_calls(frame, event, _):
        del event
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        frame.f_trace_opcodes = instructions
        return trace_lines

    before = sys.gettrace()
    sys.settrace(trace_calls)
    try:
        yield countdown
    finally:
        sys.setprofile(None)
        sys.settrace(before)


def enumerate_lines(make_body, **options):
    """Interrupts a body at each line of stepsave that it runs; returns how many those are.

    Args:
        make_body: Called before each time; returns what is interrupted, and what must hold then.
        options: Of `interrupted_at_line`.
    """
    error = options.get("error", Interrupted)
    for number in itertools.count(1):
        assert number < 100_000, "no end of lines"
        body, check = make_body()
        try:
            with interrupted_at_line(number, **options) as countdown:
                body()
        except error:
            check()
        if not countdown.raised_at:
            return number - 1
    raise AssertionError


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
