import re
import threading

import numpy as np
import pytest
from engine_support import assert_is_state_of, restore_once, save_once, state_of

import stepsave
from stepsave.format.tree import flatten
from stepsave.store.local import LocalStore


@pytest.fixture
def gate(monkeypatch):
    """Saves stop before they publish, until the gate is opened."""
    opened = threading.Event()
    real = LocalStore.replace

    def replace(self, path, data):
        assert opened.wait(30)
        real(self, path, data)

    monkeypatch.setattr(LocalStore, "replace", replace)
    yield opened
    opened.set()


def test_a_handle_tells_how_its_save_goes_on(tmp_path, gate):
    state = state_of(7)
    with stepsave.Checkpointer(tmp_path) as saver:
        handle = saver.save(7, state)
        assert (handle.step, handle.skipped, handle.done, handle.durable_s) == (
            7,
            False,
            False,
            None,
        )
        assert handle.bytes == sum(np.asarray(leaf).nbytes for leaf in flatten(state)[1])
        assert (handle.changed_bytes, handle.written_bytes) == (0, 0)
        assert "step 7: in flight" in repr(handle)
        with pytest.raises(TimeoutError, match=r"step 7.*0.01 s"):
            handle.wait(0.01)
        with pytest.raises(TimeoutError, match="step 7"):
            saver.wait(0.01)
        assert saver.in_flight == 1
        gate.set()
        handle.wait()
        handle.wait(0)  # twice is fine
        assert handle.done
        assert 0 < handle.stall_s < handle.durable_s
        assert re.search(r"durable after \d+\.\d+ s", repr(handle))
        assert saver.in_flight == 0
    assert_is_state_of(restore_once(tmp_path))


def test_saves_become_durable_in_their_order(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        handles = [saver.save(step, state_of(step)) for step in range(20)]
        for number, handle in enumerate(handles):
            handle.wait()
            assert all(earlier.done for earlier in handles[:number])
            assert saver._directory.committed.step >= number
    assert_is_state_of(restore_once(tmp_path))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.usefixtures("small_shards")
def test_a_failed_shard_fails_the_save_and_the_next_one_starts_afresh(
    tmp_path, monkeypatch, double
):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=double) as saver:
        if saver.stats().writer != "direct":
            pytest.skip("the file system of the temporary directory does not take O_DIRECT")
        saver.save(1, state_of(1)).wait()
        saver.save(2, state_of(2)).wait()
        real = LocalStore.write_direct

        def fail(self, path, data, ranges=None):
            real(self, path, data, ranges)
            if path.endswith("/1"):
                raise OSError(5, "the sync failed")

        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "write_direct", fail)
            handle = saver.save(3, state_of(3))
            with pytest.raises(stepsave.SaveFailedError, match=r"step 3.*sync failed") as caught:
                handle.wait()
        assert isinstance(caught.value.__cause__, OSError)
        assert "failed" in repr(handle)
        assert not (tmp_path / "spare").exists(), "files of a failed sync must not be used again"
        assert_is_state_of(saver.restore())
        assert saver.restore().step == 2
        saver.save(3, state_of(3)).wait()
    assert restore_once(tmp_path).step == 3
    assert_is_state_of(restore_once(tmp_path))


def test_a_failure_is_reported_once(tmp_path, monkeypatch):
    saver = stepsave.Checkpointer(tmp_path)
    with monkeypatch.context() as patch:

        def fail(*_):
            raise MemoryError("no room")

        patch.setattr(LocalStore, "rename", fail)
        saver.save(1, state_of(1))
        saver.drain()
    with pytest.raises(stepsave.SaveFailedError, match="no room"):
        saver.save(2, state_of(2))
    saver.save(2, state_of(2)).wait()
    assert saver.stats().failed == 1
    saver.close()
    assert_is_state_of(restore_once(tmp_path))


@pytest.mark.parametrize("told_by", ["wait", "close", "exit"])
def test_a_failure_is_told_by_whoever_is_asked_first(tmp_path, monkeypatch, told_by):
    def fail(*_):
        raise OSError(5, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "replace", fail)
        saver = stepsave.Checkpointer(tmp_path)
        saver.save(1, state_of(1))
        saver.drain()
    ask = {"wait": saver.wait, "close": saver.close, "exit": saver.__exit__}[told_by]
    with pytest.raises(stepsave.SaveFailedError, match="broken"):
        ask(*[None] * 3 if told_by == "exit" else [])
    saver.close()


def test_a_failure_never_hides_the_error_that_ends_the_loop(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "broken")

    monkeypatch.setattr(LocalStore, "replace", fail)

    def train():
        with stepsave.Checkpointer(tmp_path) as saver:
            saver.save(1, state_of(1))
            raise KeyError("the loop's own")

    with pytest.raises(KeyError, match="the loop's own") as caught:
        train()
    assert any("broken" in note for note in caught.value.__notes__)


def test_two_failures_are_both_counted_and_memory_is_given_back(tmp_path, monkeypatch):
    real = LocalStore.replace
    with stepsave.Checkpointer(tmp_path) as saver:
        for step in range(1, 6):  # more than there are arenas
            with monkeypatch.context() as patch:

                def fail(*_):
                    raise OSError(28, "full")

                patch.setattr(LocalStore, "replace", fail)
                with pytest.raises(stepsave.SaveFailedError, match="full"):
                    saver.save(step, state_of(step)).wait()
        assert saver.restore() is None
        assert LocalStore.replace is real
        saver.save(9, state_of(9)).wait()
        assert (saver.stats().failed, saver.stats().committed) == (5, 1)
    assert_is_state_of(restore_once(tmp_path))


def test_a_state_of_zeros_is_written(tmp_path):
    with stepsave.Checkpointer(tmp_path, writer="tensorstore") as saver:
        saver.save(0, {"a": np.zeros(5000)}).wait()
    assert (tmp_path / "0/pytree/d/c/0").stat().st_size >= 40_000
    assert (restore_once(tmp_path).state["a"] == np.zeros(5000)).all()


@pytest.mark.parametrize("name", ["stepsave-keeper", "stepsave-uploader"])
def test_threads_that_cannot_be_started_are_told_at_the_start(tmp_path, monkeypatch, name):
    real = threading.Thread.start

    def start(thread):
        if thread.name.startswith(name):
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    what = "writer threads" if name == "stepsave-keeper" else "threads for uploads"
    with pytest.raises(
        stepsave.BackupDirectoryError, match=rf"cannot start \d+ {what}: can't .*ulimit -u"
    ):
        stepsave.Checkpointer("memory://no-threads", local_dir=tmp_path)
    monkeypatch.undo()
    save_once(tmp_path, {"a": np.zeros(3)})  # nothing was left locked
