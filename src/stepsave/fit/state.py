"""What a backup of a `fit` holds, and how a later `fit` takes it over.

Beside the variables of the model: the random generators, how the data was read, the other
callbacks' state and, if asked for, the history. Arrays of these are leaves beside the
variables, everything else is metadata.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from stepsave import rng
from stepsave.engine.checkpointer import Checkpointer
from stepsave.engine.peers import count_processes
from stepsave.engine.reader import StoredBackup
from stepsave.errors import ChangedTrainingWarning, CorruptBackupError
from stepsave.fit import callback_states, keras_internals
from stepsave.fit.data_position import Batching, Resume, Stream
from stepsave.fit.loop import FitLoop
from stepsave.fit.model_config import model_config
from stepsave.fit.phases import Phases
from stepsave.fit.saveables import SAVEABLES
from stepsave.fit.variables import (
    ModelVariables,
    Restored,
    prepare_model,
    restore_variables,
)
from stepsave.format.packing import pack, unpack
from stepsave.format.tree import unflatten
from stepsave.position import TrainingPosition
from stepsave.rng import RngState
from stepsave.snapshot.arrays import wait_computed

__all__ = ("BeforeValidation", "Cut", "FitState", "RestoredFit", "restore_fit")

# Arrays beside the variables lie where stock Keras, which refuses collections that it does not
# know, passes over names that it does not know.
_COLLECTION, _OURS, _BELOW = SAVEABLES
_CALLBACKS = (_COLLECTION, _OURS, "callbacks")
_KERAS_SEED = (_COLLECTION, _OURS, "rng", "keras")


@dataclasses.dataclass(frozen=True, slots=True)
class BeforeValidation:
    """What validation changes and a backup from its midst must hold as it was before.

    Attributes:
        end: The cut after the last batch.
        metrics: Values of the metrics, accumulated over the epoch, by identity of variable.
    """

    end: Cut
    metrics: Mapping[int, Any]

    @classmethod
    def take(cls, model: Any, end: Cut) -> BeforeValidation:
        metrics = {
            id(v): np.array(keras.ops.convert_to_numpy(v.value)) for v in model.metrics_variables
        }
        return cls(end, metrics)


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """The random generators on the host and the data at a cut, as documents for JSON."""

    rng: dict[str, Any]
    stream: dict[str, Any]

    @classmethod
    def take(cls, loop: FitLoop, *, between_epochs: bool = False) -> Cut:
        state = rng.capture(keras=False)
        return cls(state.to_json(), loop.stream(between_epochs=between_epochs).to_json())


class FitState:
    """Collects the state of one `fit` for its saves."""

    def __init__(
        self, model: Any, loop: FitLoop | None, phases: Phases, *, with_history: bool
    ) -> None:
        """Collects nothing yet.

        Args:
            model: The model.
            loop: The loop of `fit`; None to save no more than Keras's callback resumes.
            phases: The fits that use the same directory.
            with_history: Whether to save the history of all epochs.
        """
        self._model = model
        self._loop = loop
        self._phases = phases
        self._with_history = with_history
        self._processes = count_processes()
        self._variables: ModelVariables | None = None
        self._variables_checked = False  # in this epoch
        self._paths: list[tuple[str, ...]] = []
        self._paths_for: tuple[Any, int, bool] | None = None

    def begin_epoch(self) -> None:
        self._variables_checked = False

    def prepare(self, saver: Checkpointer) -> None:
        """Makes layout and buffers before the first step, so that no save pays for them."""
        prepare_model(self._model, None)
        paths, leaves = self._leaves(saver, (), None)
        self._variables_checked = False
        saver.prepare_leaves(paths, leaves)

    def wait_computed(self, saver: Checkpointer) -> None:
        """Returns when the steps that were dispatched have been computed."""
        wait_computed(self._collect(saver).values())

    def contents(
        self,
        saver: Checkpointer,
        position: TrainingPosition,
        siblings: Sequence[Any],
        before: BeforeValidation | None,
    ) -> tuple[dict[str, Any], Sequence[tuple[str, ...]], list[Any]]:
        """Returns all that a backup holds: metadata, and arrays with their paths.

        Args:
            saver: Who saves it.
            position: Where training is.
            siblings: The other callbacks.
            before: What to take from before validation, if that is going on.

        Raises:
            InvalidStateError: If the state of a callback cannot be saved.
        """
        metadata, arrays = self._describe(position, siblings, before, self._collect(saver))
        return metadata, *self._leaves(saver, arrays, before)

    def _describe(
        self,
        position: TrainingPosition,
        siblings: Sequence[Any],
        before: BeforeValidation | None,
        variables: ModelVariables,
    ) -> tuple[dict[str, Any], list[Any]]:
        """Returns the metadata of a backup, and arrays that belong to it."""
        model, loop = self._model, self._loop
        arrays: list[Any] = []
        document: dict[str, Any] = {
            "backend": keras.backend.backend(),
            "keras_version": keras.version(),
            "position": position.to_json(),
            "build_config": _build_config(model),
            "saveables": self._ask(variables, arrays),
            "phase": self._phases.to_json(),
            "processes": self._processes,
        }
        if loop is None:
            return document, arrays
        if any(callback_states.has_state_per_batch(sibling) for sibling in siblings):
            keras_internals.flush(loop.callbacks)
        cut = before.end if before else Cut.take(loop, between_epochs=position.batch == 0)
        document["resume"] = {
            "rng": cut.rng,
            "stream": cut.stream,
            "data": loop.source.name,
            "batching": loop.batching.to_json(),
            "callbacks": callback_states.capture(siblings, arrays),
            "stop_training": bool(model.stop_training),
            "ended": before is not None,
            "history": self._history(),
        }
        return document, arrays

    def _ask(self, variables: ModelVariables, arrays: list[Any]) -> list[dict[str, Any]]:
        below = variables.below
        if below.must_be_asked and keras_internals.jax_state(self._model) is not None:
            self._model.jax_state_sync()  # what they store may be made of their variables
        return below.ask(arrays)

    def _leaves(
        self, saver: Checkpointer, arrays: Sequence[Any], before: BeforeValidation | None
    ) -> tuple[Sequence[tuple[str, ...]], list[Any]]:
        """Returns the paths and values of all that is saved as arrays."""
        variables = self._collect(saver)
        values = variables.values()
        if before is not None:
            taken = before.metrics
            values = [
                taken.get(id(variable), value)
                for variable, value in zip(variables.variables, values, strict=True)
            ]
        seed = None if self._loop is None else keras_internals.global_seed()
        if not arrays and seed is None:
            return variables.paths, values
        kind = (variables, len(arrays), seed is not None)
        if kind != self._paths_for:  # the engine compares paths by identity first
            self._paths_for = kind
            extra = [(*_CALLBACKS, str(i)) for i in range(len(arrays))]
            extra += [] if seed is None else [_KERAS_SEED]
            self._paths = [*variables.paths, *extra]
        return self._paths, [*values, *arrays, *([] if seed is None else [seed.value])]

    def _collect(self, saver: Checkpointer) -> ModelVariables:
        """The model's variables, listed again when there are more of them.

        That is looked at once per epoch: listing them takes time in a deep model, and Keras
        makes variables late only in the first step of a fit.
        """
        variables = self._variables
        is_current = variables is not None and (self._variables_checked or variables.is_current())
        self._variables_checked = True
        if variables is None or not is_current:
            variables = self._variables = ModelVariables(self._model)
            config = model_config(self._model)
            saver.attach({} if config is None else {"model_config": {"config": config}})
        return variables

    def _history(self) -> Any:
        history = getattr(self._model, "history", None)
        if not self._with_history or history is None:
            return None
        return pack({"epoch": list(history.epoch), "history": history.history})


@dataclasses.dataclass(slots=True)
class RestoredFit:
    """A backup that was restored into a model, and what of it is still to be put back.

    Attributes:
        position: Where it was taken.
        variables: The values that were assigned.
        document: What is known for an exact resume; None if the backup does not have it.
        arrays: Arrays of callbacks' states.
        keras_seed: State of Keras's global seed generator, if it was saved.
        cut_otherwise: How the data is cut into batches now and was then, if that differs.
    """

    position: TrainingPosition
    variables: Restored
    document: dict[str, Any] | None
    arrays: Sequence[Any]
    keras_seed: Any
    cut_otherwise: tuple[Batching, Batching] | None = None

    @property
    def stopped(self) -> bool:
        """Whether a callback had ended the training."""
        return self.between_epochs and self._flag("stop_training")

    @property
    def between_epochs(self) -> bool:
        return self.position.batch == 0

    def resume(self, model: Any, siblings: Callable[[], Sequence[Any]]) -> Resume:
        """Returns how the loop is to begin, so that all is as at the cut of the backup."""
        stream = (self.document or {}).get("stream")
        ended = self._flag("ended")

        def at_cut(iterator: Any, drawn_ahead: frozenset[str]) -> None:
            if self.between_epochs:
                self.variables.forget()  # all was put back before the epoch began
                return
            if keras.backend.backend() == "tensorflow":
                self._make_metrics(model, iterator)
            self.variables.assign_again()
            if ended:
                model.stop_training = self._flag("stop_training")
            self.put_back(siblings(), leave=drawn_ahead)

        stream = None if stream is None else Stream.from_json(stream)
        if stream is not None and self.cut_otherwise is not None:
            now, then = self.cut_otherwise
            place = stream.place if now == then else None
            batches = now.place_of(stream.batches, then)
            stream = dataclasses.replace(stream, batches=batches, place=place)
        return Resume(self.position.batch, stream, ended, at_cut)

    def _make_metrics(self, model: Any, iterator: Any) -> None:
        """Has metrics that Keras on TensorFlow makes in the first step exist, to be restored."""
        if not self.variables.lacks_metrics and not keras_internals.has_unbuilt_metrics(model):
            return
        try:
            keras_internals.trace_first_step(model, iterator)
        except Exception as e:  # noqa: BLE001  of the user's training step; it may run all the same
            warnings.warn(
                "Metrics that the first step makes count only what is left of this epoch: "
                f"`train_step` cannot be traced before it runs ({type(e).__name__}: {e}).",
                ChangedTrainingWarning,
                stacklevel=2,
            )

    def fit_to(self, batching: Batching) -> str | None:
        """Has the epoch go on where it was, though the data may be cut into other batches now.

        Returns:
            What has changed, and what comes of it; None if nothing has.
        """
        saved = (self.document or {}).get("batching")
        then = None if saved is None else Batching.from_json(saved)
        if then is None or not batching.changes(then):
            return None
        self.cut_otherwise = (batching, then)
        position = self.position
        place = batching.place_of(position.batch, then)
        self.position = dataclasses.replace(
            position, batch=place, steps_per_epoch=batching.steps or position.steps_per_epoch
        )
        if self.between_epochs:
            return None
        return batching.describe_change(then, position.batch, place)

    def _flag(self, name: str) -> bool:
        return bool(self.document and self.document.get(name))

    def put_back(self, siblings: Sequence[Any], *, leave: frozenset[str] = frozenset()) -> None:
        """Restores the callbacks' states and the random generators, but those to leave."""
        document = self.document
        if document is None:
            return
        callback_states.restore(siblings, document["callbacks"], self.arrays)
        if self.keras_seed is not None:
            keras_internals.set_global_seed(self.keras_seed)
        rng.restore(RngState.from_json(document["rng"]), leave=leave)

    def put_back_history(self, model: Any) -> None:
        """Makes `History` go on from the epochs before, if they were saved."""
        saved = self.document and self.document.get("history")
        history = getattr(model, "history", None)
        if saved and history is not None:
            content = unpack(saved)
            history.epoch = list(content["epoch"])
            history.history = content["history"]


def restore_fit(
    model: Any, backup: StoredBackup, batch_spec: Callable[[], Any] | None = None
) -> RestoredFit:
    """Assigns the variables of a backup to a model: all of them, or none.

    Args:
        model: A compiled model.
        backup: The backup.
        batch_spec: Returns the specification of a batch on TensorFlow, to build the model by.

    Raises:
        BackupMismatchError: If the backup does not fit; the model is then untouched.
        CorruptBackupError: If it was not made by a `fit`.
    """
    metadata = backup.metadata
    position = TrainingPosition.from_json(metadata.get("position"))
    document = metadata.get("resume")
    if document is not None and not isinstance(document.get("callbacks"), list):
        raise CorruptBackupError(f"Impossible state of a fit in the backup: {document!r:.200}.")
    flat = backup.flat
    state = dict(unflatten(flat.paths, flat.leaves, flat.notes))
    metrics = state[_COLLECTION] = dict(state.get(_COLLECTION, {}))
    ours: Mapping[str, Any] = metrics.pop(_OURS, {})
    arrays, seed = ours.get("callbacks", {}), ours.get("rng", {}).get("keras")
    if _BELOW in ours:
        metrics[_OURS] = {_BELOW: ours[_BELOW]}
    prepare_model(model, metadata.get("build_config"), batch_spec)
    # Copies: callbacks keep them, and the memory that they were restored into is for saves.
    in_order = [np.array(arrays[key]) for key in sorted(arrays, key=int)]
    own_state = metadata.get("saveables", ()), in_order
    variables = restore_variables(model, state, metadata.get("backend"), own_state)
    keras_seed = None if seed is None else np.array(seed)
    return RestoredFit(position, variables, document, in_order, keras_seed)


def _build_config(model: Any) -> Any:
    config = model.get_build_config()
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError):
        return None  # of a custom layer; such a model must be built before it is restored
