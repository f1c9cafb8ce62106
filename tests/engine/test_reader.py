import collections
import json
import os
import re

import numpy as np
import pytest
from engine_support import assert_same_bits, change_json, random_array, restore_once, save_once

import stepsave
from stepsave.format.records import DTYPES

WRITERS = ["auto", "tensorstore"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (5,), (3, 1, 7), (40, 60)], ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, writer, shape):
    state = {name: random_array(shape, name, seed=i) for i, name in enumerate(DTYPES)}
    save_once(tmp_path, state, writer=writer)
    assert_same_bits(restore_once(tmp_path).state, state)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.usefixtures("small_shards")
def test_arrays_larger_than_a_shard_come_back(tmp_path, writer):
    state = {
        "rows": random_array((1000, 70), "float32"),
        "columns": random_array((1, 300_000), "uint8"),
        "rows too long for a chunk": random_array((3, 5, 9000), "int16"),
        "transposed": random_array((500, 300), "bfloat16").T,
        "small": random_array((3,), "bool"),
    }
    save_once(tmp_path, state, writer=writer)
    assert len(os.listdir(tmp_path / "1/pytree/d/c")) > 5
    assert_same_bits(restore_once(tmp_path).state, state)


@pytest.mark.parametrize("writer", WRITERS)
def test_an_array_larger_than_a_real_shard_comes_back(tmp_path, writer):
    state = {"a": random_array((70, 1 << 20), "uint8"), "b": random_array((3,), "float64")}
    save_once(tmp_path, state, writer=writer)
    assert len(os.listdir(tmp_path / "1/pytree/d/c")) == 2
    assert_same_bits(restore_once(tmp_path).state, state)


def test_ten_thousand_small_arrays_come_back(tmp_path):
    state = {
        f"layer{i}": {name: random_array((i % 7,), name, seed=i) for name in ("float32", "int8")}
        for i in range(5000)
    }
    save_once(tmp_path, state)
    assert_same_bits(restore_once(tmp_path).state, state)


@pytest.mark.parametrize(
    "state",
    [{}, {"e": np.zeros(0)}, {"a": {"b": np.zeros((3, 0, 5), np.int8)}}],
    ids=["no arrays", "one empty array", "no bytes"],
)
def test_a_state_without_any_bytes_comes_back(tmp_path, state):
    save_once(tmp_path, state, step=3, metadata={"epoch": 1})
    backup = restore_once(tmp_path)
    assert_same_bits(backup.state, state)
    assert (backup.step, backup.metadata) == (3, {"epoch": 1})


def test_odd_names_come_back_in_their_order(tmp_path):
    names = [
        "z",
        "ünï",
        "a/b",
        "/a",
        "a b",
        "日本",
        "..",
        ".",
        "c/0",
        "zarr.json",
        "a\0b",
        '"',
        "🎉",
    ]
    state = {"top": {name: random_array((5,), "int16", seed=i) for i, name in enumerate(names)}}
    save_once(tmp_path, state)
    assert_same_bits(restore_once(tmp_path).state, state)


def test_a_name_that_is_no_text_is_refused_as_a_state_error(tmp_path):
    with pytest.raises(stepsave.InvalidStateError, match="its name is not valid Unicode"):
        save_once(tmp_path, {"\ud800": np.zeros(3)})


def test_restored_arrays_may_be_changed_without_harm(tmp_path):
    save_once(tmp_path, {"a": np.arange(5), "b": np.arange(5)})
    with stepsave.Checkpointer(tmp_path) as saver:
        first = saver.restore()
        first.state["a"][:] = 9
        assert (first.state["b"] == np.arange(5)).all()
        assert (saver.restore().state["a"] == np.arange(5)).all()


def test_metadata_comes_back_as_json_keeps_it(tmp_path):
    metadata = {"epoch": 3, "nested": {"ü": [1, 2.5, None, True, "x"]}, "big": 2**70, "t": (1, 2)}
    save_once(tmp_path, {"a": np.zeros(1)}, metadata=metadata)
    assert restore_once(tmp_path).metadata == {**metadata, "t": [1, 2]}


Moments = collections.namedtuple("Moments", "count mu nu")  # noqa: PYI024  as optax has them


@pytest.mark.parametrize("writer", WRITERS)
def test_containers_none_and_numbers_come_back_as_they_were(tmp_path, writer):
    array = random_array((3, 5), "bfloat16")
    state = {
        "list": [array, [array], []],
        "tuple": (array, (), None),
        "integers as keys": {3: array, -1: {"a": {}}, "x": None},
        "numbers": {"b": True, "i": -(2**63), "f": 0.1, "c": 1 - 2j, "large": 2**64 - 1},
        "numpy's number": np.float32(3),
        "empty": {},
    }
    save_once(tmp_path, state, step=7, metadata={"structure": "mine"}, writer=writer)
    backup = restore_once(tmp_path)
    assert_same_bits(backup.state, state)
    assert (backup.step, backup.metadata) == (7, {"structure": "mine"})


@pytest.mark.parametrize("state", [[np.arange(3)], (np.arange(3), {"a": None}), [], (), {}])
def test_a_state_may_be_any_container(tmp_path, state):
    save_once(tmp_path, state)
    assert_same_bits(restore_once(tmp_path).state, state)


def test_a_structure_that_changes_between_saves_is_told_with_each(tmp_path):
    states = [{"a": [np.zeros(3)]}, {"a": (np.ones(3),)}, {"a": {"0": np.ones(3)}}, {"a": {0: 1}}]
    with stepsave.Checkpointer(tmp_path) as saver:
        for step, state in enumerate(states * 2):
            saver.save(step, state)
            assert_same_bits(saver.restore().state, state)


def test_a_torch_optimizer_goes_on_from_what_came_back(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2)

    def train(model, optimizer, steps):
        for step in range(steps):
            optimizer.zero_grad()
            model(torch.full((4, 3), float(step))).square().sum().backward()
            optimizer.step()

    def make(model):
        return torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9), foreach=False)

    optimizer = make(model)
    train(model, optimizer, 3)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_once(tmp_path, state)
    found = restore_once(tmp_path).state
    groups = found["optimizer"]["param_groups"]
    assert groups == state["optimizer"]["param_groups"]
    assert [list(map(type, group.values())) for group in groups] == [
        list(map(type, group.values())) for group in state["optimizer"]["param_groups"]
    ]
    assert list(found["optimizer"]["state"]) == [0, 1]
    again = torch.nn.Linear(3, 2)
    again.load_state_dict({key: torch.from_numpy(a) for key, a in found["model"].items()})
    slots = found["optimizer"]["state"]
    for slot in slots.values():
        slot.update({key: torch.from_numpy(array) for key, array in slot.items()})
    resumed = make(again)
    resumed.load_state_dict(found["optimizer"])
    train(model, optimizer, 2)
    train(again, resumed, 2)
    for one, other in zip(again.parameters(), model.parameters(), strict=True):
        assert_same_bits(one.detach().numpy(), other.detach().numpy())


def test_what_jax_knows_comes_back_as_dicts_and_key_data(tmp_path):
    jax = pytest.importorskip("jax")
    import dataclasses

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class TrainState:
        params: dict
        opt_state: tuple
        key: jax.Array
        name: str = dataclasses.field(metadata={"static": True}, default="mine")

    count = jax.numpy.int32(3)
    moments = Moments(count, {"w": jax.numpy.ones(4)}, None)
    keys = jax.random.split(jax.random.key(5, impl="rbg"), 3)
    save_once(tmp_path, TrainState({"w": jax.numpy.zeros(4)}, (moments,), keys))
    expected = {
        "params": {"w": np.zeros(4, np.float32)},
        "opt_state": ({"count": np.int32(3), "mu": {"w": np.ones(4, np.float32)}, "nu": None},),
        "key": np.asarray(jax.random.key_data(keys)),
    }
    assert_same_bits(restore_once(tmp_path).state, expected)
    training = json.loads((tmp_path / "1/training.json").read_text())
    assert [["key"], "prng_key", "rbg"] in training["structure"]["notes"]


def test_a_container_without_names_or_that_nobody_knows_is_refused_with_its_place(tmp_path):
    jax = pytest.importorskip("jax")

    class Unnamed:
        pass

    class Unknown:
        pass

    jax.tree_util.register_pytree_node(Unnamed, lambda _: ((1,), None), lambda _, __: Unnamed())
    with stepsave.Checkpointer(tmp_path) as saver:
        with pytest.raises(stepsave.InvalidStateError, match=r"'a/0'.*Unnamed.*without names"):
            saver.save(1, {"a": [Unnamed()]})
        with pytest.raises(
            stepsave.InvalidStateError, match="Python has or JAX knows, found Unknown"
        ):
            saver.save(1, {"a": [Unknown()]})
        saver.save(1, {"a": [1]}).wait()
    assert_same_bits(restore_once(tmp_path).state, {"a": [1]})


def test_a_nested_dict_of_arrays_has_no_structure_beside_it(tmp_path):
    state = {"a": {"b": np.arange(3)}, "c": np.int64(1)}
    save_once(tmp_path, state)
    training = json.loads((tmp_path / "1/training.json").read_text())
    assert training == {"format": 1, "step": 1, "metadata": {}}
    assert_same_bits(restore_once(tmp_path).state, state)


def test_who_does_not_know_of_structures_reads_nested_dicts(tmp_path):
    """As 0.1.0 did, and stock readers do."""
    save_once(tmp_path, {"a": [np.arange(3), {7: 2.5}], "b": None})
    change_json(tmp_path, "training.json", lambda document: document.pop("structure") and document)
    expected = {"a": {"0": np.arange(3), "1": {"7": np.float64(2.5)}}}
    assert_same_bits(restore_once(tmp_path).state, expected)


@pytest.mark.parametrize(
    ("structure", "error"),
    [
        ({"version": 2}, stepsave.FormatVersionError),
        ({"version": 1, "notes": [[["a"], "tuple", 10**9]]}, stepsave.CorruptBackupError),
        ({"version": 1, "notes": [[["a"]]]}, stepsave.CorruptBackupError),
        ("text", stepsave.CorruptBackupError),
        ({"version": 1, "notes": [[["a", "0", "b"], "list", 0]]}, stepsave.CorruptBackupError),
    ],
    ids=repr,
)
def test_a_structure_that_cannot_be_is_refused_naming_its_file(tmp_path, structure, error):
    save_once(tmp_path, {"a": [np.arange(3)]})
    change_json(tmp_path, "training.json", lambda document: document.update(structure=structure))
    with pytest.raises(error, match=re.escape(f"{tmp_path}/1/training.json")):
        restore_once(tmp_path)
