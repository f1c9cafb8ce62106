"""A state on several devices of one process, in a child process that has four."""

import os
import subprocess
import sys

from engine_support import SMALL_SHARDS

SEVERAL_DEVICES = (
    SMALL_SHARDS
    + """
import json
import sys
import jax, jax.numpy as jnp, numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import stepsave
from stepsave.errors import InvalidStateError
from stepsave.snapshot.jax_transfer import bytes_by_device
from stepsave.snapshot.selection import Selection, Team

devices = jax.devices()
mesh = Mesh(np.array(devices).reshape(2, 2), ("a", "b"))
other = Mesh(np.array(devices[:2]), ("b",))
specs = {"replicated": P(), "rows": P("a"), "columns": P(None, "b"), "tiles": P("a", "b"),
         "both": P(("a", "b"))}

def state_of(step, mesh=mesh, specs=specs):
    ramp = jnp.arange(16 * 500, dtype=jnp.float32).reshape(16, 500) % 100 + step
    state = {name: jax.device_put(ramp, NamedSharding(mesh, spec)) for name, spec in specs.items()}
    for device in (devices[0], devices[3]):
        state[f"on {device.id}"] = jax.device_put(ramp.astype(jnp.bfloat16), device)
    return state

def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(value).tobytes(), name

state = state_of(0)
leaves = list(state.values())
places = {name: sum(len(s.data) for s in a.addressable_shards) for name, a in state.items()}
assert places["replicated"] == 4 * 16, "replicas on all devices"
parts = Selection([(name,) for name in state], leaves, None).parts(leaves)
assert sum(part.nbytes for part in parts) == sum(leaf.nbytes for leaf in leaves), "each byte once"
assert all(len(part.sharding.device_set) == 1 for part in parts)
sent = bytes_by_device(parts)
assert sum(sent.values()) == sum(leaf.nbytes for leaf in leaves)
assert max(sent.values()) <= 64_000, "of replicas not all are taken from one device"
try:
    Selection([("x", "y")], [state["rows"]], Team(0, 2))
except InvalidStateError as e:
    assert "'x/y': expected an array that all processes have in common" in str(e)
else:
    raise AssertionError("processes that do not share a mesh")

step_of = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
for mode in ("auto", "device", "host"):
    place = f"{sys.argv[1]}/{mode}"
    state = state_of(0)
    with stepsave.Checkpointer(place, snapshot=mode) as saver:
        saver.prepare(state)
        for number in range(6):
            saver.save(number, state)
            parts = {name: value for name, value in state.items() if not name.startswith("on")}
            alone = {name: value + 1 for name, value in state.items() if name.startswith("on")}
            state = step_of(parts) | alone
            assert_equal(saver.restore().state, state_of(number))
            assert_equal(saver.restore(like=state).state, state_of(number))
        if mode == "device":
            copies = saver._capture._stager._stage._copies
            assert sum(copy.nbytes for copy in copies) == sum(a.nbytes for a in state.values())
        elsewhere = state_of(0, other, dict(zip(specs, (P("b"), P(), P("b"), P(None, "b"), P()))))
        found = saver.restore(like=elsewhere).state
        assert_equal(found, state_of(5))
        assert all(found[name].sharding == a.sharding for name, a in elsewhere.items())
        moved = {name: jax.device_put(value, devices[1]) for name, value in state.items()}
        saver.save(9, moved)  # the same types, elsewhere
        assert_equal(saver.restore().state, moved)
        saver.save(10, state)
    layout = json.loads(open(f"{place}/10/layout.json").read())
    assert layout["format"] == 2
    cut = {leaf["path"][0]: leaf["chunk_shape"] for leaf in layout["leaves"]}
    assert cut["columns"][1] == cut["tiles"][1] == 250, "no chunk crosses the border of a shard"
    for name, value in state.items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": {
            "driver": "file", "path": f"{place}/10/pytree/"}, "path": f"{name}/"}}
        stored = ts.open(spec).result().read().result()
        assert stored.tobytes() == np.asarray(value).tobytes(), name
    with ocp.PyTreeCheckpointer() as stock:
        assert_equal(stock.restore(f"{place}/10/pytree"), state)
print("all equal")
"""
)


def test_each_distinct_shard_is_saved_once_and_restored_onto_any_mesh(tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", SEVERAL_DEVICES, str(tmp_path)]
    ended = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "all equal" in ended.stdout
