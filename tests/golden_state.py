"""The state of the golden backups. Must never change: it says what old backups hold.

    python tests/golden_state.py DIRECTORY [processes | disks | kept]

writes a backup of it, as was done once for each format: by one process, by two that have it on
two devices each (into one directory, or each to a disk of its own), or with older ones before it.
"""

import os
import sys

import numpy as np

import stepsave
from stepsave.format.records import DTYPES

STEP = 1200
KEPT = (600, 800, 1000)
METADATA = {"epoch": 3, "note": "größer als 1 MiB? no", "values": [1, 2.5, None, True]}


def state():
    made = {name: (np.arange(12).reshape(3, 4) % 2).astype(dtype) for name, dtype in DTYPES.items()}
    counting = np.arange(1000, dtype=np.float32) / 7
    return {
        "dtypes": made,
        "nested": {"a/b": {"ü": counting}, "scalar": np.array(2.5), "empty": np.zeros((0, 3))},
    }


SPREAD = """
import json, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import golden_state, stepsave

rank, count, port = map(int, sys.argv[1:4])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_x64", True)
jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))

def spread(array):
    if isinstance(array, dict):  # in its own order, which `jax.tree.map` does not keep
        return {key: spread(value) for key, value in array.items()}
    spec = {2: P(None, "y"), 1: P(("x", "y")), 0: P()}[array.ndim]
    sharding = NamedSharding(mesh, P() if array.size == 0 else spec)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

state = spread(golden_state.state())
"""

SAVE_SPREAD = (
    SPREAD
    + """
with stepsave.Checkpointer(sys.argv[4], **json.loads(sys.argv[5])) as saver:
    metadata = golden_state.METADATA if rank == 0 else {"rank": rank}
    saver.save(golden_state.STEP, state, metadata).wait()
"""
)

RESTORE_SPREAD = (
    SPREAD
    + """
from engine_support import assert_same_bits
from stepsave.format.tree import flatten

def shards_of(tree):
    return [[np.asarray(s.data) for s in array.addressable_shards] for array in flatten(tree)[1]]

with stepsave.Checkpointer(sys.argv[4], **json.loads(sys.argv[5])) as saver:
    backup = saver.restore(like=state)
assert backup.step == golden_state.STEP
assert backup.metadata == (golden_state.METADATA if rank == 0 else {"rank": rank})
assert flatten(backup.state)[0] == flatten(state)[0]
assert_same_bits(shards_of(backup.state), shards_of(state))
print("exact")
"""
)


if __name__ == "__main__":
    if sys.argv[2:] == ["processes"]:
        from peers_support import Processes

        with Processes(SAVE_SPREAD, sys.argv[1], "{}") as processes:
            processes.results()
    elif sys.argv[2:] == ["disks"]:
        import json

        from bucket_support import BUCKET, s3_environment, s3_server
        from peers_support import Processes

        with s3_server() as url:
            os.environ.update(s3_environment(url))
            options = json.dumps({"local_dir": sys.argv[1]})
            with Processes(SAVE_SPREAD, f"s3://{BUCKET}/golden", options) as processes:
                processes.results()
    else:
        older = KEPT if sys.argv[2:] == ["kept"] else ()
        with stepsave.Checkpointer(sys.argv[1], keep=len(older)) as saver:
            for step in older:
                saver.save(step, {"of": np.int16(step)}).wait()
            saver.save(STEP, state(), METADATA).wait()
