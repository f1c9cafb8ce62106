"""The commit protocol against a model: what is acknowledged is never lost, whatever dies when."""

import contextlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from engine_support import assert_same_bits, flip_bit, read_marker
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import stepsave
from stepsave.engine.commit import COMMIT, PREVIOUS, SPARE
from stepsave.engine.reader import read_backup
from stepsave.format import planning
from stepsave.format.marker import decode_marker
from stepsave.store.local import LocalStore
from stepsave.testing import FaultStore
from stepsave.threads import Crew

_CREW = Crew(1, "test")


def state_of(step, width):
    arrays = {f"w{i}": np.full((700, 7), step * 10 + i, np.float32) for i in range(width)}
    rows = np.zeros((700, 7), np.float32)
    rows[step % 7 * 100] = step
    return {
        "weights": arrays,
        "empty": np.zeros((0, 3)),
        "frozen": np.arange(4900, dtype=np.float32),
        "rows": rows,
        "slow": np.full((700, 7), step // 3, np.float32),
        "step": np.int64(step),
    }


class CommitMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda _: None)  # processes die here, not machines
        self.patch.setattr(os, "fdatasync", lambda _: None)
        self.patch.setattr(planning, "SHARD_TARGET_BYTES", 32 << 10)
        self.patch.setattr(planning, "CHUNK_LIMIT_BYTES", 8 << 10)
        self.directory = Path(tempfile.mkdtemp(prefix="stepsave-machine-"))
        self.states = {}  # step -> the state that was saved under it last
        self.acknowledged = 0  # the newest step that is durable for sure
        self.possible = set()  # newer ones, which may be durable or not
        self.last_step = 0
        self.keep = 0
        self.valid_limit = 1
        self.saver = self.store = None
        self.open()

    def open(self):
        # Until the next save that goes well with fewer.
        self.valid_limit = max(self.valid_limit, 1 + self.keep)
        self.store = FaultStore(self.directory)
        self.saver = stepsave.Checkpointer(self.store, keep=self.keep)

    def close(self):
        with contextlib.suppress(stepsave.SaveFailedError):
            self.saver.close()

    def teardown(self):
        self.close()
        self.patch.undo()
        shutil.rmtree(self.directory)

    def restored(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backup = self.saver.restore()
        found = backup.step if backup else 0
        assert found in {self.acknowledged, *self.possible}, "neither old nor new"
        if backup:
            assert_same_bits(backup.state, self.states[found])
            assert backup.metadata == {"of": found}
        self.acknowledged, self.possible = found, set()
        self.last_step = found or self.last_step
        return found

    def save(self, width, step):
        self.last_step = step
        self.states[step] = state_of(step, width)
        return self.saver.save(step, self.states[step], {"of": step})

    def next_step(self):
        taken = [self.last_step, self.acknowledged, *self.possible]
        return max(taken) + 1

    @rule(width=st.integers(1, 4), count=st.integers(1, 3))
    def save_well(self, width, count):
        self.store.mend()
        with contextlib.suppress(stepsave.SaveFailedError):
            self.saver.wait()
        for _ in range(count):
            step = self.next_step()
            self.save(width, step).wait()
            self.acknowledged, self.possible = step, set()
        kept = {record.directory for record in self.valid_records()}
        assert str(self.acknowledged) in kept
        markers = {COMMIT, PREVIOUS} if len(kept) > 1 else {COMMIT}
        litter = set(os.listdir(self.directory)) - kept - markers - {"LOCK", SPARE}
        assert not litter
        assert len(kept) <= 1 + self.keep
        self.valid_limit = 1 + self.keep

    @rule(
        width=st.integers(1, 4),
        countdown=st.integers(1, 60),
        when=st.sampled_from(["before", "middle", "after"]),
        dies=st.booleans(),
        reopens_keep=st.integers(0, 2),
        restores=st.booleans(),
    )
    def save_with_a_fault(self, width, countdown, when, dies, reopens_keep, restores):
        self.store.mend()
        (self.store.die if dies else self.store.fail)(nth=countdown, when=when)
        step = self.next_step()
        try:
            try:
                handle = self.save(width, step)
            except stepsave.SaveFailedError:  # the news of the save before
                handle = self.save(width, step)
            handle.wait()
            self.acknowledged, self.possible = step, set()
        except stepsave.SaveFailedError:
            self.possible.add(step)
        if dies:
            self.close()
            self.keep = reopens_keep
            self.open()
        if restores or dies:
            self.store.mend()
            self.restored()

    @rule(keep=st.integers(0, 2))
    def reopen(self, keep):
        self.close()
        self.keep = keep
        self.open()
        self.restored()

    @rule()
    def restore(self):
        self.store.mend()
        self.restored()

    @precondition(lambda self: len(self.valid_records()) >= 2)
    @rule(what=st.sampled_from(["shard", "layout", "index", "training", "empty marker", "gone"]))
    def spoil_the_newest(self, what):
        self.saver.drain()
        older, valid = sorted(record.step for record in self.valid_records())[-2:]
        newest = self.directory / str(valid)
        if what in ("empty marker", "gone") and valid != self.committed_on_disk():
            older = valid  # the marker names one that was spoilt before
        if what == "shard":
            flip_bit(newest / "pytree/d/c/0", 50)
        elif what == "layout":
            flip_bit(newest / "layout.json", 50)
        elif what == "index":
            flip_bit(newest / "pytree/d/index", 50)
        elif what == "training":
            (newest / "training.json").unlink()
        elif what == "gone":
            (self.directory / COMMIT).unlink()
        else:
            (self.directory / COMMIT).write_bytes(b"")
        self.acknowledged, self.possible = older, set()
        self.restored()

    def committed_on_disk(self):
        with contextlib.suppress(OSError, ValueError):
            return read_marker(self.directory)["step"]

    def valid_records(self):
        """The backups that a marker names and whose every byte is proved."""
        store = LocalStore(self.directory)
        found = {}
        for name in (COMMIT, PREVIOUS):
            records = ()
            with contextlib.suppress(OSError, stepsave.CorruptBackupError):
                records = decode_marker((self.directory / name).read_bytes(), name)
            for record in records:
                with contextlib.suppress(OSError, stepsave.CorruptBackupError):
                    backup = read_backup(store, record, _CREW)
                    assert_same_bits(backup.state, self.states[record.step])
                    found[record.directory] = record
        return list(found.values())

    @invariant()
    def what_is_valid_is_what_the_model_says(self):
        steps = {record.step for record in self.valid_records()}
        assert len(steps) <= self.valid_limit
        if self.acknowledged:
            assert steps, "no valid backup is left"
            assert max(steps) in {self.acknowledged, *self.possible}


CommitMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=12, deadline=None, database=None, print_blob=True
)
TestCommitMachine = CommitMachine.TestCase
