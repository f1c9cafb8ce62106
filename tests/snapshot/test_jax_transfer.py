"""JAX arrays on their way to the host, and pinned memory."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stepsave
from stepsave.snapshot import jax as jax_module
from stepsave.snapshot import jax_transfer
from stepsave.snapshot.jax_transfer import PinnedPool, Transfer, bytes_by_device, send
from stepsave.snapshot.page_locks import NoPins


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

    transfer = Transfer([Broken()], pool, sent=True)
    with pytest.raises(jax.errors.JaxRuntimeError):
        transfer(0)
    assert pool.is_refused
    assert send([array], pool) is None
