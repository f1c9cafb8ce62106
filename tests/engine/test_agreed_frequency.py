"""Processes that save the same steps by one clock: played by threads of this one."""

import random
import threading
import time

import pytest
from peers_support import Service

import stepsave
from stepsave.engine import agreed_frequency
from stepsave.engine.agreed_frequency import AgreedFrequency
from stepsave.engine.frequency import SaveFrequency
from stepsave.engine.peers import Board

pytestmark = pytest.mark.once


class EachTenth(SaveFrequency):
    """Due, when somebody asks, if ten steps have been made since it was."""

    def __init__(self):
        self.last = 0
        self.asked = []

    def is_due(self, step):
        self.asked.append(step)
        if step < self.last + 10:
            return False
        self.last = step
        return True


def board_of(service, rank, count):
    board = Board.__new__(Board)
    board.peers, board._place, board._prefix = service.peers(rank, count), "here", "here"
    return board


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(agreed_frequency, "_AHEAD_S", 0.02)
    monkeypatch.setattr(agreed_frequency, "_APART_S", 0.02)
    monkeypatch.setattr(agreed_frequency, "_LIMIT_S", 20.0)


def train(frequency, rank, barrier, saved, *, steps, run_ahead, execution):
    """Steps that need all, of which each process may be some ahead in what it has begun."""
    rng = random.Random(rank)
    try:
        for step in range(execution, steps + 1, execution):
            if step > run_ahead:
                barrier.wait(30)
            time.sleep(rng.random() * 0.004)
            if frequency.is_due(step):
                saved[rank].append(step)
    finally:
        frequency.close()


def play(*, count=3, delay_s=0.0, steps=300, run_ahead=0, execution=1):
    service, saved = Service(delay_s), [[] for _ in range(count)]
    barrier, threads, own = threading.Barrier(count), [], [EachTenth() for _ in range(count)]
    for rank in range(count):
        frequency = AgreedFrequency(own[rank], board_of(service, rank, count), 0, lambda: None)
        options = {"steps": steps, "run_ahead": run_ahead, "execution": execution}
        arguments = (frequency, rank, barrier, saved)
        threads.append(threading.Thread(target=train, args=arguments, kwargs=options))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return saved, own, service


@pytest.mark.parametrize(
    "options", [{}, {"execution": 7}, {"delay_s": 0.03}, {"run_ahead": 40}, {"count": 2}]
)
def test_all_save_the_same_steps_as_process_0_says(options):
    saved, own, _ = play(**options)
    assert len(saved[0]) >= 4
    assert all(steps == saved[0] for steps in saved)
    assert all(step % options.get("execution", 1) == 0 for step in saved[0])
    # Each is made a little after it was due, and none is lost.
    due = [step for step in own[0].asked if step]
    assert len(due) >= len(saved[0])
    assert [one.asked for one in own[1:]] == [[]] * (len(saved) - 1)


def test_decisions_are_made_apart_and_followed_later(monkeypatch):
    monkeypatch.setattr(AgreedFrequency, "_measure", lambda *_: 0.004)  # five steps in 0.02 s
    saved, own, service = play(count=2, steps=100)
    assert own[0].asked == [1, 6, *range(16, 100, 10)]
    # Due at 16 for the first time, as ten steps have been made; what is decided then is done at 21.
    assert saved[0] == saved[1] == [*range(21, 101, 10)]
    assert len(service.values) == len(own[0].asked)


def test_old_decisions_are_forgotten(monkeypatch):
    monkeypatch.setattr(agreed_frequency, "_KEPT", 5)
    monkeypatch.setattr(agreed_frequency, "_APART_S", 0.0)
    monkeypatch.setattr(agreed_frequency, "_AHEAD_S", 0.002)
    _, _, service = play(count=2)
    assert len(service.values) <= 6
    assert "here/decision 0" not in service.values


def test_a_process_that_hears_nothing_says_whom_it_waited_for(monkeypatch):
    monkeypatch.setattr(agreed_frequency, "_LIMIT_S", 0.3)
    board = board_of(Service(), 1, 2)
    frequency = AgreedFrequency(EachTenth(), board, 0, lambda: None)
    with pytest.raises(stepsave.PeerError, match=r"process 1 of 2 .* process 0 when to save"):
        frequency.is_due(1)
    frequency.close()


def test_only_process_0_tells_of_a_choice():
    class Talking(SaveFrequency):
        text = "a save every 5 steps"

        def news(self):
            return self.text

    for rank, expected in ((0, "a save every 5 steps"), (1, "")):
        frequency = AgreedFrequency(Talking(), board_of(Service(), rank, 2), 0, lambda: None)
        assert (frequency.text, frequency.news()) == (expected, expected)
        frequency.close()
