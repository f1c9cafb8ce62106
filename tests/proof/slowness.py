"""A disk that stands still, or answers late."""

import threading
import time

from proof.operations import Operations

LIMIT_S = 3600


class SlowDisk:
    """While it is entered, operations on files take as long as one wants.

    Attributes:
        delay_s: How long each takes beside.
    """

    def __init__(self, delay_s=0.0):
        self.delay_s = delay_s
        self._goes = threading.Event()
        self._goes.set()
        self._operations = Operations(before=self._wait)

    def __enter__(self):
        self._operations.__enter__()
        return self

    def __exit__(self, *_):
        self._goes.set()
        self._operations.__exit__()

    def stop(self):
        """From now on operations do not end."""
        self._goes.clear()

    def go_on(self):
        self._goes.set()

    def _wait(self, *_):
        time.sleep(self.delay_s)
        assert self._goes.wait(LIMIT_S)
