"""Processes that are told to stop, and end at the same step: played by threads of this one."""

import json
import random
import threading
import time

import pytest
from peers_support import Service

import stepsave
from stepsave.engine.peers import Board
from stepsave.fit import stopping
from stepsave.fit.stopping import StopAgreement

pytestmark = pytest.mark.once


def train(service, rank, count, barrier, told_at, ends, *, steps=400, run_ahead=0, execution=1):
    """Steps that need all, of which each process may be some ahead in what it has begun."""
    board = Board.__new__(Board)
    board.peers, board._place, board._prefix = service.peers(rank, count), "here", "here"
    agreement = StopAgreement(board)
    rng = random.Random(rank)
    try:
        for step in range(execution, steps + 1, execution):
            if step > run_ahead:
                barrier.wait(30)
            time.sleep(rng.random() * 0.004)
            signum = 15 if told_at is not None and step >= told_at else None
            if agreement.is_due(step, signum):
                agreement.end()
                ends[rank] = step, agreement.signum
                return
        ends[rank] = "end", None
    finally:
        agreement.close()


def play(told, *, count=3, delay_s=0.0, **options):
    service, ends, threads = Service(delay_s), {}, []
    barrier = threading.Barrier(count)
    for rank in range(count):
        arguments = (service, rank, count, barrier, told.get(rank), ends)
        threads.append(threading.Thread(target=train, args=arguments, kwargs=options))
        threads[-1].start()
    # What waits in vain for one that has ended is not waited for here.
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return ends


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stopping, "_POLL_S", 0.01)
    monkeypatch.setattr(stopping, "_AHEAD_S", 0.1)
    monkeypatch.setattr(stopping, "_LIMIT_S", 5.0)


@pytest.mark.parametrize("told", [{0: 20}, {1: 20}, {2: 1}, {0: 20, 1: 21, 2: 23}])
@pytest.mark.parametrize("options", [{}, {"execution": 5}, {"delay_s": 0.02}])
def test_all_end_at_one_step_whoever_was_told(told, options):
    ends = play(told, **options)
    assert len(ends) == 3
    assert len(set(ends.values())) == 1
    step, signum = ends[0]
    assert step >= min(told.values())
    assert signum == 15


def test_a_step_that_some_have_passed_is_not_agreed(monkeypatch):
    monkeypatch.setattr(StopAgreement, "_ahead", lambda _: 1)
    ends = play({1: 30}, delay_s=0.03)
    assert len(set(ends.values())) == 1
    assert ends[0][0] >= 30


def test_nobody_ends_who_is_not_told():
    assert set(play({}, steps=30).values()) == {("end", None)}


def test_a_training_that_ends_before_the_step_ends_as_it_would():
    ends = play({1: 29}, steps=30)
    assert set(ends.values()) == {("end", None)}


def test_a_process_that_does_not_answer_is_waited_for_so_long_and_named(monkeypatch):
    monkeypatch.setattr(stopping, "_LIMIT_S", 0.3)
    service = Service()
    agreement = StopAgreement(Board(service.peers(0, 2), "a place of this test"))

    def go_on():
        for step in range(1, 1000):
            agreement.is_due(step, 15)
            time.sleep(0.01)

    with pytest.raises(stepsave.PeerError, match=r"process 0 of 2.* for process 1 .*`seen 0 1`"):
        go_on()
    agreement.close()
    (proposal,) = (value for key, value in service.values.items() if key.endswith("/stop 0"))
    assert json.loads(proposal)["signum"] == 15
