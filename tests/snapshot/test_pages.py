import threading
import time

import numpy as np
import pytest

from stepsave.snapshot import pages
from stepsave.snapshot.pages import Pages, Touching, available_bytes
from stepsave.threads import Crew

SIZE = 20 << 20


@pytest.fixture
def crew():
    crew = Crew(1, "test")
    yield crew
    crew.end()
    crew.join()


def test_memory_is_page_aligned_and_zeros_before_and_after_it_is_touched(crew):
    made = Pages(SIZE)
    memory = made.view()
    assert (memory.nbytes, memory.ctypes.data % 4096) == (SIZE, 0)
    assert not memory[::4097].any()
    touching = Touching(memory)
    crew.put(touching.run)
    touching.wait()
    assert not memory.any()


def test_views_are_of_the_same_memory():
    made = Pages(SIZE)
    made.view()[5] = 9
    assert made.lend()[5] == 9


def test_memory_is_lent_as_long_as_any_view_lives():
    made = Pages(SIZE)
    own = made.view()
    assert not made.is_lent
    lent = made.lend()
    part = np.asarray(lent[8:16].view(np.float64).reshape(1, 1))[0]
    del lent
    assert made.is_lent
    del part
    assert not made.is_lent
    assert not own.any()


def test_touching_that_nobody_has_begun_with_is_given_up(crew):
    goes_on = threading.Event()
    crew.put(lambda: goes_on.wait(30))
    touching = Touching(Pages(SIZE).view())
    crew.put(touching.run)
    touching.stop()  # returns, although no thread is free
    goes_on.set()
    touching.wait()


def test_where_memory_comes_slowly_most_of_it_is_left_to_others(monkeypatch):
    rests = []
    monkeypatch.setattr(pages, "_FAST_BYTES_PER_S", 1e15)
    monkeypatch.setattr(pages.Latch, "wait", lambda _, timeout_s=None: rests.append(timeout_s))
    began_s = time.perf_counter()
    Touching(Pages(SIZE).view()).run()
    took_s = time.perf_counter() - began_s
    assert len(rests) == 3
    assert all(0 < rest < 9 * took_s for rest in rests)


def test_who_waits_for_memory_that_comes_slowly_has_it_come_without_rests(crew, monkeypatch):
    monkeypatch.setattr(pages, "_FAST_BYTES_PER_S", 1e15)
    monkeypatch.setattr(pages, "_RESTS", 1e9)
    touching = Touching(Pages(SIZE).view())
    crew.put(touching.run)
    touching.hurry()  # or a thread of the crew would rest for days
    touching.wait()


def test_available_memory_is_a_plausible_number():
    found = available_bytes()
    assert found is None or 1 << 20 < found < 1 << 50
