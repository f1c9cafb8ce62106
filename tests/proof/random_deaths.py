"""A process that is killed at a random moment, and a look at what it left."""

import dataclasses
import os
import random
import shutil
import signal
import time
from pathlib import Path

from bucket_support import BUCKET

from proof import aftermath

LIMIT_S = 60


@dataclasses.dataclass(frozen=True, slots=True)
class Mixture:
    """One kind of life.

    Attributes:
        title: For a table.
        life: Of `proof.lives`.
        options: Of the checkpointer.
        most_s: The process is killed after that time at most.
        anew: Whether each process begins with nothing.
        uploads: Whether the directory is a disk before a bucket.
    """

    title: str
    life: str
    options: dict = dataclasses.field(default_factory=dict)
    most_s: float = 0.8
    anew: bool = False
    uploads: bool = False


class Victims:
    """Processes that go on, one after the other, where the one before was killed."""

    def __init__(self, nursery, mixture, options, directory, chance):
        """Begins nothing yet.

        Args:
            nursery: Where they come from.
            mixture: How they live.
            options: Of the checkpointer, beside those of the mixture.
            directory: Of the backup; not there yet.
            chance: Decides when they die.
        """
        self.mixture = mixture
        self.options = {**mixture.options, **options}
        self.directory = Path(directory)
        self.place = f"s3://{BUCKET}/{os.getpid()}{directory}" if mixture.uploads else None
        self.told = aftermath.Told()
        self._nursery = nursery
        self._chance = chance
        self._killed = 0

    def kill_one(self):
        """Has one live and die; returns the step that is restored then.

        Raises:
            AssertionError: If that is not as it must be.
        """
        self._live_and_die()
        noise = self._nursery.noise()
        assert not noise, noise
        step = aftermath.check_restored(self.directory, self.told, self.options, self.place)
        # What is there now, acknowledged or not, must not be lost by the next one.
        uploaded = self.told.uploaded if step else 0
        self.told = aftermath.Told(durable=step, begun=step, uploaded=uploaded)
        if self.mixture.anew:
            self.end(step)
            self.told = aftermath.Told()
        return step

    def end(self, step):
        """A save works, and nothing is left lying about; then all is removed."""
        options, place = self.options, self.place
        aftermath.go_on(self.directory, step + 1, self.told, options, place)

    def drop(self):
        """Removes what there is, for one that has failed."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _live_and_die(self):
        nursery = self._nursery
        nursery.order(
            kind="life",
            life=self.mixture.life,
            directory=str(self.directory),
            options=self.options,
            seed=self._chance.randrange(1 << 32),
            place=self.place,
        )
        child = deadline_s = None
        after_s = self._chance.uniform(0, self.mixture.most_s)
        # Every other one has time to get on, however slow the machine is.
        first = "durable" if self._killed % 2 else "start"
        self._killed += 1
        while child is None or deadline_s is None or time.monotonic() < deadline_s:
            known = child is not None and deadline_s is not None
            left_s = max(0, deadline_s - time.monotonic()) if known else LIMIT_S
            line = nursery.lines.next(left_s)
            if line is None:
                assert known, f"the child did not say {first!r}"
                break
            if line == "gone":
                return  # it has ended by itself
            what = line.split()[0]
            if what == first and deadline_s is None:
                deadline_s = time.monotonic() + after_s
            if what == "child":
                child = int(line.split()[1])
            else:
                self.told.hear(line)
        os.kill(child, signal.SIGKILL)
        while (line := nursery.lines.next(LIMIT_S)) != "gone":
            assert line is not None, "the child did not die"
            self.told.hear(line)  # what it said before it died counts


def mixtures():
    """All of them, by name."""
    double, keep = {"double_checkpoint": True}, {"keep": 2}
    return {
        "first": Mixture("the first save", "train", most_s=0.2, anew=True),
        "train": Mixture("saves, after a resume", "train"),
        "double": Mixture("saves with `double_checkpoint`", "train", double),
        "keep": Mixture("saves with `keep=2`", "train", keep),
        "restore": Mixture("restores, openings and closings", "restore"),
        "delete": Mixture("deletions", "delete"),
        "delete kept": Mixture("deletions of three backups", "delete", keep),
        "fail": Mixture("saves of which some fail", "fail"),
        "leave": Mixture("the exit of the interpreter, saves in flight", "leave", most_s=0.4),
        "upload": Mixture("saves and uploads to a bucket", "upload", uploads=True),
    }


def chance_of(*what):
    """Chance that is the same whenever it is asked for the same."""
    return random.Random("-".join(map(str, what)))
