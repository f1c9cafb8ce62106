import json

import numpy as np
import pytest
import tensorstore as ts

from stepsave.format import orbax
from stepsave.format.planning import compile_layout
from stepsave.format.records import DTYPES, LeafSpec


def plan_of(*specs):
    return compile_layout([LeafSpec(tuple(name.split(".")), *spec) for name, *spec in specs])


def write_backup(directory, plan, arena):
    for path, data in orbax.constant_files(plan).items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    for number in range(plan.shard_count):
        shard = directory / orbax.shard_path(number)
        shard.parent.mkdir(parents=True, exist_ok=True)
        shard.write_bytes(arena[number * plan.shard_bytes :][: plan.shard_bytes])


@pytest.mark.usefixtures("small_shards")
def test_the_shards_are_one_zarr_array_of_bytes(tmp_path):
    plan = plan_of(("a", (50_000,), "float32"))
    arena = np.random.default_rng(0).bytes(plan.arena_bytes)
    write_backup(tmp_path, plan, arena)
    spec = {"driver": "zarr3", "kvstore": f"file://{tmp_path}/pytree/d/"}
    array = ts.open(spec).result()
    assert plan.shard_count > 1
    assert (array.shape, array.chunk_layout.read_chunk.shape) == (
        (plan.arena_bytes,),
        (plan.shard_bytes,),
    )
    assert array.read().result().tobytes() == arena


@pytest.mark.parametrize("dtype", DTYPES)
def test_stock_tensorstore_opens_each_dtype_by_name_and_wants_a_checksum(tmp_path, dtype):
    plan = plan_of(("group.leaf", (3, 5), dtype))
    write_backup(tmp_path, plan, bytes(plan.arena_bytes - 1) + b"\x01")
    base = {"driver": "ocdbt", "base": f"file://{tmp_path}/pytree/", "path": "group.leaf"}
    array = ts.open({"driver": "zarr3", "kvstore": base}).result()
    assert (array.dtype.name, array.shape) == (dtype, (3, 5))
    with pytest.raises(
        ValueError, match="Digest mismatch"
    ):  # zeros, but their checksum is not zero
        array.read().result()


def test_equal_layouts_give_equal_files():
    specs = [("a", (3, 4), "bfloat16"), ("b.c", (), "bool"), ("ü/x", (0,), "int4")]
    assert orbax.constant_files(plan_of(*specs)) == orbax.constant_files(plan_of(*specs))


def test_the_tree_tells_orbax_where_each_leaf_belongs():
    files = orbax.constant_files(plan_of(("a.b", (2, 3), "float32"), ("c", (), "int8")))
    tree = json.loads(files["pytree/_METADATA"])["tree_metadata"]
    assert list(tree) == ["('a', 'b')", "('c',)"]
    assert [key["key"] for key in tree["('a', 'b')"]["key_metadata"]] == ["a", "b"]
    assert tree["('a', 'b')"]["value_metadata"]["write_shape"] == [2, 3]


def test_the_time_of_a_save_is_in_its_metadata():
    document = json.loads(orbax.checkpoint_metadata(["model_config"], 5, 7))
    assert list(document["item_handlers"]) == ["pytree", "model_config"]
    assert (document["init_timestamp_nsecs"], document["commit_timestamp_nsecs"]) == (5, 7)


def test_an_item_of_strings_keeps_them_as_they_are():
    files = orbax.json_item("model_config", {"config": '{"ü": 1}'})
    assert json.loads(files["model_config/_strings.json"]) == {"config": '{"ü": 1}'}
    assert "('config',)" in json.loads(files["model_config/_METADATA"])["tree_metadata"]
