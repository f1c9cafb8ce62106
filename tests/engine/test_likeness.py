import collections
import dataclasses
import re

import numpy as np
import pytest
from engine_support import assert_same_bits, check_python, random_array, save_once

import stepsave

Moments = collections.namedtuple("Moments", "count mu nu")  # noqa: PYI024  as optax has them


def restore_like(directory, like):
    with stepsave.Checkpointer(directory) as saver:
        return saver.restore(like=like)


def test_a_state_comes_back_in_the_structure_of_another(tmp_path):
    def state(fill):
        return {
            "opt": (Moments(np.int32(fill), [np.full(3, fill)], None), Moments(fill, (), {})),
            "ordered": collections.OrderedDict(b=np.full(2, fill), a=float(fill)),
            7: {"flag": fill > 3},
        }

    save_once(tmp_path, state(5), step=4, metadata={"epoch": 1})
    like = state(0)
    backup = restore_like(tmp_path, like)
    assert (backup.step, backup.metadata) == (4, {"epoch": 1})
    assert_same_bits(backup.state, state(5))
    assert type(backup.state["opt"][0]) is Moments
    assert type(backup.state["opt"][0].count) is np.int32
    assert type(backup.state["ordered"]) is collections.OrderedDict
    assert_same_bits(like, state(0))


def test_without_a_backup_there_is_nothing_to_fit(tmp_path):
    assert restore_like(tmp_path, {"a": np.zeros(2)}) is None


def test_what_an_older_stepsave_saved_as_dicts_fits_lists_and_tuples(tmp_path):
    save_once(tmp_path, {"a": {"0": np.arange(3), "1": {"0": np.int64(7)}}})
    found = restore_like(tmp_path, {"a": [np.zeros(3, int), (1,)]}).state
    assert_same_bits(found, {"a": [np.arange(3), (7,)]})


@pytest.mark.parametrize(
    ("like", "told"),
    [
        ({"a": np.zeros(3, np.float32)}, ["'b/0': expected no array, found int64[2]"]),
        (
            {"a": np.zeros(3, np.float32), "b": [np.zeros(2, int)], "c": np.zeros(1)},
            ["'c': expected float64[1], found no array"],
        ),
        (
            {"a": np.zeros((3, 1)), "b": [np.zeros(2, np.int32)]},
            [
                "'a': expected float64[3, 1], found float32[3]",
                "'b/0': expected int32[2], found int64[2]",
            ],
        ),
        (
            {"a": None, "b": [np.zeros(2, int)], "n": 1},
            ["'a': expected no array", "'n': expected a number of type int, found none"],
        ),
        ({"a": 1.0, "b": [np.zeros(2, int)]}, ["'a': expected a number of type float"]),
    ],
    ids=range(5),
)
def test_a_backup_that_does_not_fit_is_refused_naming_every_difference(tmp_path, like, told):
    state = {"a": np.arange(3, dtype=np.float32), "b": [np.arange(2)], "n": None}
    save_once(tmp_path, state)
    with stepsave.Checkpointer(tmp_path) as saver:
        with pytest.raises(stepsave.BackupMismatchError, match=str(tmp_path)) as caught:
            saver.restore(like=like)
        for text in told:
            assert text in str(caught.value)
        assert f"in {len(told)} place(s)" in str(caught.value)
        assert_same_bits(saver.restore().state, state)  # the newest, and no older one


def test_of_many_differences_some_are_shown_and_the_rest_counted(tmp_path):
    save_once(tmp_path, {f"w{i:02}": np.zeros(2) for i in range(30)})
    with pytest.raises(stepsave.BackupMismatchError, match=r"(?s)30 place.*'w09'.*and 20 more"):
        restore_like(tmp_path, {f"w{i:02}": np.zeros(3) for i in range(30)})
    assert_same_bits(
        restore_like(tmp_path, {f"w{i:02}": np.ones(2) for i in range(30)}).state,
        {f"w{i:02}": np.zeros(2) for i in range(30)},
    )


def test_a_leaf_that_could_not_be_saved_is_named(tmp_path):
    save_once(tmp_path, {"a": [np.zeros(2)]})
    with pytest.raises(stepsave.InvalidStateError, match=re.escape("'a/0': expected an array")):
        restore_like(tmp_path, {"a": [object()]})
    assert_same_bits(restore_like(tmp_path, {"a": [np.ones(2)]}).state, {"a": [np.zeros(2)]})


def test_registered_dataclasses_and_typed_keys_come_back_as_such(tmp_path):
    jax = pytest.importorskip("jax")

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class TrainState:
        params: dict
        extra: object
        key: jax.Array
        name: str = dataclasses.field(metadata={"static": True}, default="")

    def state(fill, name):
        params = {"w": jax.numpy.full((3, 4), fill, "bfloat16")}
        return TrainState(params, None, jax.random.split(jax.random.key(fill), 3), name)

    save_once(tmp_path, state(5, "saved"))
    found = restore_like(tmp_path, state(0, "like")).state
    assert (type(found), found.name, found.extra) == (TrainState, "like", None)
    assert isinstance(found.params["w"], jax.Array)
    assert_same_bits(found.params, state(5, "").params)
    expected = state(5, "").key
    assert found.key.dtype == expected.dtype
    assert_same_bits(*map(jax.random.key_data, (found.key, expected)))
    assert jax.random.bits(found.key[1]) == jax.random.bits(expected[1])


def test_a_key_of_another_kind_is_refused_and_raw_key_data_fits_a_key(tmp_path):
    jax = pytest.importorskip("jax")
    save_once(tmp_path / "rbg", {"key": jax.random.key(1, impl="rbg")})
    with pytest.raises(stepsave.BackupMismatchError, match="of unsafe_rbg, found one of rbg"):
        restore_like(tmp_path / "rbg", {"key": jax.random.key(0, impl="unsafe_rbg")})
    found = restore_like(tmp_path / "rbg", {"key": jax.random.key(0, impl="rbg")}).state["key"]
    assert_same_bits(*map(jax.random.key_data, (found, jax.random.key(1, impl="rbg"))))
    save_once(tmp_path / "raw", {"key": jax.random.PRNGKey(1)})
    found = restore_like(tmp_path / "raw", {"key": jax.random.key(0)}).state["key"]
    assert_same_bits(*map(jax.random.key_data, (found, jax.random.key(1))))


def test_a_torch_training_goes_on_without_a_word_about_numpy(tmp_path):
    torch = pytest.importorskip("torch")

    def make():
        model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(model, optimizer, steps):
        for step in range(steps):
            optimizer.zero_grad()
            x = torch.full((4, 3), float(step), dtype=torch.bfloat16)
            model(x).square().sum().backward()
            optimizer.step()

    def state_of(model, optimizer):
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    torch.manual_seed(1)
    model, optimizer = make()
    train(model, optimizer, 3)
    save_once(tmp_path, state_of(model, optimizer))
    again, resumed = make()
    train(again, resumed, 1)  # its slots are made by the first step
    found = restore_like(tmp_path, state_of(again, resumed)).state
    again.load_state_dict(found["model"])
    resumed.load_state_dict(found["optimizer"])
    train(model, optimizer, 2)
    train(again, resumed, 2)
    for one, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_torch_training_goes_on_before_its_optimizer_has_slots(tmp_path):
    torch = pytest.importorskip("torch")

    def make(seed):
        torch.manual_seed(seed)
        model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9))

    def train(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(4, 3, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()

    model, optimizer = make(1)
    train(model, optimizer)
    save_once(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again, resumed = make(2)
    for found in (
        stepsave.restore(tmp_path, arrays="torch").state,
        stepsave.restore(tmp_path, arrays="torch").state,  # of the first nothing is shared
    ):
        again.load_state_dict(found["model"])
        resumed.load_state_dict(found["optimizer"])
        assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        slots = zip(again.parameters(), model.parameters(), strict=True)
        for one, other in slots:
            for name, value in optimizer.state[other].items():
                assert resumed.state[one][name].dtype == value.dtype
                assert torch.equal(resumed.state[one][name], value)
        train(again, resumed)
    train(model, optimizer)
    for one, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_every_dtype_of_torch_comes_back_and_others_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    names = ("bool", "uint8", "int64", "uint16", "bfloat16", "float16", "float8_e5m2", "complex64")
    bits = torch.arange(48, dtype=torch.uint8)
    state = {name: (bits % 2).bool() for name in names[:1]}
    state |= {name: bits.view(getattr(torch, name)) for name in names[1:]}
    state |= {"number": 3, "none": None, "scalar": torch.tensor(2.5), "list": [torch.ones(0, 3)]}
    save_once(tmp_path / "torch", state)
    found = stepsave.restore(tmp_path / "torch", arrays="torch").state
    assert (found.pop("number"), found.pop("none")) == (state.pop("number"), state.pop("none"))
    (found["list"],), (state["list"],) = found["list"], state["list"]
    for name, tensor in state.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bytes(found[name].untyped_storage()) == bytes(tensor.untyped_storage())
    save_once(tmp_path / "int4", {"a": [random_array((3,), "int4")]})
    with pytest.raises(
        stepsave.BackupMismatchError, match=r"torch can hold, found int4\[3\] at 'a"
    ):
        stepsave.restore(tmp_path / "int4", arrays="torch")


def test_kinds_of_arrays_that_are_none_are_refused(tmp_path):
    save_once(tmp_path, {"a": np.zeros(2)})
    with pytest.raises(ValueError, match="Expected 'numpy' or 'torch'"):
        stepsave.restore(tmp_path, arrays="jax")
    with pytest.raises(ValueError, match="Pass one of the two"):
        stepsave.restore(tmp_path, like={"a": np.zeros(2)}, arrays="torch")


def test_arrays_spread_over_devices_are_spread_likewise(tmp_path):
    pytest.importorskip("jax")
    script = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, numpy as np, stepsave
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
places = {"a": NamedSharding(mesh, P("x", "y")), "b": NamedSharding(mesh, P(None)),
          "c": jax.sharding.SingleDeviceSharding(jax.devices()[3])}
values = {name: np.arange(32.0, dtype=np.float32).reshape(4, 8) + i for i, name in enumerate("abc")}
like = {name: jax.device_put(np.zeros((4, 8), np.float32), at) for name, at in places.items()}
like["d"] = jax.numpy.zeros((4, 8), np.float32)
with stepsave.Checkpointer(sys.argv[1]) as saver:
    saver.save(1, values | {"d": values["a"]})
    found = saver.restore(like=like).state
for name, array in found.items():
    assert array.sharding == like[name].sharding, name
    assert array.committed == like[name].committed, name
    assert np.asarray(array).tobytes() == values.get(name, values["a"]).tobytes(), name
"""
    check_python(script, tmp_path)


def test_no_backend_is_imported_that_the_state_is_not_of(tmp_path):
    save_once(tmp_path, {"a": [random_array((3,), "bfloat16"), 2]})
    script = """
import sys, numpy as np, ml_dtypes, stepsave
like = {"a": (np.zeros(3, ml_dtypes.bfloat16), 0)}
with stepsave.Checkpointer(sys.argv[1]) as saver:
    found = saver.restore(like=like).state
    saver.save(2, found).wait()
    assert saver.restore(like=like).state["a"][0].tobytes() == found["a"][0].tobytes()
assert not {"jax", "torch", "tensorflow", "keras"} & set(sys.modules)
"""
    check_python(script, tmp_path)
