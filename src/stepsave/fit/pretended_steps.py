"""What stands in for a training step where a resumed `fit` must see one, but none is trained.

`fit` looks its `train_function` up at every step, on all backends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

from stepsave.fit import keras_internals

__all__ = ("no_batch", "no_training", "or_end", "put_back")

_STANDS_FOR = "stepsave_stands_for"


def put_back(model: Any) -> None:
    """Puts the model's own step back, if a `fit` was interrupted so that a stand-in was left."""
    stand_in = getattr(model, "train_function", None)
    model.train_function = getattr(stand_in, _STANDS_FOR, stand_in)


def _stand_in(model: Any, stand_in: Callable[..., Any], train: Any) -> None:
    setattr(stand_in, _STANDS_FOR, train)
    model.train_function = stand_in


@contextlib.contextmanager
def or_end(model: Any, callbacks: Any) -> Generator[Callable[[], bool], None, None]:
    """Has the next step return the logs there are if there is no batch for it."""
    train, logs = model.train_function, model.get_metrics_result()
    ended = False

    def train_or_end(*args: Any) -> Any:
        nonlocal ended
        model.train_function = train
        try:
            return train(*args)
        except Exception as e:
            if not (isinstance(e, StopIteration) or type(e).__name__ == "OutOfRangeError"):
                raise
        ended = True
        # The end of this batch is hidden: `fit` calls it next.
        hidden.enter_context(keras_internals.silent(callbacks))
        return (logs, args[0]) if len(args) > 1 else logs

    try:
        _stand_in(model, train_or_end, train)
        with contextlib.ExitStack() as hidden:
            yield lambda: ended
    finally:
        model.train_function = train  # a callback may have raised before the step


@contextlib.contextmanager
def no_batch(model: Any) -> Generator[None, None, None]:
    """Has the next step find the end of the data.

    Not by trying: on TensorFlow a step without a batch still counts as one for all that
    does not depend on data, such as random seeds, and it was tried once before.
    """
    train = model.train_function

    def find_end(*_: Any) -> Any:
        raise StopIteration

    try:
        _stand_in(model, find_end, train)
        yield
    finally:
        model.train_function = train


@contextlib.contextmanager
def no_training(model: Any) -> Generator[None, None, None]:
    """Has the next step return the logs there are, and train nothing."""
    train, logs = model.train_function, model.get_metrics_result()

    def pretend(*args: Any) -> Any:
        return (logs, args[0]) if len(args) > 1 else logs  # JAX: state, iterator

    try:
        _stand_in(model, pretend, train)
        yield
    finally:
        model.train_function = train
