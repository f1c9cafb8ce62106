"""Medians and their spread: the same everywhere."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median with the 10th and 90th percentile, which stay inside what was measured."""
    return {
        "median": statistics.median(values),
        "p10": percentile(values, 10),
        "p90": percentile(values, 90),
        "samples": len(values),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest samples, never beyond the outermost."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
