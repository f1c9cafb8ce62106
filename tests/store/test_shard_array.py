import re
import shutil

import numpy as np
import pytest
from engine_support import SMALL_SHARDS, check_python, run_python

from stepsave.format import orbax
from stepsave.format.planning import compile_layout
from stepsave.format.records import LeafSpec
from stepsave.store.local import LocalStore
from stepsave.store.shard_array import ShardArray


@pytest.fixture
def made(tmp_path, small_shards):  # noqa: ARG001
    store = LocalStore(tmp_path)
    plan = compile_layout([LeafSpec(("a",), (200_000,), "uint8")])
    for path, data in orbax.constant_files(plan).items():
        (tmp_path / "spare" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "spare" / path).write_bytes(data)
    return store, plan


def test_a_shard_is_the_file_with_these_very_bytes(made):
    store, plan = made
    array = ShardArray(store, "spare", plan)
    assert plan.shard_count > 1
    for number in reversed(range(plan.shard_count)):
        array.write(number, np.full(plan.shard_bytes, number + 1, np.uint8))
    for number in range(plan.shard_count):
        data = store.read(f"spare/{orbax.shard_path(number)}", 1 << 20)
        assert data == bytes([number + 1]) * plan.shard_bytes
    assert store.list("spare/pytree/d/c") == [str(n) for n in range(plan.shard_count)]


WRITE_ONE = (
    SMALL_SHARDS
    + """
import sys
import numpy as np
from stepsave.format.planning import compile_layout
from stepsave.format.records import LeafSpec
from stepsave.store.local import LocalStore
from stepsave.store.shard_array import ShardArray
plan = compile_layout([LeafSpec(("a",), (200_000,), "uint8")])
array = ShardArray(LocalStore(sys.argv[1]), "spare", plan)
array.write(0, np.full(plan.shard_bytes, 7, np.uint8))
"""
)


def test_a_shard_is_synced_before_it_gets_its_name(made, tmp_path):
    """tensorstore's own calls of the system, which no patch of Python's sees."""
    calls = tmp_path / "calls"
    trace = ["strace", "-f", "-y", "-o", calls, "-e", "trace=fsync,fdatasync,rename,renameat"]
    if shutil.which("strace") is None or run_python("", prefix=trace).returncode:
        pytest.skip("there is no strace here, or it may not look")
    store, plan = made
    check_python(WRITE_ONE, tmp_path, prefix=trace)
    shard = f"spare/{orbax.shard_path(0)}"
    assert store.read(shard, 1 << 20) == b"\x07" * plan.shard_bytes
    lines = [line for line in calls.read_text().splitlines() if "pytree/d/c" in line]
    done = [re.search(r"(f(?:data)?sync|rename\w*)\(", line)[1] for line in lines]
    named = next(i for i, name in enumerate(done) if name.startswith("rename"))
    assert any(name in ("fsync", "fdatasync") for name in done[:named]), lines
    assert any(name == "fsync" for name in done[named + 1 :]), lines
