"""Least, largest and mean value of arrays of any dtype, piece by piece."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from stepsave.format.records import DTYPES, ChunkSpec, LayoutPlan
from stepsave.snapshot.pages import Bytes

__all__ = ("Statistics", "Summing", "readable")

_PIECE = 1 << 18  # elements at a time: what is made of them stays in the cache
Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Statistics:
    """What is known of some values. Of complex numbers, least and largest are magnitudes.

    Attributes:
        count: How many of them are finite.
        least: The least of these; None if there is none.
        largest: The largest of these.
        mean: Their mean.
        nan_count: How many are NaN.
        infinite_count: How many are infinite.
    """

    count: int = 0
    least: float | None = None
    largest: float | None = None
    mean: complex | None = None
    nan_count: int = 0
    infinite_count: int = 0

    def and_of(self, other: Statistics) -> Statistics:
        """Returns what is known of both together."""
        nan_count = self.nan_count + other.nan_count
        infinite_count = self.infinite_count + other.infinite_count
        some = [one for one in (self, other) if one.count]
        if len(some) < 2:
            base = some[0] if some else Statistics()
            return dataclasses.replace(base, nan_count=nan_count, infinite_count=infinite_count)
        count = self.count + other.count
        return Statistics(
            count,
            min(one.least for one in some if one.least is not None),
            max(one.largest for one in some if one.largest is not None),
            # Not the sum of all: it could be beyond the largest number.
            sum(one.mean * (one.count / count) for one in some if one.mean is not None),
            nan_count,
            infinite_count,
        )


def readable(data: Bytes, dtype: str) -> Array:
    """Returns stored bytes as an array of NumPy's own dtypes, with the same values."""
    values = data.view(DTYPES[dtype])
    if values.dtype.isbuiltin == 1:
        return values.view(np.uint8) if dtype == "bool" else values
    return values.astype(np.int8 if dtype.startswith("int") else np.float32)  # both are exact


class Summing:
    """Collects the statistics of the arrays of a backup, from chunks in any order."""

    def __init__(self, plan: LayoutPlan) -> None:
        """Knows nothing yet."""
        self._plan = plan
        self._guard = threading.Lock()
        self._parts: list[dict[int, Statistics]] = [{} for _ in plan.leaves]

    def add(self, chunk: ChunkSpec, data: Bytes) -> None:
        """Takes a chunk in; called by several threads."""
        dtype = self._plan.leaves[chunk.leaf].dtype
        step_bytes = _PIECE * DTYPES[dtype].itemsize
        pieces = (
            _summarize(readable(data[begin : begin + step_bytes], dtype))
            for begin in range(0, len(data), step_bytes)
        )
        with np.errstate(all="ignore"):  # any bits may come
            part = _join(pieces)
        with self._guard:
            self._parts[chunk.leaf][chunk.offset_bytes] = part

    def of_leaf(self, number: int) -> Statistics:
        """Returns what is known of an array; the same to the last bit, whoever came first."""
        parts = self._parts[number]
        return _join(parts[offset] for offset in sorted(parts))


def _join(parts: Iterable[Statistics]) -> Statistics:
    joined = Statistics()
    for part in parts:
        joined = joined.and_of(part)
    return joined


def _summarize(values: Array) -> Statistics:
    nan_count = infinite_count = 0
    if values.dtype.kind in "fc":
        is_finite = np.isfinite(values)
        if not is_finite.all():
            nan_count = int(np.isnan(values).sum())
            total = values.size
            values = values[is_finite]
            infinite_count = total - values.size - nan_count
    if not values.size:
        return Statistics(nan_count=nan_count, infinite_count=infinite_count)
    if values.dtype.kind == "c":
        values = values.astype(np.complex128)
        sizes = np.minimum(np.abs(values), np.finfo(np.float64).max)
        wide = np.complex128
    else:
        sizes, wide = values, np.float64
    mean = values.sum(dtype=wide) / values.size
    if not np.isfinite(mean):  # the sum is beyond the largest number, but not the mean
        mean = (values.astype(wide) * (1 / values.size)).sum()
    return Statistics(
        values.size, sizes.min().item(), sizes.max().item(), mean.item(), nan_count, infinite_count
    )
