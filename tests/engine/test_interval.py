"""How often to save, by what saves cost: arithmetic."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepsave.engine.interval import Interval, best_interval_s

pytestmark = pytest.mark.once

SECONDS = st.floats(1e-6, 1e4)


def lost(interval_s, cost_s, mtbf_s):
    """The share of the time that saves and failures cost, exactly, if failures are Poisson's."""
    work_s = interval_s - cost_s
    # Expected time to get through an interval, begun anew after each failure: Daly's equation 13.
    return 1 - work_s / (mtbf_s * math.expm1(interval_s / mtbf_s))


# Daly's paper, figures 3 to 5: the time between dumps of five minutes, without the dump.
@pytest.mark.parametrize(("mtbf_min", "expected"), [(24 * 60, "117"), (6 * 60, "57"), (15, "9.1")])
def test_the_best_interval_is_that_of_dalys_paper(mtbf_min, expected):
    minutes = best_interval_s(5 * 60, mtbf_min * 60) / 60 - 5
    assert f"{minutes:.{3 if mtbf_min > 999 else 2}g}" == expected


@given(share=st.floats(1e-6, 0.5), mtbf_s=st.floats(10, 1e7))
def test_nothing_loses_less_than_the_best_interval_by_more_than_a_hundredth(share, mtbf_s):
    cost_s = share * mtbf_s
    best_s = best_interval_s(cost_s, mtbf_s)
    others = cost_s + (best_s - cost_s) * np.geomspace(0.1, 10, 400)
    least = min(lost(other_s, cost_s, mtbf_s) for other_s in others if other_s < 50 * mtbf_s)
    assert lost(best_s, cost_s, mtbf_s) <= least * 1.01


def test_saves_that_cost_more_than_failures_come_seldom_enough_to_do_something_in_between():
    assert best_interval_s(30.0, 10.0) == 40.0


def learn(interval, costs_s, durable_s=0.0):
    chosen = []
    for cost_s in costs_s:
        interval.learn(cost_s, durable_s)
        chosen.append(interval.seconds)
    return chosen


def test_the_first_two_saves_teach_nothing_but_how_long_to_wait_for_the_next():
    interval = Interval(0.01, None)
    assert learn(interval, [0.5, 0.3], durable_s=9.0) == pytest.approx([5.0, 3.0])
    assert not interval.is_settled
    assert learn(interval, [0.02, 0.02])[-1] == pytest.approx(0.02 / 0.01 * 1.2)
    assert interval.is_settled
    assert interval.bound == "budget"


def test_the_disk_decides_where_saves_take_long_to_be_durable():
    interval = Interval(0.5, None)
    chosen = learn(interval, [0.1] * 12, durable_s=4.0)
    assert chosen[-1] == pytest.approx(4.0 * 1.2)
    assert interval.bound == "disk"


@pytest.mark.parametrize(
    ("mtbf_s", "expected_s", "bound"),
    [(1e6, 141.5, "failures"), (10.0, 1.2, "budget")],  # the budget wins
)
def test_failures_decide_where_they_are_so_rare_that_less_would_do(mtbf_s, expected_s, bound):
    interval = Interval(0.01, mtbf_s)
    assert learn(interval, [0.01] * 20)[-1] == pytest.approx(expected_s, rel=0.01)
    assert interval.bound == bound


def test_a_choice_changes_by_a_factor_of_two_at_most():
    interval = Interval(0.01, None)
    chosen = learn(interval, [0.02] * 12 + [2.0] * 30 + [0.02] * 30)[3:]
    changes = [after / before for before, after in itertools.pairwise(chosen)]
    assert max(changes) <= 2
    assert min(changes) >= 0.5
    assert chosen[35] == pytest.approx(240, rel=0.7)
    assert chosen[-1] == pytest.approx(2.4, rel=0.7)


def test_an_accident_changes_little():
    interval = Interval(0.01, None)
    before = learn(interval, [0.02] * 12)[-1]
    after = learn(interval, [20.0, *[0.02] * 20])
    assert max(after) <= 2 * before


def test_saves_that_cost_nothing_are_as_often_as_can_be_until_they_do():
    interval = Interval(0.01, None)
    assert learn(interval, [0.0] * 10)[-1] == 0
    assert 10 <= learn(interval, [0.1] * 20)[-1] <= 20


@given(
    costs_s=st.lists(SECONDS, min_size=3, max_size=60),
    durable_s=st.none() | SECONDS,
    overhead=st.floats(1e-4, 1.0),
    mtbf_s=st.none() | st.floats(1, 1e9),
)
def test_whatever_is_learned_there_is_a_choice(costs_s, durable_s, overhead, mtbf_s):
    interval = Interval(overhead, mtbf_s)
    chosen = learn(interval, costs_s, durable_s)
    assert all(0 < each < math.inf for each in chosen)
    assert interval.bound in ("budget", "disk", "failures")


@given(cost_s=SECONDS, overhead=st.floats(1e-3, 1.0), seed=st.integers(0, 999))
def test_noise_of_a_third_changes_the_choice_a_few_times_at_most(cost_s, overhead, seed):
    noise = random.Random(seed)
    interval = Interval(overhead, None)
    chosen = learn(interval, [cost_s * noise.uniform(0.67, 1.33) for _ in range(300)])[2:]
    assert len(set(chosen)) <= 5
    settled = chosen[20:]
    assert len(set(settled)) <= 2
    assert min(settled) >= 0.95 * cost_s / overhead
    assert max(settled) <= 2 * 1.15 * cost_s / overhead
