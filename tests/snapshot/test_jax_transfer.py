"""JAX arrays on their way to the host: several devices in a child process, and pinned memory."""

import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stepsave
from stepsave.snapshot import jax as jax_module
from stepsave.snapshot import jax_transfer
from stepsave.snapshot.jax_transfer import Cut, PinnedPool, Transfer, bytes_by_device, send
from stepsave.snapshot.page_locks import NoPins

SEVERAL_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import stepsave
from stepsave.snapshot.jax_transfer import Cut, bytes_by_device

devices = jax.devices()
mesh = Mesh(np.array(devices).reshape(2, 2), ("a", "b"))

def state_of(step):
    ramp = jnp.arange(16 * 500, dtype=jnp.float32).reshape(16, 500) % 100 + step
    specs = {"replicated": P(), "rows": P("a"), "tiles": P("a", "b"), "both": P(("a", "b"))}
    state = {name: jax.device_put(ramp, NamedSharding(mesh, spec)) for name, spec in specs.items()}
    for device in (devices[0], devices[3]):
        state[f"on {device.id}"] = jax.device_put(ramp.astype(jnp.bfloat16), device)
    return state

state = state_of(0)
leaves = list(state.values())
places = {name: sum(len(s.data) for s in a.addressable_shards) for name, a in state.items()}
assert places["replicated"] == 4 * 16, "replicas on all devices"
cut = Cut(leaves)
parts = cut.parts(leaves)
assert sum(part.nbytes for part in parts) == sum(leaf.nbytes for leaf in leaves), "each byte once"
assert all(len(part.sharding.device_set) == 1 for part in parts)
assert sum(bytes_by_device(leaves).values()) == sum(leaf.nbytes for leaf in leaves)
for number, leaf in enumerate(leaves):
    assert cut.join(number, parts).tobytes() == np.asarray(leaf).tobytes()

step_of = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
for mode in ("device", "host"):
    state = state_of(0)
    with stepsave.Checkpointer(f"{sys.argv[1]}/{mode}", snapshot=mode) as saver:
        saver.prepare(state)
        for number in range(6):
            saver.save(number, state)
            parts = {name: value for name, value in state.items() if not name.startswith("on")}
            alone = {name: value + 1 for name, value in state.items() if name.startswith("on")}
            state = step_of(parts) | alone
            found = saver.restore().state
            for name, value in state_of(number).items():
                assert found[name].tobytes() == np.asarray(value).tobytes(), (name, number)
        if mode == "device":
            copies = saver._capture._stager._stage._copies
            assert sum(copy.nbytes for copy in copies) == sum(a.nbytes for a in state.values())
        moved = {name: jax.device_put(value, devices[1]) for name, value in state.items()}
        saver.save(9, moved)  # the same types, elsewhere
        found = saver.restore().state
        for name, value in moved.items():
            assert found[name].tobytes() == np.asarray(value).tobytes(), name
print("all equal")
"""


def test_each_distinct_shard_is_copied_and_sent_once(tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", SEVERAL_DEVICES, str(tmp_path)]
    ended = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "all equal" in ended.stdout


def pinned(array):
    return jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))


def pool_of(arrays):
    return PinnedPool(bytes_by_device(arrays))


def test_what_is_in_pinned_memory_already_outlives_its_donation():
    array = pinned(jnp.arange(1000.0))
    (sent,) = send([array], pool_of([array]))
    assert sent.unsafe_buffer_pointer() != array.unsafe_buffer_pointer()
    array.delete()
    assert np.array_equal(sent, np.arange(1000.0))


def test_a_device_without_pinned_memory_has_no_pool(monkeypatch):
    array = jnp.arange(10.0)
    monkeypatch.setattr(jax_module, "is_on_accelerator", lambda _: True)
    assert isinstance(jax_module.make_pins([array]), PinnedPool)
    monkeypatch.setattr(jax_module, "has_pinned_memory", lambda _: False)
    assert isinstance(jax_module.make_pins([array]), NoPins)
    assert send([array], None) is None


def exhausted(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore of it")


def test_the_pool_is_grown_once_by_as_much_as_a_state_takes(monkeypatch):
    taken = []
    real = jax_transfer._to_pinned

    def to_pinned(parts):
        taken.extend(part.nbytes for part in parts)
        return real(parts)

    monkeypatch.setattr(jax_transfer, "_to_pinned", to_pinned)
    monkeypatch.setattr(jax_transfer, "_BLOCK_BYTES", 1000)
    pool = pool_of([jnp.zeros(1000, jnp.float32)])
    for _ in range(2):
        pool.pin(None)
    assert taken == [1000] * 4
    assert not pool.is_refused


@pytest.mark.parametrize("mode", ["device", "host"])
@pytest.mark.parametrize("ahead", [True, False])
def test_without_pinned_memory_a_state_takes_another_way(
    tmp_path, monkeypatch, caplog, mode, ahead
):
    """As on an accelerator, whose pool may be refused ahead or by the first transfer."""
    monkeypatch.setattr(jax_module, "is_on_accelerator", lambda _: True)
    step_of = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {f"w{i}": jnp.zeros((50, 50)) for i in range(5)}
    if ahead:
        monkeypatch.setattr(jax_transfer, "_to_pinned", exhausted)
    with (
        caplog.at_level(logging.WARNING),
        stepsave.Checkpointer(tmp_path, snapshot=mode) as saver,
    ):
        saver.prepare(state)
        monkeypatch.setattr(jax_transfer, "_to_pinned", exhausted)
        for number in range(6):
            saver.save(number, state)
            state = step_of(state)
            found = saver.restore().state
            assert all((array == number).all() for array in found.values())
        assert saver._capture._stager._pins.is_refused
    said = [record.message for record in caplog.records if "pinned memory" in record.message]
    assert len(said) == 1
    assert said[0].endswith("so snapshots take longer: RESOURCE_EXHAUSTED: Out of memory")


def test_through_pinned_memory_too(tmp_path, monkeypatch):
    monkeypatch.setattr(jax_module, "is_on_accelerator", lambda _: True)
    step_of = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {f"w{i}": jnp.zeros((50, 50)) for i in range(5)}
    with stepsave.Checkpointer(tmp_path, snapshot="host") as saver:
        for number in range(6):
            saver.save(number, state)
            state = step_of(state)
            found = saver.restore().state
            assert all((array == number).all() for array in found.values())
        stager = saver._capture._stager
        assert not stager.blocks
        assert not stager._pins.is_refused


def test_a_transfer_that_finds_no_pinned_memory_only_when_waited_for_has_the_next_go_elsewhere():
    array = jnp.arange(10.0)
    pool = pool_of([array])

    class Broken:
        nbytes = array.nbytes

        def __array__(self, *_, **__):
            exhausted()

    transfer = Transfer(Cut([array]), [Broken()], pool, sent=True)
    with pytest.raises(jax.errors.JaxRuntimeError):
        transfer(0)
    assert pool.is_refused
    assert send([array], pool) is None
