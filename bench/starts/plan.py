"""What is started, and what each of the processes is asked. Imports no framework."""

from __future__ import annotations

import dataclasses
import json

START, RESUME = "start", "resume"
WARM, COLD = "warm", "cold"
NONE, OURS, KERAS, ORBAX = "none", "stepsave", "keras", "orbax_keras"

EVERY = 3  # batches between saves
SAVES = {START: 3, RESUME: 2}  # of a process, before it is killed: both buffers were in use
WEIGHTS = ("trainable_variables", "non_trainable_variables", "optimizer_variables")


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """What a `fit` is started with.

    Attributes:
        how: How it is set up and resumed, as published.
        restores: The collections of variables that it brings back, by its own promise.
        goes_on: Whether a resumed `fit` goes on at the batch, and not at its epoch.
    """

    how: str
    restores: tuple[str, ...] = WEIGHTS
    goes_on: bool = False


SUBJECTS = {
    NONE: Subject("`fit` without callbacks", ()),
    OURS: Subject(
        "`stepsave.BackupAndRestore(dir, save_freq=k)`",
        (*WEIGHTS, "metrics_variables"),
        goes_on=True,
    ),
    KERAS: Subject("`keras.callbacks.BackupAndRestore(dir, save_freq=k)`"),
    ORBAX: Subject(
        "`keras.callbacks.OrbaxCheckpoint(dir, save_freq=k)`, which restores nothing: to resume "
        "is `model.load_weights(dir)`, timed too, and then `fit`"
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One process: trains with a subject in a directory, with a backup in it or not.

    Attributes:
        subject: A key of `SUBJECTS`.
        phase: `START` or `RESUME`.
        directory: Where it saves.
        width: Of the Dense layers, of which the state mostly consists.
        layers: How many.
    """

    subject: str
    phase: str
    directory: str
    width: int
    layers: int

    @property
    def saves(self) -> int:
        return SAVES[self.phase]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        return cls(**json.loads(text))
