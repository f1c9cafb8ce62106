"""Least, largest and mean of any bits of any dtype, however they are cut."""

import itertools
import math
import warnings

import numpy as np
import pytest
from engine_support import random_array
from hypothesis import given
from hypothesis import strategies as st

from stepsave.cli import statistics
from stepsave.cli.statistics import Summing
from stepsave.format.layout import chunks_of
from stepsave.format.records import DTYPES, ChunkSpec, LayoutPlan, LeafSpec


def found_of(array, dtype, cuts=()):
    """What is known of an array that comes as several chunks, the last first."""
    plan = LayoutPlan((LeafSpec(("a",), array.shape, dtype),), (array.shape,), (), 4096, 1)
    summing = Summing(plan)
    data = np.ascontiguousarray(array).reshape(-1)
    bounds = [0, *sorted(cuts), data.size]
    for begin, end in reversed([*itertools.pairwise(bounds)]):
        if end > begin:
            part = data[begin:end].view(np.uint8)
            summing.add(ChunkSpec(0, (begin,), 0, len(part), len(part), begin), part)
    return summing.of_leaf(0)


def expected_of(array, dtype):
    """The same, value by value, with Python's own numbers."""
    values = [complex(v) if dtype.startswith("complex") else v.item() for v in array.reshape(-1)]
    if dtype == "bool":
        values = [int(v) for v in values]
    elif not isinstance(values[0], int):
        values = [complex(v) if isinstance(v, complex) else float(v) for v in values]
    parts = [(v.real, v.imag) if isinstance(v, complex) else (v,) for v in values]
    nan = [any(map(math.isnan, part)) for part in parts]
    finite = [v for v, part in zip(values, parts, strict=True) if all(map(math.isfinite, part))]
    sizes = [np.hypot(v.real, v.imag) if isinstance(v, complex) else v for v in finite]
    return finite, sizes, sum(nan), len(values) - len(finite) - sum(nan)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 300), max_size=4))
def test_any_values_are_summed_up(dtype, seed, cuts):
    array = random_array((300,), dtype, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = found_of(array, dtype, cuts)
    finite, sizes, nan, infinite = expected_of(array, dtype)
    assert (found.count, found.nan_count, found.infinite_count) == (len(finite), nan, infinite)
    assert found.least == pytest.approx(min(sizes), rel=1e-6)
    assert found.largest == pytest.approx(max(sizes), rel=1e-6)
    if np.dtype(array.dtype).kind in "biu":
        assert (found.least, found.largest) == (min(sizes), max(sizes)), "exact"
    scale = max(*map(abs, sizes), 1e-300)
    mean = sum(v / scale / len(finite) for v in finite)
    assert abs(found.mean / scale - mean) < 1e-6
    for value in (found.least, found.largest):
        assert math.isfinite(value)


def test_a_mean_is_known_whose_sum_is_beyond_the_largest_number():
    array = np.full(1000, 1.5e308)
    found = found_of(array, "float64", [10, 500])
    assert found.mean == pytest.approx(1.5e308)
    assert found_of(-array, "float64").mean == pytest.approx(-1.5e308)
    assert found_of(array * (1 + 1j), "complex128").largest == np.finfo("f8").max


def test_large_arrays_are_summed_up_piece_by_piece(monkeypatch):
    monkeypatch.setattr(statistics, "_PIECE", 7)
    array = np.arange(1000, dtype=np.float32)
    array[500] = np.nan
    array[900] = -np.inf
    found = found_of(array, "float32", [333])
    assert (found.count, found.nan_count, found.infinite_count) == (998, 1, 1)
    assert (found.least, found.largest) == (0, 999)
    assert found.mean == pytest.approx((999 * 500 - 1400) / 998)


@pytest.mark.parametrize("array", [np.zeros((0, 3)), np.full(4, np.nan), np.full(4, np.inf)])
def test_without_a_finite_value_there_is_neither_least_nor_mean(array):
    found = found_of(array, "float64")
    assert (found.count, found.least, found.largest, found.mean) == (0, None, None, None)
    assert found.nan_count + found.infinite_count == array.size


def test_the_padding_of_a_chunk_does_not_count():
    leaf = LeafSpec(("a",), (5,), "float32")
    *_, last = chunks_of(0, leaf, (3,))
    plan = LayoutPlan((leaf,), ((3,),), (), 4096, 1)
    summing = Summing(plan)
    stored = np.array([8, 9, 0], np.float32).view(np.uint8)
    summing.add(last, stored[: last.data_bytes])
    found = summing.of_leaf(0)
    assert (found.count, found.least) == (2, 8)
