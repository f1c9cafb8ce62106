"""What a process does when it is killed: scenes, each up to a line `begin`, and what comes then.

They say what they have begun, and what was acknowledged to them; `proof.aftermath` compares.
"""

import dataclasses
import json
import resource
import warnings
from collections.abc import Callable
from typing import Any

from engine_support import flip_bit, state_of

import stepsave
from proof import tracing

LIMIT_S = 60


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """One of them.

    Attributes:
        title: What is done, for a table.
        act: Does it, with a `Stage`.
        options: Of the checkpointer.
        names: The calls that it is killed at.
        after: A scene and the call that an earlier process was killed at, in the same directory.
        uploads: Whether the directory is a disk before a bucket.
    """

    title: str
    act: Callable[["Stage"], None]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = tracing.WRITES
    after: tuple[str, tuple[str, str, int]] | None = None
    uploads: bool = False


class Stage:
    """What a scene has.

    Attributes:
        kept: Checkpointers that nobody closes.
    """

    kept: list = []  # noqa: RUF012

    def __init__(self, directory, place, options, say):
        self.directory = directory
        self.options = dict(options)
        self.say = say
        if place is not None:
            self.options["local_dir"] = directory
        self._place = place or directory

    def begin(self):
        self.say("begin")

    def open(self):
        return stepsave.Checkpointer(self._place, **self.options)

    def open_for_good(self):
        """One that nobody closes, which is warned of at the end of the interpreter."""
        warnings.simplefilter("ignore", ResourceWarning)
        self.kept.append(self.open())
        return self.kept[-1]

    def save(self, saver, *steps, leaves=12):
        for step in steps:
            self.hand_over(saver, step, leaves).wait(LIMIT_S)
            self.say(f"durable {step}")

    def hand_over(self, saver, step, leaves=12):
        self.say(f"begun {step}")
        return saver.save(step, state_of(step, leaves), {"step": step})


def _first(stage):
    stage.begin()
    with stage.open() as saver:
        stage.save(saver, 1)


def _second(stage):
    with stage.open() as saver:
        stage.save(saver, 1)
        stage.begin()
        stage.save(saver, 2)


def _later(stage):
    """Over the directory that was retired, of which it is known what it holds."""
    with stage.open() as saver:
        stage.save(saver, 1, 2, 3, 4)
        stage.begin()
        stage.save(saver, 5, 6)


def _resumed(stage):
    with stage.open() as saver:
        stage.save(saver, 1, 2)
    stage.begin()
    _go_on(stage)


def _go_on(stage):
    with stage.open() as saver:
        backup = saver.restore()
        stage.save(saver, backup.step + 1 if backup else 1)


def _after_a_death(stage):
    stage.begin()
    _go_on(stage)


def _another_layout(stage):
    with stage.open() as saver:
        stage.save(saver, 1, 2)
        stage.begin()
        stage.save(saver, 3, leaves=7)


def _restore(stage):
    with stage.open() as saver:
        stage.save(saver, 1, 2)
    stage.begin()
    with stage.open() as saver:
        assert saver.restore().step == 2


def _fall_back(stage):
    with stage.open() as saver:
        stage.save(saver, 1, 2, 3)
    flip_bit(f"{stage.directory}/3/pytree/d/c/0", 50)
    stage.say("damaged 3")
    stage.begin()
    with warnings.catch_warnings(), stage.open() as saver:
        warnings.simplefilter("ignore", UserWarning)  # that step 3 is lost, which is so
        assert saver.restore().step == 2
        stage.save(saver, 4)


def _delete(stage):
    with stage.open() as saver:
        stage.save(saver, 1, 2, 3)
        stage.begin()
        stage.say("deleting")
        saver.close(delete_backup=True)
    stage.say("deleted")


def _end(stage):
    with stage.open() as saver:
        stage.save(saver, 1)
        stage.begin()
        saver.close(ended=True)


def _abandon(stage):
    with stage.open() as saver:
        stage.save(saver, 1, 2)
        stage.begin()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        try:
            stage.hand_over(saver, 3).wait(LIMIT_S)
            raise AssertionError("more was written than may be")
        except stepsave.SaveFailedError:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        stage.save(saver, 4)


def _exit(stage):
    """Ends with two saves in flight, as a script that closes nothing."""
    saver = stage.open_for_good()
    stage.save(saver, 1)
    stage.begin()
    for step in (2, 3):
        stage.hand_over(saver, step)


def _upload(stage):
    with stage.open() as saver:
        stage.save(saver, 1)
        saver.upload()
        stage.say("uploaded 1")
        stage.begin()
        stage.save(saver, 2)
        saver.upload()
        stage.say("uploaded 2")
        stage.save(saver, 3)  # over the directory that was read
    stage.say("uploaded 3")


SCENES = {
    "first": Scene("the first save", _first),
    "second": Scene("the second save", _second),
    "later": Scene("later saves, over retired backups", _later),
    "layout": Scene("a save of another layout", _another_layout),
    "resumed": Scene("a save after a resume", _resumed),
    "debris": Scene(
        "a save after a resume after such a death",
        _after_a_death,
        after=("second", ("rename", "COMMIT.tmp > COMMIT", 0)),
    ),
    "double": Scene("saves with `double_checkpoint`", _later, {"double_checkpoint": True}),
    "keep": Scene("saves with `keep=2`: retirement", _later, {"keep": 2}),
    "restore": Scene("a restore", _restore, names=tracing.READS),
    "fall back": Scene("a fall back to a kept backup", _fall_back, {"keep": 2}),
    "delete": Scene("the deletion of a backup", _delete),
    "delete kept": Scene("the deletion of three backups", _delete, {"keep": 2}),
    "end": Scene("the note that a training has ended", _end),
    "abandon": Scene("a save that fails, and the next", _abandon),
    "exit": Scene("the exit of the interpreter, saves in flight", _exit),
    "upload": Scene("saves and uploads to a bucket", _upload, uploads=True),
    "upload reads": Scene("what is read for uploads", _upload, names=tracing.READS, uploads=True),
}


def play(scene, directory, writer, place=None, aim=None):
    """Has a child play a scene, and says how it fared; returns whether this is the child."""
    from proof.nursery import say

    found = SCENES[scene]
    options = {**found.options, "writer": writer}

    def body(tell):
        found.act(Stage(directory, place, options, tell))

    def started(child):
        say(f"child {child}")

    watched = tracing.watch(body, directory, found.names, aim, started)
    if watched is None:
        return True
    say(json.dumps(dataclasses.asdict(watched)))
    return False
