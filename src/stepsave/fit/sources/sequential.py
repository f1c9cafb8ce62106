"""Data that is read one after the other: `tf.data`, grain, Python generators."""

from __future__ import annotations

import contextlib
import logging
import math
import zlib
from collections.abc import Iterator
from typing import Any, cast

import keras
import numpy as np

from stepsave.fit import keras_data
from stepsave.fit.keras_data import EpochData
from stepsave.fit.sources.source import Source, backend
from stepsave.format.packing import pack, unpack

__all__ = ("GeneratorSource", "GrainSource", "TensorFlowSource")

_logger = logging.getLogger("stepsave")

_PLACES = 64  # Keras reads one batch ahead
_MAX_SEED = 16  # numbers


class TensorFlowSource(Source):
    """`tf.data.Dataset`: what shuffles it goes on with each iterator that is made."""

    name = "`tf.data.Dataset`"

    def __init__(self, data: EpochData) -> None:
        super().__init__(data)
        self._seeds = _seeds(self.object)
        self._differs = False

    def state(self) -> Any:
        orders = [_seeds_of_shuffle(dataset) for dataset in _with_inputs(self.object)]
        orders = [seeds for seeds in orders if seeds]
        seeds = [pack(seed.numpy()) for seed in self._seeds]
        return {"orders": orders, "seeds": seeds} if orders or seeds else None

    def set_state(self, state: Any) -> None:
        for seed, value in zip(self._seeds, (state or {}).get("seeds", ()), strict=False):
            seed.assign(unpack(value))

    def compare(self, state: Any) -> None:
        now = self.state()
        self._differs = bool(state and now) and state["orders"] != now["orders"]

    def doubt(self) -> str | None:
        if self._differs:
            return "it is shuffled by other seeds than before. Set the same ones"
        orders = map(_seeds_of_shuffle, _with_inputs(self.object))
        if any(seeds and not any(seeds) for seeds in orders):
            return (
                "it is shuffled without a seed. Give `shuffle(…, seed=…)` one, or call "
                "`keras.utils.set_random_seed(…)` before the dataset is made"
            )
        options = getattr(self.object, "options", None)
        if options is not None and options().deterministic is False:
            return "its option `deterministic` is False. Leave it out"
        return None

    def repeat_streams(self, created: int, used: int) -> None:
        # Keras on TensorFlow makes an iterator at once, elsewhere when it is read from.
        if backend() == "tensorflow":
            for _ in range(created):
                iter(self.data.get_iterator())
        else:
            for _ in range(used):
                iter(self.object)


class GrainSource(Source):
    """A grain dataset or loader: a `MapDataset` is sliced, iterators are set to their place."""

    name = "grain dataset"

    def __init__(self, data: EpochData) -> None:
        super().__init__(data)
        self._reading: _Reading | None = None

    def place(self, batches: int) -> Any:
        return None if self._reading is None else self._reading.place(batches)

    def open(self) -> Any:
        return self._open(None, 0)

    def open_at(self, batches: int, place: Any) -> tuple[Any, int]:
        if place is not None and backend() != "tensorflow":
            return self._open(unpack(place), batches), 0
        import grain  # the data is made of it

        if not isinstance(self.object, grain.MapDataset):
            return self._open(None, 0), batches
        self._reading = None  # its states would be those of the slice
        if backend() == "jax":
            keras_data.wrap_next(self.adapter, lambda iterable: iterable[batches:])
            return self.data.get_iterator(), 0
        rest = cast("Any", self.object)[batches:]
        with keras_data.swap_source(self.adapter, rest):
            tensorflow = backend() == "tensorflow"
            return self.data.remake() if tensorflow else self.data.get_iterator(), 0

    def _open(self, state: Any, batches: int) -> Any:
        def follow(iterable: Any) -> _Followed:
            return _Followed(self, iterable, state, batches)

        if backend() == "jax":
            keras_data.wrap_next(self.adapter, follow)
        elif backend() == "torch":
            with keras_data.swap_source(self.adapter, follow(self.object)):
                return self.data.get_iterator()
        return self.data.get_iterator()

    def read_by(self, iterator: Any, batches: int) -> _Reading:
        """Notes the iterator of the stream, which begins after so many batches."""
        self._reading = _Reading(iterator, batches)
        return self._reading


class _Followed:
    """An iterable that begins at a state, and shows the iterator it is read by."""

    def __init__(self, source: GrainSource, iterable: Any, state: Any, batches: int) -> None:
        self._source = source
        self._iterable = iterable
        self._state = state
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._iterable)
        if self._state is not None:
            iterator = self._set_state(iterator)
        return self._source.read_by(iterator, self._batches)

    def _set_state(self, iterator: Any) -> Any:
        try:
            iterator.set_state(self._state)
        except ValueError as e:  # grain compares data by its `repr`, which may be an address
            _logger.warning("Reading %d batches again, as grain refuses: %s", self._batches, e)
            iterator = iter(self._iterable)
            for _ in range(self._batches):
                next(iterator)
        return iterator


class _Reading(Iterator[Any]):
    """A grain iterator that is read, and where it was after each batch.

    Keras may have read more than is trained, so the present place is not always what is asked
    for. Then places are noted with each batch, the last of them.
    """

    def __init__(self, iterator: Any, batches: int) -> None:
        self._iterator = iterator
        self._read = batches
        self._places: dict[int, Any] = {}
        self._reads_ahead = keras_data.reads_ahead()

    def __next__(self) -> Any:
        batch = next(self._iterator)
        self._read += 1
        if self._reads_ahead:
            self._places[self._read] = self._state()
            self._places.pop(self._read - _PLACES, None)
        return batch

    def place(self, batches: int) -> Any:
        """Its state after so many batches, for `set_state`; None if that is not known."""
        return self._places.get(batches) if self._reads_ahead else self._state()

    def _state(self) -> Any:
        return pack(self._iterator.get_state(), where="get_state()")


class GeneratorSource(Source):
    """A Python generator: read from its start, and compared with what it yielded before."""

    name = "Python generator"

    def __init__(self, data: EpochData) -> None:
        super().__init__(data)
        self._drawn = 0  # by earlier streams
        self._differs = False

    def doubt(self) -> str | None:
        if self._differs:
            return "its first batches are not those that it began with before. Seed it"
        unseeded = _unseeded_generator(self.adapter)
        if unseeded is not None:
            return f"it draws from `{unseeded}`, a random generator without a seed. Seed that"
        return None

    def state(self) -> Any:
        first = _checksum(keras_data.first_batches(self.adapter))
        return {"drawn": self._drawn, "first": first}

    def compare(self, state: Any) -> None:
        first = keras_data.first_batches(self.adapter)
        self._differs = state is not None and state["first"] != _checksum(first)

    def set_state(self, state: Any) -> None:
        drawn = 0 if state is None else state["drawn"]
        if drawn > self._drawn:
            batches = self.object()  # Keras hands those out first that it had read ahead
            for _ in range(len(keras_data.first_batches(self.adapter)) + drawn - self._drawn):
                next(batches, None)
            self._drawn = drawn

    def count(self, batches: int) -> None:
        self._drawn += max(0, batches - len(keras_data.first_batches(self.adapter)))


def _with_inputs(dataset: Any) -> Iterator[Any]:
    pending = [dataset]
    while pending:
        dataset = pending.pop()
        yield dataset
        with contextlib.suppress(AttributeError, NotImplementedError):
            pending += dataset._inputs()  # noqa: SLF001  TensorFlow says it in no other way


def _seeds_of_shuffle(dataset: Any) -> list[int] | None:
    """The seeds of a dataset that shuffles, zeros if it has none; None if it does not."""
    seeds = [getattr(dataset, name, None) for name in ("_seed", "_seed2")]
    return None if None in seeds else [int(cast("Any", seed)) for seed in seeds]


def _seeds(dataset: Any) -> list[Any]:
    """Variables that the functions of a dataset use and that may be seeds, as a Keras layer has.

    Small and of integers. Other ones, such as weights, do not move when they are read.
    """
    graphs = [
        getattr(function.function, "graph", None)
        for one in _with_inputs(dataset)
        for function in getattr(one, "_functions", list)()
    ]
    variables = [variable for graph in graphs for variable in getattr(graph, "variables", ())]
    return [v for v in variables if v.dtype.is_integer and 0 < math.prod(v.shape) <= _MAX_SEED]


def _unseeded_generator(adapter: Any) -> str | None:
    """The name of a NumPy generator without a seed that a Python generator has at hand."""
    for name, value in keras_data.generator_names(adapter).items():
        bits = getattr(value, "bit_generator", None)
        entropy = getattr(getattr(bits, "seed_seq", None), "entropy", None)
        # Without a seed NumPy takes 128 bits from the operating system.
        if isinstance(value, np.random.Generator) and isinstance(entropy, int) and entropy >> 64:
            return name
    return None


def _checksum(batches: list[Any]) -> int:
    checksum = 0
    for leaf in keras.tree.flatten(batches):
        if leaf is not None:
            array = np.ascontiguousarray(keras.ops.convert_to_numpy(leaf))
            checksum = zlib.crc32(array.tobytes(), checksum)
    return checksum
