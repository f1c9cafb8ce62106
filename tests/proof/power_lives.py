"""Child processes of the power cuts: those that save until then, and those that look afterwards."""

import json
import os
import random
import select
import signal
import time
import warnings

from engine_support import assert_is_state_of, state_of

from proof.operations import Operations
from stepsave.engine.checkpointer import Checkpointer  # now, and not in each child
from stepsave.format import planning

LIMIT_S = 60

SCENES = {
    # How many saves went before what is going on when the power is cut; whether two are kept.
    "first save": (0, False),
    "second save": (1, False),
    "second save, two kept": (1, True),
    "save in place": (3, False),
    "save in place, two kept": (3, True),
    "save of another layout": (2, False),
    "note of the end": (2, False),
}


class Steps:
    """Counts the operations of this process on files, and stops after one of them."""

    def __init__(self, stop_after, stop):
        self._left = stop_after
        self._stop = stop

    def count(self, name, target):
        self._left -= 1
        if self._left == 0:
            self._stop(f"{name} {target}")

    def arm(self):
        """Counts from now on, until the process ends."""
        Operations(after=self.count).__enter__()
        if self._left == 0:
            self._stop("nothing")


_write = os.write  # to a pipe, which is no operation on a file


class Line:
    """Two pipes between a process and its child; every wait has a limit."""

    def __init__(self):
        self._up, self._down = os.pipe(), os.pipe()
        self._rest = b""
        self._read = self._write = None

    def take(self, *, is_child):
        ours, theirs = (self._down, self._up) if is_child else (self._up, self._down)
        self._read, self._write = ours[0], theirs[1]
        os.close(ours[1])
        os.close(theirs[0])

    def say(self, *what):
        _write(self._write, json.dumps(what).encode() + b"\n")

    def hear(self, limit_s=LIMIT_S):
        """Returns what was said; None at the end; raises `TimeoutError`."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._rest:
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([self._read], [], [], left_s)[0]:
                raise TimeoutError
            data = os.read(self._read, 1 << 16)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def close(self):
        os.close(self._read)
        os.close(self._write)


class Child:
    """A forked process that runs a function with its end of a line, and is gone afterwards."""

    def __init__(self, function, *args):
        self.line = Line()
        self._pid = os.fork()
        if self._pid:
            self.line.take(is_child=False)
            return
        status = 1
        try:
            warnings.simplefilter("error")
            self.line.take(is_child=True)
            function(self.line, *args)
            status = 0
        except BaseException as e:  # noqa: BLE001  told, as nobody is there to raise it to
            self.line.say("error", f"{type(e).__name__}: {e}")
        finally:
            os._exit(status)

    def kill(self):
        os.kill(self._pid, signal.SIGKILL)

    def end(self):
        """Waits until it has ended, which it does when it has said all; returns its status."""
        _, status = os.waitpid(self._pid, 0)
        self.line.close()
        return status


def set_small_shards():
    planning.SHARD_TARGET_BYTES, planning.CHUNK_LIMIT_BYTES = 64 << 10, 16 << 10


def save_scene(line, directory, scene, writer, stop_after):
    """In a child: saves, and waits at one operation of the last save to be told to go on."""
    set_small_shards()

    def stop(where):
        line.say("at", where)
        line.hear()

    steps = Steps(stop_after, stop)
    before, double = SCENES[scene]
    if not before:
        steps.arm()
    # One thread writes, so that the operations come in the same order each time.
    with Checkpointer(
        directory, writer=writer, double_checkpoint=double, writer_threads=1
    ) as saver:
        for step in range(1, before + 2):
            leaves = 13 if scene == "save of another layout" and step > before else 12
            if step > before and before:
                steps.arm()
            if step > before and scene == "note of the end":
                saver.close(ended=True)
                break
            _save(line, saver, step, leaves)


def save_on(line, directory, writer, double, seed):
    """In a child: saves until it is killed, or the disk fails."""
    set_small_shards()
    rng = random.Random(seed)
    with Checkpointer(directory, writer=writer, double_checkpoint=double) as saver:
        for step in range(1, 1 << 30):
            # Two layouts take turns, so that spares are made anew as well as reused.
            _save(line, saver, step, 12 + step // 7 % 2, waits=rng.random() < 0.6)


def _save(line, saver, step, leaves, *, waits=True):
    line.say("begun", step)
    handle = saver.save(step, state_of(step, leaves), {"step": step})
    if waits:
        handle.wait()
        line.say("acknowledged", step)


def look(line, directory, double):
    """In a child: restores, saves once more, and removes it all; says what was found."""
    set_small_shards()
    with Checkpointer(directory, double_checkpoint=double) as saver:
        backup = saver.restore()
        found = backup.step if backup else 0
        if backup:
            assert_is_state_of(backup)
            assert backup.metadata == {"step": found}
        line.say("restored", found)
        saver.save(found + 1, state_of(found + 1), {"step": found + 1}).wait()
    with Checkpointer(directory, double_checkpoint=double) as saver:
        backup = saver.restore()
        assert backup.step == found + 1, "a save after the cut is not what is restored"
        assert_is_state_of(backup)
        saver.close(delete_backup=True)
    assert not os.path.lexists(directory), f"debris: {os.listdir(directory)}"
    line.say("clean", 0)
