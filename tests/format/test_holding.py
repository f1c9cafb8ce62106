"""What one process keeps: all that it has, its shards of a backup of all in front."""

import dataclasses
import itertools
import json

import pytest
from hypothesis import given
from layout_support import chunk_limit, limits, spread_leaves

from stepsave.errors import CorruptBackupError, FormatVersionError
from stepsave.format.holding import (
    Holding,
    decode_holding,
    encode_holding,
    first_chunk,
    hold,
    place_of,
)
from stepsave.format.layout import decode_layout, encode_layout
from stepsave.format.planning import block_of, deal_layout


def holding_of(deal, process):
    first, end = deal.first_shards[process : process + 2]
    return Holding(process, len(deal.first_shards) - 1, first, end - first, "cpu", deal.plan)


def deal_of(case, limit_bytes):
    leaves, spreads, count = case
    with chunk_limit(limit_bytes):
        return leaves, count, deal_layout(leaves, spreads, count)


@given(spread_leaves(), limits)
def test_each_process_keeps_every_chunk_that_it_has_once(case, limit_bytes):
    leaves, count, deal = deal_of(case, limit_bytes)
    for process in range(count):
        plan, share = hold(deal, process)
        assert decode_layout(encode_layout(plan), "plan") == plan
        assert share.plan.chunks == plan.chunks
        assert share.shards == range(plan.shard_count)
        kept = set()
        for chunk in plan.chunks:
            part, spec = share.parts[chunk.leaf], plan.leaves[chunk.leaf]
            assert spec.path[:-1] == leaves[part.leaf].path
            block, _ = place_of(spec.path[-1], len(spec.shape))
            assert block == part.block
            shape = deal.plan.chunk_shapes[part.leaf]
            first = first_chunk(block, shape, spec.shape)
            kept.add((part.leaf, tuple(a + b for a, b in zip(first, chunk.grid, strict=True))))
        had = set()
        for chunk in deal.plan.chunks:
            spread = deal.spreads[chunk.leaf]
            shape = deal.plan.chunk_shapes[chunk.leaf]
            block = block_of(chunk.grid, shape, spread.block_shape)
            is_alone = spread.block_shape == leaves[chunk.leaf].shape
            if process in spread.holders[block] or is_alone:
                had.add((chunk.leaf, chunk.grid))
        assert kept == had
        assert len(plan.chunks) == len(had)
        ends = {
            chunk.offset_bytes: chunk.offset_bytes + chunk.stored_bytes for chunk in plan.chunks
        }
        assert len(ends) == len(plan.chunks)
        offsets = sorted(ends)
        assert all(ends[a] + 4 <= b for a, b in itertools.pairwise(offsets))
        shards = {(a // plan.shard_bytes, (b + 3) // plan.shard_bytes) for a, b in ends.items()}
        assert all(a == b < plan.shard_count for a, b in shards)


@given(spread_leaves(), limits)
def test_the_shards_in_front_are_those_of_a_backup_of_all(case, limit_bytes):
    _, count, deal = deal_of(case, limit_bytes)
    for process in range(count):
        plan, _ = hold(deal, process)
        holding = holding_of(deal, process)
        assert plan.shard_bytes == deal.plan.shard_bytes
        for number in range(holding.shard_count):
            there = holding.first_shard + number
            expected = [
                (deal.plan.leaves[c.leaf].path, c.offset_bytes - there * plan.shard_bytes)
                for c in deal.plan.shard_chunks[there]
            ]
            found = [
                (plan.leaves[c.leaf].path[:-1], c.offset_bytes - number * plan.shard_bytes)
                for c in plan.shard_chunks[number]
            ]
            assert sorted(found) == sorted(expected)


@given(spread_leaves())
def test_what_is_kept_says_what_of(case):
    leaves, spreads, count = case
    deal = deal_layout(leaves, spreads, count)
    holding = holding_of(deal, count - 1)
    found = decode_holding(encode_holding(holding), "holding.json")
    assert encode_holding(found) == encode_holding(holding)
    assert dataclasses.replace(found, plan=holding.plan) == holding


@pytest.mark.parametrize(
    "change",
    [
        {"format": 0},
        {"format": "1"},
        {"process": 2},
        {"process": -1},
        {"process": "0"},
        {"first_shard": 9},
        {"shard_count": -1},
        {"shard_count": None},
        {"device": 1},
        {"layout": 1},
        {"processes": True},
    ],
)
def test_a_part_that_cannot_be_is_refused(change):
    deal = deal_layout([], None, 2)
    holding = dataclasses.replace(holding_of(deal, 0))
    document = json.loads(encode_holding(holding)) | change
    with pytest.raises(CorruptBackupError, match=r"^holding\.json: (desc|malf|expected a layout)"):
        decode_holding(json.dumps(document).encode(), "holding.json")
    del document["layout"]
    with pytest.raises(CorruptBackupError, match=r"^holding\.json: malformed: KeyError"):
        decode_holding(json.dumps(document).encode(), "holding.json")


@pytest.mark.parametrize("name", ["", "0 of 0", "2 of 2", "0.0 of 1", "1", "0 of 1 of 1", "Whole"])
def test_a_name_that_is_no_place_is_refused(name):
    with pytest.raises(ValueError, match="no place"):
        place_of(name, 1)


def test_a_part_of_a_future_format_is_refused_with_both_versions():
    deal = deal_layout([], None, 2)
    document = json.loads(encode_holding(holding_of(deal, 0)))
    for newer in (
        document | {"format": 2},
        document | {"layout": document["layout"] | {"format": 3}},
    ):
        with pytest.raises(FormatVersionError, match=r"^holding\.json: .*newer stepsave"):
            decode_holding(json.dumps(newer).encode(), "holding.json")
