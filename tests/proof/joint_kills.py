"""Kills processes that train one model, one or all of them, at random moments of their saves.

Each training goes on where the one before was killed: all its processes at the same step, the
newest that was acknowledged or a newer one, whole. What one process reads of it is compared too.
"""

import dataclasses
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from bucket_support import BUCKET, s3_environment, s3_server
from peers_support import LIMIT_S, Processes
from spread_support import PRELUDE, assert_is_spread_state, devices

import stepsave
from proof.nursery import tidy_up_when_terminated
from proof.record import Campaign, Row, parser

MOST_S = 1.5

LIFE = (
    PRELUDE
    + """
last, disk = int(sys.argv[6]), sys.argv[7]
options = {"local_dir": disk, "upload_every": 2} if disk else {}
with stepsave.Checkpointer(place, **options) as saver:
    backup = saver.restore(like=state_of(0))
    begun = 0 if backup is None else backup.step
    if backup is not None:
        assert_is_state_of(backup.state, begun)
    print("from", begun, flush=True)
    for step in range(begun + 1, begun + 1 + last):
        handle = saver.save(step, state_of(step))
        if step % 3 == 0:
            handle.wait(60)
            print("durable", step, flush=True)
        if disk and step % 5 == 0:
            saver.upload()
            print("uploaded", step, flush=True)
"""
)


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """How many processes there are, and where they save.

    Attributes:
        title: For a table.
        count: How many processes.
        mesh: Over their devices.
        is_remote: Whether the backups are in a bucket.
        has_disks: Whether each process has a disk before it.
    """

    title: str
    count: int = 2
    mesh: str = "1x2"
    is_remote: bool = False
    has_disks: bool = False


KINDS = {
    "directory": Kind("two processes, into one directory"),
    "four": Kind("four processes, into one directory", 4, "2x2"),
    "bucket": Kind("two processes, into a bucket", is_remote=True),
    "disks": Kind("two processes, onto a disk each and a bucket", is_remote=True, has_disks=True),
}


class Told:
    """What one process printed, read as it comes."""

    def __init__(self, child):
        self.steps = {"from": None, "durable": 0, "uploaded": 0}
        self.errors = ""
        self._changed = threading.Condition()
        self._child = child
        self._threads = [
            threading.Thread(target=one, name="proof-told") for one in (self._hear, self._complain)
        ]
        for thread in self._threads:
            thread.start()

    def _hear(self):
        for line in self._child.stdout:
            what, _, step = line.partition(" ")
            with self._changed:
                self.steps[what] = int(step)
                self._changed.notify_all()

    def _complain(self):
        self.errors = self._child.stderr.read()

    def wait_until_begun(self):
        with self._changed:
            assert self._changed.wait_for(lambda: self.steps["from"] is not None, LIMIT_S), (
                "a process did not begin"
            )

    def end(self):
        """Waits for the process and all that it said."""
        self._child.wait(LIMIT_S)
        for thread in self._threads:
            thread.join(LIMIT_S)


class Trainings:
    """Trainings of several processes, one after the other, each killed but the last."""

    def __init__(self, kind, place, disk, chance):
        """Begins nothing yet.

        Args:
            kind: How many processes, and where they save.
            place: Of the backup.
            disk: The directory of their disks.
            chance: Decides who dies when.
        """
        self._kind, self._place, self._chance = kind, place, chance
        self._disk = disk if kind.has_disks else ""
        self._durable = self._uploaded = 0

    def kill_one(self):
        """Has a training begin and be killed; returns the last step that was acknowledged.

        Raises:
            AssertionError: If what it left, or what it began with, is not as it must be.
        """
        count, chance = self._kind.count, self._chance
        some = range(count) if chance.random() < 0.4 else [chance.randrange(count)]
        after_s, rest_s = chance.uniform(0, MOST_S), chance.uniform(0, 0.5)
        with self._begin(10_000) as processes:
            told = [Told(child) for child in processes.children]
            for one in told:
                one.wait_until_begun()
            time.sleep(after_s)
            for rank in some:
                processes.children[rank].kill()
            time.sleep(rest_s)  # the others notice, or do not
            processes.kill()
            for one in told:
                one.end()
        self._take(told)
        self._look()
        return self._durable

    def end(self):
        """A training that is not killed comes to its end, and no debris is there."""
        with self._begin(3) as processes:
            told = [Told(child) for child in processes.children]
            for one in told:
                one.end()
            for child, one in zip(processes.children, told, strict=True):
                assert child.returncode == 0, one.errors
        self._take(told)
        self._look()
        if not self._kind.is_remote:
            left = sorted(os.listdir(self._place))
            spare = [name for name in left if name.startswith("spare")]
            assert len(spare) <= 1, f"debris: {left}"
            assert len(left) == 3 + len(spare), f"debris: {left}"

    def _begin(self, count):
        kind = self._kind
        arguments = self._place, kind.mesh, count, self._disk
        return Processes(LIFE, *arguments, count=kind.count, environment=devices(1))

    def _take(self, told):
        for one in told:
            assert "AssertionError" not in one.errors, one.errors
        begun = {one.steps["from"] for one in told}
        assert len(begun) == 1, f"processes go on from {begun}"
        assert begun.pop() >= self._durable, f"{self._durable} was acknowledged"
        durable = [one.steps["durable"] for one in told]
        # A disk has the part of its process: acknowledged is what all have.
        self._durable = max(self._durable, min(durable) if self._disk else max(durable))
        self._uploaded = max(self._uploaded, *(one.steps["uploaded"] for one in told))

    def _look(self):
        """One process reads what all have saved."""
        backup = stepsave.restore(self._place)
        least = self._uploaded if self._disk else self._durable
        found = 0 if backup is None else backup.step
        assert found >= least, f"step {least} was acknowledged, {found} restored"
        if backup is not None:
            assert_is_spread_state(backup)


def main(arguments=None):
    options = parser("joint_kills", __doc__)
    options.add_argument("--count", type=int, default=50, help="how many of each kind")
    options = options.parse_args(arguments)
    if options.quick:
        options.count = 2
    print(f"seed {options.seed}", flush=True)  # noqa: T201
    tidy_up_when_terminated()
    with tempfile.TemporaryDirectory(prefix="stepsave-joint-") as root, s3_server() as url:
        os.environ.update(s3_environment(url))
        campaign = Campaign("joint_kills", options, root)
        for name, kind in KINDS.items():
            chance = random.Random(f"{options.seed} {name}")
            bad = kill_some(kind, Path(root, name), chance, options.count)
            campaign.add(Row(f"Killed at random moments: {kind.title}", options.count, bad))
    return 1 if campaign.bad else 0


def kill_some(kind, root, chance, count):
    """Kills so many trainings; returns how many left something as it must not be."""
    bad, trainings = 0, None
    for number in range(count):
        if trainings is None:  # one that was bad is not gone on with
            directory = root / str(number)
            directory.mkdir(parents=True)
            place = f"s3://{BUCKET}{directory}" if kind.is_remote else directory / "backup"
            trainings = Trainings(kind, place, directory / "disk", chance)
        try:
            trainings.kill_one()
            if number == count - 1:
                trainings.end()
        except (AssertionError, stepsave.StepsaveError):
            print(f"bad: kill {number}, {kind.title}", flush=True)  # noqa: T201
            traceback.print_exc()
            bad, trainings = bad + 1, None
    shutil.rmtree(root)
    return bad


if __name__ == "__main__":
    sys.exit(main())
