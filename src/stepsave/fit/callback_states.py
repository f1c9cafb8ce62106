"""The state of the other callbacks of a `fit`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, cast

import keras

from stepsave.fit.keras_internals import callback_attributes, skip_saved_steps
from stepsave.format.packing import pack, unpack

__all__ = ("capture", "has_state_per_batch", "restore")

_logger = logging.getLogger("stepsave")


def capture(callbacks: Iterable[Any], arrays: list[Any]) -> list[dict[str, Any]]:
    """Returns the states of the callbacks that have one, as a document for JSON.

    Args:
        callbacks: The callbacks, in their order.
        arrays: Where their arrays are put.

    Raises:
        InvalidStateError: If `get_state` of a callback returns what cannot be saved.
    """
    states: list[dict[str, Any]] = []
    for callback in callbacks:
        state = _get_state(callback)
        if state is not None:
            name = type(callback).__name__
            states.append({"class": name, "state": pack(state, arrays, f"state of {name}")})
    return states


def restore(callbacks: Iterable[Any], states: Sequence[Any], arrays: Sequence[Any]) -> None:
    """Puts states back, each into the callback of the same class; the n-th into the n-th."""
    left = list(states)
    for callback in callbacks:
        name = type(callback).__name__
        at = next((i for i, state in enumerate(left) if state["class"] == name), None)
        if at is not None and _has_state(callback):
            _set_state(callback, unpack(left.pop(at)["state"], arrays))
            skip_saved_steps(callback)
    if left:
        names = ", ".join(state["class"] for state in left)
        _logger.info("The backup has states of callbacks that are not there now: %s", names)


def has_state_per_batch(callback: Any) -> bool:
    """Whether the state may change with each batch, and not only with each epoch."""
    hooks = ("on_train_batch_end", "on_batch_end")
    base = keras.callbacks.Callback
    overrides = any(getattr(type(callback), h) is not getattr(base, h) for h in hooks)
    return _has_state(callback) and overrides


def _defines_state(callback: Any) -> bool:
    return all(callable(getattr(callback, name, None)) for name in ("get_state", "set_state"))


def _has_state(callback: Any) -> bool:
    return _defines_state(callback) or bool(callback_attributes(callback))


def _get_state(callback: Any) -> Any:
    if _defines_state(callback):
        return callback.get_state()
    attributes = callback_attributes(callback)
    if not attributes:
        return None
    return {name: getattr(callback, name) for name in attributes if hasattr(callback, name)}


def _set_state(callback: Any, state: Any) -> None:
    if _defines_state(callback):
        callback.set_state(state)
        return
    for name, value in cast("dict[str, Any]", state).items():
        if name in callback_attributes(callback):  # nothing else: the backup does not choose
            setattr(callback, name, value)
