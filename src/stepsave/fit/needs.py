"""Which parts of a backup this process needs for its part of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import keras

from stepsave.engine.extents import Needs, Regions
from stepsave.fit.matching import match
from stepsave.fit.variables import ModelVariables
from stepsave.format.records import LeafSpec
from stepsave.snapshot.leaves import regions_here

__all__ = ("needs_of",)


def needs_of(model: Any) -> Needs | None:
    """Returns them; None if that is everything.

    Of variables that do not exist yet everything is read.
    """
    if keras.backend.backend() != "jax":
        return None
    now = ModelVariables(model)
    if all(regions_here(variable) is None for variable in now.variables):
        return None

    def needed(leaves: Sequence[LeafSpec]) -> Regions:
        saved: dict[tuple[str, ...], Any] = {leaf.path: leaf for leaf in leaves}
        pairs, _ = match(now.by_path, saved, optional=now.optional, unbuilt=frozenset())
        partners: list[tuple[Any, LeafSpec]] = [(pair[0], cast("Any", pair[2])) for pair in pairs]
        return {
            leaf.path: regions
            for variable, leaf in partners
            if (regions := regions_here(variable)) is not None
            and tuple(variable.shape) == leaf.shape
        }

    return Needs(needed)
