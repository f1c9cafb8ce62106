import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepsave.errors import CorruptBackupError, InvalidStateError
from stepsave.format.packing import TAG, pack, unpack

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.just(TAG), inner, max_size=4)
    ),
    max_leaves=15,
)


@given(values)
def test_what_is_packed_survives_json_with_its_types(value):
    text = json.dumps(pack(value), allow_nan=False)
    found = unpack(json.loads(text))
    assert found == value
    assert repr(found) == repr(value)


ARRAYS = [
    np.arange(6, dtype=np.uint32).reshape(2, 3),
    np.zeros((0, 3), np.float64),
    np.array(3.5, np.float16),
    np.array([1.5, -2], ml_dtypes.bfloat16),
    np.arange(12).reshape(3, 4)[:, ::2],
    np.array([1, 2], ">i4"),
    np.array(["a", "long"]),
    np.array([b"a", b"long"]),
    np.array(["2026-11-30"], "datetime64[D]"),
    np.array([1, 2], np.longdouble),
]


@pytest.mark.parametrize("array", ARRAYS, ids=str)
@pytest.mark.parametrize("beside", [True, False])
def test_arrays_keep_dtype_shape_and_bits(array, beside):
    arrays = [] if beside else None
    document = json.loads(json.dumps(pack({"a": [array]}, arrays)))
    found = unpack(document, arrays or ())["a"][0]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()


def test_an_array_of_records_is_refused_with_what_to_do():
    records = np.zeros(2, [("a", "i4"), ("b", "f8")])
    with pytest.raises(InvalidStateError, match=r"expected an array of numbers, texts or bytes"):
        pack(records)


def test_numbers_that_are_not_finite_and_scalars_come_back():
    found = unpack(pack([math.nan, math.inf, -math.inf, np.float32(1.5)]))
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, -math.inf, 1.5]
    assert type(found[3]) is np.float32


@pytest.mark.parametrize(
    "wrong",
    [object(), {1, 2}, np.array([object()]), 1j, print, np.zeros(2, [("a", "i4"), ("b", "f8")])],
)
def test_what_cannot_be_packed_is_refused_and_named(wrong):
    with pytest.raises(InvalidStateError, match=r"state of X\['a'\]\[1\].*found"):
        pack({"a": [0, wrong]}, where="state of X")


@pytest.mark.parametrize(
    "document",
    [
        {TAG: ["what"]},
        {TAG: []},
        {TAG: ["array", "float32", [2], "AAAA"]},
        {TAG: ["array", "object", [1], "AAAAAAAAAAA="]},
        {TAG: ["array", "int16,", [1], "AAA="]},
        {TAG: ["array beside", 3]},
        {TAG: ["bytes", "%"]},
        {TAG: ["tuple", 3]},
        {TAG: 5},
    ],
)
def test_what_was_not_packed_is_refused(document):
    with pytest.raises(CorruptBackupError):
        unpack({"a": document})
