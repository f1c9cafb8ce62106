import itertools
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from crc32c import crc32c
from engine_support import filled, plan_of, random_array
from hypothesis import given
from hypothesis import strategies as st

from stepsave.format import planning
from stepsave.format.records import DTYPES
from stepsave.snapshot import filling, runs
from stepsave.snapshot.arena import Arena
from stepsave.snapshot.contents import Attention
from stepsave.snapshot.pages import Pages


def leaf_bytes(plan, arena, number):
    chunks = [chunk for chunk in plan.chunks if chunk.leaf == number]
    return b"".join(
        arena.bytes[chunk.offset_bytes :][: chunk.data_bytes].tobytes() for chunk in chunks
    )


def begun(arrays, **options):
    """An arena bound to the layout of some arrays, and a filling of it."""
    plan = plan_of(arrays)
    arena = Arena(Pages(plan.arena_bytes))
    arena.bind(plan)
    return plan, arena, arena.begin(list(arrays).__getitem__, Attention(), **options)


def assert_sealed(plan, arena):
    for chunk in plan.chunks:
        end = chunk.offset_bytes + chunk.stored_bytes
        checksum = crc32c(arena.bytes[chunk.offset_bytes : end])
        assert int.from_bytes(arena.bytes[end : end + 4].tobytes(), "little") == checksum


@given(st.data())
def test_every_leaf_lies_where_the_plan_says(data):
    shapes = st.lists(st.integers(0, 20), max_size=3).map(tuple)
    specs = data.draw(st.lists(st.tuples(shapes, st.sampled_from(list(DTYPES))), max_size=6))
    arrays = [random_array(*spec, seed=i) for i, spec in enumerate(specs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "CHUNK_LIMIT_BYTES", 1 << 10)
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
    plan, arena = filled([array], threads=threads)
    assert leaf_bytes(plan, arena, 0) == array.tobytes()


def test_helpers_that_have_copied_all_before_the_caller_comes_to_it_leave_him_nothing():
    arrays = [random_array((100_000,), "float32", seed=i) for i in range(3)]
    plan, arena, on_its_way = begun(arrays)
    on_its_way.help()
    assert on_its_way.is_complete
    on_its_way.work()
    for number, array in enumerate(arrays):
        assert leaf_bytes(plan, arena, number) == array.tobytes()
    assert_sealed(plan, arena)


def test_the_odd_bits_of_not_a_number_are_kept():
    bits = np.array([0x7F800001, 0xFFC12345, 0x7FC00000], np.uint32)
    plan, arena = filled([bits.view(np.float32)])
    assert leaf_bytes(plan, arena, 0) == bits.tobytes()


@given(st.lists(st.integers(0, 3000), max_size=40), st.integers(1, 3))
def test_every_chunk_is_sealed_whoever_copied_it(sizes, threads):
    arrays = [random_array((size,), "uint8", seed=i) for i, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SHARD_TARGET_BYTES", 8 << 10)
        patch.setattr(planning, "CHUNK_LIMIT_BYTES", 2 << 10)
        patch.setattr(runs, "_SMALL_BYTES", 500)
        patch.setattr(runs, "_PACK_BYTES", 1500)
        plan, arena = filled(arrays, threads=threads)
    assert_sealed(plan, arena)
    for number in range(plan.shard_count):
        chunks = plan.shard_chunks[number]
        seals = [arena.bytes[c.offset_bytes + c.stored_bytes :][:4].tobytes() for c in chunks]
        assert arena.digest(number) == crc32c(b"".join(seals))


@pytest.mark.usefixtures("small_shards")
def test_what_is_written_is_what_is_there_when_it_is_said(monkeypatch):
    """Written as the ranges come, a copy of each shard ends equal to the sealed shard."""
    monkeypatch.setattr(filling, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(runs, "_SMALL_BYTES", 1000)
    arrays = [random_array((size,), "uint8", seed=size) for size in range(1, 40_000, 1501)]
    plan, arena, begun_filling = begun(arrays, is_led=True)
    assert plan.shard_count > 2
    on_disk = np.zeros_like(arena.bytes)

    def write(number):
        start = number * plan.shard_bytes
        for begin, end in begun_filling.ranges(number):
            on_disk[start + begin : start + end] = arena.bytes[start + begin : start + end]

    writers = [threading.Thread(target=write, args=[n]) for n in range(plan.shard_count)]
    for writer in writers:
        writer.start()
    begun_filling.lead()
    for writer in writers:
        writer.join()
    assert_sealed(plan, arena)
    assert (on_disk == arena.bytes).all()


@pytest.mark.usefixtures("small_shards")
def test_the_first_bytes_are_ready_before_the_last_are_copied(monkeypatch):
    monkeypatch.setattr(filling, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(runs, "_SMALL_BYTES", 1000)
    arrays = [random_array((15_000,), "uint8", seed=i) for i in range(12)]
    plan = plan_of(arrays)
    arena = Arena(Pages(plan.arena_bytes))
    arena.bind(plan)
    gate = threading.Event()
    taken = itertools.count()

    def source(leaf):
        if next(taken) == 2:  # of four in the first shard
            assert gate.wait(30)
        return arrays[leaf]

    half = arena.begin(source, Attention(), is_led=True)
    worker = threading.Thread(target=half.lead)
    worker.start()
    ranges = half.ranges(0)
    begin, end = next(ranges)
    assert begin == 0
    early = arena.bytes[:end].copy()
    gate.set()
    worker.join()
    assert (early == arena.bytes[:end]).all(), "it was said to be there before it was"
    list(ranges)
    for number in range(1, plan.shard_count):
        list(half.ranges(number))
    assert_sealed(plan, arena)


@pytest.mark.usefixtures("small_shards")
def test_helpers_leave_small_chunks_to_the_thread_at_work(monkeypatch):
    monkeypatch.setattr(runs, "_SMALL_BYTES", 1000)
    arrays = [random_array((size,), "uint8", seed=size) for size in (10, 5000, 20, 6000)]
    plan, arena, shared = begun(arrays)
    shared.help()
    assert shared._source is not None, "the small ones are still to be copied"
    for number in (1, 3):
        assert leaf_bytes(plan, arena, number) == arrays[number].tobytes()
    shared.work()
    assert_sealed(plan, arena)
    for number, array in enumerate(arrays):
        assert leaf_bytes(plan, arena, number) == array.tobytes()


def test_on_return_of_the_call_helpers_have_copied_what_they_took():
    arrays = [random_array((200_000,), "uint8", seed=i) for i in range(3)]
    copying, gate = threading.Event(), threading.Event()

    def source(leaf):
        if threading.current_thread() is helper:
            copying.set()
            assert gate.wait(30)
        return arrays[leaf]

    plan = plan_of(arrays)
    arena = Arena(Pages(plan.arena_bytes))
    arena.bind(plan)
    shared = arena.begin(source, Attention())
    helper = threading.Thread(target=shared.help)
    helper.start()
    assert copying.wait(30)
    threading.Timer(0.1, gate.set).start()
    shared.work()
    assert shared.is_complete
    assert_sealed(plan, arena)
    helper.join()


def test_a_source_that_fails_fails_all_who_copy_and_all_who_wait():
    arrays = [random_array((200_000,), "uint8", seed=i) for i in range(4)]
    plan = plan_of(arrays)
    arena = Arena(Pages(plan.arena_bytes))
    arena.bind(plan)

    def source(leaf):
        if leaf == 2:
            raise RuntimeError("the device is gone")
        return arrays[leaf]

    broken = arena.begin(source, Attention(), is_led=True)
    caught = []

    def write():
        try:
            list(broken.ranges(0))
        except RuntimeError as e:
            caught.append(e)

    writer = threading.Thread(target=write)
    writer.start()
    broken.lead()
    writer.join()
    assert len(caught) == 1
    broken.wait_left()
    broken.wait_quiet()
    with pytest.raises(RuntimeError, match="device is gone"):
        list(broken.ranges(0))
    broken = arena.begin(source, Attention())
    with pytest.raises(RuntimeError, match="device is gone"):
        broken.work()


def test_a_helper_that_fails_fails_the_caller():
    arrays = [random_array((200_000,), "uint8", seed=i) for i in range(4)]
    helping = threading.Event()

    def source(leaf):
        if threading.current_thread() is not threading.main_thread():
            helping.set()
            raise RuntimeError("the device is gone")
        assert helping.wait(30)
        return arrays[leaf]

    plan = plan_of(arrays)
    arena = Arena(Pages(plan.arena_bytes))
    arena.bind(plan)
    shared = arena.begin(source, Attention())
    helper = threading.Thread(target=shared.help)
    helper.start()
    with pytest.raises(RuntimeError, match="device is gone"):
        shared.work()
    helper.join()


def test_on_return_from_giving_up_nobody_copies_any_more():
    arrays = [random_array((200_000,), "uint8", seed=i) for i in range(6)]
    copying, gate = threading.Event(), threading.Event()
    taken = []

    def source(leaf):
        taken.append(leaf)
        copying.set()
        assert gate.wait(30)
        return arrays[leaf]

    plan = plan_of(arrays)
    arena = Arena(Pages(plan.arena_bytes))
    arena.bind(plan)
    left_behind = arena.begin(source, Attention())
    helper = threading.Thread(target=left_behind.help)
    helper.start()
    assert copying.wait(30)
    timer = threading.Timer(0.1, gate.set)
    timer.start()
    left_behind.give_up()
    assert gate.is_set(), "it waited for the helper"
    before = arena.bytes.copy()
    left_behind.help()  # one that comes late
    helper.join()
    assert (arena.bytes == before).all()
    assert taken == [0], "the helper went no further"
    timer.join()


def test_a_filling_that_is_led_ends_whole_although_its_save_was_given_up():
    arrays = [random_array((200_000,), "uint8", seed=i) for i in range(6)]
    copying = threading.Event()

    def source(leaf):
        copying.set()
        time.sleep(0.01)
        return arrays[leaf]

    plan = plan_of(arrays)
    arena = Arena(Pages(plan.arena_bytes))
    arena.bind(plan)
    led = arena.begin(source, Attention(), is_led=True)
    leader = threading.Thread(target=led.lead)
    leader.start()
    assert copying.wait(30)
    led.give_up()
    assert led.is_complete
    leader.join()
    never_led = arena.begin(source, Attention(), is_led=True)
    never_led.give_up()
    never_led.lead()
    assert not never_led.is_complete, "given up before it began"


def test_the_state_is_let_go_when_it_is_copied():
    array = np.zeros(10)
    held = [array]
    plan = plan_of(held)
    arena = Arena(Pages(plan.arena_bytes))
    arena.bind(plan)
    done = arena.begin(held.__getitem__, Attention())
    done.work()
    assert done._source is None
    done.help()  # one that comes late finds nothing to do
    assert done.is_complete


def test_what_somebody_else_has_copied_is_sealed_all_the_same():
    arrays = [random_array((size,), "uint8", seed=size) for size in (10, 100_000)]
    plan, arena = filled(arrays)
    sealed = arena.bytes.copy()
    for chunk in plan.chunks:
        arena.bytes[chunk.offset_bytes + chunk.stored_bytes :][:4] ^= 255
    again = arena.begin(lambda _: None, Attention())
    again.work()
    list(again.ranges(0))
    assert (arena.bytes == sealed).all()
