"""What Keras does not promise, and stepsave needs all the same.

With `keras_data` and `keras_saving` the only module that touches private attributes of Keras. Each
use says what it is for and what happens where it is gone; `tests/fit/test_keras_internals.py` fails
when Keras changes one.
Written for Keras 3.14 and 3.15.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable
from types import FrameType
from typing import Any, TypeVar

import keras

__all__ = ("RunningFit", "find_fit", "is_in_fit")  # and the functions below

_GLOBAL_SEED = "global_seed_generator"  # keras/src/random/seed_generator.py


class _Epoch(int):
    """A number of an epoch that is true even if it is 0.

    `fit` reads `self._initial_epoch or initial_epoch`, and would take the user's for a 0.
    """

    owner: Any = None

    def __bool__(self) -> bool:
        return True


def set_initial_epoch(model: Any, epoch: int | None, owner: Any = None) -> None:
    """Says where `fit` begins, for a callback, the owner; None for where its caller says.

    The one way: all three `fit`s read it after `on_train_begin`, or training would start over.
    """
    model._initial_epoch = None
    if epoch is not None:
        begin = _Epoch(epoch)
        begin.owner = weakref.ref(owner)
        model._initial_epoch = begin


def forget_initial_epoch(model: Any, others: Iterable[Any]) -> None:
    """Forgets what an interrupted `fit` has left: what no other callback of this one has set."""
    left = getattr(model, "_initial_epoch", None)
    if isinstance(left, _Epoch) and not any(left.owner() is other for other in others):
        model._initial_epoch = None


def jax_state(model: Any) -> dict[str, Any] | None:
    """On JAX, the values of the variables during an epoch, by collection.

    They are not in the variables then: a variable read there returns a fresh sample of its
    initializer. Without it the public `jax_state_sync` puts them back, at a price per step.

    Returns:
        None if the variables have their values.
    """
    state = getattr(model, "_jax_state", None)
    return None if not state or getattr(model, "_jax_state_synced", True) else state


def flatten_layers(model: Any) -> Iterable[Any]:
    """All layers; only the outer ones where Keras does not say."""
    flatten = getattr(model, "_flatten_layers", None)
    return model.layers if flatten is None else flatten()


def global_seed() -> Any:
    """The state variable of Keras's global seed generator; None if nobody used it yet."""
    try:
        from keras.src.backend.common import global_state
    except ImportError:  # the generator then starts over in a resumed run
        return None
    return getattr(global_state.get_global_attribute(_GLOBAL_SEED), "state", None)


def set_global_seed(value: Any) -> None:
    """Sets the state of Keras's global seed generator, and makes it if there is none."""
    if global_seed() is None:
        keras.random.uniform(())  # draws from it
    seed = global_seed()
    if seed is not None:
        seed.assign(value)


def unwrap(model: Any) -> Any:
    """The model itself; torch's DistributedDataParallel wraps it."""
    return model.module if type(model).__name__ == "DistributedDataParallel" else model


def is_built(model: Any) -> bool:
    """Whether all layers are built; `build` of a subclassed model says so of itself alone."""
    return model.built and all(layer.built for layer in flatten_layers(model))


def has_unbuilt_metrics(model: Any) -> bool:
    """Whether metrics that were given to `compile` have no variables yet, as far as Keras says."""
    metrics = getattr(model, "_compile_metrics", None)
    return metrics is not None and not getattr(metrics, "built", True)


def trace_training(model: Any, batch_spec: Any) -> None:
    """Makes all variables exist that Keras on TensorFlow makes in the first training step.

    Those of layers, metrics and optimizers, by whatever `train_step` the model has.

    Args:
        model: A compiled model.
        batch_spec: Specification of a batch, as `tf.data` has it.
    """
    import tensorflow as tf  # the backend

    # Not converted, as in Keras.
    tf.function(model.train_step, autograph=False).get_concrete_function(batch_spec)


def trace_first_step(model: Any, iterator: Any) -> None:
    """The same within `fit`: its own function is traced, which then needs not be again.

    Args:
        model: A model in `fit`.
        iterator: What `fit` is about to train from.
    """
    for cell in getattr(model.train_function, "__closure__", None) or ():
        trace = getattr(cell.cell_contents, "get_concrete_function", None)
        if trace is not None:
            trace(iterator)
            return
    trace_training(model, iterator.element_spec)  # `run_eagerly`, or another Keras


_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class RunningFit:
    """The `fit` that is running: what it has in its hands while it calls callbacks.

    Attributes:
        epoch_iterator: Keras's `EpochIterator` over the training data.
        callbacks: The `CallbackList`.
        code: Code of that `fit`, by which its frame is known.
    """

    epoch_iterator: Any
    callbacks: Any
    code: Any

    def shared(self, kind: type[_T], make: Callable[[], _T]) -> _T:
        """The one of its kind in this `fit`; lives as long as the epoch iterator, no longer."""
        ours = vars(self.epoch_iterator).setdefault("stepsave", {})
        if kind not in ours:
            ours[kind] = make()
        return ours[kind]


def find_fit(model: Any) -> RunningFit | None:
    """Finds the `fit` of `model` that called the caller, through its `CallbackList`.

    A callback is given neither the other callbacks nor the data. Both are local variables of
    the functions that called it, so they are read from there.

    Returns:
        None if it is not Keras's `fit`; an interrupted epoch is then repeated.
    """
    callbacks: Any = None
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        names = frame.f_locals
        if callbacks is None and isinstance(names.get("self"), keras.callbacks.CallbackList):
            callbacks = names["self"]
        iterator = names.get("epoch_iterator")
        needed = ("_enumerate_iterator", "_get_iterator", "_steps_seen", "data_adapter")
        is_iterator = iterator is not None and all(hasattr(iterator, name) for name in needed)
        if callbacks is not None and is_iterator and names.get("self") is model:
            return RunningFit(iterator, callbacks, frame.f_code)
        frame = frame.f_back
    return None


def warn_of_unknown_fit() -> None:
    """Warns, for a callback, that `find_fit` has found nothing, and what that means."""
    # Neither the data nor the end of such a `fit` is known: signals would go astray after it.
    warnings.warn(
        "This `fit` is not Keras's, or Keras has changed: training can only be resumed at the head "
        'of an epoch (`resume="epoch"` says that this is meant), and no signals are handled.',
        stacklevel=3,
    )


def is_in_fit(fit: RunningFit, model: Any) -> Callable[[FrameType | None], bool]:
    """Returns what tells whether code at a frame was called by this `fit` of this model."""
    code, alive = fit.code, weakref.ref(model)

    def is_in(frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code is code and frame.f_locals.get("self") is alive():
                return True
            frame = frame.f_back
        return False

    return is_in


@contextlib.contextmanager
def silent(callbacks: Any) -> Generator[None, None, None]:
    """Hides a batch from all callbacks: one that `fit` must see, but that is not trained."""

    def nothing(*_: Any, **__: Any) -> None:
        pass

    callbacks.on_train_batch_begin = callbacks.on_train_batch_end = nothing
    try:
        yield
    finally:
        del callbacks.on_train_batch_begin, callbacks.on_train_batch_end


def flush(callbacks: Any) -> None:
    """Waits until the callbacks that Keras calls on other threads have been called.

    Only callbacks marked `async_safe` are; without it their state may lag behind.
    """
    wait = getattr(callbacks, "_flush_futures", None)
    if getattr(callbacks, "_async_train", False) and wait is not None:
        wait()


# What Keras's callbacks remember from one batch or epoch to the next, by class. Attributes of
# other versions of Keras are left out; the callback then starts anew in a resumed fit.
# LearningRateScheduler and TerminateOnNaN remember nothing: the rate is in the optimizer.
_CALLBACK_ATTRIBUTES = {
    "EarlyStopping": "wait stopped_epoch best best_weights best_epoch",
    "ReduceLROnPlateau": "best wait cooldown_counter",
    "ModelCheckpoint": "best _batches_seen_since_last_saving _last_batch_seen _current_epoch",
    "OrbaxCheckpoint": "best _batches_seen_since_last_saving _last_batch_seen _total_batches_seen",
    "BackupAndRestore": "_batches_seen_since_last_saving _last_batch_seen _current_epoch",
    "SwapEMAWeights": "_ema_weights_in_model",
    "TensorBoard": "_global_train_batch _global_test_batch _previous_epoch_iterations",
}


def skip_saved_steps(callback: Any) -> None:
    """Has an `OrbaxCheckpoint` pass over steps that it has saved before it was interrupted.

    The resumed `fit` comes to them again, with the same state, and Orbax refuses them.
    """
    orbax_class = getattr(keras.callbacks, "OrbaxCheckpoint", None)
    save = getattr(callback, "_save_checkpoint", None)
    if orbax_class is None or not isinstance(callback, orbax_class) or save is None:
        return
    saved = {int(name) for name in os.listdir(callback.directory) if name.isdecimal()}

    def save_new(step: int, *args: Any, **kwargs: Any) -> None:
        if step not in saved:
            save(step, *args, **kwargs)

    callback._save_checkpoint = save_new


def callback_attributes(callback: Any) -> tuple[str, ...]:
    """The attributes in which one of Keras's callbacks keeps its state; none for others."""
    for name, attributes in _CALLBACK_ATTRIBUTES.items():
        keras_class = getattr(keras.callbacks, name, None)
        if keras_class is not None and isinstance(callback, keras_class):
            return tuple(attributes.split())
    return ()
