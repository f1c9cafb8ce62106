"""The protocol of buckets against a model: two trainers, lost answers, deaths at any request."""

import contextlib
import itertools
import warnings
from typing import ClassVar

import numpy as np
import pytest
from engine_support import assert_same_bits
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import stepsave
from stepsave.engine import checkpointer
from stepsave.format import planning
from stepsave.store import places, shard_array
from stepsave.store.bucket import BucketStore
from stepsave.store.lock import ProcessHold

pytestmark = pytest.mark.once

CHANGES = ("write_all", "write_if", "remove", "remove_below")
_numbers = itertools.count()


class Died(BaseException):
    """Not an `Exception`, as the end of a process is none."""


class FaultyBucket(BucketStore):
    """Dies, or has no answer once, at the n-th change: before, in the middle of or after it.

    Plans are by trainer: what one does must not count for the other.
    """

    plans: ClassVar = {}
    dead: ClassVar = set()
    trainer: ClassVar = None

    def __init__(self, address):
        super().__init__(address)
        self.name = FaultyBucket.trainer
        self.life = next(_numbers)

    def make_hold(self):
        return ProcessHold(f"{self.root} of {self.life}")

    def fails(self):
        """When the change that is about to be made fails, and how; None if it does not."""
        if self.life in self.dead:
            raise Died
        plan = self.plans.get(self.name)
        if plan is None:
            return None
        plan[0] -= 1
        return plan[1:] if plan[0] == 0 else None

    def end(self, dies):
        if dies:
            self.dead.add(self.life)
            raise Died
        raise stepsave.BucketError("injected: no answer")


def _faulty(name):
    real = getattr(BucketStore, name)

    def operation(self, *args):
        plan = self.fails()
        if plan is None:
            return real(self, *args)
        when, dies = plan
        if when == "after":
            real(self, *args)
        elif when == "middle" and name == "write_all":
            (objects,) = args
            real(self, dict(list(objects.items())[: len(objects) // 2]))
        elif when == "middle" and name == "remove_below":
            for path in self.list(*args)[::2]:
                self._kv.write(path, None).result()
        return self.end(dies)

    return operation


for _name in CHANGES:
    setattr(FaultyBucket, _name, _faulty(_name))


class FaultyShards(shard_array.ShardArray):
    def write(self, number, data):
        plan = self._store.fails()
        if plan is None:
            return super().write(number, data)
        if plan[0] == "after":
            super().write(number, data)
        return self._store.end(plan[1])


def state_of(trainer, step, width):
    arrays = {f"w{i}": np.full((700, 7), step * 10 + i, np.float32) for i in range(width)}
    return {"weights": arrays, "frozen": np.arange(4900.0), "trainer": np.int64(trainer)}


class BucketMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(places, "BucketStore", FaultyBucket)
        self.patch.setattr("stepsave.engine.shard_writing.ShardArray", FaultyShards)
        self.patch.setattr(planning, "SHARD_TARGET_BYTES", 32 << 10)
        self.patch.setattr(planning, "CHUNK_LIMIT_BYTES", 8 << 10)
        self.place = f"memory://machine/{next(_numbers)}"
        self.states = {}  # trainer and step -> the state that was saved under it last
        self.acknowledged = None  # whose save is durable for sure, and which step
        self.possible = set()  # those that may be in its place
        self.keep = [0, 0]
        self.savers = [None, None]
        self.knows = [True, True]  # whether nobody else has changed the marker since it looked
        FaultyBucket.plans, FaultyBucket.dead = {}, set()
        self.open(0)
        self.open(1)

    def open(self, who):
        FaultyBucket.plans.pop(who, None)
        FaultyBucket.trainer = who
        self.savers[who] = checkpointer.Checkpointer(self.place, keep=self.keep[who])
        self.knows[who] = True

    def close(self, who):
        with contextlib.suppress(stepsave.SaveFailedError):
            self.savers[who].close()

    def teardown(self):
        FaultyBucket.plans = {}
        for who in (0, 1):
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
        FaultyBucket.plans.pop(who, None)
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
        FaultyBucket.plans.pop(who, None)
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
        FaultyBucket.plans[who] = [countdown, when, dies]
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
        FaultyBucket.plans.pop(who, None)
        self.close(who)
        self.keep[who] = keep
        self.open(who)
        self.restored(who)

    @rule(who=st.integers(0, 1))
    def restore(self, who):
        self.restored(who)

    @rule(who=st.integers(0, 1))
    def delete(self, who):
        FaultyBucket.plans.pop(who, None)
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
        FaultyBucket.trainer = "reader"
        self.check(stepsave.restore(self.place))


BucketMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=14, deadline=None, database=None, print_blob=True
)
TestBucketMachine = BucketMachine.TestCase
