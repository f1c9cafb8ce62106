"""Power cuts of a disk while a process saves there, and what a restore finds afterwards."""

import functools
import itertools
import os
import sys
import time

from proof.power_lives import LIMIT_S, SCENES, Child, look, save_on, save_scene

WRITERS = "direct", "tensorstore"
MOMENTS_S = 0.5


class Heard:
    """What a saving process said."""

    def __init__(self):
        self.begun = self.acknowledged = 0
        self.errors = []

    def take(self, said, *, counts=True):
        what, value = said
        if what == "begun":
            self.begun = value
        elif what == "acknowledged" and counts:
            self.acknowledged = value
        elif what == "error":
            self.errors.append(value)

    def take_until_cut(self, line):
        """Takes what is said until it waits to be told to go on, or ends; tells where it waits."""
        while (said := line.hear()) is not None:
            if said[0] == "at":
                return said[1]
            self.take(said)
        return None

    def take_for(self, line, some_s):
        """Takes what is said for so long, after the first save; tells whether it goes on."""
        until = time.monotonic() + LIMIT_S
        is_timed = False
        try:
            while (said := line.hear(until - time.monotonic())) is not None:
                self.take(said)
                if self.acknowledged and not is_timed:
                    until, is_timed = time.monotonic() + some_s, True
        except TimeoutError:
            return is_timed and not self.errors
        return False

    def take_rest(self, child, *, goes_on):
        """Takes what is said after a cut, and has the process end.

        Args:
            child: The process.
            goes_on: Whether it runs into errors, and whatever it acknowledges must be there all the
                same. Else it does not know, and what it says of its world is nothing to us.
        """
        if not goes_on:
            child.kill()
        while (said := child.line.hear()) is not None:
            self.take(said, counts=goes_on)
        child.end()


def sync_something_else(disk):
    """What any other program may do: the journal takes along what it has of ours."""
    with (disk.root / "unrelated").open("wb") as file:
        file.write(bytes(100))
        file.flush()
        os.fsync(file.fileno())


def cut_at_step(disk, directory, scene, writer, stop_after, cut):
    """Saves, has the power cut after an operation, and looks.

    Args:
        disk: Where.
        directory: A new one there.
        scene: What is saved; of `SCENES`.
        writer: Of the checkpointer.
        stop_after: How many operations are done before the cut.
        cut: Cuts.

    Returns:
        What is wrong, or an empty text; None if there are fewer operations: nothing was cut.
    """
    child = Child(save_scene, directory, scene, writer, stop_after)
    heard = Heard()
    where = heard.take_until_cut(child.line)
    if where is None:
        status = child.end()
        assert not status, f"saving failed without a cut: {heard.errors or status}"
        return None
    cut()
    if disk.goes_on:
        child.line.say("go on")
    heard.take_rest(child, goes_on=disk.goes_on)
    disk.start_again()
    wrong = what_is_wrong(directory, SCENES[scene][1], heard)
    return wrong and f"after {where}: {wrong}"


def cut_at_random(disk, directory, writer, double, rng, cut):
    """Saves for some moments, has the power cut, and looks.

    Returns:
        What is wrong, or an empty text; and the last save that was acknowledged.
    """
    child = Child(save_on, directory, writer, double, rng.randrange(1 << 32))
    heard = Heard()
    if not heard.take_for(child.line, rng.uniform(0, MOMENTS_S)):
        raise AssertionError(f"saving failed without a cut: {heard.errors or child.end()}")
    cut()
    heard.take_rest(child, goes_on=disk.goes_on)
    disk.start_again()
    return what_is_wrong(directory, double, heard), heard.acknowledged


def what_is_wrong(directory, double, heard):
    """Restores after a cut, in a process of its own; returns what is wrong, or an empty text."""
    child = Child(look, directory, double)
    restored, said, wrong = None, None, ""
    while (said := child.line.hear()) is not None:
        what, value = said
        if what == "restored":
            restored = value
        elif what == "error":
            wrong = value
    child.end()
    if restored is not None and not heard.acknowledged <= restored <= heard.begun:
        return f"{restored} restored, {heard.acknowledged} acknowledged, {heard.begun} begun"
    return wrong


class Trials:
    """Power cuts of one disk, one after the other.

    Attributes:
        cases: How many there were.
        acknowledged: How many saves were acknowledged before those at random moments.
        failures: What was wrong, a text for each case that was.
    """

    def __init__(self, disk, rng, ways=None):
        """Begins, with a disk that is mounted; `ways` is None for all that it knows."""
        self._disk, self._rng = disk, rng
        ways = list(disk.WAYS if ways is None else ways)
        first = rng.randrange(len(ways))
        self._ways = itertools.cycle(ways[first:] + ways[:first])
        self.cases = self.acknowledged = 0
        self.failures = []

    def cut_at_steps(self, scenes=tuple(SCENES), writers=WRITERS, every=1):
        """Cuts after each operation of each scene, or each so many; ways take turns."""
        for scene, writer in itertools.product(scenes, writers):
            for stop_after in itertools.count(self._rng.randrange(every), every):
                way, directory, cut = self._prepare()
                wrong = cut_at_step(self._disk, directory, scene, writer, stop_after, cut)
                if wrong is None:
                    break
                self._take(f"{scene}, {writer}, {way}", wrong)

    def cut_at_random(self, count, writers=WRITERS):
        """Cuts so often at random moments; ways and writers take turns."""
        for number in range(count):
            way, directory, cut = self._prepare()
            writer, double = writers[number % len(writers)], self._rng.random() < 0.5
            wrong, count = cut_at_random(self._disk, directory, writer, double, self._rng, cut)
            self.acknowledged += count
            self._take(f"{writer}, double={double}, {way}", wrong)

    def _prepare(self):
        """Returns a way to cut, a new directory, and what cuts so."""
        way = next(self._ways)
        number = self._rng.randrange(1 << 32)
        directory = self._disk.root / f"backup-{number:08x}"
        return way, directory, functools.partial(self._cut, way, number)

    def _cut(self, way, seed):
        what, syncs = self._disk.WAYS[way]
        if syncs:
            sync_something_else(self._disk)
        self._disk.cut(what, seed)

    def _take(self, case, wrong):
        self.cases += 1
        if wrong:
            self.failures.append(f"{case}: {wrong}")
            print(f"BAD: {self.failures[-1]}", file=sys.stderr, flush=True)  # noqa: T201
