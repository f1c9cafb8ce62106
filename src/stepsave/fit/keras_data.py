"""What Keras does not promise of the data that `fit` reads, and stepsave needs all the same.

Beside `keras_internals` the only module that touches private attributes of Keras; see there.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Generator, Iterator
from typing import Any

import keras

__all__ = ("EpochData",)  # and the functions below


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
    def batch_spec(self) -> Any:
        """On TensorFlow: the specification of a batch."""
        return self._iterator._distributed_dataset.element_spec

    @property
    def batch_size(self) -> int | None:
        """Samples of a batch, or None if the adapter does not know."""
        try:
            size = getattr(self.adapter, "batch_size", None)
        except IndexError:  # of `tf.data` whose first part is a scalar
            return None
        return int(size) if isinstance(size, numbers.Integral) else None

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


def reads_ahead() -> bool:
    """Whether Keras reads more than is trained: the place of the data is not that of training."""
    if keras.backend.backend() == "jax":
        import jax  # the backend

        # `JAXEpochIterator._get_iterator`: one batch ahead, since 3.15 not on a CPU.
        release = tuple(int(number) for number in keras.version().split(".")[:2])
        return release < (3, 15) or jax.default_backend() != "cpu"
    return keras.backend.backend() == "tensorflow"


def reads_in_background() -> bool:
    """Whether data is read on another thread than that of `fit`, at any time: by `tf.data`."""
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
