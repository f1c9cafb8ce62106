import gc
import logging
import math
import os
import threading
import time
import warnings

import numpy as np
import pytest
from engine_support import (
    assert_is_state_of,
    assert_same_bits,
    check_python,
    needs_direct,
    random_array,
    restore_once,
    save_once,
    state_of,
)

import stepsave
from stepsave.snapshot import arena
from stepsave.store.local import LocalStore
from stepsave.store.lock import DirectoryLock
from stepsave.threads import Crew


@pytest.fixture
def gate(monkeypatch):
    """Saves stop before they write a shard or seal, until the gate is opened."""
    opened = threading.Event()
    opened.set()
    real = LocalStore.write

    def write(self, path, data):
        assert opened.wait(30)
        real(self, path, data)

    monkeypatch.setattr(LocalStore, "write", write)
    for name in ("write_direct",):
        real_direct = getattr(LocalStore, name)

        def write_direct(self, path, data, final=None, real_direct=real_direct):
            assert opened.wait(30)
            return real_direct(self, path, data, final)

        monkeypatch.setattr(LocalStore, name, write_direct)
    yield opened
    opened.set()


def test_nothing_is_restored_from_an_empty_directory(tmp_path):
    with stepsave.Checkpointer(tmp_path / "new") as saver:
        assert saver.restore() is None
        assert saver.committed is None
        assert saver.previous is None
        assert saver.directory == str(tmp_path / "new")


def test_a_save_is_restored_by_the_same_one_and_by_the_next(tmp_path):
    state = {"w": {"kernel": random_array((30, 40), "float32")}, "n": 3}
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(12, state, {"epoch": 2})
        backup = saver.restore()  # waits by itself
        assert saver.committed.step == 12
    for found in (backup, restore_once(tmp_path)):
        assert (found.step, found.metadata) == (12, {"epoch": 2})
        assert_same_bits(found.state, state)


def change(state, other):
    """Gives the arrays of a state the values of those of another one, in place."""
    for key, value in other.items():
        if isinstance(value, dict):
            change(state[key], value)
        elif np.ndim(value):
            state[key][...] = value
        else:
            state[key] = value


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("writer", ["auto", "tensorstore"])
def test_a_snapshot_is_of_one_step_exactly(tmp_path, writer, double):
    state = state_of(0)
    with stepsave.Checkpointer(tmp_path, writer=writer, double_checkpoint=double) as saver:
        for step in range(1, 40):
            change(state, state_of(step))
            saver.save(step, state)
            change(state, state_of(-1))  # the next step, while the save is in flight
            if step % 7 == 0:
                assert saver.restore().step == step
                assert_is_state_of(saver.restore())
    assert restore_once(tmp_path).step == 39
    assert_is_state_of(restore_once(tmp_path))


@pytest.mark.usefixtures("small_shards")
def test_a_changed_structure_is_compiled_anew_and_restored_right(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, logger="stepsave")
    states = [
        {"a": random_array((100, 200), "float32")},
        {"a": random_array((100, 200), "float64")},
        {"a": random_array((200, 100), "float64")},
        {"b": random_array((200, 100), "float64")},
        {"b": {"c": random_array((3,), "int8")}, "d": random_array((900, 900), "uint8")},
        {"d": random_array((900, 900), "uint8"), "b": {"c": random_array((3,), "int8")}},
        {"big": random_array((3000, 1000), "float32")},  # larger than the arenas made so far
        {"a": random_array((100, 200), "float32")},
    ]
    with stepsave.Checkpointer(tmp_path) as saver:
        for step, state in enumerate(states):
            saver.save(step, state)
            assert_same_bits(saver.restore().state, state)
            assert_same_bits(restored_by_another_reader(tmp_path), state)
    told = [entry for entry in caplog.records if "compiled anew" in entry.getMessage()]
    assert len(told) == len(states) - 1
    assert all(entry.levelno == logging.DEBUG for entry in told)


def restored_by_another_reader(directory):
    from stepsave.engine.reader import read_backup
    from stepsave.format.marker import decode_marker

    (record,) = decode_marker((directory / "COMMIT").read_bytes(), "COMMIT")
    return read_backup(LocalStore(directory), record, Crew(1, "test")).state


def test_when_busy_skip_skips_and_counts(tmp_path, gate):
    with stepsave.Checkpointer(tmp_path, when_busy="skip") as saver:
        needs_direct(saver)
        saver.save(1, state_of(1)).wait()
        gate.clear()
        handles = [saver.save(step, state_of(step)) for step in (2, 3, 4, 5)]
        assert [handle.skipped for handle in handles] == [False, False, True, True]
        assert "skipped" in repr(handles[2])
        handles[2].wait()
        assert (handles[2].bytes, handles[2].done) == (0, True)
        gate.set()
        saver.wait()
        stats = saver.stats()
        assert (stats.started, stats.committed, stats.skipped, stats.failed) == (3, 3, 2, 0)
        saver.save(5, state_of(5)).wait()  # a skipped step may be saved later
    assert restore_once(tmp_path).step == 5
    assert_is_state_of(restore_once(tmp_path))


def test_when_busy_wait_waits_for_an_arena(tmp_path, gate):
    with stepsave.Checkpointer(tmp_path) as saver:
        needs_direct(saver)
        saver.save(1, state_of(1)).wait()
        gate.clear()
        saver.save(2, state_of(2))
        saver.save(3, state_of(3))
        threading.Timer(0.2, gate.set).start()
        handle = saver.save(4, state_of(4))
        assert gate.is_set()
        assert handle.stall_s > 0.1
        handle.wait()
        assert saver.stats().skipped == 0
    assert_is_state_of(restore_once(tmp_path))


def test_stats_sum_up(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        empty = saver.stats()
        assert (empty.started, empty.arena_count, empty.stall_total_s) == (0, 0, 0)
        assert math.isnan(empty.stall_median_s)
        assert math.isnan(empty.durable_median_s)
        handles = [saver.save(step, state_of(step)) for step in (1, 2, 3)]
        saver.wait()
        stats = saver.stats()
    stalls = sorted(handle.stall_s for handle in handles)
    assert (stats.started, stats.committed, stats.failed, stats.skipped) == (3, 3, 0, 0)
    assert stats.state_bytes == sum(handle.bytes for handle in handles)
    assert stats.stall_total_s == pytest.approx(sum(stalls))
    assert (stats.stall_median_s, stats.stall_max_s) == (stalls[1], stalls[2])
    assert stats.durable_median_s == sorted(handle.durable_s for handle in handles)[1]
    assert stats.arena_count == 2
    assert stats.writer in ("direct", "tensorstore")
    assert restore_once(tmp_path).step == 3


@pytest.mark.parametrize("step", [3, 2, 0, -1])
def test_steps_only_grow(tmp_path, step):
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(3, state_of(3)).wait()
        with pytest.raises(ValueError, match=f"step={step}.*greater than 3"):
            saver.save(step, state_of(step))
    with (
        stepsave.Checkpointer(tmp_path) as saver,
        pytest.raises(ValueError, match=f"step={step}.*greater than 3"),
    ):
        saver.save(step, state_of(step))
    assert restore_once(tmp_path).step == 3


def test_a_step_may_be_any_integer_and_nothing_else(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(np.int32(0), state_of(0)).wait()
        with pytest.raises(TypeError):
            saver.save(1.0, state_of(1))
        with pytest.raises(TypeError):
            saver.save("1", state_of(1))
        saver.save(10**15, state_of(1)).wait()
    assert restore_once(tmp_path).step == 10**15


def test_after_nothing_could_be_restored_training_starts_at_any_step(tmp_path, monkeypatch):
    with stepsave.Checkpointer(tmp_path) as saver:
        with monkeypatch.context() as patch:

            def fail(*_):
                raise OSError(28, "full")

            patch.setattr(LocalStore, "rename", fail)
            with pytest.raises(stepsave.SaveFailedError):
                saver.save(5, state_of(5)).wait()
        assert saver.restore() is None
        saver.save(1, state_of(1)).wait()
    assert restore_once(tmp_path).step == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when_busy": "drop"}, "when_busy='drop'.*'wait' or 'skip'"),
        ({"writer": "fast"}, "writer='fast'"),
    ],
)
def test_an_invalid_argument_is_refused_with_its_value(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        stepsave.Checkpointer(tmp_path, **arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("directory", ["", None])
def test_an_empty_directory_name_is_refused(directory):
    with pytest.raises(ValueError, match="Empty"):
        stepsave.Checkpointer(directory)


@pytest.mark.parametrize("directory", ["gs://bucket/x", "s3://bucket/x"])
def test_a_remote_directory_is_refused(directory):
    with pytest.raises(stepsave.BackupDirectoryError, match=directory):
        stepsave.Checkpointer(directory)


@pytest.mark.parametrize(
    "metadata",
    [{"a": float("nan")}, {"a": np.zeros(2)}, {"a": object()}, {(1, 2): 3}],
    ids=["nan", "array", "object", "key"],
)
def test_metadata_that_json_cannot_hold_is_refused_and_the_next_save_works(tmp_path, metadata):
    with stepsave.Checkpointer(tmp_path) as saver:
        with pytest.raises(stepsave.InvalidStateError, match="Expected what JSON can hold"):
            saver.save(1, state_of(1), metadata)
        saver.save(1, state_of(1), {"fine": 1}).wait()
    assert_is_state_of(restore_once(tmp_path))


def test_a_bad_leaf_costs_no_arena(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(1, state_of(1)).wait()
        for _ in range(3):
            with pytest.raises(stepsave.InvalidStateError, match="'a/b'"):
                saver.save(2, {"a": {"b": "text"}})
        saver.save(2, state_of(2)).wait()
    assert_is_state_of(restore_once(tmp_path))


def test_nothing_is_written_while_training_waits_for_the_copy(tmp_path, monkeypatch):
    events = []
    fill, write = arena.ArenaPool.fill, LocalStore.write_direct

    def slow_fill(self, filling):
        time.sleep(0.1)  # for writers that would not wait
        fill(self, filling)
        events.append("copied")

    def noted_write(self, path, data, ranges=None):
        events.append("write")
        return write(self, path, data, ranges)

    with stepsave.Checkpointer(tmp_path) as saver:
        needs_direct(saver)
        monkeypatch.setattr(arena.ArenaPool, "fill", slow_fill)
        monkeypatch.setattr(LocalStore, "write_direct", noted_write)
        saver.save(1, state_of(1)).wait()
    assert events[0] == "copied"
    assert "write" in events
    assert_is_state_of(restore_once(tmp_path))


def test_a_copy_that_is_interrupted_costs_no_arena_and_saves_nothing(tmp_path, monkeypatch):
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(1, state_of(1)).wait()
        for _ in range(3):  # more often than there are arenas
            with monkeypatch.context() as patch:

                def interrupt(*_, **__):
                    raise KeyboardInterrupt

                patch.setattr("stepsave.snapshot.runs.Pack.fill", interrupt)
                patch.setattr("stepsave.snapshot.runs.Slab.fill", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    saver.save(2, state_of(2))
        assert saver.in_flight == 0
        assert saver.restore().step == 1
        saver.save(2, state_of(2)).wait()
        assert saver.stats().committed == 2
    backup = restore_once(tmp_path)
    assert backup.step == 2
    assert_is_state_of(backup)


def test_a_state_that_is_changed_while_it_is_saved_can_still_be_read(tmp_path):
    """Against the rules, and nobody can say of which step it is; but nothing is lost by it."""
    array = np.zeros(2_000_000)
    ended = threading.Event()

    def change():
        while not ended.is_set():
            np.add(array, 1.0, out=array)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with stepsave.Checkpointer(tmp_path) as saver:
            for step in range(5):
                saver.save(step, {"array": array}).wait()
                found = saver.restore().state["array"]
                assert np.ptp(found) < 1e6  # each a number that was there
    finally:
        ended.set()
        changer.join()


def test_a_closed_checkpointer_refuses_with_what_to_do(tmp_path):
    saver = stepsave.Checkpointer(tmp_path)
    assert not saver.closed
    saver.close()
    saver.close()
    assert saver.closed
    with pytest.raises(stepsave.CheckpointerClosedError, match="Make a new one"):
        saver.save(1, state_of(1))
    with pytest.raises(stepsave.CheckpointerClosedError):
        saver.restore()
    with pytest.raises(stepsave.CheckpointerClosedError):
        saver.prepare(state_of(1))


def test_closing_waits_for_saves_in_flight(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(1, state_of(1))
        saver.save(2, state_of(2))
    assert restore_once(tmp_path).step == 2
    assert_is_state_of(restore_once(tmp_path))


def test_what_was_saved_before_the_lock_was_had_is_seen(tmp_path, monkeypatch):
    """Another process saves, and ends, between a look at the directory and the lock."""
    directory, other = tmp_path / "here", tmp_path / "other"
    save_once(other, state_of(1), step=1)
    directory.mkdir()
    real = DirectoryLock.acquire

    def acquire(self):
        for name in ("1", "COMMIT"):
            os.rename(other / name, directory / name)
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryLock, "acquire", acquire)
        saver = stepsave.Checkpointer(directory)
    with saver:
        with pytest.raises(ValueError, match="step"):
            saver.save(1, state_of(1))
        assert_is_state_of(saver.restore())


def test_that_its_training_has_ended_is_noted_with_the_backup_until_the_next_save(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(1, state_of(1))
        saver.wait()
        assert not saver.restore().ended
        saver.close(ended=True)
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        backup = saver.restore()
        assert backup.ended
        assert_is_state_of(backup)
        saver.save(2, state_of(2))
        saver.wait()
        assert not saver.restore().ended
        assert saver.previous.ended
    with stepsave.Checkpointer(tmp_path / "empty") as saver:
        saver.close(ended=True)  # nothing was saved


def test_a_failed_last_save_leaves_the_training_unended(tmp_path, monkeypatch):
    saver = stepsave.Checkpointer(tmp_path)
    saver.save(1, state_of(1))
    saver.wait()
    monkeypatch.setattr(LocalStore, "rename", refuse)
    saver.save(2, state_of(2))
    with pytest.raises(stepsave.SaveFailedError):
        saver.close(ended=True)
    monkeypatch.undo()
    assert not stepsave.restore(tmp_path).ended


def refuse(*_):
    raise OSError("no")


def test_closing_keeps_the_backup_if_the_last_save_failed(tmp_path, monkeypatch):
    saver = stepsave.Checkpointer(tmp_path)
    saver.save(1, state_of(1)).wait()
    with monkeypatch.context() as patch:

        def fail(*_):
            raise OSError(28, "full")

        patch.setattr(LocalStore, "replace", fail)
        saver.save(2, state_of(2))
        saver.drain()
    with pytest.raises(stepsave.SaveFailedError, match="full"):
        saver.close(delete_backup=True)
    assert restore_once(tmp_path).step == 1
    assert_is_state_of(restore_once(tmp_path))


def test_not_closing_gives_a_resource_warning_that_names_the_directory(tmp_path):
    savers = [stepsave.Checkpointer(tmp_path)]
    savers[0].save(1, state_of(1)).wait()
    with pytest.warns(ResourceWarning, match=str(tmp_path)):
        savers.clear()
    assert_is_state_of(restore_once(tmp_path))  # and the directory is free again


def test_a_dropped_checkpointer_keeps_the_directory_until_its_saves_have_ended(tmp_path, gate):
    saver = stepsave.Checkpointer(tmp_path)
    needs_direct(saver)
    saver.save(1, state_of(1)).wait()
    gate.clear()
    saver.save(2, state_of(2))
    threading.Timer(1.5, gate.set).start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del saver
        gc.collect()
    try:
        backup = restore_once(tmp_path)
    except stepsave.DirectoryBusyError:
        return  # still in use: as good
    assert backup.step == 2, "two writers were in one directory"


def test_prepare_makes_everything_ready_for_the_first_save(tmp_path):
    state = state_of(1)
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.prepare(state)
        assert saver.stats().arena_count == 2
        prepared = saver.stats()
        saver.save(1, state).wait()
        assert saver.stats().arena_bytes == prepared.arena_bytes > 0
        assert (prepared.started, saver.stats().started) == (0, 1)
    assert_is_state_of(restore_once(tmp_path))


def test_with_memory_for_one_arena_saves_still_work(tmp_path, monkeypatch):
    monkeypatch.setattr(arena, "available_bytes", lambda: 3 << 20)
    with stepsave.Checkpointer(tmp_path) as saver:
        with pytest.warns(UserWarning, match="Using one") as caught:
            saver.prepare(state_of(0))
        for step in range(1, 8):
            saver.save(step, state_of(step))
        assert saver.stats().arena_count == 1
    assert len(caught) == 1
    assert restore_once(tmp_path).step == 7
    assert_is_state_of(restore_once(tmp_path))


def test_with_memory_for_one_arena_a_training_resumes(tmp_path, monkeypatch):
    save_once(tmp_path, state_of(1), step=1)
    with stepsave.Checkpointer(tmp_path) as saver:
        backup = saver.restore()
        assert_is_state_of(backup)
        monkeypatch.setattr(arena, "available_bytes", lambda: 0)
        del backup
        with pytest.warns(UserWarning, match="Using one"):
            saver.prepare(state_of(1))
        for step in range(2, 6):
            saver.save(step, state_of(step))
    assert restore_once(tmp_path).step == 5
    assert_is_state_of(restore_once(tmp_path))


def test_a_restored_state_stays_as_it_was_whatever_is_saved_then(tmp_path):
    save_once(tmp_path, state_of(1), step=1)
    with stepsave.Checkpointer(tmp_path) as saver:
        backup = saver.restore()
        for step in range(2, 8):
            saver.save(step, state_of(step))
        saver.wait()
        assert_is_state_of(backup)
        # Itself, too: an arena must not be filled from itself.
        saver.save(8, backup.state).wait()
        assert_same_bits(saver.restore().state, backup.state)


def test_what_was_restored_becomes_an_arena_when_nobody_has_it(tmp_path):
    save_once(tmp_path, state_of(1), step=1)
    with stepsave.Checkpointer(tmp_path) as saver:
        backup = saver.restore()
        assert_is_state_of(backup)
        restored = saver._capture._restored
        del backup
        for step in range(2, 6):
            saver.save(step, state_of(step))
        arenas = saver._capture._pool._arenas
        assert restored in [arena.pages for arena in arenas]
        assert len(arenas) == 2
    assert_is_state_of(restore_once(tmp_path))


def test_children_made_by_fork_can_read_what_was_restored(tmp_path):
    save_once(tmp_path, state_of(1), step=1)
    code = """
import os, sys, stepsave
with stepsave.Checkpointer(sys.argv[1]) as saver:
    state = saver.restore().state
    saver.prepare(state)
    child = os.fork()
    if not child:
        os._exit(0 if all((array == 1).all() for array in state["weights"].values()) else 1)
    print(os.waitpid(child, 0)[1])
"""
    assert check_python(code, tmp_path).strip() == "0"


def test_without_memory_for_an_arena_it_is_refused_and_smaller_states_still_save(
    tmp_path, monkeypatch
):
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(1, state_of(1)).wait()
        with monkeypatch.context() as patch:
            patch.setattr(arena, "available_bytes", lambda: 1 << 20)
            with pytest.raises(stepsave.ArenaMemoryError, match="available memory is 1 MiB"):
                saver.save(2, {"big": np.zeros(1 << 20)})
        assert_is_state_of(saver.restore())
        saver.save(3, state_of(3)).wait()
    assert restore_once(tmp_path).step == 3
    assert_is_state_of(restore_once(tmp_path))


def test_two_checkpointers_in_two_directories_do_not_mix(tmp_path):
    with (
        stepsave.Checkpointer(tmp_path / "a") as one,
        stepsave.Checkpointer(tmp_path / "b") as two,
    ):
        for step in range(1, 6):
            one.save(step, state_of(step))
            two.save(step * 10, state_of(step * 10))
    assert restore_once(tmp_path / "a").step == 5
    assert restore_once(tmp_path / "b").step == 50
    assert_is_state_of(restore_once(tmp_path / "b"))


def test_the_directory_follows_no_change_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with stepsave.Checkpointer("backup") as saver:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        saver.save(1, state_of(1)).wait()
    assert_is_state_of(restore_once(tmp_path / "backup"))


def test_a_fall_back_goes_on_from_the_older_step(tmp_path):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step)).wait()
        assert (saver.committed.step, saver.previous.step) == (3, 2)
        (tmp_path / "3/training.json").unlink()
        with pytest.warns(UserWarning, match="step 3.*1 steps of training are lost"):
            assert saver.restore().step == 2
        saver.save(3, state_of(3)).wait()
        assert (saver.committed.step, saver.previous.step) == (3, 2)
    assert_is_state_of(restore_once(tmp_path))


def test_items_may_change_during_a_run(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        for step, text in ((1, "one"), (2, "two, longer"), (3, "one")):
            saver.attach({"model_config": {"config": text}})
            saver.save(step, state_of(step)).wait()
            assert text in (tmp_path / f"{step}/model_config/_strings.json").read_text()
        saver.attach({})
        saver.save(4, state_of(4)).wait()
        assert not (tmp_path / "4/model_config").exists()
    save_once(tmp_path, state_of(5), step=5)
    assert_is_state_of(restore_once(tmp_path))
