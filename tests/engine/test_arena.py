import concurrent.futures
import itertools
import threading

import ml_dtypes
import numpy as np
import pytest
from engine_help import random_array
from hypothesis import given
from hypothesis import strategies as st

from stepsave import arena, layout
from stepsave.arena import Arena, ArenaPool
from stepsave.errors import ArenaMemoryError
from stepsave.layout import compile_layout
from stepsave.snapshot import dtype_name
from stepsave.spec import DTYPES, LeafSpec

HUGE_PAGE = 2 << 20


def plan_of(arrays):
    leaves = [
        LeafSpec((f"w{i}",), array.shape, dtype_name((), array)) for i, array in enumerate(arrays)
    ]
    return compile_layout(leaves)


def filled(arrays, threads=1, arena=None):
    plan = plan_of(arrays)
    arena = arena or Arena(-(-plan.arena_bytes // 4096) * 4096)
    arena.bind(plan, threads)
    with concurrent.futures.ThreadPoolExecutor(4) as helpers:
        arena.fill(arrays, helpers if threads > 1 else None)
    return plan, arena


def leaf_bytes(plan, arena, number):
    chunks = [chunk for chunk in plan.chunks if chunk.leaf == number]
    return b"".join(
        arena.bytes[chunk.offset_bytes :][: chunk.data_bytes].tobytes() for chunk in chunks
    )


@pytest.fixture
def available(monkeypatch):
    return lambda size: monkeypatch.setattr(arena, "_available_bytes", lambda: size)


@given(st.data())
def test_every_leaf_lies_where_the_plan_says(data):
    shapes = st.lists(st.integers(0, 20), max_size=3).map(tuple)
    specs = data.draw(st.lists(st.tuples(shapes, st.sampled_from(list(DTYPES))), max_size=6))
    arrays = [random_array(*spec, seed=i) for i, spec in enumerate(specs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_LIMIT_BYTES", 1 << 10)
        plan, arena = filled(arrays, threads=data.draw(st.sampled_from([1, 3])))
    for i, array in enumerate(arrays):
        assert leaf_bytes(plan, arena, i) == array.tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(60, dtype=np.float32).reshape(6, 10).T,
        np.arange(60, dtype=np.int16)[::-3],
        np.asfortranarray(np.arange(60.0).reshape(5, 12)),
        np.broadcast_to(np.float64(7), (5, 3)),
        np.arange(60).astype(ml_dtypes.bfloat16).reshape(6, 10)[:, ::2],
        np.arange(100_000, dtype=np.float32).reshape(400, 250).T,
        np.frombuffer(bytes(range(13)), np.uint8, offset=1).view(np.float32),  # unaligned
    ],
    ids=["transposed", "reversed", "fortran", "broadcast", "strided", "large", "unaligned"],
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("small_shards")
def test_arrays_that_are_not_contiguous_are_stored_in_c_order(array, threads):
    plan, arena = filled([array], threads)
    assert leaf_bytes(plan, arena, 0) == array.tobytes()


def test_the_odd_bits_of_not_a_number_are_kept():
    bits = np.array([0x7F800001, 0xFFC12345, 0x7FC00000], np.uint32)
    plan, arena = filled([bits.view(np.float32)])
    assert leaf_bytes(plan, arena, 0) == bits.tobytes()


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


def test_a_copy_that_fails_in_a_helper_is_raised(monkeypatch):
    arrays = [random_array((200_000,), "uint8", seed=i) for i in range(4)]
    plan = plan_of(arrays)
    broken = Arena(1 << 20)
    broken.bind(plan, 2)
    real, caller = np.copyto, threading.get_ident()

    def copyto(target, source):
        if threading.get_ident() != caller:
            raise RuntimeError("helper broke")
        real(target, source)

    monkeypatch.setattr(np, "copyto", copyto)
    with (
        concurrent.futures.ThreadPoolExecutor(2) as helpers,
        pytest.raises(RuntimeError, match="helper broke"),
    ):
        broken.fill(arrays, helpers)


@pytest.mark.parametrize("size", [None, 4 * HUGE_PAGE])
def test_there_are_two_arenas_where_two_fit(available, size):
    available(size)
    pool = ArenaPool(plan_of([np.zeros(10)]))
    assert pool.count == 2
    pool.close()


def test_with_room_for_one_arena_there_is_one_and_one_warning(available):
    available(4 * HUGE_PAGE - 1)
    with pytest.warns(UserWarning, match="Using one") as caught:
        pool = ArenaPool(plan_of([np.zeros(HUGE_PAGE // 8)]))
    assert len(caught) == 1
    assert pool.count == 1
    pool.close()


def test_without_room_for_one_arena_it_is_refused_with_both_sizes(available):
    available(HUGE_PAGE - 1)
    with pytest.raises(ArenaMemoryError, match=r"needs 2 MiB, but available memory is 2 MiB"):
        ArenaPool(plan_of([np.zeros(10)]))


def test_memory_that_the_system_refuses_counts_as_missing(monkeypatch, available):
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
        pool = ArenaPool(plan_of([np.zeros(10)]))
    assert pool.count == 1
    pool.close()


def test_available_memory_is_a_plausible_number():
    found = arena._available_bytes()
    assert found is None or 1 << 20 < found < 1 << 50


def test_an_arena_is_leased_to_one_save_at_a_time():
    pool = ArenaPool(plan_of([np.zeros(10)]))
    first, second = pool.acquire(block=True), pool.acquire(block=False)
    assert first is not second
    assert pool.acquire(block=False) is None
    timer = threading.Timer(0.05, pool.release, [first])
    timer.start()
    assert pool.acquire(block=True) is first
    timer.join()
    pool.close()


def test_large_copies_are_shared_out_and_small_ones_are_not():
    assert arena._group([10] * 5, 3) == [[0, 1, 2, 3, 4]]
    groups = arena._group([1 << 20] * 6, 3)
    assert sorted(map(len, groups)) == [2, 2, 2]
    assert sorted(itertools.chain(*groups)) == list(range(6))
