"""Nested dicts of arrays, as flat lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from stepsave.errors import InvalidStateError

__all__ = ("flatten", "unflatten")

MAX_DEPTH = 64


def flatten(state: Mapping[str, Any]) -> tuple[list[tuple[str, ...]], list[Any]]:
    """Lists the leaves of a nested dict with their paths, in the order of the dict.

    Raises:
        InvalidStateError: If the state is no dict, or a key is no string.
    """
    if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidStateError(
            f"Invalid value for argument `state`. Expected a nested dict of arrays, found "
            f"{type(state).__name__}."
        )
    paths: list[tuple[str, ...]] = []
    leaves: list[Any] = []
    _walk(state, (), paths, leaves)
    return paths, leaves


def _walk(
    node: Mapping[Any, Any],
    at: tuple[str, ...],
    paths: list[tuple[str, ...]],
    leaves: list[Any],
) -> None:
    if len(at) > MAX_DEPTH:
        raise InvalidStateError(f"State {'/'.join(at[:3])}…: nested deeper than {MAX_DEPTH}.")
    for key, value in node.items():
        if not isinstance(key, str):
            raise InvalidStateError(
                f"Key {key!r} in state[{'/'.join(at)!r}]: expected a string, found "
                f"{type(key).__name__}. Use str({key!r})."
            )
        path = (*at, key)
        if isinstance(value, Mapping):
            _walk(cast("Mapping[Any, Any]", value), path, paths, leaves)
        elif isinstance(value, (list, tuple)):
            raise InvalidStateError(
                f"State {'/'.join(path)!r}: expected an array or a dict, found "
                f"{type(cast('object', value)).__name__}. Turn it into a dict keyed by "
                "position, or stack it into one array."
            )
        else:
            paths.append(path)
            leaves.append(value)


def unflatten(paths: Sequence[tuple[str, ...]], leaves: Sequence[Any]) -> dict[str, Any]:
    """The inverse of `flatten`; empty dicts are not brought back."""
    state: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        node = state
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return state
