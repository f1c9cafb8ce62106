"""State below a model that is in none of its four collections, as Keras's `save_weights` has it.

A second optimizer, a metric that is an attribute, buffers of a torch module: their variables are
saved like all others. What saves and loads itself in a way of its own is asked, and told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from stepsave.errors import BackupMismatchError, CorruptBackupError
from stepsave.fit.keras_saving import (
    carried_states,
    derive_values,
    has_own_way,
    kind_of,
    own_variables,
    walk,
)
from stepsave.format.packing import pack, unpack

__all__ = ("SAVEABLES", "OwnState", "Saveables")

SAVEABLES = ("metrics_variables", "stepsave", "saveables")
"""Where their variables lie: stock Keras passes over names there that it does not know."""

OwnState = tuple[Sequence[Mapping[str, Any]], Sequence[Any]]
"""What `Saveables.ask` returned, and the arrays that it put beside."""


class Saveables:
    """The objects below a model that Keras saves with it.

    Attributes:
        variables: Their variables that are in no collection of the model.
        paths: Where these are saved.
        kinds: Kind of the object that each belongs to; "state" for what an RNN carries on.
    """

    def __init__(self, model: Any, collected: Sequence[Any]) -> None:
        """Lists them.

        Args:
            model: The model.
            collected: The variables in its collections.
        """
        self.variables: list[Any] = []
        self.paths: list[tuple[str, ...]] = []
        self.kinds: list[str] = []
        self._objects: list[tuple[str, Any]] = []
        self._counts: list[int] = []
        seen = {id(variable) for variable in collected}
        for path, saveable in walk(model):
            self._objects.append(("/".join(path), saveable))
            own, states = own_variables(saveable), carried_states(saveable)
            self._counts.append(len(own) + len(states))
            for number, variable in enumerate([*own, *states]):
                if id(variable) not in seen:
                    seen.add(id(variable))
                    self.variables.append(variable)
                    self.paths.append((*SAVEABLES, *path, str(number)))
                    self.kinds.append("state" if number >= len(own) else kind_of(saveable))
        self._own_way = [(at, one) for at, one in self._objects if has_own_way(one)]

    def are_current(self) -> bool:
        """Whether none of them has made variables since, as an optimizer does when first used."""
        return self._counts == [
            len(own_variables(one)) + len(carried_states(one)) for _, one in self._objects
        ]

    @property
    def unbuilt_optimizers(self) -> set[tuple[str, ...]]:
        """Where those are saved whose slots the first training step will make."""
        return {
            (*SAVEABLES, *at.split("/"))
            for at, one in self._objects
            if kind_of(one) == "optimizer" and not one.built
        }

    @property
    def must_be_asked(self) -> bool:
        return bool(self._own_way)

    def ask(self, arrays: list[Any]) -> list[dict[str, Any]]:
        """Returns what objects that save themselves in a way of their own store.

        Variables are not stored twice: of these only the number is kept.

        Args:
            arrays: Where arrays are put.

        Raises:
            InvalidStateError: If an object stores what cannot be saved.
        """
        return [self._ask(at, one, arrays) for at, one in self._own_way]

    def _ask(self, at: str, saveable: Any, arrays: list[Any]) -> dict[str, Any]:
        store: dict[str, Any] = {}
        saveable.save_own_variables(store)
        at_of = {id(variable): i for i, variable in enumerate(own_variables(saveable))}
        variables = {key: at_of[id(value)] for key, value in store.items() if id(value) in at_of}
        values = {
            key: np.asarray(keras.ops.convert_to_numpy(value))
            for key, value in store.items()
            if key not in variables
        }
        where = f"`save_own_variables` of {type(saveable).__name__} ({at or 'the model'})"
        return {"path": at, "variables": variables, "values": pack(values, arrays, where)}

    def tell(self, own_state: OwnState) -> None:
        """Tells all objects that their variables were loaded, and gives back what they stored.

        Raises:
            BackupMismatchError: If an object refuses what it is given.
            CorruptBackupError: If the documents are not what `ask` returns.
        """
        documents, arrays = own_state
        try:
            stored = {document["path"]: document for document in documents}
        except (TypeError, KeyError) as e:
            raise CorruptBackupError(f"Impossible states in the backup: {documents!r:.200}.") from e
        for at, saveable in self._own_way:
            if at in stored:
                self._load(at, saveable, stored[at], arrays)
        for _, saveable in self._objects:
            derive_values(saveable)

    def _load(self, at: str, saveable: Any, document: Any, arrays: Sequence[Any]) -> None:
        own = own_variables(saveable)
        try:
            store = dict(unpack(document["values"], arrays))
            store |= {
                key: np.asarray(keras.ops.convert_to_numpy(own[number].value))
                for key, number in document["variables"].items()
            }
            saveable.load_own_variables(store)
        except Exception as e:
            raise BackupMismatchError(
                f"{type(saveable).__name__} ({at or 'the model'}) refuses the state that it saved "
                f"in the backup: {type(e).__name__}: {e}. Use it as it was when the backup was "
                "made, or another `backup_dir`."
            ) from e
