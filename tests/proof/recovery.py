"""Recovers from what a crash has left, as the next start of a training does."""

import contextlib
import dataclasses
import os
import random
import shutil
import warnings
from pathlib import Path

from engine_support import assert_is_state_of

import stepsave
from proof.crash_recording import free_syncs
from proof.crash_scenarios import NAME, tiny_state
from stepsave.engine.commit import COMMIT, PREVIOUS, SPARE
from stepsave.engine.markers import Markers
from stepsave.store.local import LocalStore
from stepsave.testing.crashes import crash_states, distinct, materialise
from stepsave.testing.posix_model import Sync

FOREIGN = b"somebody else's"
JUNK = ".DS_Store"


def recover(state, top, scenario, writer):
    """Restores, saves and restores again; then looks for debris.

    Raises:
        AssertionError: If anything of it is not as promised.
    """
    directory = Path(top, NAME)
    with _materialised(state, top):
        foreign = _put_foreign(Path(top), directory, deep=state.key[0] % 8 == 0)
        _recover(directory, state.acknowledged, scenario, writer, foreign)
        for path in foreign:
            found = [p for p in Path(top).rglob(path.name) if p.read_bytes() == FOREIGN]
            assert found, f"{path} is gone"


@contextlib.contextmanager
def _materialised(state, top):
    """Has what a crash left in a directory, which is empty again afterwards."""
    materialise(state, top)
    try:
        yield
    except Exception as e:
        e.add_note(state.describe())
        raise
    finally:
        for name in os.listdir(top):
            path = Path(top, name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _put_foreign(top, directory, *, deep):
    """Puts files of somebody else beside a backup, and into it where they are bearable."""
    places = [top / "beside"]
    if directory.is_dir():
        places.append(directory / JUNK)
        if deep:
            valid = {record.directory for record in _records(directory)}
            places += [
                found / f"mine-{found.parents[2].name}"
                for found in directory.glob("*/pytree/d/c")
                if found.parents[2].name not in valid
            ]
    for path in places:
        path.write_bytes(FOREIGN)
    return places


def _records(directory):
    markers = Markers(LocalStore(directory))
    markers.read_markers()
    return markers.records


def _recover(directory, acknowledged, scenario, writer, foreign):
    keep = max(scenario.options.get("keep", 0), scenario.options.get("double_checkpoint", 0))
    with stepsave.Checkpointer(directory, writer=writer, **scenario.options) as saver:
        with _warnings(scenario):
            backup = saver.restore()
        found = -1 if backup is None else backup.step
        assert found >= acknowledged, f"step {acknowledged} was acknowledged, {found} restored"
        if backup is not None:
            assert_is_of(backup)
        del backup
        if acknowledged > keep and not scenario.may_fall_back:
            kept = [record.step for record in saver.kept]
            assert len(kept) >= keep, f"of {keep} only {kept} are kept"
            for step in kept:
                assert_is_of(saver.restore(step=step))
        step = max(found, 0) + 10
        saver.save(step, tiny_state(step), {"of": step}).wait()
        restored = saver.restore()
        assert restored.step == step
        assert_is_of(restored)
        del restored
    _assert_clean(directory, foreign, [step, *([found] if keep and found > 0 else [])])


def _warnings(scenario):
    """What was damaged on purpose is warned of; nothing else may need a warning."""
    return _without_warnings() if scenario.may_fall_back else contextlib.nullcontext()


@contextlib.contextmanager
def _without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def assert_is_of(backup):
    assert_is_state_of(backup)
    assert len(backup.state["weights"]) in (2, 3)
    assert backup.metadata == {"of": backup.step}


def _assert_clean(directory, foreign, valid):
    """Nothing is there but valid backups, markers, the lock, and a spare one."""
    names = set(os.listdir(directory))
    records = _records(directory)
    steps = [record.step for record in records]
    assert steps[: len(valid)] == valid, f"{steps} are valid instead of {valid}"
    expected = {COMMIT, "LOCK", *(record.directory for record in records)}
    expected |= {PREVIOUS} if len(records) > 1 else set()
    strange = {path.name for path in foreign}
    if strange - {"beside", JUNK}:
        return  # where somebody else's files are, directories stay
    assert expected <= names <= expected | {SPARE, JUNK}, f"debris: {sorted(names)}"
    whole = _files(directory / records[0].directory)
    assert whole == {f.path for f in records[0].files} | {
        f"pytree/d/c/{n}" for n in range(len(records[0].shard_digests))
    }
    assert _files(directory / SPARE) <= whole | {"pytree/d/c/4"}


def _files(directory):
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir()}


def find_out(state, top):
    """Restores from what a disk has left that said it had synced, and had not.

    What it lost is lost; but what is restored is a backup as it was saved, or an error names the
    directory.

    Raises:
        AssertionError: If anything else is.
    """
    directory = Path(top, NAME)
    with _materialised(state, top), _without_warnings():
        for restore in (stepsave.restore, _restore_to_train):
            try:
                backup = restore(directory)
            except stepsave.StepsaveError as e:
                if str(directory) not in str(e):
                    raise
                continue
            if backup is not None:
                assert_is_of(backup)


def _restore_to_train(directory):
    with stepsave.Checkpointer(directory) as saver:
        return saver.restore()


def _lies(log):
    """Yields a log as it is with a disk that does nothing on one of its syncs, for each."""
    for number, one in enumerate(log.operations):
        if isinstance(one, Sync):
            rest = log.operations[:number] + log.operations[number + 1 :]
            yield dataclasses.replace(log, operations=rest)


def recover_from_all(log, scenario, writer, sampling, place, most=None, *, lying=False):
    """Recovers from each state that may be left, once.

    Args:
        log: What was recorded.
        scenario: What that was.
        writer: Of the checkpointers.
        sampling: Which states are looked at.
        place: An empty directory.
        most: How many of these are drawn; None for all.
        lying: Whether the disk may do nothing on a sync; then `find_out`.

    Returns:
        How many states there were, and what went wrong, as exceptions.
    """
    logs = _lies(log) if lying else [log]
    states = distinct(state for log in logs for state in crash_states(log, sampling))
    if most is not None and len(states) > most:
        states = random.Random(sampling.seed).sample(states, most)
    bad = []
    with free_syncs():
        for state in states:
            try:
                if lying:
                    find_out(state, place)
                else:
                    recover(state, place, scenario, writer)
            except Exception as e:  # noqa: BLE001  each is to be counted
                bad.append(e)
    return len(states), bad
