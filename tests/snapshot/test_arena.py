import threading

import numpy as np
import pytest
from engine_support import filled, plan_of, random_array

from stepsave.errors import ArenaMemoryError
from stepsave.snapshot import arena
from stepsave.snapshot.arena import Arena, ArenaPool, Claim, pages_for
from stepsave.snapshot.contents import Attention
from stepsave.snapshot.pages import Pages
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
    return lambda size: monkeypatch.setattr(arena, "available_bytes", lambda: size)


def test_gaps_are_zeros_after_another_layout_was_there():
    _, arena = filled([random_array((3000,), "uint8", seed=i) for i in range(20)])
    arrays = [np.zeros(5, np.uint8), np.ones(3, np.float32)]
    plan, arena = filled(arrays, arena=arena)
    _, fresh = filled(arrays, arena=Arena(Pages(arena.capacity_bytes)))
    assert plan.arena_bytes <= arena.capacity_bytes
    assert (arena.bytes == fresh.bytes).all()


@pytest.mark.usefixtures("small_shards")
def test_shards_are_the_bytes_of_the_arena_in_order():
    plan, arena = filled([random_array((200_000,), "uint8")])
    assert plan.shard_count > 1
    whole = b"".join(arena.shard(number).tobytes() for number in range(plan.shard_count))
    assert whole == arena.bytes[: plan.arena_bytes].tobytes()


@pytest.mark.parametrize("size", [None, 4 * HUGE_PAGE])
def test_there_are_two_arenas_where_two_fit(available, size, crew):
    available(size)
    pool = ArenaPool(plan_of([np.zeros(10)]), crew)
    assert pool.count == 2
    pool.close()


def test_with_room_for_one_arena_there_is_one_and_one_warning(available, crew):
    available(4 * HUGE_PAGE - 1)
    with pytest.warns(UserWarning, match="need 2 x 4 MiB.*is 4 MiB beside the first") as caught:
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

    class Limited(Pages):
        def __init__(self, size):
            if made:
                raise OSError("no memory")
            made.append(size)
            super().__init__(size)

    monkeypatch.setattr(arena, "Pages", Limited)
    with pytest.warns(UserWarning, match="available memory is unknown"):
        pool = ArenaPool(plan_of([np.zeros(10)]), crew)
    assert pool.count == 1
    pool.close()


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


def test_memory_of_a_restore_is_an_arena_when_the_last_view_of_it_has_gone(crew):
    plan = plan_of([np.zeros(10)])
    pages = pages_for(plan)
    restored = pages.lend()
    view = restored[4:8].view(np.int32)
    pool = ArenaPool(plan, crew, pages)
    assert pool.count == 2
    claims = [Claim(), Claim()]
    other = pool.acquire(claims[0], block=True)
    assert other.pages is not pages
    del restored
    assert pages.is_lent
    del view
    assert pool.acquire(claims[1], block=False).pages is pages
    pool.close()


def test_there_is_another_arena_for_one_whose_restored_arrays_are_kept(crew):
    plan = plan_of([np.zeros(10)])
    pages = pages_for(plan)
    restored = pages.lend()
    restored[:] = 7
    pool = ArenaPool(plan, crew, pages)
    claims = [Claim() for _ in range(4)]
    lent = [pool.acquire(claim, block=False) for claim in claims[:2]]
    assert all(arena.pages is not pages for arena in lent)
    assert lent[0] is not lent[1]
    assert pool.acquire(claims[2], block=False) is None
    for taken in lent:
        taken.bytes[:] = 1
    assert (restored == 7).all()
    pool.close()


def test_without_memory_beside_a_restored_backup_it_is_said_to_let_go_of_it(available, crew):
    plan = plan_of([np.zeros(10)])
    pages = pages_for(plan)
    restored = pages.lend()
    available(0)
    with pytest.warns(UserWarning, match="Using one"):
        pool = ArenaPool(plan, crew, pages)
    with pytest.raises(ArenaMemoryError, match=r"still in use.*`del backup`"):
        pool.acquire(Claim(), block=True)
    del restored
    assert pool.acquire(Claim(), block=True).pages is pages
    pool.close()


def test_a_restore_into_too_little_memory_is_no_arena(crew):
    large = plan_of([np.zeros(4 * HUGE_PAGE, np.uint8)])
    pool = ArenaPool(large, crew, pages_for(plan_of([np.zeros(10)])))
    assert pool.count == 2
    assert all(memory.nbytes >= large.arena_bytes for memory in pool.memories)
    pool.close()


def test_gaps_are_zeros_in_memory_that_a_restore_left(crew):
    arrays = [np.zeros(5, np.uint8), random_array((70_000,), "uint8"), np.ones(3, np.float32)]
    plan = plan_of(arrays)
    pages = pages_for(plan)
    pages.view()[:] = 255
    pool = ArenaPool(plan, crew, pages)
    arena = pool.acquire(Claim(), block=True)
    assert arena.pages is pages
    filled(arrays, arena=arena)
    _, fresh = filled(arrays, arena=Arena(Pages(arena.capacity_bytes)))
    assert (arena.bytes == fresh.bytes).all()
    pool.close()


def test_an_arena_that_is_needed_is_touched_no_further(monkeypatch, crew):
    """And what was copied in meanwhile is not zeroed by those who touch."""
    touched = threading.Event()
    goes_on = threading.Event()

    class Slow(Pages):
        def view(self):
            return super().view().view(Watched)

    class Watched(np.ndarray):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if isinstance(key, slice) and key.step is not None:
                touched.set()
                assert goes_on.wait(30)

    monkeypatch.setattr(arena, "Pages", Slow)
    array = random_array((3 * HUGE_PAGE,), "uint8")
    pool = ArenaPool(plan_of([array]), crew)
    assert touched.wait(30)
    plan = plan_of([array])
    taken = pool.acquire(Claim(), block=True)
    threading.Timer(0.05, goes_on.set).start()
    taken.bind(plan)
    taken.begin([array].__getitem__, Attention()).work()
    crew.call(lambda: None)
    pool.wait_touched()
    assert (np.asarray(taken.bytes)[: array.nbytes] == array).all()
    pool.close()


def test_an_arena_is_lent_when_nobody_fills_it_any_more_for_a_save_that_was_given_up(crew):
    array = random_array((200_000,), "uint8")
    copying, goes_on = threading.Event(), threading.Event()

    def source(_):
        copying.set()
        assert goes_on.wait(30)
        return array

    plan, claim = plan_of([array]), Claim()
    pool = ArenaPool(plan, crew)
    taken = pool.acquire(claim, block=True)
    taken.bind(plan)
    helper = threading.Thread(target=taken.begin(source, Attention()).help)
    helper.start()
    assert copying.wait(30)
    claim.drop()
    threading.Timer(0.1, goes_on.set).start()
    assert pool.acquire(Claim(), block=False) is taken
    assert goes_on.is_set(), "it waited for the helper"
    helper.join()
    pool.close()


def test_what_a_device_may_have_overwritten_is_not_taken_for_what_was_there():
    array = random_array((HUGE_PAGE,), "uint8")
    plan, arena = filled([array])
    attention = Attention()
    for _ in range(3):  # until it is known, and left alone
        arena.begin([array].__getitem__, attention).work()
    known = arena.begin([array].__getitem__, attention)
    known.work()
    assert known.held.changed_bytes() == 0
    arena.settle(by_device=True)
    arena.bytes[plan.chunks[0].offset_bytes] ^= 255  # and then the transfer failed
    arena.begin([array].__getitem__, attention).work()
    begin = plan.chunks[0].offset_bytes
    assert (arena.bytes[begin : begin + array.nbytes] == array).all()
