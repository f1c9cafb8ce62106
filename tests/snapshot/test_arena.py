import threading

import numpy as np
import pytest
from engine_support import filled, plan_of, random_array

from stepsave.errors import ArenaMemoryError
from stepsave.snapshot import arena
from stepsave.snapshot.arena import Arena, ArenaPool, Claim
from stepsave.threads import Crew

HUGE_PAGE = 2 << 20


@pytest.fixture
def crew():
    crew = Crew(2, "test")
    yield crew
    crew.end()
    crew.join()


@pytest.fixture
def available(monkeypatch):
    return lambda size: monkeypatch.setattr(arena, "_available_bytes", lambda: size)


def test_gaps_are_zeros_after_another_layout_was_there():
    _, arena = filled([random_array((3000,), "uint8", seed=i) for i in range(20)])
    arrays = [np.zeros(5, np.uint8), np.ones(3, np.float32)]
    plan, arena = filled(arrays, arena=arena)
    _, fresh = filled(arrays, arena=Arena(arena.capacity_bytes))
    assert plan.arena_bytes <= arena.capacity_bytes
    assert (arena.bytes == fresh.bytes).all()


@pytest.mark.usefixtures("small_shards")
def test_shards_are_the_bytes_of_the_arena_in_order():
    plan, arena = filled([random_array((200_000,), "uint8")])
    assert plan.shard_count > 1
    whole = b"".join(arena.shard(number).tobytes() for number in range(plan.shard_count))
    assert whole == arena.bytes[: plan.arena_bytes].tobytes()


def test_memory_is_page_aligned_and_untouched_bytes_are_zeros():
    arena = Arena(HUGE_PAGE)
    assert arena.bytes.ctypes.data % 4096 == 0
    for part in range(3):
        arena.touch(part, 3)
    assert not arena.bytes.any()


@pytest.mark.parametrize("size", [None, 4 * HUGE_PAGE])
def test_there_are_two_arenas_where_two_fit(available, size, crew):
    available(size)
    pool = ArenaPool(plan_of([np.zeros(10)]), crew)
    assert pool.count == 2
    pool.close()


def test_with_room_for_one_arena_there_is_one_and_one_warning(available, crew):
    available(4 * HUGE_PAGE - 1)
    with pytest.warns(UserWarning, match="Using one") as caught:
        pool = ArenaPool(plan_of([np.zeros(HUGE_PAGE // 8)]), crew)
    assert len(caught) == 1
    assert pool.count == 1
    pool.close()


def test_without_room_for_one_arena_it_is_refused_with_both_sizes(available, crew):
    available(HUGE_PAGE - 1)
    with pytest.raises(ArenaMemoryError, match=r"needs 2 MiB, but available memory is 2 MiB"):
        ArenaPool(plan_of([np.zeros(10)]), crew)


def test_memory_that_the_system_refuses_counts_as_missing(monkeypatch, available, crew):
    available(None)
    made = []

    class Limited(Arena):
        def __init__(self, size):
            if made:
                raise OSError("no memory")
            made.append(size)
            super().__init__(size)

    monkeypatch.setattr(arena, "Arena", Limited)
    with pytest.warns(UserWarning, match="available memory is unknown"):
        pool = ArenaPool(plan_of([np.zeros(10)]), crew)
    assert pool.count == 1
    pool.close()


def test_available_memory_is_a_plausible_number():
    found = arena._available_bytes()
    assert found is None or 1 << 20 < found < 1 << 50


def test_an_arena_is_lent_to_one_save_at_a_time(crew):
    pool = ArenaPool(plan_of([np.zeros(10)]), crew)
    claims = [Claim(), Claim(), Claim(), Claim()]
    first, second = (pool.acquire(claim, block=True) for claim in claims[:2])
    assert first is not second
    assert pool.acquire(claims[2], block=False) is None
    timer = threading.Timer(0.05, claims[0].release)
    timer.start()
    assert pool.acquire(claims[3], block=True) is first
    timer.join()
    pool.close()


def test_a_claim_is_accepted_or_dropped_and_never_both():
    accepted, dropped = Claim(), Claim()
    assert accepted.accept()
    assert not accepted.drop()
    assert accepted.accept(), "it stays so"
    assert not accepted.is_over
    assert dropped.drop()
    assert not dropped.accept()
    assert dropped.is_over


def test_an_arena_whose_claim_was_dropped_is_free_again(crew):
    pool = ArenaPool(plan_of([np.zeros(10)]), crew)
    claims = [Claim(), Claim()]
    lent = [pool.acquire(claim, block=True) for claim in claims]
    claims[1].drop()
    assert pool.acquire(Claim(), block=False) is lent[1]
    pool.close()
