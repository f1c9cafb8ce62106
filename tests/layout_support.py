"""States to lay out, and small limits by which they have many chunks."""

import contextlib
import itertools
import math

import pytest
from hypothesis import strategies as st

from stepsave.format import planning
from stepsave.format.planning import Spread
from stepsave.format.records import DTYPES, LeafSpec

shapes = st.lists(st.integers(0, 40), max_size=4).map(tuple).filter(lambda s: math.prod(s) < 5000)
leaf_lists = st.lists(st.tuples(shapes, st.sampled_from(sorted(DTYPES))), max_size=6).map(
    lambda specs: [LeafSpec((f"w{i}",), *spec) for i, spec in enumerate(specs)]
)
limits = st.sampled_from([1 << 8, 1 << 10, 1 << 12])


@contextlib.contextmanager
def chunk_limit(limit_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "CHUNK_LIMIT_BYTES", limit_bytes)
        patch.setattr(planning, "SHARD_TARGET_BYTES", 4 * limit_bytes)
        yield


@st.composite
def spread_leaves(draw):
    """Arrays in blocks, each of which some processes have; and how many processes there are."""
    count = draw(st.integers(1, 4))
    leaves, spreads = [], []
    for i in range(draw(st.integers(0, 5))):
        block = draw(st.lists(st.integers(0, 9), max_size=3).map(tuple))
        cuts = draw(st.tuples(*[st.integers(1, 3) for _ in block]))
        shape = tuple(size * cut for size, cut in zip(block, cuts, strict=True))
        if draw(st.integers(0, 3)) == 0:
            spreads.append(None)
        else:
            some = st.sets(st.integers(0, count - 1), min_size=1)
            places = itertools.product(*map(range, cuts))
            spreads.append(Spread(block, {place: tuple(sorted(draw(some))) for place in places}))
        leaves.append(LeafSpec((f"w{i}",), shape, draw(st.sampled_from(["uint8", "float32"]))))
    return leaves, spreads, count
