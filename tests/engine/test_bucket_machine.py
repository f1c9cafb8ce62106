"""The protocol of buckets against a model: two trainers, lost answers, deaths at any request."""

import contextlib
import itertools
import warnings

import numpy as np
import pytest
from engine_support import assert_same_bits
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import stepsave
from stepsave.format import planning
from stepsave.store.addresses import address_of
from stepsave.store.bucket import BucketStore
from stepsave.store.lock import ProcessHold
from stepsave.testing import FaultStore

pytestmark = pytest.mark.once

_numbers = itertools.count()


class ApartBucket(BucketStore):
    """Two of one place in one process do not know of each other, as if they were in two."""

    def make_hold(self):
        return ProcessHold(f"{self.root} of {id(self)}")


def state_of(trainer, step, width):
    arrays = {f"w{i}": np.full((700, 7), step * 10 + i, np.float32) for i in range(width)}
    return {"weights": arrays, "frozen": np.arange(4900.0), "trainer": np.int64(trainer)}


class BucketMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(planning, "SHARD_TARGET_BYTES", 32 << 10)
        self.patch.setattr(planning, "CHUNK_LIMIT_BYTES", 8 << 10)
        self.place = f"memory://machine/{next(_numbers)}"
        self.states = {}  # trainer and step -> the state that was saved under it last
        self.acknowledged = None  # whose save is durable for sure, and which step
        self.possible = set()  # those that may be in its place
        self.keep = [0, 0]
        self.savers, self.stores = [None, None], [None, None]
        self.knows = [True, True]  # whether nobody else has changed the marker since it looked
        self.open(0)
        self.open(1)

    def open(self, who):
        self.stores[who] = FaultStore(ApartBucket(address_of(self.place)))
        self.savers[who] = stepsave.Checkpointer(self.stores[who], keep=self.keep[who])
        self.knows[who] = True

    def close(self, who):
        with contextlib.suppress(stepsave.SaveFailedError):
            self.savers[who].close()

    def teardown(self):
        for who in (0, 1):
            self.stores[who].mend()
            self.close(who)
        self.patch.undo()

    def check(self, backup):
        found = backup and (int(backup.state["trainer"]), backup.step)
        assert found in {self.acknowledged, *self.possible}, "neither old nor new"
        if backup:
            assert_same_bits(backup.state, self.states[found])
            assert backup.metadata == {"of": found[1]}
        return found

    def restored(self, who):
        self.stores[who].mend()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backup = self.savers[who].restore()
        self.acknowledged, self.possible = self.check(backup), set()
        self.knows[who] = True

    def save(self, who, width):
        """Saves; tells whether it is durable, and the reason if it is not."""
        saver = self.savers[who]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while True:
                step = max(saver._last_step, 0) + 1
                state = state_of(who, step, width)
                try:
                    handle = saver.save(step, state, {"of": step})
                    break
                except stepsave.SaveFailedError:  # the news of the save before
                    continue
        before = self.states.get((who, step))
        self.states[who, step] = state
        handle.wait_ended(60)
        try:
            handle.raise_error()
        except stepsave.SaveFailedError as e:
            if (who, step) == self.acknowledged and before is not None:
                self.states[who, step] = before
            return (who, step), e.__cause__
        return (who, step), None

    @rule(who=st.integers(0, 1), width=st.integers(1, 4), count=st.integers(1, 2))
    def save_well(self, who, width, count):
        self.stores[who].mend()
        for _ in range(count):
            saved, error = self.save(who, width)
            if error is not None:
                assert isinstance(error, stepsave.DirectoryBusyError), error
                assert not self.knows[who], "refused without another trainer"
                return
            self.acknowledged, self.possible = saved, set()
            self.knows[1 - who] = False

    @rule(
        who=st.integers(0, 1),
        width=st.integers(1, 4),
        countdown=st.integers(1, 14),
        when=st.sampled_from(["before", "middle", "after"]),
        dies=st.booleans(),
        restores=st.booleans(),
    )
    def save_with_a_fault(self, who, width, countdown, when, dies, restores):
        self.stores[who].mend()
        (self.stores[who].die if dies else self.stores[who].fail)(nth=countdown, when=when)
        saved, error = self.save(who, width)
        is_refused = isinstance(error, stepsave.DirectoryBusyError)
        if is_refused:
            assert not self.knows[who]
        elif error is None:
            self.acknowledged, self.possible = saved, set()
        else:
            self.possible.add(saved)
        # It may have claimed the place before it failed.
        self.knows[1 - who] = self.knows[1 - who] and is_refused
        if dies:
            self.close(who)
            self.open(who)
        if restores or dies:
            self.restored(who)

    @rule(who=st.integers(0, 1), keep=st.integers(0, 2))
    def reopen(self, who, keep):
        self.stores[who].mend()
        self.close(who)
        self.keep[who] = keep
        self.open(who)
        self.restored(who)

    @rule(who=st.integers(0, 1))
    def restore(self, who):
        self.restored(who)

    @rule(who=st.integers(0, 1))
    def delete(self, who):
        self.stores[who].mend()
        saver = self.savers[who]
        failed = saver._log.last_failed
        try:
            saver.close(delete_backup=True)
        except stepsave.DirectoryBusyError:
            assert not self.knows[who]
        except stepsave.SaveFailedError:
            assert failed
        else:
            if not failed:
                self.acknowledged, self.possible = None, set()
                self.knows[1 - who] = False
        self.open(who)

    @invariant()
    def what_can_be_read_is_what_the_model_says(self):
        self.check(stepsave.restore(self.place))


BucketMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=14, deadline=None, database=None, print_blob=True
)
TestBucketMachine = BucketMachine.TestCase
