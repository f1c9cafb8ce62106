import threading

import numpy as np
import pytest

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
    pages = Pages(SIZE)
    memory = pages.view()
    assert (memory.nbytes, memory.ctypes.data % 4096) == (SIZE, 0)
    assert not memory[::4097].any()
    Touching(memory, crew).wait()
    assert not memory.any()


def test_views_are_of_the_same_memory():
    pages = Pages(SIZE)
    pages.view()[5] = 9
    assert pages.lend()[5] == 9


def test_memory_is_lent_as_long_as_any_view_lives():
    pages = Pages(SIZE)
    own = pages.view()
    assert not pages.is_lent
    lent = pages.lend()
    part = np.asarray(lent[8:16].view(np.float64).reshape(1, 1))[0]
    del lent
    assert pages.is_lent
    del part
    assert not pages.is_lent
    assert not own.any()


def test_touching_that_nobody_has_begun_with_is_given_up(crew):
    goes_on = threading.Event()
    crew.put(lambda: goes_on.wait(30))
    touching = Touching(Pages(SIZE).view(), crew)
    touching.stop()  # returns, although no thread is free
    goes_on.set()
    touching.wait()


def test_available_memory_is_a_plausible_number():
    found = available_bytes()
    assert found is None or 1 << 20 < found < 1 << 50
