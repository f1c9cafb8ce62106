"""Calls of several threads wait for each other; one that was interrupted holds up nobody."""

import threading
import time

import pytest
from engine_support import assert_is_state_of, restore_once, state_of
from interrupting import Interrupted, InterruptedAfter, enumerate_lines

import stepsave
from stepsave.engine.turns import Turns
from stepsave.threads import Latch

PATIENCE_S = 60


class Counter:
    """Counts in two steps, so that two threads at once lose some."""

    def __init__(self):
        self.turns = Turns()
        self.value = 0

    def add(self):
        with self.turns.take(self):
            value = self.value
            time.sleep(0)
            self.value = value + 1

    def add_twice(self):
        with self.turns.take(self):
            self.add()
            self.add()

    def wait(self, begun, latch):
        with self.turns.take(self):
            begun.open()
            assert latch.wait(PATIENCE_S)


def in_thread(function, *arguments):
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def test_no_two_threads_are_within_at_once():
    counter = Counter()
    threads = [in_thread(lambda: [counter.add_twice() for _ in range(300)]) for _ in range(4)]
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert counter.value == 4 * 300 * 2


def test_a_call_waits_until_the_one_before_has_ended_and_no_longer():
    counter, begun, latch = Counter(), Latch(), Latch()
    first = in_thread(counter.wait, begun, latch)
    assert begun.wait(PATIENCE_S)
    second = in_thread(counter.add)
    second.join(0.2)
    assert (second.is_alive(), counter.value) == (True, 0)
    latch.open()
    for thread in (first, second):
        thread.join(PATIENCE_S)
    assert counter.value == 1


def test_a_call_that_is_interrupted_anywhere_holds_up_neither_its_thread_nor_others():
    counter = Counter()

    def make_body():
        def check():
            other = in_thread(counter.add)
            counter.add()
            other.join(PATIENCE_S)
            assert not other.is_alive()

        return counter.add_twice, check

    assert enumerate_lines(make_body, instructions=True) > 100


def test_who_waits_for_his_turn_may_be_interrupted():
    counter, begun, latch = Counter(), Latch(), Latch()
    first = in_thread(counter.wait, begun, latch)
    assert begun.wait(PATIENCE_S)
    for _ in range(3):
        with pytest.raises(Interrupted), InterruptedAfter(0.07):
            counter.add()
    latch.open()
    first.join(PATIENCE_S)
    counter.add()
    assert counter.value == 1


def test_a_save_of_an_interrupted_call_is_settled_by_one_that_saves_flat_leaves(
    tmp_path, monkeypatch
):
    """As the callback does: nothing else is called between two saves."""
    from stepsave.format.tree import flatten
    from stepsave.snapshot.runs import Pack

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save_leaves(1, *flatten(state_of(1))).wait(PATIENCE_S)
        with monkeypatch.context() as patch:
            patch.setattr(Pack, "fill", interrupt)
            with pytest.raises(KeyboardInterrupt):
                saver.save_leaves(2, *flatten(state_of(2)))
        saver.save_leaves(3, *flatten(state_of(3))).wait(PATIENCE_S)
    assert restore_once(tmp_path).state["optimizer"]["step"] == 3


def test_a_save_behind_a_closing_that_was_interrupted_is_refused(tmp_path, monkeypatch):
    """The closing goes on; what is put behind it must not write where others may be by then."""
    from stepsave.store.local import LocalStore

    latch, real = Latch(), LocalStore.rename

    def rename(self, source, target):
        assert latch.wait(PATIENCE_S)
        real(self, source, target)

    saver = stepsave.Checkpointer(tmp_path)
    saver.save(1, state_of(1)).wait(PATIENCE_S)
    monkeypatch.setattr(LocalStore, "rename", rename)
    saver.save(2, state_of(2))
    with pytest.raises(Interrupted), InterruptedAfter(0.2):
        saver.close()
    handle = saver.save(3, state_of(3))
    latch.open()
    with pytest.raises(stepsave.SaveFailedError) as caught:
        handle.wait(PATIENCE_S)
    assert isinstance(caught.value.__cause__, stepsave.CheckpointerClosedError)
    saver.close()
    backup = restore_once(tmp_path)
    assert backup.step == 2
    assert_is_state_of(backup)
