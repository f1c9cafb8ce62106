"""Processes that want one directory at once, and how the one that got it ends.

To be run as a process of its own, `python -m proof.racing DIRECTORY RACES SEED`: it has no thread,
so it can fork racers that begin at once. It prints what it found as JSON.
"""

import contextlib
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path

from engine_support import assert_is_state_of, state_of, tree_bytes

import stepsave

PATIENCE_S = 30
ENDINGS = ("close", "kill", "stop", "delete")


class Racer:
    """A forked process that waits for the start, and then does what it is told by letters."""

    def __init__(self, barrier, directory, step):
        told, self._tell = os.pipe()
        self._heard, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _race(barrier, told, answers, directory, step)
                status = 0
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(status)
        for fd in (told, answers):
            os.close(fd)

    def tell(self, letter):
        os.write(self._tell, letter)

    def hear(self):
        """What it says next."""
        ready, _, _ = select.select([self._heard], [], [], PATIENCE_S)
        assert ready, "a racer says nothing"
        said = os.read(self._heard, 4096)
        assert said, "a racer has died"
        return said.decode()

    def signal(self, signum):
        os.kill(self.pid, signum)

    def end(self):
        """Has it close, unless it was killed; returns its exit status."""
        with contextlib.suppress(BrokenPipeError):
            self.tell(b"e")
        for fd in (self._tell, self._heard):
            os.close(fd)
        deadline_s = time.monotonic() + PATIENCE_S
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline_s, "a racer does not end"
            time.sleep(0.001)
        return os.waitstatus_to_exitcode(ended[1])


def _race(barrier, told, answers, directory, step):
    """The life of a racer."""
    os.read(barrier, 1)
    saver = None
    letter = b"o"
    while letter != b"e":
        if letter == b"o":
            try:
                saver = stepsave.Checkpointer(directory)
            except stepsave.DirectoryBusyError as e:
                os.write(answers, f"busy {e}".encode())
            else:
                saver.save(step, state_of(step)).wait(PATIENCE_S)
                os.write(answers, b"won")
        elif letter == b"d":
            _delete_often(directory, saver)
            os.write(answers, b"deleted")
            saver = None
        letter = os.read(told, 1)
    if saver is not None:
        saver.close()


def _delete_often(directory, saver):
    """Opens, saves, restores and deletes; nobody else may be in there meanwhile.

    The directory goes each time, with its lock file, while others are about to take that.
    """
    alone = f"{directory}.alone"
    for _ in range(3):
        deadline_s = time.monotonic() + PATIENCE_S
        while saver is None:
            assert time.monotonic() < deadline_s
            with contextlib.suppress(stepsave.DirectoryBusyError):
                saver = stepsave.Checkpointer(directory)
        os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
        saver.drain()
        if saver.committed is None:
            saver.save(1, state_of(1)).wait(PATIENCE_S)
        assert_is_state_of(saver.restore())
        os.unlink(alone)
        saver.close(delete_backup=True)
        saver = None


def race(directory, step, ending, count=2):
    """One race; raises if anything was wrong.

    Args:
        directory: What all want.
        step: What the winner saves; greater than any before.
        ending: How the winner ends, one of `ENDINGS`.
        count: How many race.
    """
    barrier, start = os.pipe()
    racers = [Racer(barrier, directory, step) for _ in range(count)]
    os.write(start, bytes(count))
    try:
        said = [racer.hear() for racer in racers]
        winners = [racer for racer, what in zip(racers, said, strict=True) if what == "won"]
        losers = [racer for racer in racers if racer not in winners]
        assert len(winners) == 1, said
        _check_refused(directory, winners[0], losers, said)
        if ending == "stop":
            winners[0].signal(signal.SIGSTOP)
            _check_refused(directory, winners[0], losers)
        if ending == "delete":
            for racer in racers:
                racer.tell(b"d")
            assert [racer.hear() for racer in racers] == ["deleted"] * count
        elif ending != "close":
            winners[0].signal(signal.SIGKILL)
        killed = -signal.SIGKILL if ending in ("kill", "stop") else 0
        for racer in list(racers):
            racers.remove(racer)
            assert racer.end() == (killed if racer in winners else 0)
    finally:
        for racer in racers:
            racer.signal(signal.SIGKILL)
            racer.end()
        os.close(barrier)
        os.close(start)
    _check_free(directory, step, ending)


def _check_refused(directory, winner, losers, said=()):
    """All others are told who has it, now and again; and change nothing by asking."""
    before = tree_bytes(directory)
    for racer in losers:
        racer.tell(b"o")
    for what in [*said, *(racer.hear() for racer in losers)]:
        if what != "won":
            assert what.startswith(f"busy {directory}: "), what
            assert "another live process" in what, what
    for racer in losers:
        racer.tell(b"o")
        assert f"pid {winner.pid}" in racer.hear()
    assert tree_bytes(directory) == before


def _check_free(directory, step, ending):
    assert Path(directory).exists() == (ending != "delete")
    with stepsave.Checkpointer(directory) as saver:
        backup = saver.restore()
        if ending == "delete":
            assert backup is None
        else:
            assert backup.step == step
            assert_is_state_of(backup)


def main(arguments):
    directory, races, seed = arguments[0], int(arguments[1]), int(arguments[2])
    chance = random.Random(seed)
    bad = {}
    counts = dict.fromkeys(ENDINGS, 0)
    for number in range(races):
        ending = ENDINGS[number % len(ENDINGS)]
        counts[ending] += 1
        count = chance.choice((2, 2, 3))
        try:
            # In a process of its own: what it opens to look has threads, which no racer may have.
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    race(f"{directory}/{ending}", number + 1, ending, count)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                    raise
                finally:
                    os._exit(status)
            status = os.waitpid(child, 0)[1]
            assert status == 0, f"status {status}"
        except AssertionError as e:
            bad[number] = repr(e)
    json.dump({"counts": counts, "bad": bad}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
