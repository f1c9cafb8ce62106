import gc
import threading
import time

import pytest
from engine_support import check_python
from interrupting import Interrupted, InterruptedAfter

from stepsave.threads import Crew, Latch


@pytest.fixture
def crew():
    crew = Crew(3, "test")
    yield crew
    crew.end()
    crew.join()


def test_a_latch_lets_all_pass_who_wait_and_who_come_later():
    latch = Latch()
    passed = []

    def wait():
        passed.append(latch.wait())  # without a limit, after which it would look again

    waiters = [threading.Thread(target=wait, daemon=True) for _ in range(5)]
    for waiter in waiters:
        waiter.start()
    assert not latch.wait(0.01)
    assert not latch.is_open
    latch.open()
    end_s = time.monotonic() + 20
    for waiter in waiters:
        waiter.join(max(0, end_s - time.monotonic()))
    assert passed == [True] * 5
    assert latch.wait(0)


def test_a_latch_that_opens_as_somebody_begins_to_wait_lets_him_pass():
    latch = Latch()

    class Late(list):
        def append(self, waiter):
            latch.open()  # by a thread that has not seen the waiter yet
            super().append(waiter)

    latch._waiters = Late()
    passed = []
    waiter = threading.Thread(target=lambda: passed.append(latch.wait()), daemon=True)
    waiter.start()
    waiter.join(30)
    assert passed == [True]


def test_a_wait_that_is_interrupted_hinders_nobody():
    latch = Latch()
    for _ in range(50):
        with pytest.raises(Interrupted), InterruptedAfter(0.001):
            latch.wait(30)
    threading.Timer(0.01, latch.open).start()
    assert latch.wait(30)


def test_one_thread_does_tasks_in_their_order():
    crew, done = Crew(1, "test"), []
    for number in range(100):
        crew.put(lambda number=number: done.append(number))
    crew.end()
    crew.join()
    assert done == list(range(100))


def test_a_call_returns_what_was_returned_and_raises_what_was_raised(crew):
    assert crew.call(threading.current_thread).name.startswith("test-")
    with pytest.raises(ZeroDivisionError):
        crew.call(lambda: 1 / 0)


def test_a_call_goes_on_when_its_caller_is_interrupted(crew):
    done = Latch()

    def work():
        time.sleep(0.1)
        done.open()

    with pytest.raises(Interrupted), InterruptedAfter(0.02):
        crew.call(work)
    assert done.wait(30)


def test_work_is_shared_and_each_item_done_once(crew):
    done, names = [], set()

    def work(item):
        time.sleep(0.001)
        done.append(item)
        names.add(threading.current_thread().name)

    crew.share(range(60), work, helpers=3)
    assert sorted(done) == list(range(60))
    assert len(names) > 1


def test_after_an_error_no_item_is_begun_with(crew):
    done = []

    def work(item):
        if item == 5:
            raise ValueError("five")
        time.sleep(0.001)
        done.append(item)

    with pytest.raises(ValueError, match="five"):
        crew.share(range(1000), work, helpers=2)
    assert len(done) < 500


def test_who_puts_a_task_after_the_end_does_it_himself():
    crew = Crew(2, "test")
    crew.end()
    crew.join()
    assert crew.call(threading.current_thread) is threading.current_thread()
    done = []
    crew.share(range(5), done.append, helpers=2)
    assert done == list(range(5))


def test_the_threads_of_a_crew_that_is_dropped_end():
    crew = Crew(2, "dropped")
    crew.call(lambda: None)
    del crew
    gc.collect()
    deadline_s = time.monotonic() + 30
    while any(thread.name.startswith("dropped") for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_the_interpreter_ends_and_what_was_put_is_done():
    out = check_python(
        """
import atexit, os, time
from stepsave.threads import Crew
crew = Crew(2, "test")
atexit.register(lambda: crew.put(lambda: print("after the end", flush=True)))
for number in range(5):
    crew.put(lambda number=number: (time.sleep(0.05), os.write(1, b"done %d\\n" % number)))
""",
        timeout=30,
    )
    assert sorted(out.split("\n")[:5]) == [f"done {number}" for number in range(5)]
    assert "after the end" in out
