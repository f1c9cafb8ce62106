"""A `fit` of several processes: process 0 saves, all go on from its backup, bit for bit."""

import os
import shutil
import signal

import keras
import pytest
from bucket_support import s3, s3_target
from engine_support import assert_same_bits
from peers_support import Processes

import stepsave

FIT = """
import hashlib, os, sys, time
rank, count, port = map(int, sys.argv[1:4])
place, pause_s = sys.argv[4], float(sys.argv[5])
BEFORE
import keras
import numpy as np
import stepsave

class Tell(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        print("batch", batch, flush=True)
        time.sleep(pause_s)

rows = np.arange(192, dtype="float32").reshape(48, 4) / 100
mine = rows.reshape(-1, count, 3, 4)[:, rank].reshape(-1, 4)  # three of each batch of six
SCOPE
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dropout(0.5),
                              keras.layers.Dense(3)])
    model.compile("adam", "mse")
backup = stepsave.BackupAndRestore(
    place, 1, delete_checkpoint=False, save_before_preemption=pause_s > 0)
DATA
history = model.fit(data, epochs=3, verbose=0, callbacks=[backup, Tell()])
weights = b"".join(np.asarray(w).tobytes() for w in model.get_weights())
print("epochs", len(history.epoch), flush=True)
print(hashlib.sha256(weights).hexdigest(), flush=True)
"""

CODE = (
    FIT.replace(
        "BEFORE",
        """
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
""",
    )
    .replace(
        "SCOPE",
        """
keras.distribution.set_distribution(
    keras.distribution.DataParallel(devices=keras.distribution.list_devices(),
                                    auto_shard_dataset=False))
if True:
""",
    )
    .replace(
        "DATA",
        """
import tensorflow as tf
data = tf.data.Dataset.from_tensor_slices((mine, mine[:, :3])).batch(3)
""",
    )
)

SPREAD = (
    CODE.replace(
        "import stepsave\n",
        """
import stepsave
from stepsave.engine import reader

real = reader.Extents
def extents(plan, regions=None):
    for path, some in (regions or {}).items():
        if path[0] == "trainable_variables" and path[-1] == "kernel":
            print("needs", [[(cut.start, cut.stop) for cut in region] for region in some])
    return real(plan, regions)
reader.Extents = extents
""",
    )
    .replace(
        """
keras.distribution.set_distribution(
    keras.distribution.DataParallel(devices=keras.distribution.list_devices(),
                                    auto_shard_dataset=False))
""",
        """
mesh = keras.distribution.DeviceMesh((1, len(jax.devices())), ("batch", "model"),
                                     keras.distribution.list_devices())
layout = keras.distribution.LayoutMap(mesh)
layout[".*kernel"] = (None, "model")
layout[".*bias"] = ("model",)
keras.distribution.set_distribution(keras.distribution.ModelParallel(
    layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False))
mine = rows  # what is spread is the model
""",
    )
    .replace(".batch(3)", ".batch(6)")
    .replace("Dense(3)", "Dense(4)")
    .replace("mine[:, :3]", "mine")
    .replace(
        "weights = b",
        """
if pause_s == 0:
    kernel = model.layers[-1].kernel.value
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 4 // len(jax.devices()))
    print("captured", backup.stats().state_bytes // backup.stats().started, flush=True)
from jax.experimental import multihost_utils
model.get_weights = lambda: [
    multihost_utils.process_allgather(v.value, tiled=True) for v in model.weights]
weights = b""",
    )
)

__all__ = ("s3", "s3_target")
SHARDED_BY_KERAS = (
    CODE.replace(",\n                                    auto_shard_dataset=False", "")
    .replace(".batch(3)", ".shuffle(8, seed=5).batch(6)")
    .replace("(mine, mine", "(rows, rows")
)

pytestmark = pytest.mark.skipif(
    os.environ["KERAS_BACKEND"] != "jax",
    reason="on PyTorch `fit` knows of one process; under TensorFlow's strategy for several workers "
    "that of Keras 3.15 raises by itself",
)


def environment(rank, count, port):  # noqa: ARG001
    return {"KERAS_BACKEND": "jax"}


@pytest.mark.parametrize(
    "code",
    [CODE, SHARDED_BY_KERAS, SPREAD],
    ids=["data parallel", "data sharded by Keras", "model parallel"],
)
def test_a_fit_of_two_processes_that_are_killed_goes_on_as_if_nothing_had_happened(tmp_path, code):
    with Processes(code, tmp_path / "whole", 0, environment=environment) as whole:
        expected = whole.results()
    assert expected[0][-1] == expected[1][-1]
    assert stepsave.restore(tmp_path / "whole").step == 24
    with Processes(code, tmp_path / "killed", 0.05, environment=environment) as killed:
        for batch in (7, 3):  # of the second epoch
            killed.wait_for(f"batch {batch}")
        killed.kill()
    begun = stepsave.restore(tmp_path / "killed").step
    assert 9 <= begun <= 13
    with Processes(code, tmp_path / "killed", 0, environment=environment) as again:
        found = again.results()
    assert [lines[-2:] for lines in found] == [["epochs 2", expected[0][-1]]] * 2
    needs = [line for lines in found for line in lines if line.startswith("needs")]
    halves = ["needs [[(0, 4), (0, 2)]]", "needs [[(0, 4), (2, 4)]]"]  # of the kernel's columns
    assert needs == (halves if code is SPREAD else [])
    assert stepsave.restore(tmp_path / "killed").step == 24


def test_a_signal_to_one_process_ends_all_at_the_same_step(tmp_path):
    code = CODE.replace("epochs=3", "epochs=50")
    place = tmp_path / "backup"
    with Processes(code, place, 0.05, environment=environment) as processes:
        processes.wait_for("batch 5")
        processes.children[1].send_signal(signal.SIGTERM)
        ends = [child.communicate(timeout=200) for child in processes.children]
        codes = [child.returncode for child in processes.children]
    assert codes == [stepsave.Preempted.EXIT_CODE] * 2, ends
    made = [out.count("batch") for out, _ in ends]
    assert made[0] + 6 == made[1]  # those before were read above
    assert stepsave.restore(place).step == made[1] < 400


@pytest.mark.parametrize("save_freq", ["'0.3s'", "'auto', max_overhead=0.5"])
def test_by_time_all_save_the_same_steps(save_freq, tmp_path):
    code = CODE.replace("epochs=3", "epochs=20").replace(
        "place, 1, delete", f"place, {save_freq}, delete"
    )
    code = code.replace(
        "import stepsave\n",
        """
import stepsave
from stepsave.engine import agreed_frequency
agreed_frequency._APART_S, agreed_frequency._AHEAD_S = 0.2, 0.1  # the training is short
real = stepsave.Checkpointer.save_leaves
def save_leaves(self, step, *args, **kwargs):
    print("saves", step, flush=True)
    return real(self, step, *args, **kwargs)
stepsave.Checkpointer.save_leaves = save_leaves
""",
    )
    code += "print(backup.stats().committed, backup.stats().failed, backup.stats().skipped)"
    with Processes(code, tmp_path / "backup", 0.02, environment=environment) as processes:
        first, second = processes.results()
    assert first[-1] == second[-1]
    committed, failed, skipped = map(int, first[-1].split())
    assert committed >= 3
    assert failed == skipped == 0
    steps = [[line for line in lines if line.startswith("saves")] for lines in (first, second)]
    assert steps[0] == steps[1]
    assert steps[0][-1] == f"saves {stepsave.restore(tmp_path / 'backup').step}"


RNG = (
    CODE.replace(
        "class Tell(keras.callbacks.Callback):",
        """
class Tell(keras.callbacks.Callback):
    drawn = []

    def on_train_batch_begin(self, batch, logs=None):
        self.drawn.append(float(np.random.random()))
""",
    )
    .replace(
        "keras.utils.set_random_seed(3)",
        "keras.utils.set_random_seed(3); np.random.seed(rank)  # each augments its own data",
    )
    .replace('print("epochs"', 'print("drew", Tell.drawn[-3:], flush=True)\nprint("epochs"')
)


def test_each_process_goes_on_with_its_own_random_generators(tmp_path):
    with Processes(RNG, tmp_path / "whole", 0, environment=environment) as whole:
        expected = [lines[-3:] for lines in whole.results()]
    assert expected[0][0] != expected[1][0]
    place = tmp_path / "killed"
    with Processes(RNG, place, 0.05, environment=environment) as killed:
        for batch in (7, 3):
            killed.wait_for(f"batch {batch}")
        killed.kill()
    step = stepsave.restore(place).step
    assert (place / f"{step}/training.json").exists()
    assert (place / f"{step}/training.1.json").exists()
    with Processes(RNG, place, 0, environment=environment) as again:
        found = [lines[-3:] for lines in again.results()]
    assert [one[0] for one in found] == [one[0] for one in expected]
    assert [one[2] for one in found] == [one[2] for one in expected]


def test_another_number_of_processes_goes_on_and_says_what_cannot_be_exact(tmp_path):
    place, code = tmp_path / "backup", SPREAD
    with Processes(code, place, 0.05, environment=environment) as killed:
        for batch in (7, 3):
            killed.wait_for(f"batch {batch}")
        killed.kill()
    begun = stepsave.restore(place).step
    with Processes(code, place, 0, count=4, environment=environment) as again:
        ends = [child.communicate(timeout=200) for child in again.children]
    for out, err in ends:
        assert "2 process(es) made the backup, and 4 train(s) now" in err, err[-2000:]
        assert out.count("batch") == 24 - begun
    assert len({out.splitlines()[-1] for out, _ in ends}) == 1
    backup = stepsave.restore(place)
    assert backup.step == 24
    assert backup.metadata["processes"] == 4
    stock = keras.saving.load_model(place)  # by one process, which knows of no mesh
    saved = backup.state["trainable_variables"]["sequential"]["dense"]
    assert_same_bits(stock.layers[-1].kernel.numpy(), saved["kernel"])
    assert_same_bits(stock.layers[-1].bias.numpy(), saved["bias"])


@pytest.mark.xdist_group("buckets")
def test_a_fit_with_a_disk_for_each_process_goes_on_from_what_all_of_them_have(s3, tmp_path):
    disk = tmp_path / "disk"
    code = SPREAD.replace(
        "place, 1, delete", f"place, 1, local_dir={str(disk)!r}, upload_every='1h', delete"
    ).replace("backup.stats().state_bytes // backup.stats().started", "0")
    with Processes(code, s3.place + "/whole", 0, environment=environment) as whole:
        expected = whole.results()
    assert stepsave.restore(s3.place + "/whole").step == 24
    shutil.rmtree(disk)
    place = s3.place + "/killed"
    with Processes(code, place, 0.2, environment=environment) as killed:
        for batch in (7, 3):  # of the second epoch
            killed.wait_for(f"batch {batch}")
        killed.kill()
    assert 1 <= stepsave.restore(place).step < 9
    with Processes(code, place, 0, environment=environment) as again:
        found = again.results()
    assert [lines[-2:] for lines in found] == [["epochs 2", expected[0][-1]]] * 2
    assert stepsave.restore(place).step == 24


@pytest.mark.xdist_group("buckets")
def test_a_signal_has_what_all_have_on_their_disks_uploaded_first(s3, tmp_path):
    disk = tmp_path / "disk"
    tiers = f"place, 1, local_dir={str(disk)!r}, upload_every='1h', delete"
    code = CODE.replace("epochs=3", "epochs=50").replace("place, 1, delete", tiers)
    with Processes(code, s3.place, 0.05, environment=environment) as processes:
        processes.wait_for("batch 5")
        processes.children[0].send_signal(signal.SIGTERM)
        ends = [child.communicate(timeout=200) for child in processes.children]
        codes = [child.returncode for child in processes.children]
    assert codes == [stepsave.Preempted.EXIT_CODE] * 2, ends
    step = ends[1][0].count("batch")
    shutil.rmtree(disk)
    assert stepsave.restore(s3.place).step == step < 400
