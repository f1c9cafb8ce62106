import numpy as np
import pytest

from stepsave.format import orbax
from stepsave.format.planning import compile_layout
from stepsave.format.records import LeafSpec
from stepsave.store.local import LocalStore
from stepsave.store.shard_array import ShardArray


@pytest.mark.usefixtures("small_shards")
def test_a_shard_is_the_file_with_these_very_bytes(tmp_path):
    store = LocalStore(tmp_path)
    plan = compile_layout([LeafSpec(("a",), (200_000,), "uint8")])
    for path, data in orbax.constant_files(plan).items():
        (tmp_path / "spare" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "spare" / path).write_bytes(data)
    array = ShardArray(store, "spare", plan)
    assert plan.shard_count > 1
    for number in reversed(range(plan.shard_count)):
        array.write(number, np.full(plan.shard_bytes, number + 1, np.uint8))
    for number in range(plan.shard_count):
        data = store.read(f"spare/{orbax.shard_path(number)}", 1 << 20)
        assert data == bytes([number + 1]) * plan.shard_bytes
    assert store.list("spare/pytree/d/c") == [str(n) for n in range(plan.shard_count)]
