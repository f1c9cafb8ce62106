"""Which `fit` of a script a backup belongs to.

A script may call `fit` several times with one backup directory: for the head of a model first
and then for all of it, or once per epoch. Killed in a later one and run again, it comes to the
earlier ones first, and these find the backup of the later one. They are told apart by what
`compile` was given and by what is trained.
"""

from __future__ import annotations

import enum
import json
import os
import weakref
import zlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from stepsave.errors import CorruptBackupError
from stepsave.fit.keras_internals import is_built

__all__ = ("BackupOf", "Phases")


class BackupOf(enum.Enum):
    """Whose a backup is."""

    THIS_FIT = enum.auto()
    EARLIER_FIT = enum.auto()  # of this model in this process, which has ended
    LATER_FIT = enum.auto()  # in the run before, in which this one had ended
    CHANGED_FIT = enum.auto()  # this one, but the script was changed since


Phase = Mapping[str, Any]
"""A `fit`, as a document for JSON: what tells it from others with the same directory."""

# The fits of this process that have ended and their models, by directory.
_ended: dict[str, list[tuple[Phase, weakref.ref[Any]]]] = {}

# The rate that `compile` gave an optimizer, and what it was when its last `fit` ended: it is the
# user's again where it was set since then, and not what a callback or a backup made of it.
_rates: weakref.WeakKeyDictionary[Any, tuple[float | None, float | None]] = (
    weakref.WeakKeyDictionary()
)


class Phases:
    """The fits of this process that use one directory, the present one last."""

    def __init__(self, directory: str, model: Any) -> None:
        """To be made when `fit` begins, before anything is restored.

        Args:
            directory: The backup directory, or its URL.
            model: The compiled model; it may not be built yet.
        """
        self._model = model
        name = os.fspath(directory)
        place = name if "://" in name else os.path.realpath(name)
        self._ended = _ended.setdefault(place, [])
        self._before = _once([phase for phase, _ in self._ended])
        self._before_of_model = [phase for phase, one in self._ended if one() is model]
        self._trained: int | None = None
        self._compiled: Phase = {
            "optimizer": None if model.optimizer is None else type(model.optimizer).__name__,
            "learning_rate": _given_rate(model.optimizer),
            "loss": _name_of(getattr(model, "loss", None)),
        }

    def to_json(self) -> dict[str, Any]:
        """The document for a backup."""
        return {**self._present(), "fits_before": len(self._ended), "before": self._before}

    def place(self, document: Mapping[str, Any] | None) -> BackupOf:
        """Says whose a backup is, by what `to_json` returned for it; None if it has nothing.

        Raises:
            CorruptBackupError: If it is something else.
        """
        present = self._present()
        try:
            if document is None or _same(document, present):
                return BackupOf.THIS_FIT
            if any(_same(phase, present) for phase in document["before"]):
                return BackupOf.LATER_FIT
            if any(_same(phase, document) for phase in self._before_of_model):
                return BackupOf.EARLIER_FIT
        except (KeyError, TypeError) as e:
            raise CorruptBackupError(f"Expected a phase, found {document!r:.200}.") from e
        return BackupOf.CHANGED_FIT

    def doubt(self, document: Mapping[str, Any] | None) -> str | None:
        """Why a backup may be of another training, though nothing tells them apart; or None."""
        fits, saved = len(self._ended), 0 if document is None else document["fits_before"]
        if saved <= fits:
            return None
        return (
            f"The backup was made by `fit` number {saved + 1} with this directory in its process, "
            f"and this is number {fits + 1}. Training goes on from it. Where they are different "
            "trainings, such as folds or trials, give each a `backup_dir` of its own"
        )

    def changes(self, document: Mapping[str, Any]) -> str:
        """What `compile` was given then and is given now, where these differ."""
        return ", ".join(
            f"{name.replace('_', ' ')} {document[name]}, now {value}"
            for name, value in self._compiled.items()
            if document[name] != value
        )

    def present_rate(self) -> float | None:
        """The learning rate of the optimizer."""
        return _present_rate(self._model.optimizer)

    def end(self) -> None:
        """Notes that the present `fit` has come to its end."""
        optimizer = self._model.optimizer
        if optimizer is not None:
            _rates[optimizer] = (self._compiled["learning_rate"], _present_rate(optimizer))
        self._ended.append((self._present(), weakref.ref(self._model)))

    def _present(self) -> Phase:
        if self._trained is None and is_built(self._model):
            shapes = [list(variable.shape) for variable in self._model.trainable_variables]
            self._trained = zlib.crc32(json.dumps(shapes).encode())
        return {**self._compiled, "trained": self._trained}


def _given_rate(optimizer: Any) -> float | None:
    present = _present_rate(optimizer)
    if present is None:
        return None
    given, at_end = _rates.setdefault(optimizer, (present, None))
    if at_end is not None and present != at_end:
        _rates[optimizer] = (given, at_end) = (present, None)
    return given


def _present_rate(optimizer: Any) -> float | None:
    rate = getattr(optimizer, "learning_rate", None)  # of a schedule: that of the present step
    if rate is None:
        return None
    return float(np.asarray(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(rate))))


def _name_of(loss: Any) -> Any:
    if isinstance(loss, Mapping):
        return {str(key): _name_of(value) for key, value in loss.items()}
    if isinstance(loss, (list, tuple)):
        return [_name_of(one) for one in loss]
    if loss is None or isinstance(loss, str):
        return loss
    return getattr(loss, "__name__", type(loss).__name__)


def _same(a: Phase, b: Phase) -> bool:
    """Whether two fits cannot be told apart; a model that is not built may train anything."""
    known = ("optimizer", "learning_rate", "loss")
    trained = a["trained"], b["trained"]
    return all(a[key] == b[key] for key in known) and (None in trained or trained[0] == trained[1])


def _once(phases: list[Phase]) -> list[Phase]:
    """Each once: a loop may call `fit` a thousand times."""
    return [phase for i, phase in enumerate(phases) if phase not in phases[:i]]
