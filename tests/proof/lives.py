"""What a process does until it is killed at a random moment: lives, each without an end."""

import os
import random
import resource

import stepsave
from proof.scenes import LIMIT_S, Stage

LEAVES = 8


class Life(Stage):
    """What a life has: a stage, and chance."""

    def __init__(self, directory, place, options, say, seed):
        super().__init__(directory, place, options, say)
        self.chance = random.Random(seed)
        self.step = 0

    def resume(self, saver):
        backup = saver.restore()
        self.step = max(self.step, backup.step if backup else 0)

    def save_some(self, saver, count):
        for _ in range(count):
            self.step += 1
            # Two layouts take turns, so that spares are made anew as well as reused.
            handle = self.hand_over(saver, self.step, LEAVES + self.step // 7 % 2)
            if self.chance.random() < 0.6:
                handle.wait(LIMIT_S)
                self.say(f"durable {self.step}")


def _train(life):
    with life.open() as saver:
        life.resume(saver)
        while True:
            life.save_some(saver, 1)


def _restore(life):
    while True:
        with life.open() as saver:
            for _ in range(life.chance.randrange(1, 4)):
                life.resume(saver)
            life.save_some(saver, 1)


def _delete(life):
    while True:
        saver = life.open()
        life.resume(saver)
        life.save_some(saver, life.chance.randrange(1, 4))
        saver.wait(LIMIT_S)
        life.say(f"durable {life.step}")
        life.say("deleting")
        saver.close(delete_backup=True)
        life.say("deleted")


def _fail(life):
    """Some saves meet a limit on the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with life.open() as saver:
        life.resume(saver)
        while True:
            life.save_some(saver, life.chance.randrange(1, 3))
            saver.wait(LIMIT_S)
            life.say(f"durable {life.step}")
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
            life.step += 1
            try:
                life.hand_over(saver, life.step).wait(LIMIT_S)
                raise AssertionError("more was written than may be")
            except stepsave.SaveFailedError:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _leave(life):
    """Ends by itself, with saves in flight, as a script that closes nothing."""
    saver = life.open_for_good()
    life.resume(saver)
    life.save_some(saver, 2)
    for _ in range(2):
        life.step += 1
        life.hand_over(saver, life.step)


def _upload(life):
    with life.open() as saver:
        life.resume(saver)
        while True:
            life.save_some(saver, life.chance.randrange(1, 4))
            if life.chance.random() < 0.3:
                saver.upload()
                life.say(f"durable {life.step}")
                life.say(f"uploaded {life.step}")


LIVES = {
    "train": _train,
    "restore": _restore,
    "delete": _delete,
    "fail": _fail,
    "leave": _leave,
    "upload": _upload,
}


def live(life, directory, options, seed, place=None):
    """Has a child live until it is killed; returns whether this is the child, at its own end."""
    from proof.nursery import say

    child = os.fork()
    if child == 0:
        say("start")
        LIVES[life](Life(directory, place, options, say, seed))
        return True
    say(f"child {child}")
    os.waitpid(child, 0)
    say("gone")
    return False
