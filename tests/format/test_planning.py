import collections
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_support import chunk_limit, leaf_lists, limits, shapes, spread_leaves

from stepsave.errors import InvalidStateError
from stepsave.format import planning
from stepsave.format.layout import decode_layout, encode_layout
from stepsave.format.planning import Spread, compile_layout, deal_layout
from stepsave.format.records import DTYPES, LeafSpec


def check_places(plan):
    assert plan.shard_bytes % 4096 == 0
    end = 0
    for chunk in sorted(plan.chunks, key=lambda chunk: chunk.offset_bytes):
        assert chunk.offset_bytes >= end
        assert chunk.offset_bytes % 64 == 0
        end = chunk.offset_bytes + chunk.stored_bytes + 4
        assert chunk.offset_bytes // plan.shard_bytes == (end - 1) // plan.shard_bytes
    assert end <= plan.arena_bytes


@given(leaf_lists, limits)
def test_no_two_chunks_overlap_and_none_crosses_a_shard(leaves, limit_bytes):
    with chunk_limit(limit_bytes):
        check_places(compile_layout(leaves))


@given(shapes, st.sampled_from(["uint8", "float32", "complex128"]), limits)
def test_each_chunk_is_the_run_of_bytes_that_zarr_puts_there(shape, dtype, limit_bytes):
    leaf = LeafSpec(("w",), shape, dtype)
    with chunk_limit(limit_bytes):
        plan = compile_layout([leaf])
    array = np.arange(math.prod(shape)).astype(DTYPES[dtype]).reshape(shape)
    data, seen = array.tobytes(), 0
    (chunk_shape,) = plan.chunk_shapes
    for chunk in plan.chunks:
        run = data[chunk.source_bytes : chunk.source_bytes + chunk.data_bytes]
        assert array[index_of(chunk, chunk_shape)].tobytes() == run
        assert chunk.stored_bytes == math.prod(chunk_shape) * array.itemsize
        seen += chunk.data_bytes
    assert seen == array.nbytes


def index_of(chunk, chunk_shape):
    return tuple(
        slice(i * size, (i + 1) * size) for i, size in zip(chunk.grid, chunk_shape, strict=True)
    )


@given(leaf_lists, limits)
def test_no_chunk_is_larger_than_the_limit(leaves, limit_bytes):
    with chunk_limit(limit_bytes):
        plan = compile_layout(leaves)
    assert max((chunk.stored_bytes for chunk in plan.chunks), default=0) <= limit_bytes


@given(spread_leaves(), st.sampled_from([64, 256, 1024]))
def test_processes_together_capture_every_byte_once_and_each_only_what_it_has(spread, limit_bytes):
    leaves, spreads, count = spread
    with chunk_limit(limit_bytes):
        deal = deal_layout(leaves, spreads, count)
        assert deal_layout(leaves, spreads, count) == deal, "all processes must find the same"
    plan = deal.plan
    check_places(plan)
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 100, leaf.shape).astype(DTYPES[leaf.dtype]).reshape(leaf.shape)
        for leaf in leaves
    ]
    image = np.zeros(plan.arena_bytes, np.uint8)
    for process in range(count):
        share = deal.share(process)
        check_places(share.plan)
        first = share.shards.start * plan.shard_bytes
        for chunk in share.plan.chunks:
            part = of_share(share, chunk, arrays, deal)
            holders = deal.spreads[part[1].leaf].holders[part[1].block]
            assert process in holders
            data = part[0][chunk.source_bytes : chunk.source_bytes + chunk.data_bytes]
            at = first + chunk.offset_bytes
            assert not image[at : at + chunk.data_bytes].any()
            image[at : at + chunk.data_bytes] = data
    found = decode_layout(encode_layout(plan), "here")
    for chunk in found.chunks:
        shape = found.chunk_shapes[chunk.leaf]
        want = arrays[chunk.leaf][index_of(chunk, shape)].tobytes()
        assert image[chunk.offset_bytes : chunk.offset_bytes + chunk.data_bytes].tobytes() == want
        assert len(want) == chunk.data_bytes


def of_share(share, chunk, arrays, deal):
    """The bytes of the part that has a chunk, and the part."""
    if share.parts is None:
        part = planning.Part(chunk.leaf, (0,) * arrays[chunk.leaf].ndim, None)
    else:
        part = share.parts[chunk.leaf]
    block_shape = deal.spreads[part.leaf].block_shape
    block = arrays[part.leaf][
        tuple(slice(i * n, (i + 1) * n) for i, n in zip(part.block, block_shape, strict=True))
    ]
    array = block if part.cut is None else block[part.cut]
    if share.parts is not None:
        assert array.shape == share.plan.leaves[chunk.leaf].shape
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8), part


def test_a_replicated_state_is_shared_out_equally():
    leaves = [LeafSpec((f"w{i}",), (1000, 1000), "float32") for i in range(20)]
    leaves += [LeafSpec((f"b{i}",), (1000,), "float32") for i in range(20)]
    all_have = [Spread(leaf.shape, {(0,) * len(leaf.shape): (0, 1, 2, 3)}) for leaf in leaves]
    deal = deal_layout(leaves, all_have, 4)
    loads = [deal.share(process).plan.state_bytes for process in range(4)]
    assert sum(loads) == deal.plan.state_bytes
    assert max(loads) < 1.07 * min(loads)
    assert deal.plan.arena_bytes < 1.1 * deal.plan.state_bytes


def test_what_few_have_is_dealt_first_so_that_the_others_make_up_for_it():
    alone = [LeafSpec((f"a{i}",), (1 << 20,), "float32") for i in range(6)]
    shared = [LeafSpec((f"s{i}",), (1 << 20,), "float32") for i in range(6)]
    spreads = [None] * 6 + [Spread((1 << 20,), {(0,): (0, 1)})] * 6
    deal = deal_layout([*alone, *shared], spreads, 2)
    assert [deal.share(process).plan.state_bytes for process in (0, 1)] == [6 << 22, 6 << 22]


def test_chunks_end_where_blocks_do_even_where_few_numbers_divide_them():
    leaf = LeafSpec(("w",), (2 * 50_261, 1024), "float32")  # a prime number of rows per process
    deal = deal_layout([leaf], [Spread((50_261, 1024), {(0, 0): (0,), (1, 0): (1,)})], 2)
    assert deal.plan.chunk_shapes == ((50_261, 1024),), "rather than 50 261 chunks"
    even = LeafSpec(("w",), (2 * 50_400, 1024), "float32")
    deal = deal_layout([even], [Spread((50_400, 1024), {(0, 0): (0,), (1, 0): (1,)})], 2)
    rows, _ = deal.plan.chunk_shapes[0]
    assert 50_400 % rows == 0
    assert rows * 4096 <= planning.CHUNK_LIMIT_BYTES


def test_processes_may_be_more_than_chunks():
    leaf = LeafSpec(("w",), (10,), "float32")
    deal = deal_layout([leaf], [Spread((10,), {(0,): (0, 1, 2)})], 3)
    shares = [deal.share(process) for process in range(3)]
    assert collections.Counter(len(share.shards) for share in shares) == {1: 1, 0: 2}
    assert all(share.plan.shard_count == 1 for share in shares), "an arena of at least a page"


def test_shards_are_balanced():
    leaves = [LeafSpec((f"w{i}",), (1 << 18,), "float32") for i in range(300)]  # 300 x 1 MiB
    plan = compile_layout(leaves)
    assert plan.shard_count == 5
    assert plan.arena_bytes < plan.state_bytes * 1.05


def test_a_leaf_larger_than_a_shard_is_cut_along_its_first_axis():
    plan = compile_layout([LeafSpec(("w",), (100, 1 << 20), "float32")])  # 400 MiB
    assert plan.shard_count > 1
    assert plan.chunk_shapes[0][1] == 1 << 20
    assert plan.state_bytes <= plan.arena_bytes < plan.state_bytes * 1.2


def test_an_empty_state_has_one_shard_of_one_page():
    plan = compile_layout([])
    assert (plan.shard_count, plan.shard_bytes, plan.chunks) == (1, 4096, ())
    deal = deal_layout([], [], 2)
    assert [len(deal.share(process).shards) for process in (0, 1)] == [1, 0]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([("a", "b"), ("a.b",)], "would both be stored as 'a.b'"),
        ([("a", "")], "empty"),
        ([("",)], "empty"),
        ([("ü" * 2049,)], "4096 bytes"),
    ],
)
def test_names_that_cannot_be_stored_are_refused(paths, message):
    with pytest.raises(InvalidStateError, match=message):
        compile_layout([LeafSpec(path, (), "int8") for path in paths])
