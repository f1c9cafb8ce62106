import sys

import numpy as np
import pytest
from engine_support import assert_same_bits, restore_once, save_once

from stepsave.errors import InvalidStateError
from stepsave.snapshot.arrays import dtype_name, view_on_host


def view(leaf):
    return view_on_host([("group", "leaf")], [leaf])[0]


def test_numpy_arrays_are_viewed_and_not_copied():
    array = np.arange(10.0)[::2]
    assert np.shares_memory(view(array), array)


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (True, "bool"),
        (7, "int64"),
        (-1.5, "float64"),
        (1 + 2j, "complex128"),
        (np.float16(3), "float16"),
        (np.zeros(1, bool)[0], "bool"),
    ],
)
def test_numbers_are_saved_as_scalars(tmp_path, number, dtype):
    assert view(number).shape == ()
    assert dtype_name((), view(number)) == dtype
    save_once(tmp_path, {"n": number})
    assert_same_bits(restore_once(tmp_path).state, {"n": np.asarray(number)})


@pytest.mark.parametrize("leaf", ["text", b"bytes", None, object(), {1, 2}, [1.0], range(3)])
def test_what_is_no_array_is_refused_with_its_place(leaf):
    with pytest.raises(InvalidStateError, match=f"'group/leaf'.*{type(leaf).__name__}"):
        view(leaf)


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a", "b"]),
        np.array([1, None], object),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.zeros(2, [("x", "f4")]),
        np.zeros(2, ">f4"),
        np.zeros(2, np.longdouble),
        np.array(2**70),
    ],
    ids=lambda array: str(array.dtype),
)
def test_a_dtype_that_cannot_be_saved_is_refused_with_its_place(tmp_path, array):
    with pytest.raises(InvalidStateError, match=r"'group/leaf'.*cannot be saved"):
        save_once(tmp_path, {"group": {"leaf": array}})


def test_numpy_arrays_import_no_backend():
    before = {"jax", "torch", "tensorflow"} & set(sys.modules)
    view(np.zeros(3))
    assert {"jax", "torch", "tensorflow"} & set(sys.modules) == before


def test_of_several_leaves_the_bad_one_is_named():
    paths = [("a",), ("b",), ("c",)]
    with pytest.raises(InvalidStateError, match="'b'"):
        view_on_host(paths, [np.zeros(1), "bad", np.zeros(1)])
