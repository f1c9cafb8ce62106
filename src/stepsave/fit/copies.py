"""Copies of a callback: fresh ones, with the same arguments."""

from __future__ import annotations

from typing import Any

import keras

__all__ = ("FreshCopies",)


class FreshCopies(keras.callbacks.Callback):
    """A callback whose copies, by `copy` or `pickle`, know nothing of a `fit`.

    Tuners copy callbacks for each trial. What belongs to a fit (locks, threads, the model) could
    not be copied, and must not be shared.
    """

    _of_a_fit: frozenset[str]

    def _forget_fit(self) -> None:
        """Sets all attributes that belong to a `fit`, for none."""
        raise NotImplementedError

    def _begin_fresh(self) -> None:
        """To be called at the end of `__init__`, when all arguments are attributes."""
        arguments = set(vars(self))
        self._forget_fit()
        self._of_a_fit = frozenset(set(vars(self)) - arguments)

    def __getstate__(self) -> dict[str, Any]:
        of_a_fit = self._of_a_fit | set(vars(keras.callbacks.Callback()))
        return {name: value for name, value in vars(self).items() if name not in of_a_fit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        keras.callbacks.Callback.__init__(self)
        vars(self).update(state)
        self._forget_fit()
