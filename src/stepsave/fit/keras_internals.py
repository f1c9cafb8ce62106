"""What Keras does not promise, and stepsave needs all the same.

The only module that touches private attributes of Keras. Each use says what it is for and what
happens where it is gone; `tests/fit/test_keras_internals.py` fails when Keras changes one.
Written for Keras 3.14 and 3.15.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from types import FrameType
from typing import Any

import keras

__all__ = ("EpochData", "RunningFit", "find_fit", "is_in_fit")  # and the functions below

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


def build_metrics(model: Any, batch: Any) -> None:
    """Makes the variables of the metrics exist, which Keras on TensorFlow makes in a step.

    Without it metrics of a resumed epoch count only the batches after the resume. Only shapes
    and dtypes of the batch matter.
    """
    build = getattr(model, "_symbolic_build", None)
    if build is not None:
        build(data_batch=batch)


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


class EpochData:
    """Keras's `EpochIterator`, whose epochs and streams can be watched and changed.

    A *stream* is what `iter()` of the adapted data returned: of one epoch, or of several where
    `steps_per_epoch` is given.
    """

    def __init__(self, epoch_iterator: Any) -> None:
        self._iterator = epoch_iterator

    @property
    def adapter(self) -> Any:
        return self._iterator.data_adapter

    @property
    def steps(self) -> int | None:
        """Steps of an epoch, or None if nobody knows yet."""
        return self._iterator.steps_per_epoch or self._iterator._num_batches

    @property
    def steps_per_execution(self) -> int:
        return self._iterator.steps_per_execution

    @property
    def streams_last(self) -> bool:
        """Whether a stream serves several epochs."""
        return self._iterator.steps_per_epoch is not None

    def watch(
        self, enumerate_epoch: Callable[[], Iterator[Any]], get_iterator: Callable[[], Any]
    ) -> None:
        """Has the epoch iterator call these instead of its own methods."""
        self._iterator._enumerate_iterator = enumerate_epoch
        self._iterator._get_iterator = get_iterator

    @property
    def companion(self) -> Any:
        """Something that lives as long as the epoch iterator, and no longer."""
        return self._iterator.stepsave_companion

    @companion.setter
    def companion(self, value: Any) -> None:
        self._iterator.stepsave_companion = value

    def unwatch(self) -> None:
        for name in ("_enumerate_iterator", "_get_iterator"):
            vars(self._iterator).pop(name, None)

    def enumerate(self) -> Generator[tuple[int, int, Any], None, None]:
        """The epoch as Keras enumerates it: first step, last step, stream."""
        return type(self._iterator)._enumerate_iterator(self._iterator)

    def get_iterator(self) -> Any:
        """What Keras makes a stream of."""
        return type(self._iterator)._get_iterator(self._iterator)

    def remake(self) -> Any:
        """The same on TensorFlow, of what the adapter has now; Keras makes it once."""
        strategy = self._iterator._distribute_strategy
        return strategy.experimental_distribute_dataset(self.adapter.get_tf_dataset())

    def count_as_seen(self, steps: int) -> None:
        """Adds to the steps that are counted against the length of the stream."""
        self._iterator._steps_seen += steps


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


def callback_attributes(callback: Any) -> tuple[str, ...]:
    """The attributes in which one of Keras's callbacks keeps its state; none for others."""
    for name, attributes in _CALLBACK_ATTRIBUTES.items():
        keras_class = getattr(keras.callbacks, name, None)
        if keras_class is not None and isinstance(callback, keras_class):
            return tuple(attributes.split())
    return ()


def reads_ahead() -> bool:
    """Whether Keras reads more than is trained: the place of the data is not that of training."""
    if keras.backend.backend() == "jax":
        import jax  # the backend

        # `JAXEpochIterator._get_iterator`: one batch ahead, since 3.15 not on a CPU.
        release = tuple(int(number) for number in keras.version().split(".")[:2])
        return release < (3, 15) or jax.default_backend() != "cpu"
    return keras.backend.backend() == "tensorflow"


# Data adapters: keras/src/trainers/data_adapters. A source whose adapter looks otherwise than
# expected is read from its start up to where training goes on.


def source_of(adapter: Any) -> Any:
    """The object that was given to `fit`; None for arrays, and where the adapter hides it."""
    names = ("py_dataset", "_dataloader", "_dataset", "generator")
    sources = (getattr(adapter, name, None) for name in names)
    return next((source for source in sources if source is not None), None)


@contextlib.contextmanager
def swap_source(adapter: Any, source: Any) -> Generator[None, None, None]:
    """Has the adapter of a grain dataset use another one for a moment."""
    before = adapter._dataset
    adapter._dataset = source
    try:
        yield
    finally:
        adapter._dataset = before


def wrap_next(adapter: Any, wrap: Callable[[Any], Any]) -> None:
    """Has Keras on JAX read its next stream from what `wrap` makes of the adapter's iterable."""

    def get_jax_iterator() -> Any:
        del adapter.get_jax_iterator
        return wrap(adapter.get_jax_iterator())

    adapter.get_jax_iterator = get_jax_iterator


def array_is_shuffled(adapter: Any) -> bool:
    """Whether Keras shuffles arrays, as a whole or within batches."""
    return bool(getattr(adapter, "_shuffle", False))


def skip_slices(adapter: Any, count: int) -> bool:
    """Has the next stream of arrays on JAX yield `count` empty batches first.

    Their indices are drawn, as they cost nothing and may come from a random generator; the
    arrays are not sliced. Returns whether the adapter lets that be done.
    """
    original = getattr(type(adapter), "_get_iterator", None)
    if original is None:
        return False

    def get_iterator(slice_array: Callable[..., Any], inputs: Any) -> Any:
        del adapter._get_iterator
        sliced = 0
        arrays = sum(leaf is not None for leaf in keras.tree.flatten(inputs))

        def slice_or_skip(sliceable: Any, indices: Any = None) -> Any:
            nonlocal sliced
            sliced += 1
            # So many slices make a batch.
            return slice_array(sliceable, indices=indices) if sliced > count * arrays else None

        return original(adapter, slice_or_skip, inputs)

    adapter._get_iterator = get_iterator
    return True


def first_batches(adapter: Any) -> list[Any]:
    """The batches of a generator that Keras reads ahead, and yields again first."""
    return list(getattr(adapter, "_first_batches", ()))


def generator_names(adapter: Any) -> dict[str, Any]:
    """Local variables of the Python generator that an adapter reads, and those it closes over."""
    chain = getattr(adapter, "generator", None)
    for cell in getattr(chain, "__closure__", None) or ():
        frame = getattr(cell.cell_contents, "gi_frame", None)
        if frame is not None:
            return dict(frame.f_locals)
    return {}


def py_dataset_has_workers(adapter: Any) -> bool:
    """Whether threads or processes load the batches of a PyDataset."""
    return getattr(adapter, "enqueuer", None) is not None


def drop_leftovers(adapter: Any) -> None:
    """Drops what workers of a PyDataset have loaded for an epoch that did not take place."""
    queue = getattr(getattr(adapter, "enqueuer", None), "ready_queue", None)
    while queue is not None and not queue.empty():
        queue.get()


def take_shuffle(adapter: Any) -> bool:
    """Has the workers of a PyDataset load in order; returns whether they shuffled before.

    `wrap_py_dataset` then puts it back.
    """
    enqueuer = adapter.enqueuer
    shuffled = bool(getattr(enqueuer, "shuffle", False))
    enqueuer.shuffle = False
    return shuffled


def wrap_py_dataset(adapter: Any, wrapped: Any) -> Callable[[], None]:
    """Puts something in the place of a PyDataset, for the adapter and its workers.

    Returns what puts the dataset and the workers' order back.
    """
    enqueuer = getattr(adapter, "enqueuer", None)
    holders = [adapter] if enqueuer is None else [adapter, enqueuer]
    original = adapter.py_dataset
    for holder in holders:
        holder.py_dataset = wrapped

    def put_back() -> None:
        for holder in holders:
            holder.py_dataset = original
        if enqueuer is not None:
            enqueuer.shuffle = adapter.shuffle

    return put_back
