"""What has not changed is not written, and is in the backup all the same."""

import itertools
import os

import numpy as np
import pytest
from engine_support import (
    assert_same_bits,
    needs_direct,
    plan_of,
    random_array,
    restore_once,
    save_once,
)

import stepsave
from stepsave.engine.commit import SPARE, CommitProtocol
from stepsave.engine.retention import Retention
from stepsave.format import orbax
from stepsave.format.blueprint import Blueprint
from stepsave.snapshot import contents, runs
from stepsave.store.local import LocalStore

WRITERS = ("auto", "tensorstore")
MEBIBYTE = 1 << 20


def part_frozen(step):
    """Four large arrays of which one changes, and many small ones of which none does."""
    frozen = {f"f{i}": random_array((MEBIBYTE,), "uint8", seed=i) for i in range(3)}
    small = {f"s{i}": random_array((100,), "float32", seed=i) for i in range(500)}
    return {"frozen": frozen, "small": small, "trained": np.full(MEBIBYTE // 4, step, np.float32)}


def save_all(saver, states, begin=1):
    """Saves states one after the other; each must come back. Returns what each save wrote."""
    written = []
    for step, state in enumerate(states, begin):
        handle = saver.save(step, state)
        handle.wait()
        assert_same_bits(restore_once(saver.directory, read_only=True).state, state)
        written.append(handle.written_bytes)
    return written


def size_of_shards(directory):
    newest = max(int(name) for name in os.listdir(directory) if name.isdigit())
    return sum(file.stat().st_size for file in (directory / str(newest) / "pytree/d/c").iterdir())


@pytest.mark.parametrize("double", [False, True])
def test_of_a_part_that_changes_only_that_is_written(tmp_path, double):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=double) as saver:
        needs_direct(saver)
        written = save_all(saver, map(part_frozen, range(1, 12)))
        whole = size_of_shards(tmp_path)
        assert written[0] == whole > 4 * MEBIBYTE
        assert all(MEBIBYTE <= size < 1.1 * MEBIBYTE for size in written[6:])
        stats = saver.stats()
    assert stats.written_bytes == sum(written)
    assert stats.changed_bytes < 7 * stats.state_bytes / 11


@pytest.mark.usefixtures("small_shards")
def test_tensorstore_passes_over_shards_in_which_nothing_changes(tmp_path):
    state = {f"f{i}": random_array((60_000,), "uint8", seed=i) for i in range(6)}
    states = [{**state, "trained": np.full(100, step)} for step in range(1, 9)]
    with stepsave.Checkpointer(tmp_path, writer="tensorstore") as saver:
        written = save_all(saver, states)
        assert written[0] == size_of_shards(tmp_path)
        count = len(list((tmp_path / "8/pytree/d/c").iterdir()))
    assert count > 3
    assert written[-1] == written[0] // count


@pytest.mark.parametrize("writer", WRITERS)
def test_of_a_state_that_does_not_change_no_shard_is_written(tmp_path, writer):
    state = part_frozen(7)
    with stepsave.Checkpointer(tmp_path, writer=writer) as saver:
        written = save_all(saver, [state] * 8)
        handle = saver.save(9, state)
        handle.wait()
    assert written[0] > 0
    assert written[-2:] == [0, 0]
    assert (handle.changed_bytes, handle.written_bytes) == (0, 0)
    backup = restore_once(tmp_path)
    assert backup.step == 9
    assert_same_bits(backup.state, state)


def test_one_row_of_a_large_array_is_one_piece(tmp_path):
    array = random_array((4 * MEBIBYTE // 64, 64), "uint8")

    def states():
        for row in range(8):
            array[row * 7000 % len(array)] += 1
            yield {"array": array.copy()}

    with stepsave.Checkpointer(tmp_path) as saver:
        needs_direct(saver)
        written = save_all(saver, states())
    assert written[-1] <= 3 * runs._PIECE_BYTES  # of this save, of the one before, and the checksum


def test_a_value_that_comes_back_is_what_it_was(tmp_path):
    """A piece that is equal to what was written two saves ago, and differs from the last."""
    states = [part_frozen(value) for value in (1, 2, 1, 2, 2, 1, 1, 1, 3, 1)]
    for double in (False, True):
        with stepsave.Checkpointer(tmp_path / str(double), double_checkpoint=double) as saver:
            save_all(saver, states)


def test_pieces_whose_changes_cancel_in_the_checksum_are_told_apart(tmp_path, monkeypatch):
    """Nothing rests on a checksum of 32 bits."""
    monkeypatch.setattr(runs, "crc32c", lambda data, before=0: 0)  # noqa: ARG005
    states = [{"a": np.full(MEBIBYTE, step, np.uint8)} for step in range(1, 9)]
    with stepsave.Checkpointer(tmp_path) as saver:
        needs_direct(saver)
        written = [save_of(saver, step, state) for step, state in enumerate(states, 1)]
    assert all(size >= MEBIBYTE for size in written)


def save_of(saver, step, state):
    handle = saver.save(step, state)
    handle.wait()
    return handle.written_bytes


def fail_once(monkeypatch, method):
    """Has the next call of a method of the store do its work, and then fail."""
    from stepsave.store.local import LocalStore

    real = getattr(LocalStore, method)
    left = [1]

    def fail(self, *args):
        found = real(self, *args)
        if left and args[0] not in ("COMMIT", "PREVIOUS"):
            left.pop()
            raise OSError(5, "injected")
        return found

    monkeypatch.setattr(LocalStore, method, fail)


@pytest.mark.parametrize("method", ["write_direct", "write", "rename"])
@pytest.mark.parametrize("double", [False, True])
def test_after_a_save_that_failed_everything_is_written(tmp_path, monkeypatch, method, double):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=double) as saver:
        needs_direct(saver)
        save_all(saver, map(part_frozen, range(1, 8)))
        whole = size_of_shards(tmp_path)
        with monkeypatch.context() as patch:
            fail_once(patch, method)
            with pytest.raises(stepsave.SaveFailedError):
                saver.save(8, part_frozen(8)).wait()
        written = save_all(saver, map(part_frozen, range(9, 16)), begin=9)
    assert written[0] == whole
    assert written[-1] < 1.1 * MEBIBYTE


def test_what_is_known_of_shards_is_forgotten_when_they_are_written(tmp_path):
    plan = plan_of([np.zeros(10)])
    blueprint, numbers = Blueprint(plan, {}), range(plan.shard_count)
    protocol = CommitProtocol(LocalStore(tmp_path), Retention(0))
    for step in (1, 2):
        directory = protocol.begin(blueprint, step)
        assert protocol.take_written(plan, numbers) is None
        for number in numbers:
            shard = tmp_path / directory / orbax.shard_path(number)
            shard.write_bytes(bytes(plan.shard_bytes))
        record = protocol.seal(blueprint, step, b"{}", (0,) * plan.shard_count, [[(b"1", 1)]])
        protocol.publish(record)
        assert os.listdir(tmp_path / str(step) / "pytree/d/c")
    protocol.begin(blueprint, 3)
    assert protocol.take_written(plan, numbers).contents == [[(b"1", 1)]]
    assert protocol.take_written(plan, numbers) is None
    for number in numbers:
        (tmp_path / SPARE / orbax.shard_path(number)).write_bytes(bytes(plan.shard_bytes))
    protocol.publish(protocol.seal(blueprint, 3, b"{}", (0,) * plan.shard_count, [[(b"1", 1)]]))
    protocol.begin(blueprint, 4)
    assert protocol.take_written(plan_of([np.zeros(10)]), numbers) is None, "pieces of another plan"


def test_after_a_resume_everything_is_written_once(tmp_path):
    save_once(tmp_path, part_frozen(1), step=1)
    with stepsave.Checkpointer(tmp_path) as saver:
        needs_direct(saver)
        assert_same_bits(saver.restore().state, part_frozen(1))
        written = save_all(saver, map(part_frozen, range(2, 9)), begin=2)
        whole = size_of_shards(tmp_path)
    assert written[:2] == [whole, whole]
    assert written[-1] < 1.1 * MEBIBYTE


def test_after_a_change_of_layout_everything_is_written(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        needs_direct(saver)
        save_all(saver, map(part_frozen, range(1, 8)))
        steps = itertools.count(8)
        for extra in ({"more": np.ones(70_000)}, {}, {"more": np.ones((7, 10_000))}):
            step = next(steps)
            written = save_all(saver, [{**part_frozen(step), **extra}], begin=step)
            assert written == [size_of_shards(tmp_path)]
            for _ in range(4):
                step = next(steps)
                save_all(saver, [{**part_frozen(step), **extra}], begin=step)


@pytest.mark.parametrize("spoil", ["gone", "short"])
def test_a_shard_that_somebody_took_away_is_written_whole(tmp_path, spoil):
    with stepsave.Checkpointer(tmp_path) as saver:
        needs_direct(saver)
        save_all(saver, map(part_frozen, range(1, 8)))
        shard = tmp_path / SPARE / "pytree/d/c/0"
        if spoil == "gone":
            shard.unlink()
        else:
            os.truncate(shard, 4096)
        save_all(saver, [part_frozen(8)], begin=8)
        assert_same_bits(restore_once(tmp_path, read_only=True).state, part_frozen(8))


def test_saves_that_are_skipped_or_overlap_leave_each_backup_whole(tmp_path):
    states = [part_frozen(number) for number in range(8)]
    with stepsave.Checkpointer(tmp_path, when_busy="skip") as saver:
        for step in range(1, 200):
            saver.save(step, states[step % 8])
            if step % 19 == 0:
                saver.wait()
                backup = restore_once(tmp_path, read_only=True)
                assert_same_bits(backup.state, states[backup.step % 8])
        assert saver.stats().skipped
        assert saver.stats().written_bytes < 0.8 * saver.stats().state_bytes


def test_of_what_always_changes_it_is_hardly_asked(tmp_path, monkeypatch):
    asked = []
    digest = contents.digest
    monkeypatch.setattr(runs, "digest", lambda data: asked.append(1) or digest(data))
    with stepsave.Checkpointer(tmp_path) as saver:
        for step in range(1, 301):
            saver.save(step, {"a": np.full(100_000, step), "b": {str(i): step for i in range(9)}})
        saver.wait()
    # Each time in two saves, of two runs; with a hash of the state and one of its copy at most.
    assert len(asked) <= 2 * 2 * 2 * 9
    asked.clear()
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.restore()
        for step in range(301, 321):
            saver.save(step, {"a": np.zeros(100_000)})
    assert len(asked) >= 18, "of what does not change it is asked each time"


def test_what_freezes_in_the_midst_of_a_training_is_noticed(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        needs_direct(saver)
        for step in range(1, 101):
            saver.save(step, part_frozen(step))
        saver.wait()
        written = [save_of(saver, step, part_frozen(100)) for step in range(101, 240)]
    assert written[0] >= MEBIBYTE
    assert written[-1] == 0
    assert_same_bits(restore_once(tmp_path).state, part_frozen(100))


def test_a_state_on_its_way_from_a_device_is_written_in_part_too(tmp_path):
    jax = pytest.importorskip("jax")
    frozen = jax.numpy.asarray(random_array((MEBIBYTE,), "uint8"))
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        needs_direct(saver)
        written = [
            save_of(saver, step, {"frozen": frozen, "trained": jax.numpy.full(70_000, step)})
            for step in range(1, 9)
        ]
        backup = saver.restore()
    assert written[-1] < MEBIBYTE < written[0]
    assert (backup.state["trained"] == 8).all()
    assert_same_bits(backup.state["frozen"], np.asarray(frozen))
