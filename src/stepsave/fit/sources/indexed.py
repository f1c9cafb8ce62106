"""Data that is read by index: arrays, `PyDataset`, torch's `DataLoader`."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import keras

from stepsave import rng
from stepsave.errors import InvalidStateError
from stepsave.fit import keras_data
from stepsave.fit.keras_data import EpochData
from stepsave.fit.sources.generators import OwnGenerators
from stepsave.fit.sources.source import Source, backend
from stepsave.format.packing import pack, unpack

__all__ = ("ArraySource", "LoaderSource", "PyDatasetSource")

_logger = logging.getLogger("stepsave")

_GENERATORS = "generators of the data set"


class ArraySource(Source):
    """NumPy arrays and tensors: on JAX and torch their batches are passed over unsliced."""

    name = "arrays"

    def __init__(self, data: EpochData) -> None:
        super().__init__(data)
        shuffled = keras_data.array_is_shuffled(self.adapter)
        self._is_seeded_once = backend() == "tensorflow" and shuffled
        self._other_seed: Any = None

    def state(self) -> Any:
        return {"seed": rng.tensorflow_seed()} if self._is_seeded_once else None

    def compare(self, state: Any) -> None:
        if self._is_seeded_once and state is not None and state != self.state():
            self._other_seed = state["seed"]

    def doubt(self) -> str | None:
        if not self._is_seeded_once:
            return None
        now = rng.tensorflow_seed()
        if now is None:
            return (
                "Keras shuffles arrays on TensorFlow by its global seed, and none is set. Call "
                "`keras.utils.set_random_seed(…)` before `fit`"
            )
        if self._other_seed is not None:
            return (
                "Keras shuffles arrays on TensorFlow by its global seed, which was "
                f"{self._other_seed} and is {now}. Set the same one"
            )
        return None

    def open_at(self, batches: int, place: Any) -> tuple[Any, int]:
        del place
        if backend() == "jax" and keras.distribution.distribution() is None:
            keras_data.skip_slices(self.adapter, batches)
        iterable = self.data.get_iterator()
        return iterable, skip_indices(iterable, batches) if backend() == "torch" else batches


class PyDatasetSource(Source):
    """`keras.utils.PyDataset`: batches passed over are not loaded, except one.

    All are where loading one changes its state: its random generators, or its `get_state()`.
    """

    name = "`keras.utils.PyDataset`"
    draws_first = frozenset({"python"})  # to shuffle

    def __init__(self, data: EpochData) -> None:
        super().__init__(data)
        self._generators = OwnGenerators(self.object)
        self._put_back: Callable[[], None] | None = None
        if self.object.num_batches is not None and not data.streams_last:
            # To build a model Keras reads a batch, and trains on the others that workers had
            # loaded by then, in each epoch those of the epoch before. Epochs are then not whole.
            keras_data.drop_leftovers(self.adapter)

    @property
    def _has_state(self) -> bool:
        return all(callable(getattr(self.object, n, None)) for n in ("get_state", "set_state"))

    def doubt(self) -> str | None:
        hooks = [
            name
            for name in ("on_epoch_begin", "on_epoch_end")
            if getattr(type(self.object), name) is not getattr(keras.utils.PyDataset, name)
        ]
        if hooks and not self._has_state:
            return (
                f"`{type(self.object).__name__}` changes itself in `{hooks[0]}`, and a new "
                "process begins with a new one. Give it `get_state()` and `set_state(state)`"
            )
        if keras_data.py_dataset_has_workers(self.adapter) and self._generators:
            return (
                f"`{type(self.object).__name__}` has a random generator of its own, from which its "
                "workers draw in any order. Draw from a generator that is seeded by the index"
            )
        if (
            keras_data.py_dataset_has_workers(self.adapter)
            and self.data.streams_last
            and self.object.num_batches is not None
        ):
            return (
                "with workers and `steps_per_epoch` Keras hands batches that workers had loaded "
                "in one epoch to the next. Leave `steps_per_epoch` out"
            )
        return None

    def state(self) -> Any:
        own = pack(self.object.get_state(), where="get_state()") if self._has_state else None
        return {_GENERATORS: self._generators.state(), "own": own} if self._generators else own

    def set_state(self, state: Any) -> None:
        if isinstance(state, dict) and _GENERATORS in state:
            document = cast("dict[str, Any]", state)
            self._generators.set_state(document[_GENERATORS])
            state = document["own"]
        if state is not None and self._has_state:
            self.object.set_state(unpack(state))

    def prepare(self, batches: int) -> None:
        if not batches:
            return
        if keras_data.py_dataset_has_workers(self.adapter):
            order = None
            if self.object.num_batches is not None and keras_data.take_shuffle(self.adapter):
                order = list(range(self.object.num_batches))
                random.shuffle(order)  # as a worker would have, without a race for the generator
            passing = _PassedByIndex(self.object, batches, order)
        else:
            passing = _PassedInTurn(self.object, batches, self._moved_by_loading)
        self._put_back = keras_data.wrap_py_dataset(self.adapter, passing)

    def _moved_by_loading(self) -> Any:
        """Something that differs after a batch was loaded if that draws or changes something."""
        # Elsewhere the global generators are put back to where they were.
        drawn = rng.capture(keras=False).to_json() if keras_data.reads_in_background() else None
        return self.state(), drawn

    def close_epoch(self) -> None:
        if self._put_back is not None:
            self._put_back()
            self._put_back = None
            if not self.data.streams_last:
                keras_data.drop_leftovers(self.adapter)


class _Passed:
    """Hands out one and the same batch instead of those that are passed over."""

    def __init__(self, dataset: Any, batches: int) -> None:
        self._dataset = dataset
        self._batches = batches
        self._any: Any = None

    def _pass(self, index: int) -> Any:
        if self._any is None:  # in each worker, one batch is loaded
            self._any = self._dataset[index]
        return self._any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_dataset":
            raise AttributeError(name)  # while it is copied into a worker
        return getattr(self._dataset, name)


class _PassedInTurn(_Passed):
    """Passes over the first batches that are asked for, one after the other."""

    def __init__(self, dataset: Any, batches: int, state: Callable[[], Any]) -> None:
        super().__init__(dataset, batches)
        self._state = state
        self._moves: bool | None = None  # whether its state moves with each batch

    def __getitem__(self, index: int) -> Any:
        if self._batches <= 0 or self._moves:
            return self._dataset[index]
        self._batches -= 1
        if self._moves is None:
            before = self._state()
            batch = self._pass(index)
            self._moves = self._state() != before
            return batch
        return self._pass(index)


class _PassedByIndex(_Passed):
    """Passes over the first batches of an order, whichever worker asks for them when."""

    def __init__(self, dataset: Any, batches: int, order: list[int] | None) -> None:
        super().__init__(dataset, batches)
        self._order = order

    def __getitem__(self, index: int) -> Any:
        at = index if self._order is None else self._order[index]
        return self._pass(at) if index < self._batches else self._dataset[at]


class LoaderSource(Source):
    """A torch `DataLoader`: without workers only indices are drawn for what is passed over.

    With workers all is read, because their random generators are seeded by the epoch and
    moved by what they load; and where the data set has a random generator of its own. A
    `StatefulDataLoader` is set to its place.
    """

    name = "torch `DataLoader`"
    draws_first = frozenset({"torch"})  # to seed workers, and to shuffle

    def __init__(self, data: EpochData) -> None:
        super().__init__(data)
        self._generators_of_rows = OwnGenerators(self.object.dataset)
        self._place_is_packable = True

    def doubt(self) -> str | None:
        if self.object.num_workers and self.object.persistent_workers:
            return (
                "its workers live on from epoch to epoch, and so do their random generators. "
                "Leave `persistent_workers` out if they draw random numbers"
            )
        return None

    @property
    def _tells_its_place(self) -> bool:
        stateful = all(hasattr(self.object, name) for name in ("state_dict", "load_state_dict"))
        return stateful and self._place_is_packable and not keras_data.reads_ahead()

    def state(self) -> Any:
        own = pack([generator.get_state() for generator in self._generators()])
        rows = self._generators_of_rows
        return {_GENERATORS: rows.state(), "own": own} if rows else own

    def place(self, batches: int) -> Any:
        if not self._tells_its_place or batches == self.data.steps:
            return None  # at its end, loading a state would begin the epoch after it
        try:
            return pack(self.object.state_dict(), where="state_dict()")
        except InvalidStateError as e:  # of a data set of the user's: it can still be read again
            _logger.warning("The loader cannot be set to its place when it is resumed: %s", e)
            self._place_is_packable = False
            return None

    def set_state(self, state: Any) -> None:
        if isinstance(state, dict) and _GENERATORS in state:
            document = cast("dict[str, Any]", state)
            self._generators_of_rows.set_state(document[_GENERATORS])
            state = document["own"]
        for generator, words in zip(self._generators(), unpack(state or []), strict=False):
            generator.set_state(words)

    def open_at(self, batches: int, place: Any) -> tuple[Any, int]:
        if place is not None and self._tells_its_place:
            self.object.load_state_dict(unpack(place))
            return self.data.get_iterator(), 0
        to_read = batches if self._rows_draw() else skip_indices(self.object, batches)
        return self.data.get_iterator(), to_read

    def _rows_draw(self) -> bool:
        """Whether to load a row may move a random generator that is not put back otherwise."""
        if self._generators_of_rows:
            return True
        if not keras_data.reads_in_background() or self.object.num_workers:
            return False
        before = rng.capture(keras=False)
        try:
            self.object.dataset[0]
        except Exception:  # noqa: BLE001  data by other keys, or by iteration: nobody knows
            return True
        drawn = rng.moved(before, rng.capture(keras=False))
        rng.restore(before)
        return bool(drawn)

    def _generators(self) -> list[Any]:
        """Random generators of its own, each once."""
        loader = self.object
        holders = [loader, loader.sampler, loader.batch_sampler]
        holders.append(getattr(loader.batch_sampler, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        return list({id(g): g for g in found if hasattr(g, "get_state")}.values())


def skip_indices(loader: Any, batches: int) -> int:
    """Has the next iterator of a torch loader begin later, if it can.

    Returns:
        How many batches must still be read to have passed over `batches`: one, with which all
        is drawn from the random generators that would have been drawn.
    """
    from torch.utils.data import IterableDataset  # the loader is made of it

    sampler = loader.batch_sampler
    if loader.num_workers or sampler is None or isinstance(loader.dataset, IterableDataset):
        return batches
    if batches <= 1:
        return batches

    class Rest:
        def __iter__(self) -> Iterator[Any]:
            vars(loader)["batch_sampler"] = sampler  # the next iterator begins at the start
            return itertools.islice(iter(sampler), batches - 1, None)

        def __len__(self) -> int:
            return len(sampler)

    # Not by assignment: a loader refuses that, as workers would not learn of it.
    vars(loader)["batch_sampler"] = Rest()
    return 1
