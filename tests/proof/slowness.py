"""A disk that stands still, or answers late."""

import threading
import time

from engine_support import assert_is_state_of, restore_once, state_of

import stepsave
from proof.faults import Held
from proof.operations import Operations

STILL_S = 600

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


def train_on_one_that_stands_still(directory, writer, let_pass):
    """Saves every five seconds for ten minutes in which nothing gets to the disk, and afterwards.

    Args:
        directory: Where.
        writer: Of the checkpointer.
        let_pass: Called with how many seconds are to go by.

    Raises:
        AssertionError: If it costs memory, is not told of, or anything is lost.
    """
    with SlowDisk() as disk:
        saver = stepsave.Checkpointer(directory, writer=writer, when_busy="skip")
        for step in range(1, 5):
            saver.save(step, state_of(step)).wait()
        held = Held.by(saver)
        disk.stop()
        handles = []
        for step in range(5, 5 + STILL_S // 5):
            let_pass(5)
            handles.append(saver.save(step, state_of(step)))
        # Two in memory, and no more, however many were asked for.
        assert [handle.skipped for handle in handles].count(False) == 2
        assert saver.stats().arena_count == held.arenas
        assert saver.stats().skipped == len(handles) - 2
        assert saver.report().age_s >= STILL_S
        assert "newest backup" in str(saver.report())
        disk.go_on()
        saver.wait(60)
        assert saver.restore().step == 6
        assert_is_state_of(saver.restore())
        last = 5 + STILL_S // 5
        for step in range(last, last + 4):
            saver.save(step, state_of(step)).wait()
        assert saver.report().age_s < STILL_S <= saver.report().worst_age_s
        assert Held.by(saver) == held
        saver.close()
    assert restore_once(directory).step == last + 3
