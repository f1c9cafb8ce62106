import dataclasses

import numpy as np
import pytest
import tensorstore as ts

from stepsave.format.records import DTYPES, ChunkSpec, LayoutPlan, LeafSpec


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_one_that_tensorstore_calls_by_this_name(name):
    assert ts.dtype(name).numpy_dtype == DTYPES[name]


def test_the_dtypes_include_all_that_keras_variables_have():
    keras = """float16 float32 float64 uint8 uint16 uint32 uint64 int8 int16 int32 int64
        bfloat16 bool float8_e4m3fn float8_e5m2 complex64 complex128 int4"""
    assert set(keras.split()) <= set(DTYPES)


def test_a_leaf_knows_its_name_and_size():
    leaf = LeafSpec(("a", "b.c"), (3, 4), "bfloat16")
    assert (leaf.name, leaf.itemsize_bytes, leaf.size_bytes) == ("a.b.c", 2, 24)
    assert LeafSpec(("s",), (), "complex128").size_bytes == 16
    assert LeafSpec(("e",), (5, 0), "float32").size_bytes == 0
    assert LeafSpec(("big",), (1 << 20, 1 << 20, 1 << 20), "float64").size_bytes == 1 << 63


def test_a_plan_sorts_its_chunks_by_shard():
    leaf = LeafSpec(("a",), (2048,), "float32")
    chunks = tuple(ChunkSpec(0, (i,), i * 4096, 4096, 4096, at) for i, at in enumerate((8192, 0)))
    plan = LayoutPlan((leaf,), ((1024,),), chunks, 8192, 2)
    assert plan.shard_chunks == ((chunks[1],), (chunks[0],))
    assert (plan.arena_bytes, plan.state_bytes) == (16384, 8192)


def test_records_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LeafSpec(("a",), (), "int8").shape = (1,)


def test_numpy_sees_one_byte_per_element_below_eight_bits():
    small = [name for name in DTYPES if name.startswith(("int2", "int4", "float4"))]
    assert small
    assert all(np.empty(3, DTYPES[name]).nbytes == 3 for name in small)
