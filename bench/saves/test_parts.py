"""The parts of a save, each by itself, by pytest-benchmark.

    python -m pytest bench/saves/test_parts.py --benchmark-only

Speed is compared within one run; nothing here passes or fails on a time.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import stepsave
from bench import floors
from bench.common import Training
from stepsave.format.blueprint import Blueprint
from stepsave.format.checksum import crc32c
from stepsave.format.layout import decode_layout, encode_layout
from stepsave.format.planning import compile_layout
from stepsave.format.records import LeafSpec
from stepsave.snapshot.arena import ArenaPool, Claim, copy_thread_count
from stepsave.snapshot.contents import Attention
from stepsave.store.local import LocalStore
from stepsave.store.shard_array import ShardArray
from stepsave.threads import Crew

STATE_BYTES = 100_000_000
ARRAYS = 25


def fill(pool, arena, arrays):
    """Copies a state in, and seals it as the writers do; returns how it went."""
    filling = arena.begin(arrays.__getitem__, Attention())
    pool.fill(filling)
    return filling


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(STATE_BYTES // ARRAYS // 4, np.float32) for _ in range(ARRAYS)]


@pytest.fixture
def plan(arrays):
    specs = [LeafSpec((f"w{i}",), a.shape, "float32") for i, a in enumerate(arrays)]
    return compile_layout(specs)


@pytest.fixture
def arena(plan, arrays):
    pool = ArenaPool(plan, Crew(copy_thread_count(), "bench"))
    pool.bind(plan)
    arena = pool.acquire(Claim(), block=True)
    fill(pool, arena, arrays)
    yield arena
    pool.close()


@pytest.fixture
def spare(plan, tmp_path):
    """A store with an empty backup directory made ready for this plan."""
    store = LocalStore(tmp_path)
    store.make_directory("spare/pytree/d/c")
    for path, data in Blueprint(plan, {}).files.items():
        store.make_directory(f"spare/{path}".rpartition("/")[0])
        store.write(f"spare/{path}", data)
    return store


@pytest.mark.benchmark(group="copy 100 MB")
def test_floor_memcpy_by_two_threads(benchmark):
    memcpy = floors.Memcpy(STATE_BYTES)
    benchmark(memcpy.measure_s)
    memcpy.close()


@pytest.mark.benchmark(group="copy 100 MB")
def test_capture_into_an_arena(benchmark, plan, arrays):
    pool = ArenaPool(plan, Crew(copy_thread_count(), "bench"))
    pool.bind(plan)
    arena = pool.acquire(Claim(), block=True)
    # What has not changed is not copied.
    states = itertools.cycle([arrays, [array + 1 for array in arrays]])
    benchmark(lambda: fill(pool, arena, next(states)))
    pool.close()


@pytest.mark.benchmark(group="checksum 100 MB")
def test_checksum(benchmark, arena, plan):
    benchmark(lambda: [crc32c(arena.shard(i).data) for i in range(plan.shard_count)])


@pytest.mark.benchmark(group="write 100 MB")
def test_floor_raw_direct_write(benchmark, tmp_path):
    benchmark(floors.RawWrite(tmp_path, STATE_BYTES).measure_s)


@pytest.mark.benchmark(group="write 100 MB")
def test_direct_writer_in_place(benchmark, spare, arena, plan):
    def write() -> None:
        for number in range(plan.shard_count):
            spare.write_direct(f"spare/pytree/d/c/{number}", arena.shard(number).data)

    benchmark(write)


@pytest.mark.benchmark(group="write 100 MB")
def test_tensorstore_writer(benchmark, spare, arena, plan):
    shards = ShardArray(spare, "spare", plan)

    def write() -> None:
        for number in range(plan.shard_count):
            shards.write(number, arena.shard(number))

    benchmark(write)


@pytest.mark.benchmark(group="restore 100 MB, warm")
def test_restore_verified(benchmark, tmp_path, arrays):
    state = {f"w{i}": array for i, array in enumerate(arrays)}
    with stepsave.Checkpointer(tmp_path / "backup") as saver:
        saver.save(0, state).wait()
        backup = benchmark(saver.restore)
    assert all(np.array_equal(backup.state[name], array) for name, array in state.items())


@pytest.mark.parametrize("leaves", [100, 1000, 10_000])
@pytest.mark.benchmark(group="layout")
def test_compile_layout_and_constant_files(benchmark, leaves):
    specs = [LeafSpec(("model", f"layer_{i}"), (32, 32), "float32") for i in range(leaves)]
    benchmark.pedantic(lambda: Blueprint(compile_layout(specs), {}).files, rounds=5)


@pytest.mark.parametrize("leaves", [10_000])
@pytest.mark.benchmark(group="layout")
def test_decode_layout(benchmark, leaves):
    specs = [LeafSpec(("model", f"layer_{i}"), (32, 32), "float32") for i in range(leaves)]
    encoded = encode_layout(compile_layout(specs))
    benchmark.pedantic(decode_layout, (encoded, "bench"), rounds=5)


@pytest.mark.benchmark(group="the hooks of the callback, no save due")
def test_hooks_of_one_step(benchmark, tmp_path):
    import keras

    class EnoughError(Exception):
        """The hooks were timed; what is left of the epoch is not needed."""

    class Timed(keras.callbacks.Callback):
        def on_train_batch_end(self, *_, **__):
            steps = iter(range(1_000_000_000))
            loop = backup._loop

            def hooks() -> None:
                step = next(steps)
                for _ in loop._execute(step, step, None):  # told of the cut when it goes on
                    backup.on_train_batch_begin(step)
                    backup.on_train_batch_end(step)

            benchmark.pedantic(hooks, rounds=200, iterations=1000)
            raise EnoughError

    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    backup = stepsave.BackupAndRestore(tmp_path / "backup", save_freq=10**9)
    data = np.ones((1_000_000, 2), np.float32)  # more steps than are counted
    with pytest.raises(EnoughError):
        model.fit(data, data, batch_size=1, shuffle=False, verbose=0, callbacks=[backup, Timed()])


@pytest.mark.parametrize("leaves", [100, 10_000])
@pytest.mark.benchmark(group="save of small arrays, until it returns")
def test_stall_of_small_arrays(benchmark, tmp_path, leaves):
    training = Training("numpy", leaves, 4000)
    with stepsave.Checkpointer(tmp_path / "backup") as saver:
        saver.prepare(training.state)
        steps = iter(range(1_000_000))

        def setup() -> None:
            saver.wait()

        benchmark.pedantic(lambda: saver.save(next(steps), training.step()), setup=setup, rounds=20)
        saver.wait()
