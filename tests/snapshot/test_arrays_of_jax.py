import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from engine_support import assert_same_bits, random_array, restore_once, save_once

import stepsave
from stepsave.errors import InvalidStateError
from stepsave.format.records import DTYPES
from stepsave.snapshot.arrays import view_on_host, wait_computed

WIDE = {"int64", "uint64", "float64", "complex128"}  # need JAX's x64 mode
DTYPE_NAMES = [name for name in DTYPES if name not in WIDE and hasattr(jnp, name)] + ["bool"]


@pytest.mark.parametrize("dtype", sorted(set(DTYPE_NAMES)))
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    array = random_array((3, 5), dtype)
    moved = jnp.asarray(array)
    assert moved.dtype == array.dtype
    save_once(tmp_path, {"a": moved, "scalar": moved[0, 0], "empty": moved[:0]})
    array = np.asarray(moved)  # for int4, JAX clears the high bits that ml_dtypes sets
    expected = {"a": array, "scalar": array[0, 0], "empty": array[:0]}
    assert_same_bits(restore_once(tmp_path).state, expected)


def test_arrays_on_the_cpu_are_not_copied():
    array = jnp.arange(1000.0)
    view = view_on_host([("a",)], [array])[0]
    assert view.ctypes.data == array.unsafe_buffer_pointer()


def test_arrays_that_are_being_computed_can_be_waited_for():
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ y), x)

    array = slow(jnp.full((200, 200), 1e-2))
    wait_computed([array, np.zeros(3), 1.0])
    assert array.is_ready()


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {f"w{i}": jnp.zeros(50_000) for i in range(4)}
    with stepsave.Checkpointer(tmp_path) as saver:
        for number in range(1, 20):
            state = step(state)
            saver.save(number, state)
            state = step(state)
            state = jax.tree.map(lambda x: x - 1, state)
        backup = saver.restore()
    assert backup.step == 19
    for array in backup.state.values():
        assert (array == 19).all()


def test_transposed_and_traced_results_are_as_jax_shows_them(tmp_path):
    array = jax.jit(lambda x: (x * 2).T)(jnp.arange(12.0).reshape(3, 4))
    save_once(tmp_path, {"a": array})
    assert_same_bits(restore_once(tmp_path).state, {"a": np.asarray(array)})


def test_a_typed_key_is_refused_with_what_to_do():
    with pytest.raises(InvalidStateError, match=r"'seeds/key'.*key_data"):
        view_on_host([("seeds", "key"), ("b",)], [jax.random.key(0), jnp.zeros(1)])


def test_a_tracer_is_refused_with_its_place():
    def save(x):
        view_on_host([("a",)], [x])
        return x

    with pytest.raises(InvalidStateError, match=r"'a': expected a JAX array with values, .*Trace"):
        jax.jit(save)(jnp.zeros(3))


def test_jax_and_numpy_leaves_mix(tmp_path):
    state = {"j": jnp.ones(3, jnp.bfloat16), "n": np.arange(4), "p": 3}
    save_once(tmp_path, state)
    expected = {"j": np.ones(3, ml_dtypes.bfloat16), "n": np.arange(4), "p": np.asarray(3)}
    assert_same_bits(restore_once(tmp_path).state, expected)
