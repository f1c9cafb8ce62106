"""What saving every so many steps costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepsave.cli.costs import SaveCost


def simulate(cost, every, saves=400):
    """A training with two buffers: how long it takes, against one that saves nothing."""
    now_s = disk_free_s = 0.0
    ends_s = []
    for _ in range(saves):
        now_s += every * cost.step_s
        if len(ends_s) > 1:
            now_s = max(now_s, ends_s[-2])  # until a buffer is free
        now_s += cost.stall_s
        disk_free_s = max(now_s, disk_free_s) + cost.write_s
        ends_s.append(disk_free_s)
    return now_s / (saves * every * cost.step_s) - 1


@given(
    stall_s=st.floats(1e-4, 10), write_s=st.floats(1e-4, 60), step_s=st.floats(1e-3, 10),
    every=st.integers(1, 1000),
)  # fmt: skip
def test_it_is_what_a_simulated_training_pays(stall_s, write_s, step_s, every):
    cost = SaveCost(stall_s, stall_s + write_s, step_s)
    assert simulate(cost, every) == pytest.approx(cost.overhead(every), rel=0.02, abs=0.01)


@given(
    stall_s=st.floats(1e-4, 10), write_s=st.floats(1e-4, 60), step_s=st.floats(1e-3, 10),
    share=st.floats(1e-3, 0.5),
)  # fmt: skip
def test_what_is_recommended_keeps_within_the_share_and_one_less_does_not(
    stall_s, write_s, step_s, share
):
    cost = SaveCost(stall_s, stall_s + write_s, step_s)
    every = cost.within(share)
    assert cost.overhead(every) <= share * (1 + 1e-6)
    assert cost.write_s <= every * step_s * (1 + 1e-9)
    if every > 1:
        is_over = cost.overhead(every - 1) > share * (1 - 1e-6)
        assert is_over or cost.write_s > (every - 1) * step_s


def test_what_a_kill_undoes_is_the_time_since_the_last_commit_began():
    cost = SaveCost(stall_s=0.5, durable_s=2.0, step_s=0.1)
    assert cost.most_lost_s(100) == pytest.approx(10 + 0.5 + 2)
