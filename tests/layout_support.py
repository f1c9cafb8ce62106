"""States to lay out, and small limits by which they have many chunks."""

import contextlib
import math

import pytest
from hypothesis import strategies as st

from stepsave.format import planning
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
