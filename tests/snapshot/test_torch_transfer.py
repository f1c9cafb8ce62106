"""Tensors on their way into an arena, with the CPU as a device whose copies arrive late."""

import threading

import numpy as np
import pytest
import torch
from engine_support import assert_same_bits

import stepsave
from stepsave.snapshot import torch_transfer
from stepsave.snapshot.filling import Filling
from stepsave.snapshot.pieces import Piece
from stepsave.snapshot.torch_transfer import Clones, Lanes, Transfer, parts_of

COMMON = [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.bool]
ALONE = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn]


class LateLane:
    """What is sent arrives as late as it may: when somebody waits for an event behind it."""

    def __init__(self, _):
        self.sent = []
        self.sizes_bytes = []
        self.arrived = 0
        self.settled = 0
        self._guard = threading.Lock()
        LateLane.made.append(self)

    def follow(self):
        assert self.arrived == len(self.sent), "the state before has not arrived"

    def send(self, target, source):
        self.sent.append((target, source))
        self.sizes_bytes.append(source.nbytes)

    def mark(self):
        return Event(self, len(self.sent))

    def arrive(self, count):
        with self._guard:
            for target, source in self.sent[self.arrived : count]:
                target.copy_(source)
            self.arrived = max(self.arrived, count)

    def settle(self):
        self.settled += 1
        self.arrive(len(self.sent))


class Event:
    def __init__(self, lane, count):
        self.lane, self.count = lane, count

    def synchronize(self):
        self.lane.arrive(self.count)


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(LateLane, "made", [], raising=False)
    monkeypatch.setattr(torch_transfer, "_make_lane", LateLane)
    return LateLane


def mixed_state(step):
    """All values tell the step; arrays that are not staged lie between those that are."""
    state = {}
    for i in range(40):
        for dtype in (*COMMON, *ALONE):
            state[f"{i}-{str(dtype)[6:]}"] = torch.full((7 + i,), step).to(dtype)
        state[f"{i}-numpy"] = np.full(5 + i, step, np.int16)
        state[f"{i}-number"] = float(step)
    state["large"] = torch.arange(150_000.0).reshape(300, 500) + step
    state["turned"] = (torch.arange(150_000.0).reshape(300, 500) + step).T
    state["scalar"] = torch.tensor(step)
    state["empty"] = torch.zeros((0, 3))
    return state


def advance(state, step):
    """Changes the arrays in place, as optimizers do."""
    for name, value in mixed_state(step).items():
        if isinstance(value, torch.Tensor):
            state[name].copy_(value)
        elif isinstance(value, np.ndarray):
            state[name][...] = value
        else:
            state[name] = value


def bits(value):
    if isinstance(value, torch.Tensor):
        value = value.contiguous().view(-1) if value.numel() else value.reshape(-1)
        return value.view(torch.uint8).numpy().tobytes()
    return np.asarray(value).tobytes()


def assert_is_of(backup, step):
    expected = mixed_state(step)
    assert backup.step == step
    assert list(backup.state) == list(expected)
    for name, value in expected.items():
        assert bits(value) == np.asarray(backup.state[name]).tobytes(), f"{name}, step {step}"


@pytest.mark.parametrize("mode", ["device", "host"])
@pytest.mark.parametrize("shards", ["large", "small"])
def test_a_mixed_state_comes_back_as_it_was(tmp_path, late, request, mode, shards, monkeypatch):
    if shards == "small":
        request.getfixturevalue("small_shards")
    if mode == "host":  # on the CPU nothing is staged then, unless the device has no room
        monkeypatch.setattr(Clones, "__init__", out_of_memory)
    state = mixed_state(1)
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        if mode == "host":
            with pytest.warns(UserWarning, match="no room"):
                saver.save(1, state)
        else:
            saver.save(1, state)
        for step in range(2, 5):
            advance(state, step)
            saver.save(step, state)
            assert_is_of(saver.restore(), step)
        (lane,) = late.made[-1:]
        assert lane.sent
        assert saver._capture._stager.mode == mode


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("mode", ["device", "host"])
def test_the_mode_of_gradients_of_the_training_is_never_touched(tmp_path, mode, monkeypatch):
    """Or an interrupt at the wrong instant would leave the training without gradients for good."""
    for way in (torch.no_grad, torch.inference_mode, torch.set_grad_enabled):
        monkeypatch.setattr(way, "__enter__", way_not_to_go)
    state = {
        "weights": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)),
        "turned": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T),
        "conjugated": torch.tensor([1 + 2j, 3 - 4j], requires_grad=True).conj(),
    }
    with stepsave.Checkpointer(tmp_path, snapshot=mode) as saver:
        saver.save(1, state)
        backup = saver.restore(like=state)
    assert torch.is_grad_enabled()
    for name, value in state.items():
        assert torch.equal(backup.state[name], value), name


def way_not_to_go(_):
    raise AssertionError("gradients were switched off")


def test_without_a_copy_on_the_device_training_waits_for_transfers_and_for_no_check(
    tmp_path, late, monkeypatch
):
    monkeypatch.setattr(Clones, "__init__", out_of_memory)
    is_free, fill = threading.Event(), Filling._fill

    def fill_later(*arguments):
        assert is_free.wait(20), "the save waited until its state was checked"
        fill(*arguments)

    monkeypatch.setattr(Filling, "_fill", fill_later)
    state = mixed_state(1)
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        with pytest.warns(UserWarning, match="no room"):
            handle = saver.save(1, state)
        assert not handle.done
        assert [lane.arrived == len(lane.sent) > 0 for lane in late.made] == [True]
        advance(state, 2)
        is_free.set()
        saver.wait()
        assert_is_of(saver.restore(), 1)


def out_of_memory(*_):
    raise torch.cuda.OutOfMemoryError("out of memory")


def test_many_tensors_are_sent_by_few_copies(tmp_path, late):
    state = {f"w{i}": torch.full((1000,), float(i)) for i in range(500)}
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        saver.save(1, state)
        found = saver.restore().state
    assert len(late.made[0].sent) == 1
    assert_same_bits(found, {name: tensor.numpy() for name, tensor in state.items()})


def test_no_copy_is_larger_than_the_limit(late, monkeypatch, tmp_path, small_shards):  # noqa: ARG001
    monkeypatch.setattr(torch_transfer, "_STRETCH_BYTES", 40 << 10)
    monkeypatch.setattr(torch_transfer, "_EVENT_BYTES", 50 << 10)
    state = {f"w{i}": torch.full((100, 100), float(i)) for i in range(12)}
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        saver.save(1, state)
        found = saver.restore().state
    sizes_bytes = late.made[0].sizes_bytes
    assert max(sizes_bytes) <= 40 << 10
    assert min(sizes_bytes) > 10 << 10, "neighbours are sent together"
    assert_same_bits(found, {name: tensor.numpy() for name, tensor in state.items()})


def test_what_is_launched_together_has_one_dtype(monkeypatch):
    """Else torch launches a kernel for each tensor; and some dtypes have no such kernel."""
    groups = []
    real = torch._foreach_copy_

    def foreach_copy(targets, sources):
        groups.append({source.dtype for source in sources})
        assert all(source.is_contiguous() for source in sources)
        real(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", foreach_copy)
    dtypes = [*COMMON, *ALONE] * 3
    tensors = [torch.full((4, 6), 1).to(dtype) for dtype in dtypes]
    tensors.append(torch.full((4, 6), 1.0).T)
    pieces = pieces_of(tensors)
    clones = Clones(tensors, pieces)
    clones.take(tensors)
    assert sorted(groups, key=str) == sorted(({dtype} for dtype in COMMON), key=str)
    arena = np.full(pieces[-1].end_bytes, 255, np.uint8)
    transfer = Transfer(Lanes(), clones.parts, arena)
    for leaf, (tensor, piece) in enumerate(zip(tensors, pieces, strict=True)):
        assert transfer(leaf) is None
        assert arena[piece.offset_bytes : piece.end_bytes].tobytes() == bits(tensor)


def test_copies_are_made_anew_for_tensors_of_another_form():
    tensors = [torch.zeros(6), torch.zeros(2, 3)]
    pieces = pieces_of(tensors)
    clones = Clones(tensors, pieces)
    assert clones.fit([torch.ones(6), torch.ones(2, 3)], pieces)
    for others in ([torch.zeros(6).int(), tensors[1]], [tensors[0], torch.zeros(3, 2).T]):
        assert not clones.fit(others, pieces)
    assert not clones.fit(tensors, pieces_of(tensors))


def test_what_a_transfer_that_failed_has_sent_arrives_before_it_says_so(late):
    tensors = [torch.full((6,), float(i)) for i in range(3)]
    pieces = pieces_of(tensors)
    lanes = Lanes()
    transfer = Transfer(lanes, parts_of(tensors, pieces), np.zeros(pieces[-1].end_bytes, np.uint8))
    (lane,) = late.made
    real = lane.send

    def send(target, source):
        if len(lane.sent) == 2:
            raise RuntimeError("the device is gone")
        real(target, source)

    lane.send = send
    with pytest.raises(RuntimeError, match="device is gone"):
        transfer(0)
    assert lane.arrived == 2


def test_conjugated_and_negated_tensors_have_the_bits_that_they_show(tmp_path, late):  # noqa: ARG001
    value = torch.tensor([1 + 2j, 3 - 4j])
    state = {"conjugated": value.conj(), "negated": value.conj().imag, "gradient": leaf_tensor()}
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        saver.save(1, state)
        found = saver.restore().state
    expected = {
        "conjugated": np.array([1 - 2j, 3 + 4j], np.complex64),
        "negated": np.array([-2, 4], np.float32),
        "gradient": np.ones(3, np.float32),
    }
    assert_same_bits(found, expected)


def leaf_tensor():
    return torch.nn.Parameter(torch.ones(3))


def pieces_of(tensors):
    pieces, offset_bytes = [], 0
    for leaf, tensor in enumerate(tensors):
        pieces.append(Piece(leaf, leaf, 0, offset_bytes, tensor.nbytes))
        offset_bytes += -(-(tensor.nbytes + 4) // 64) * 64
    return pieces
