"""Snapshots within device memory, with the CPU as the device: the same code as on others."""

import importlib
import threading
import time
import types

import numpy as np
import pytest

import stepsave
from stepsave.engine.commit import CommitProtocol
from stepsave.snapshot import pages
from stepsave.snapshot.filling import Filling
from stepsave.snapshot.page_locks import NoPins
from stepsave.snapshot.staging import Stager, choose_stager

LEAVES = 12


class Numbers:
    """A training of some backend: every element of its state is the number of the step."""

    def __init__(self, kind):
        self.kind = kind
        self._module = pytest.importorskip(kind)
        self._step = None

    def state(self, step, leaves=LEAVES, shape=(60, 500)):
        big = {f"w{i}": self._full(shape, step) for i in range(leaves)}
        small = {f"s{i}": self._full((7,), step, "bfloat16") for i in range(leaves)}
        return {"big": big, "small": small, "step": np.int64(step), "rate": float(step)}

    def advance(self, state):
        """A step that overwrites the state: donates it, or changes it in place."""
        state["step"] = state["step"] + 1
        state["rate"] += 1
        for part in ("big", "small"):
            state[part] = self._advance(state[part])
        return state

    def stage_module(self):
        return importlib.import_module(f"stepsave.snapshot.{self.kind}")

    def _full(self, shape, value, dtype="float32"):
        if self.kind == "jax":
            return self._module.numpy.full(shape, value, dtype)
        if self.kind == "torch":
            return self._module.full(shape, float(value), dtype=getattr(self._module, dtype))
        return self._module.Variable(self._module.fill(shape, self._module.cast(value, dtype)))

    def _advance(self, arrays):
        if self.kind == "jax":
            if self._step is None:
                jax = self._module
                self._step = jax.jit(
                    lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
                )
            return self._step(arrays)
        for array in arrays.values():
            if self.kind == "torch":
                array.add_(1)
            else:
                array.assign_add(self._module.ones_like(array))
        return arrays


@pytest.fixture(params=["jax", "torch", "tensorflow"])
def numbers(request):
    return Numbers(request.param)


def assert_is_of(backup, step):
    assert backup.step == step
    for part in ("big", "small"):
        assert len(backup.state[part]) == LEAVES
        for name, array in backup.state[part].items():
            assert (array.astype(np.float32) == step).all(), f"{name} is not of step {step}"
    assert backup.state["step"] == step
    assert backup.state["rate"] == step


@pytest.mark.parametrize("mode", ["device", "host", "auto"])
def test_a_state_overwritten_right_after_the_save_is_restored_as_it_was(tmp_path, numbers, mode):
    state = numbers.state(1)
    with stepsave.Checkpointer(tmp_path, snapshot=mode) as saver:
        saver.prepare(state)
        for step in range(1, 16):
            handle = saver.save(step, state)
            state = numbers.advance(state)
            if step % 5 == 0:
                handle.wait()
                assert_is_of(saver.restore(), step)
        assert saver.stats().failed == 0


def test_without_prepare_too(tmp_path, numbers):
    state = numbers.state(1)
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        for step in range(1, 5):
            saver.save(step, state)
            state = numbers.advance(state)
        assert_is_of(saver.restore(), 4)


def test_both_modes_write_the_same_bytes(tmp_path, numbers):
    files = {}
    for mode in ("device", "host"):
        with stepsave.Checkpointer(tmp_path / mode, snapshot=mode) as saver:
            saver.save(3, numbers.state(3)).wait()
        shards = sorted((tmp_path / mode / "3" / "pytree" / "d" / "c").iterdir())
        files[mode] = [shard.read_bytes() for shard in shards]
    assert files["device"] == files["host"]


@pytest.mark.usefixtures("small_shards")
def test_leaves_cut_into_chunks_arrive_whole(tmp_path, numbers):
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        saver.save(9, numbers.state(9))
        assert_is_of(saver.restore(), 9)


def test_a_state_of_another_structure_is_staged_anew(tmp_path, numbers):
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        saver.save(1, numbers.state(1, leaves=3, shape=(5, 6)))
        saver.save(2, numbers.state(2))
        assert_is_of(saver.restore(), 2)
        saver.save(3, {"only": np.arange(5.0), **numbers.state(3)})
        assert_is_of(saver.restore(), 3)


class NotedPins:
    """Notes what is pinned."""

    def __init__(self):
        self.pinned = []

    def pin(self, memory):
        self.pinned.append(memory.ctypes.data)

    def unpin(self):
        self.pinned = []


def test_all_arenas_are_page_locked_with_and_without_prepare(tmp_path, numbers, monkeypatch):
    pins = NotedPins()
    monkeypatch.setattr(numbers.stage_module(), "make_pins", lambda _: pins)

    def check_pinned(saver):
        saver.wait()
        assert len(pins.pinned) == len(set(pins.pinned)) == 2, "each arena once"
        memories = saver._capture._pool.memories
        assert set(pins.pinned) == {memory.ctypes.data for memory in memories}

    with stepsave.Checkpointer(tmp_path / "prepared", snapshot="device") as saver:
        saver.prepare(numbers.state(1))
        saver.save(1, numbers.state(1))
        check_pinned(saver)
    assert not pins.pinned
    with stepsave.Checkpointer(tmp_path / "not", snapshot="device") as saver:
        saver.save(1, numbers.state(1))
        check_pinned(saver)
        saver.save(2, numbers.state(2, shape=(60, 5000)))  # takes larger arenas
        check_pinned(saver)
        assert_is_of(saver.restore(), 2)
    assert not pins.pinned


def test_skipped_saves_touch_no_device(tmp_path, numbers, monkeypatch):
    gate = threading.Event()
    real = CommitProtocol.begin

    def begin(self, *request):
        assert gate.wait(30)
        return real(self, *request)

    monkeypatch.setattr(CommitProtocol, "begin", begin)
    state = numbers.state(1)
    with stepsave.Checkpointer(tmp_path, snapshot="device", when_busy="skip") as saver:
        handles = []
        for step in range(1, 6):
            handles.append(saver.save(step, state))
            state = numbers.advance(state)
        gate.set()
        assert [handle.skipped for handle in handles] == [False, False, True, True, True]
        assert_is_of(saver.restore(), 2)


def test_the_first_save_waits_for_no_rests_of_those_who_touch_memory(
    tmp_path, numbers, monkeypatch
):
    """Transfers are to memory that is locked, and that is locked when it is there."""
    monkeypatch.setattr(pages, "_FAST_BYTES_PER_S", 1e15)
    monkeypatch.setattr(pages, "_RESTS", 1e9)
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        saver.save(1, numbers.state(1, shape=(600, 5000)))  # or it would wait for days
        assert_is_of(saver.restore(), 1)


def test_a_device_without_room_is_told_of_and_the_host_used(tmp_path, numbers, monkeypatch):
    module = numbers.stage_module()
    real = module._Stage.begin

    def begin(self, *arguments):
        if self.on_device:
            raise MemoryError("out of device memory")
        return real(self, *arguments)

    monkeypatch.setattr(module._Stage, "begin", begin)
    state = numbers.state(1)
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        saver.prepare(state)
        with pytest.warns(UserWarning, match="no room for a copy"):
            saver.save(1, state)
        state = numbers.advance(state)
        saver.save(2, state)  # no second warning
        state = numbers.advance(state)
        assert_is_of(saver.restore(), 2)


def test_the_next_state_goes_to_the_device_s_copy_when_the_last_has_left_it(
    tmp_path, numbers, monkeypatch
):
    real = Filling._fill

    def fill_later(self, *arguments):
        time.sleep(0.05)
        return real(self, *arguments)

    monkeypatch.setattr(Filling, "_fill", fill_later)
    state = numbers.state(1)
    with stepsave.Checkpointer(tmp_path, snapshot="device", keep=3) as saver:
        for step in range(1, 5):
            saver.save(step, state)
            state = numbers.advance(state)
        saver.wait()
        for step in range(1, 5):
            assert_is_of(saver.restore(step=step), step)


def test_a_stage_that_blocks_holds_the_call_up_until_all_is_on_the_host(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    real = Filling._fill

    def fill_later(self, number, source):
        time.sleep(0.05)
        real(self, number, source)

    monkeypatch.setattr(Filling, "_fill", fill_later)
    monkeypatch.setattr(Stager, "blocks", True)
    state = {f"w{i}": torch.full((200, 200), float(i)) for i in range(4)}
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        saver.save(1, state)
        assert saver._capture._filling.is_complete
        for array in state.values():
            array.fill_(-1)
        found = saver.restore().state
    assert all((found[f"w{i}"] == i).all() for i in range(4))


def test_a_transfer_that_fails_fails_the_save_and_harms_no_older_backup(
    tmp_path, numbers, monkeypatch
):
    state = numbers.state(1)
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        saver.save(1, state).wait()
        state = numbers.advance(state)
        real = Stager.begin

        def begin(self, *arguments):
            source = real(self, *arguments)

            def broken(leaf):
                if leaf == 5:
                    raise OSError(5, "the device is gone")
                return source(leaf)

            return broken

        with monkeypatch.context() as patch:
            patch.setattr(Stager, "begin", begin)
            handle = saver.save(2, state)
            with pytest.raises(stepsave.SaveFailedError, match=r"step 2.*device is gone"):
                handle.wait()
        assert_is_of(saver.restore(), 1)
        state = numbers.advance(state)
        saver.save(3, state).wait()
        assert_is_of(saver.restore(), 3)


def test_an_unsaveable_leaf_is_named(tmp_path, numbers):
    if numbers.kind != "torch":
        pytest.skip("only torch has tensors without values that look like others")
    import torch

    state = numbers.state(1)
    state["big"]["w3"] = torch.empty(4, device="meta")
    with (
        stepsave.Checkpointer(tmp_path, snapshot="device") as saver,
        pytest.raises(stepsave.InvalidStateError, match=r"'big/w3'.*dense tensor"),
    ):
        saver.save(1, state)


def test_a_copy_on_the_device_needs_arrays_of_one_backend(tmp_path):
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        with pytest.raises(stepsave.InvalidStateError, match=r"found numpy.*snapshot='auto'"):
            saver.save(1, {"w": np.zeros(3)})
        mixed = {"j": Numbers("jax").state(1)["big"], "t": Numbers("torch").state(1)["big"]}
        with pytest.raises(stepsave.InvalidStateError, match="found jax, torch"):
            saver.save(1, mixed)
    with stepsave.Checkpointer(tmp_path, snapshot="auto") as saver:
        saver.save(1, mixed)
        assert (saver.restore().state["t"]["w0"] == 1).all()


def test_on_the_cpu_nothing_is_staged_unasked(numbers):
    leaves = list(numbers.state(1)["big"].values())
    assert choose_stager(leaves, "auto") is None
    assert choose_stager(leaves, "host") is None
    assert choose_stager(leaves, "device") is not None


def test_a_wrong_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"snapshot='gpu'.*'auto' or 'device' or 'host'"):
        stepsave.Checkpointer(tmp_path, snapshot="gpu")


def test_jax_copies_reuse_the_memory_of_the_copies_before():
    numbers = Numbers("jax")
    leaves = list(numbers.state(1)["big"].values())
    stage = numbers.stage_module().make_stage(NoPins(), on_device=True)
    stage.prepare(leaves)
    addresses = []
    for _ in range(4):
        stage.begin(leaves, (), None)
        addresses.append([copy.unsafe_buffer_pointer() for copy in stage._copies])
    assert addresses[0] == addresses[1] == addresses[2] == addresses[3]


def test_device_memory_is_given_up_when_asked_and_taken_again_by_the_next_save(tmp_path, numbers):
    state = numbers.state(1)
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        saver.free_device_memory()
        for step in range(1, 4):
            saver.save(step, state)
            state = numbers.advance(state)
            saver.free_device_memory()
            stage = saver._capture._stager._stage
            assert stage.on_device
            assert [getattr(stage, name, None) for name in ("_copies", "_clones")] == [None, None]
            assert saver._capture._filling._source is None, "nobody else has the copies"
            assert_is_of(saver.restore(), step)


def test_held_tensors_are_let_go_when_they_are_on_the_host(tmp_path):
    numbers = Numbers("tensorflow")
    state = numbers.state(1)
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        saver.save(1, state).wait()
        assert saver._capture._filling._source is None


def test_numpy_leaves_are_copied_when_they_are_saved(tmp_path, numbers, monkeypatch):
    """At once, and to where they are written from: a callback keeps the best weights like that."""
    arenas = []
    real = Stager.begin

    def begin(self, leaves, plan, arena):
        source = real(self, leaves, plan, arena)
        arenas.append((source, arena.copy()))
        return source

    monkeypatch.setattr(Stager, "begin", begin)
    best = np.random.default_rng(0).standard_normal((300, 500)).astype(np.float32)
    best_then = best.copy()
    state = {"a": numbers.state(1), "best": best, "c": numbers.state(1)}
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        handle = saver.save(1, state)
        best += 1
        handle.wait()
        assert best_then.tobytes() in arenas[0][1].tobytes()
        assert np.array_equal(saver.restore().state["best"], best_then)


def test_a_state_is_described_once_as_long_as_it_looks_the_same(numbers, monkeypatch):
    described = []
    module = numbers.stage_module()
    real = module.describe
    monkeypatch.setattr(module, "describe", lambda leaves: described.append(1) or real(leaves))
    stager = choose_stager(list(numbers.state(1)["big"].values()), "device")
    for count, shape in enumerate([(60, 500), (500, 60)], 1):
        for step in range(3):
            leaves = list(numbers.state(step, shape=shape)["big"].values())
            forms = stager.describe([("leaf", str(i)) for i in range(LEAVES)], leaves)
            assert [form.shape for form in forms] == [shape] * LEAVES
        assert len(described) == count


def test_a_copy_on_a_device_of_jax_leaves_a_reserve(monkeypatch):
    jax_module = importlib.import_module("stepsave.snapshot.jax")
    stats = {"bytes_limit": 1000, "peak_bytes_in_use": 500}
    device = type("Device", (), {"memory_stats": lambda _: stats})()
    monkeypatch.setattr(jax_module, "bytes_by_device", lambda _: {device: 400})
    assert jax_module.has_room([], 1.1, 0.05)
    assert not jax_module.has_room([], 1.1, 0.07)
    stats.clear()
    assert not jax_module.has_room([], 1.1, 0.05), "nothing is known of its memory"


def test_a_copy_on_a_device_of_torch_leaves_a_reserve(monkeypatch):
    torch = pytest.importorskip("torch")
    module = importlib.import_module("stepsave.snapshot.torch")
    leaf = types.SimpleNamespace(device=torch.device("cuda", 0), nbytes=400)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (450, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 150)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 100)
    assert module.has_room([leaf], 1.1, 0.05)
    assert not module.has_room([leaf], 1.1, 0.07)


def test_tensorflow_on_a_gpu_is_staged_but_takes_no_device_memory_unasked():
    module = Numbers("tensorflow").stage_module()
    cpu, gpu = (types.SimpleNamespace(device=f"/device:{name}:0") for name in ("CPU", "GPU"))
    assert module.is_on_accelerator([cpu, gpu])
    assert not module.is_on_accelerator([cpu])
    assert not module.has_room([gpu], 1.1, 0.05)
    assert module.make_stage(NoPins(), on_device=False).blocks
    assert not module.make_stage(NoPins(), on_device=True).blocks
