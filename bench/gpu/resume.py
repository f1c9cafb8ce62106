"""Whether a Keras `fit` on an accelerator that is killed goes on as if it had not been.

python -m bench.gpu.resume DIRECTORY 40    # what `run` starts; dies at the 40th batch
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu.loop import Clock

EPOCHS, BATCHES, BATCH = 3, 10, 16
KILLED_AT = 17  # within the second epoch
DETERMINISTIC = {
    "jax": {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"},
    "torch": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
}


def train(directory: Path, killed_at: int) -> dict[str, Any]:
    """One run of the script of a user; what its training has come to."""
    import keras
    import numpy as np

    import stepsave

    if keras.backend.backend() == "torch":
        import torch

        torch.use_deterministic_algorithms(mode=True)
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    x = rng.random((BATCHES * BATCH, 32), np.float32)
    y = rng.random((BATCHES * BATCH, 1), np.float32)
    hidden = [keras.layers.Dense(256, activation="relu") for _ in range(3)]
    layers = [keras.Input((32,)), *hidden, keras.layers.Dropout(0.3)]
    model = keras.Sequential([*layers, keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    model.compile("adam", "mse")

    class Kill(keras.callbacks.Callback):
        trained = 0

        def on_train_batch_begin(self, batch, logs=None):
            del batch, logs
            if self.trained == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.trained += 1

    kill = Kill()
    backup = stepsave.BackupAndRestore(
        directory, save_freq=1, delete_checkpoint=False, history="all"
    )
    fitted = model.fit(
        x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0, shuffle=True, callbacks=[backup, kill]
    )
    digest = hashlib.sha256()
    for variable in [*model.variables, *model.optimizer.variables]:
        digest.update(keras.ops.convert_to_numpy(variable.value).tobytes())
    return {
        "digest": digest.hexdigest()[:16],
        "losses": [float(loss) for loss in fitted.history["loss"]],
        "batches": kill.trained,
    }


def run(framework: str, directory: Path, budget_s: float) -> dict[str, Any]:
    """Trains once, is killed in the second training, and goes on with it."""
    missing = [name for name in ("keras", "namex", "optree") if not importlib.util.find_spec(name)]
    if missing:
        return {"skipped": f"not installed: {', '.join(missing)}; see `bench.gpu.wheels`"}
    clock = Clock.of(budget_s)
    whole = _start(framework, directory / "whole", -1, clock)
    killed = _start(framework, directory / "killed", KILLED_AT, clock)
    resumed = _start(framework, directory / "killed", -1, clock)
    found: dict[str, Any] = {"whole": whole, "killed": killed, "resumed": resumed}
    if killed != -signal.SIGKILL or not isinstance(resumed, dict) or not isinstance(whole, dict):
        return {**found, "failed": "a run ended otherwise; see the output"}
    if not 0 < resumed["batches"] < EPOCHS * BATCHES:
        return {**found, "failed": f"trained {resumed['batches']} batches after it was killed"}
    found["same bits"] = _same(whole, resumed)
    if not found["same bits"]:  # whose fault is it?
        again = _start(framework, directory / "again", -1, clock)
        found["repeats by itself"] = _same(whole, again)
        if found["repeats by itself"]:
            found["failed"] = "ended with other bits than the training that was not killed"
    return found


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    return (one["digest"], one["losses"]) == (other["digest"], other["losses"])


def _start(framework: str, directory: Path, killed_at: int, clock: Clock) -> Any:
    """What a run has come to; the exit code of one that did not end well."""
    env = {**os.environ, "KERAS_BACKEND": framework, **DETERMINISTIC[framework]}
    command = [sys.executable, "-m", "bench.gpu.resume", str(directory), str(killed_at)]
    try:
        ended = subprocess.run(
            command, env=env, check=False, stdout=subprocess.PIPE, text=True, timeout=clock.left_s
        )
    except (subprocess.TimeoutExpired, ValueError):
        return "no time left"
    return json.loads(ended.stdout.splitlines()[-1]) if ended.returncode == 0 else ended.returncode


if __name__ == "__main__":
    print(json.dumps(train(Path(sys.argv[1]), int(sys.argv[2]))))
