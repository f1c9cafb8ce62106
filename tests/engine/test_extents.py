"""What a process reads that needs parts of arrays: these, and what proves them."""

import contextlib

import numpy as np
import pytest
from engine_support import assert_same_bits, flip_bit
from hypothesis import given
from hypothesis import strategies as st

import stepsave
from stepsave.engine import extents
from stepsave.engine.extents import Extents, Needs
from stepsave.errors import CorruptBackupError
from stepsave.format import planning
from stepsave.format.planning import compile_layout
from stepsave.format.records import LeafSpec
from stepsave.store.local import LocalStore

WIDE = np.arange(4096 * 64, dtype="float32").reshape(4096, 64)  # 1 MiB, in chunks of 16 KiB
pytestmark = pytest.mark.usefixtures("small_shards")

STATE = {"wide": WIDE, "flat": np.arange(5000.0), "b": np.float32(3)}


def needs(rows):
    return Needs(lambda _: {("wide",): [(slice(*some), slice(0, 64)) for some in rows]})


@contextlib.contextmanager
def counted(monkeypatch):
    """How many bytes of shards are read."""
    real, read = LocalStore.read_into, []

    def read_into(self, path, size_bytes, pieces, *more):
        pieces = list(pieces)
        read.extend(len(memory) for _, memory in pieces)
        real(self, path, size_bytes, pieces, *more)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "read_into", read_into)
        yield read


@pytest.mark.parametrize("rows", [[(0, 1)], [(1000, 1600)], [(0, 10), (4000, 4096)]])
def test_only_the_parts_that_are_needed_are_read_and_they_are_right(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(extents, "_BRIDGE_BYTES", 0)
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(1, STATE).wait()
        with counted(monkeypatch) as read:
            found = saver.restore_leaves(needs(rows))
        arrays = dict(zip(found.flat.paths, found.flat.leaves, strict=True))
        needed = sum(end - begin for begin, end in rows) * 256 + 40_000
        assert sum(read) < needed + (200 << 10), "and a page for the checksum of each chunk"
        for begin, end in rows:
            part = arrays["wide",][slice(begin, end), slice(0, 64)]
            assert_same_bits(part, WIDE[begin:end])
        assert_same_bits(np.asarray(arrays["flat",]), STATE["flat"])
        with pytest.raises(KeyError):
            np.asarray(arrays["wide",])
        del found, arrays, part
        saver.save(2, STATE).wait()  # what was read into is too small for an arena
        assert_same_bits(saver.restore().state, {**STATE, "b": np.asarray(STATE["b"])})


@pytest.mark.parametrize("row", [0, 700, 1400, 4095])
def test_a_flipped_bit_is_found_where_it_is_read(tmp_path, monkeypatch, row):
    monkeypatch.setattr(extents, "_BRIDGE_BYTES", 0)
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(1, STATE).wait()
        place = WIDE[row].tobytes()
        (shard,) = [p for p in tmp_path.glob("1/pytree/d/c/*") if place in p.read_bytes()]
        flip_bit(shard, shard.read_bytes().index(place))
        with pytest.raises(CorruptBackupError, match="'wide'"):
            saver.restore_leaves(needs([(row, row + 1)]))
        other = 2000
        found = saver.restore_leaves(needs([(other, other + 1)]))
        wide = dict(zip(found.flat.paths, found.flat.leaves, strict=True))["wide",]
        assert_same_bits(wide[slice(other, other + 1), slice(0, 64)], WIDE[other : other + 1])


def test_a_shard_of_another_save_is_found_by_the_checksums_of_what_is_not_needed(tmp_path):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        saver.save(1, STATE).wait()
        changed = {**STATE, "wide": WIDE.copy()}
        changed["wide"][1:] += 1  # all chunks but for their first row
        saver.save(2, changed).wait()
        old = {path.name: path.read_bytes() for path in tmp_path.glob("1/pytree/d/c/*")}
        for path in tmp_path.glob("2/pytree/d/c/*"):
            path.write_bytes(old[path.name])
        with pytest.warns(UserWarning, match="a shard of another save"):
            assert saver.restore_leaves(needs([(0, 1)])).step == 1


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 30)), max_size=4))
def test_whatever_is_needed_is_found_and_nothing_overlaps_in_memory(rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "CHUNK_LIMIT_BYTES", 4 << 10)
        patch.setattr(planning, "SHARD_TARGET_BYTES", 64 << 10)
        patch.setattr(extents, "_BRIDGE_BYTES", 8 << 10)
        plan = compile_layout(
            [LeafSpec(("w",), (100, 500), "float32"), LeafSpec(("v",), (300,), "float64")]
        )
        regions = [(slice(begin, min(100, begin + n)), slice(0, 500)) for begin, n in rows]
        chosen = Extents(plan, {("w",): regions})
    (w_rows, _), _ = plan.chunk_shapes
    at = 0
    for number in range(plan.shard_count):
        for extent in chosen.of_shard(number):
            assert extent.memory_bytes == at
            at += extent.end_bytes - extent.begin_bytes
            assert extent.begin_bytes % 4096 == extent.end_bytes % 4096 == 0
            assert extent.end_bytes <= plan.shard_bytes
    assert at == chosen.size_bytes
    for chunk in plan.chunks:
        low, high = chunk.grid[0] * w_rows, (chunk.grid[0] + 1) * w_rows
        needed = chunk.leaf == 1 or any(r.start < high and low < r.stop for r, _ in regions)
        found = chosen.find(chunk.offset_bytes, chunk.stored_bytes)
        assert found is not None or not needed
        is_read = bool(chosen.of_shard(chunk.offset_bytes // plan.shard_bytes))
        seal = chosen.find(chunk.offset_bytes + chunk.stored_bytes, 4)
        assert (seal is not None) == is_read


@pytest.mark.parametrize("rows", [None, [(1000, 1600)]])
def test_who_waits_is_told_how_much_is_read_of_what_is_needed(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(extents, "_BRIDGE_BYTES", 0)
    told = []
    regions = None if rows is None else needs(rows).regions
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(1, STATE).wait()
        with counted(monkeypatch) as read:
            saver.restore_leaves(Needs(regions, lambda *sizes: told.append(sizes)))
    assert told[0] == (0, sum(read))
    assert told[-1] == (sum(read), sum(read))
    assert len(told) == 1 + len(read), "once per piece"
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert sum(read) < (sum(array.nbytes for array in STATE.values()) if rows else np.inf)
