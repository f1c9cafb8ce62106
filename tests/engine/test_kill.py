"""A child that saves all the time is killed at random moments; nothing acknowledged is lost.

`python -m proof.kills` does that a thousand times, and to processes that do other things.
"""

import random

import pytest
from proof.nursery import Nursery
from proof.random_deaths import Victims, mixtures

KILLS = 12


@pytest.mark.parametrize("writer", ["auto", "tensorstore"])
@pytest.mark.parametrize("mixture", ["train", "double"])
@pytest.mark.usefixtures("small_shards")
def test_a_process_killed_at_any_moment_leaves_its_last_durable_step(tmp_path, writer, mixture):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201  shown if the test fails
    kill(tmp_path, seed, mixtures()[mixture], writer, KILLS)


@pytest.mark.parametrize("mixture", ["first", "restore", "delete kept", "fail", "leave"])
def test_whatever_a_process_does_it_may_be_killed_meanwhile(tmp_path, mixture, small_shards):
    del small_shards
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201  shown if the test fails
    kill(tmp_path, seed, mixtures()[mixture], "auto", 4)


def kill(tmp_path, seed, mixture, writer, count):
    with Nursery(tmp_path / "noise") as nursery:
        chance = random.Random(seed)
        victims = Victims(nursery, mixture, {"writer": writer}, tmp_path / "backup", chance)
        steps = [victims.kill_one() for _ in range(count)]
        if mixture.life == "train" and not mixture.anew:
            assert steps[-1] >= count // 2, "hardly anything was saved: the test tests nothing"
        if not mixture.anew:
            victims.end(steps[-1])
