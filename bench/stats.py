"""Medians and their spread: the same everywhere."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

DRAWS = 1000


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median with the 10th and 90th percentile, which stay inside what was measured."""
    return {
        "median": statistics.median(values),
        "p10": percentile(values, 10),
        "p90": percentile(values, 90),
        "samples": len(values),
    }


def interval_of_median(values: Sequence[float]) -> dict[str, Any]:
    """The median, and between what it lies in 95 of 100 repetitions, by resampling."""

    def resampled(rng: random.Random) -> float:
        return statistics.median(rng.choices(values, k=len(values)))

    low, high = _resampled(resampled, 2.5, 97.5)
    return {"median": statistics.median(values), "low": low, "high": high}


def ratio_of_medians(values: Sequence[float], floors: Sequence[float]) -> dict[str, Any] | None:
    """The ratio of two medians, with the 10th and 90th percentile of resampled rounds.

    Differences of whole fits may be zero or less in a single round, where a ratio means
    nothing; their medians over all rounds are not.

    Args:
        values: By round.
        floors: Of the same rounds; a round is drawn with both.

    Returns:
        None if the floors have no median over zero.
    """
    if statistics.median(floors) <= 0:
        return None
    rounds = list(zip(values, floors, strict=True))

    def resampled(rng: random.Random) -> float | None:
        above, below = zip(*rng.choices(rounds, k=len(rounds)), strict=True)
        floor = statistics.median(below)
        return statistics.median(above) / floor if floor > 0 else None

    ratio = statistics.median(values) / statistics.median(floors)
    low, high = _resampled(resampled, 10, 90)
    return {"median": ratio, "p10": low, "p90": high, "samples": len(rounds)}


def _resampled(
    draw: Callable[[random.Random], float | None], low: float, high: float
) -> tuple[float, float]:
    """Two percentiles of what many draws give; the same draws each time."""
    rng = random.Random(0)
    drawn = [value for _ in range(DRAWS) if (value := draw(rng)) is not None]
    return percentile(drawn, low), percentile(drawn, high)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest samples, never beyond the outermost."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
