import numpy as np
import pytest
import torch
from engine_support import assert_same_bits, random_array, restore_once, save_once

import stepsave
from stepsave.errors import InvalidStateError
from stepsave.format.records import DTYPES
from stepsave.snapshot.arrays import view_on_host, wait_computed

DTYPE_NAMES = [name for name in DTYPES if isinstance(getattr(torch, name, None), torch.dtype)]
PLACEHOLDERS = {"int2", "int4"}  # torch has the names, but no tensors of them


def to_torch(array):
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    name = next(name for name, dtype in DTYPES.items() if dtype == array.dtype)
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array.copy())
    raw = torch.from_numpy(array.view(bits[array.itemsize]).copy())
    return raw.view(getattr(torch, name))


def test_what_is_on_the_cpu_is_computed_already_and_devices_are_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    wait_computed([torch.zeros(3), np.zeros(3)])
    assert waited == []

    class OnDevice(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda:1")

    wait_computed([torch.zeros(3), *(torch.zeros(3).as_subclass(OnDevice) for _ in range(2))])
    assert waited == [torch.device("cuda:1")]


@pytest.mark.parametrize("dtype", [name for name in DTYPE_NAMES if name not in PLACEHOLDERS])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    array = random_array((3, 5), dtype)
    tensor = to_torch(array)
    save_once(tmp_path, {"a": tensor, "scalar": tensor[0, 0], "t": tensor.T, "empty": tensor[:0]})
    expected = {"a": array, "scalar": array[0, 0], "t": array.T, "empty": array[:0]}
    assert_same_bits(restore_once(tmp_path).state, expected)


def test_the_dtypes_tested_include_the_small_floats():
    assert {"bfloat16", "float16", "bool", "complex64"} <= set(DTYPE_NAMES)


def test_tensors_on_the_cpu_are_not_copied():
    tensor = torch.arange(100.0)
    view = view_on_host([("a",)], [tensor])[0]
    assert view.ctypes.data == tensor.data_ptr()


def test_a_state_may_change_in_place_as_soon_as_save_returns(tmp_path):
    state = {f"w{i}": torch.zeros(50_000) for i in range(4)}
    with stepsave.Checkpointer(tmp_path) as saver:
        for number in range(1, 20):
            for tensor in state.values():
                tensor.fill_(number)
            saver.save(number, state)
            for tensor in state.values():
                tensor.fill_(-1)
        backup = saver.restore()
    assert backup.step == 19
    for array in backup.state.values():
        assert (array == 19).all()


def test_parameters_and_lazily_conjugated_tensors_are_saved_as_they_show(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    conjugated = torch.tensor([1 + 2j, 3 - 4j]).conj()
    negated = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    save_once(tmp_path, {"p": parameter, "c": conjugated, "n": negated})
    expected = {
        "p": np.ones(3, np.float32),
        "c": np.array([1 - 2j, 3 + 4j], np.complex64),
        "n": np.array([-2, 4], np.float32),
    }
    assert_same_bits(restore_once(tmp_path).state, expected)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")],
    ids=["sparse", "meta"],
)
def test_a_tensor_without_dense_values_is_refused_with_its_place(tensor):
    with pytest.raises(InvalidStateError, match="'group/leaf': expected a dense tensor"):
        view_on_host([("group", "leaf"), ("b",)], [tensor, torch.zeros(1)])


def test_a_dtype_that_numpy_does_not_have_is_refused_with_its_place():
    tensor = torch.zeros(3, dtype=torch.uint8).view(torch.bits8)
    with pytest.raises(InvalidStateError, match=r"'a': dtype torch\.bits8 has no NumPy form"):
        view_on_host([("a",)], [tensor])
