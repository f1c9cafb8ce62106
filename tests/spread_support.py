"""States that are spread over the devices of several JAX processes: scripts for these.

Each begins with `PRELUDE`, and gets a place and a mesh, such as `2x2`, after what `Processes`
gives. What a state is at a step, all know without talking.
"""

import numpy as np
from engine_support import SMALL_SHARDS, assert_same_bits

PRELUDE = (
    SMALL_SHARDS
    + """
planning._SMALLEST_LIMIT_BYTES = 4 << 10
import sys
import time
import warnings
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import stepsave
from stepsave.engine import peers

rank, count, port = map(int, sys.argv[1:4])
place = sys.argv[4]
sizes = tuple(map(int, sys.argv[5].split("x")))
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
mesh = Mesh(np.array(jax.devices()).reshape(sizes), ("data", "model"))

SPECS = {
    "rows": ((64, 300), P("model")),
    "columns": ((1000, 128), P(None, "model")),
    "tiles": ((32, 40, 8), P("data", "model")),
    "sharded": ((16, 16, 9), P(("data", "model"))),
    "replicated": ((120, 100), P()),
    "small": ((7,), P()),
    "scalar": ((), P()),
}

def value_of(name, step):
    shape = SPECS[name][0]
    rng = np.random.default_rng([len(name), 0 if name == "columns" else step])
    return rng.standard_normal(shape, np.float32)

def state_of(step):
    state = {"host": np.full(3, step), "step": step}
    for name, (shape, spec) in SPECS.items():
        value = value_of(name, step)
        sharding = NamedSharding(mesh, spec)
        state[name] = jax.make_array_from_callback(shape, sharding, value.__getitem__)
    return state

def assert_is_state_of(state, step):
    assert state["step"] == step, (state["step"], step)
    assert (state["host"] == step).all()
    for name in SPECS:
        expected, found = value_of(name, step), state[name]
        assert found.shape == expected.shape
        for shard in found.addressable_shards:
            assert np.asarray(shard.data).tobytes() == expected[shard.index].tobytes(), name
"""
)


def value_of(name, shape, step):
    """An array of such a state, as a process knows it that has all of it."""
    rng = np.random.default_rng([len(name), 0 if name == "columns" else step])
    return rng.standard_normal(shape, np.float32)


def assert_is_spread_state(backup):
    """One process has read all of it, and it is what a save of all would have written."""
    assert set(backup.state) > {"rows", "tiles", "host", "scalar"}
    for name, array in backup.state.items():
        if name not in ("host", "step"):
            assert_same_bits(array, value_of(name, array.shape, backup.step))


def devices(per_process):
    """The environment of processes that have so many devices each."""

    def environment(rank, count, port):  # noqa: ARG001
        flags = f"--xla_force_host_platform_device_count={per_process}"
        return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}

    return environment
