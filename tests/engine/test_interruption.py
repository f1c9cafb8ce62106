"""Interrupted at any instant, a checkpointer goes on working and loses nothing.

What an interruption leaves is looked at while it is still being handled: its traceback then keeps
alive whatever the interrupted calls had in their hands.
"""

import contextlib
import itertools
import random
import threading
import time

import numpy as np
import pytest
from engine_support import assert_is_state_of, restore_once, state_of
from interrupting import Interrupted, InterruptedAfter, enumerate_lines

import stepsave
from stepsave.format.tree import flatten, unflatten

PATIENCE_S = 60


def assert_works(saver, at_least):
    """Saves, restores, and has both arenas."""
    step = max(at_least, saver.committed.step if saver.committed else 0) + 1
    saver.save(step, state_of(step)).wait(PATIENCE_S)
    backup = saver.restore()
    assert backup.step == step
    assert_is_state_of(backup)
    return step


@pytest.fixture
def threads():
    """No thread more after the test than before it, but the one that waits for the exit."""
    before = set(threading.enumerate())
    yield
    deadline_s = time.monotonic() + 10  # of a checkpointer that was dropped they end by themselves
    while True:
        left = {t.name for t in set(threading.enumerate()) - before} - {"stepsave-watch-exit"}
        if not left or time.monotonic() > deadline_s:
            break
        time.sleep(0.01)
    assert not left


KINDS = {
    "numpy": {},
    "tensorstore": {"writer": "tensorstore"},
    "jax on its device": {"snapshot": "device"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("threads")
def test_a_save_interrupted_at_any_line_has_happened_or_has_not(tmp_path, kind, no_sync):
    del no_sync
    to_array = pytest.importorskip("jax").numpy.asarray if kind.startswith("jax") else np.asarray

    def state(step):
        paths, leaves = flatten(state_of(step))
        return unflatten(paths, [to_array(leaf) for leaf in leaves])

    step = 0
    with stepsave.Checkpointer(tmp_path, **KINDS[kind]) as saver:
        saver.save(0, state(0)).wait()

        def make_body():
            nonlocal step
            step += 1
            begun, before = step, saver.committed.step

            def check():
                nonlocal step
                assert saver.in_flight <= 1
                saver.wait(PATIENCE_S)
                backup = saver.restore()
                assert backup.step in (before, begun)
                assert_is_state_of(backup)
                step = begun + 1
                saver.save(step, state(step)).wait(PATIENCE_S)

            return lambda: saver.save(begun, state(begun)), check

        assert enumerate_lines(make_body) > 100
        pool = saver._capture._pool
        saver.drain()
        assert pool.count == 2
        assert all(arena.is_free for arena in pool._arenas)
        assert saver.stats().failed == 0
    assert restore_once(tmp_path).step == step
    assert_is_state_of(restore_once(tmp_path))


@pytest.mark.parametrize("use", ["restore", "wait", "drain", "stats", "prepare"])
@pytest.mark.usefixtures("threads")
def test_whatever_is_interrupted_can_be_called_again(tmp_path, use, no_sync):
    del no_sync
    with stepsave.Checkpointer(tmp_path) as saver:
        step = 0
        if use != "prepare":
            saver.save(0, state_of(0))

        def make_body():
            nonlocal step
            call = {"prepare": lambda: saver.prepare(state_of(0))}.get(use) or getattr(saver, use)
            if use in ("wait", "drain"):  # there is something to wait for
                step += 1
                saver.save(step, state_of(step))

            def check():
                nonlocal step
                call()
                step = assert_works(saver, step)

            return call, check

        assert enumerate_lines(make_body) > 0
    assert_is_state_of(restore_once(tmp_path))


@pytest.mark.usefixtures("threads")
def test_a_state_of_another_shape_may_be_interrupted_too(tmp_path, no_sync):
    """Layout and arenas are then made anew."""
    del no_sync
    step = 0
    with stepsave.Checkpointer(tmp_path) as saver:

        def make_body():
            nonlocal step
            step += 1
            begun, shape = step, (1 + step % 5, 50)

            def check():
                nonlocal step
                step = assert_works(saver, begun)

            return lambda: saver.save(begun, state_of(begun, 2, shape)), check

        assert enumerate_lines(make_body) > 100
        saver.drain()
        assert all(arena.is_free for arena in saver._capture._pool._arenas)


@pytest.mark.usefixtures("threads")
def test_an_opening_interrupted_at_any_line_leaves_the_directory_to_the_next(tmp_path, no_sync):
    del no_sync

    def make_body():
        opened = []

        def check():
            with stepsave.Checkpointer(tmp_path) as saver:
                assert_works(saver, 0)

        def body():
            opened.append(stepsave.Checkpointer(tmp_path))

        return body, check

    with pytest.warns(ResourceWarning, match="not closed"):
        assert enumerate_lines(make_body) > 30  # the last one is opened, and dropped


@pytest.mark.parametrize("deletes", [False, True])
@pytest.mark.usefixtures("threads")
def test_a_closing_interrupted_at_any_line_is_closed_by_the_next(tmp_path, deletes, no_sync):
    del no_sync
    numbers = itertools.count()

    def make_body():
        directory = tmp_path / str(next(numbers))
        saver = stepsave.Checkpointer(directory)
        saver.save(1, state_of(1))

        def check():
            saver.close(delete_backup=deletes)
            assert saver.closed
            with stepsave.Checkpointer(directory) as again:
                backup = again.restore()
                assert (backup is None) == deletes
                assert_works(again, 1)

        return lambda: saver.close(delete_backup=deletes), check

    assert enumerate_lines(make_body) > 10


# What comes in a finalizer is reported, and swallowed, by Python itself.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("again_s", [0.0, 0.0003], ids=["once", "again and again"])
@pytest.mark.usefixtures("threads")
def test_saves_interrupted_at_two_thousand_instants_lose_nothing(tmp_path, again_s, no_sync):
    del no_sync
    chance = random.Random(1)
    interrupted = happened = 0
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.prepare(state_of(0))
        durable = 0
        for step in range(1, 2001):
            try:
                with InterruptedAfter(chance.uniform(1e-5, 0.003), again_s):
                    saver.save(step, state_of(step)).wait()
                durable = step
            except Interrupted:
                interrupted += 1
            if step % 50 == 0:
                committed = saver.committed.step
                assert durable <= committed <= step
                happened += committed == step
                assert_is_state_of(saver.restore())
        saver.save(5000, state_of(5000)).wait(PATIENCE_S)
        assert all(arena.is_free for arena in saver._capture._pool._arenas)
    assert interrupted > 500
    assert restore_once(tmp_path).step == 5000


# What comes in a finalizer is reported, and swallowed, by Python itself.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("threads")
def test_a_checkpointer_is_opened_used_and_closed_at_three_hundred_instants(tmp_path, no_sync):
    del no_sync
    chance = random.Random(2)
    interrupted = 0
    for _ in range(300):
        saver = None
        try:
            with InterruptedAfter(chance.uniform(1e-5, 0.03)):
                saver = stepsave.Checkpointer(tmp_path)
                backup = saver.restore()
                step = backup.step + 1 if backup else 0
                saver.save(step, state_of(step))
                saver.close()
        except Interrupted:
            interrupted += 1
        if saver is not None:
            saver.close()
        del saver
        with stepsave.Checkpointer(tmp_path) as again:
            backup = again.restore()
            if backup is not None:
                assert_is_state_of(backup)
    assert interrupted > 30
    with stepsave.Checkpointer(tmp_path) as saver:
        assert_works(saver, 0)


def test_a_signal_handler_that_saves_in_the_midst_of_a_save_is_told_so(tmp_path, monkeypatch):
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(1, state_of(1)).wait()
        errors = []

        def handler(*_):
            for use in (lambda: saver.save(9, state_of(9)), saver.restore, saver.wait, saver.close):
                with pytest.raises(stepsave.NestedCallError, match="between two steps") as caught:
                    use()
                errors.append(caught.value)

        with monkeypatch.context() as patch:
            from stepsave.snapshot.runs import Pack

            fill = Pack.fill

            def fill_and_handle(self, *args, **options):
                if not errors:
                    handler()
                fill(self, *args, **options)

            patch.setattr(Pack, "fill", fill_and_handle)
            saver.save(2, state_of(2)).wait()
        assert len(errors) == 4
        assert saver.restore().step == 2
        assert_is_state_of(saver.restore())


@pytest.mark.parametrize("told", ["wait", "raise_failed"])
def test_a_failure_whose_telling_is_interrupted_is_told_again(tmp_path, monkeypatch, told):
    from stepsave.store.local import LocalStore

    def make_body():
        saver = stepsave.Checkpointer(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "rename", lambda *_: 1 / 0)
            handle = saver.save(1, state_of(1))
            saver.drain()
        ask = handle.wait if told == "wait" else saver.raise_failed
        heard = []

        def body():
            made.append(saver)
            try:
                ask()
            except stepsave.SaveFailedError as e:
                heard.append(e)
            except BaseException as e:
                if isinstance(e.__context__, stepsave.SaveFailedError):
                    heard.append(e)  # it is in the traceback
                raise
            saver.close()

        def check():
            failure = stepsave.SaveFailedError  # better twice than never
            with contextlib.suppress(failure) if heard else pytest.raises(failure):
                saver.close()
            assert saver.closed

        return body, check

    made = []
    assert enumerate_lines(make_body) > 5
    assert all(saver.closed for saver in made)
