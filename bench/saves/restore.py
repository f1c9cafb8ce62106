"""How long does it take to get a state back from a cold disk?

Every round reads, in changing order and each from files dropped from the page cache: the same
bytes by `O_DIRECT` into warm and into fresh memory (any restore needs fresh memory), the
backup by stepsave, and the weights of the same model by Keras from HDF5. stepsave's arrays
are also assigned to the model, so that like can be compared with like.
"""

from __future__ import annotations

import gc
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import stepsave
from bench import common, floors, machine
from bench.saves import cold
from bench.stats import spread

WARM, FRESH = "raw read warm", "raw read fresh"
RESTORE, MODEL, KERAS = "stepsave restore", "stepsave model", "keras load_weights"
OVER = {WARM: (), FRESH: (WARM,), RESTORE: (WARM, FRESH), MODEL: (FRESH, KERAS), KERAS: (FRESH,)}
COLD_ENOUGH = 0.01  # part of the pages that may be left in the page cache
QUICK = {"megabytes": 16, "rounds": 4}

Samples = dict[str, list[float]]


class Files:
    """One model's weights on disk in every form, made once and read in each round."""

    def __init__(self, where: Path, size_bytes: int, array_bytes: int) -> None:
        import keras

        from stepsave.fit.variables import ModelVariables
        from stepsave.format.tree import unflatten

        width = round((array_bytes / 4) ** 0.5)
        layers = max(1, round(size_bytes / (4 * width * width)))
        inputs = outputs = keras.layers.Input((width,))
        for number in range(layers):
            dense = keras.layers.Dense(width, use_bias=False, name=f"dense_{number}")
            outputs = dense(outputs)
        self.model = keras.Model(inputs, outputs)
        self.model.compile(optimizer=None, loss="mse")
        rng = np.random.default_rng(0)
        for variable in self.model.variables:
            variable.assign(rng.standard_normal(variable.shape, np.float32))
        now = ModelVariables(self.model)
        self.variables = now.variables
        self.arrays = {
            path: np.array(keras.ops.convert_to_numpy(value))
            for path, value in zip(now.paths, now.values(), strict=True)
        }
        self.state_bytes = sum(array.nbytes for array in self.arrays.values())
        self.backup = where / "backup"
        with stepsave.Checkpointer(self.backup) as saver:
            saver.save(1, unflatten(list(self.arrays), list(self.arrays.values()))).wait()
        self.weights = where / "model.weights.h5"
        self.model.save_weights(self.weights)
        self.data = np.concatenate([a.reshape(-1).view(np.uint8) for a in self.arrays.values()])
        self.raw = floors.RawRead(where / "raw", self.data)

    def of(self, subject: str) -> list[Path]:
        """The files that a subject reads."""
        if subject in (WARM, FRESH):
            return [self.raw.path]
        return [self.weights] if subject == KERAS else cold.files_below(self.backup)

    def clear_model(self) -> None:
        for variable in self.variables:
            variable.assign(np.zeros(variable.shape, np.float32))

    def check_model(self) -> None:
        import keras

        found = {
            path: keras.ops.convert_to_numpy(variable.value)
            for path, variable in zip(self.arrays, self.variables, strict=True)
        }
        _check_same(found, self.arrays)

    def wait_for_model(self) -> None:
        import jax

        jax.block_until_ready([variable.value for variable in self.variables])


def _check_same(found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    def named(arrays: dict[Any, Any]) -> dict[str, Any]:
        return {"/".join(path): array for path, array in arrays.items()}

    common.check_same(named(found), named(expected))


class Rounds:
    """Reads everything interleaved; samples in seconds, by subject."""

    def __init__(self, files: Files) -> None:
        self.samples: Samples = {
            subject: [] for subject in (WARM, FRESH, "stepsave open", RESTORE, MODEL, KERAS)
        }
        self.resident: dict[str, float] = dict.fromkeys((WARM, FRESH, MODEL, KERAS), 0.0)
        self._files = files
        self._subjects: dict[str, Callable[[], None]] = {
            WARM: lambda: self.samples[WARM].append(files.raw.warm_s()),
            FRESH: lambda: self.samples[FRESH].append(files.raw.fresh_s()),
            MODEL: self._read_stepsave,
            KERAS: self._read_keras,
        }

    def run(self, rounds: int) -> None:
        for number in range(rounds):
            for subject in random.Random(number).sample(list(self._subjects), len(self._subjects)):
                gc.collect()
                left = cold.drop(self._files.of(subject))
                self.resident[subject] = max(self.resident[subject], left)
                self._subjects[subject]()

    def verify(self) -> None:
        """Once, not timed: what each of them gives back is what was saved, bit for bit."""
        files = self._files
        files.raw.check(files.data)
        for subject in (MODEL, KERAS):
            files.clear_model()
            self._subjects[subject]()
            files.check_model()
        for times in self.samples.values():
            times.clear()

    def _read_stepsave(self) -> None:
        from stepsave.fit.variables import restore_variables

        begin_s = time.perf_counter()
        saver = stepsave.Checkpointer(self._files.backup)
        opened_s = time.perf_counter()
        backup = saver.restore()
        restored_s = time.perf_counter()
        assert backup is not None
        restore_variables(self._files.model, backup.state, "jax")
        self._files.wait_for_model()
        assigned_s = time.perf_counter()
        saver.close()
        self.samples["stepsave open"].append(opened_s - begin_s)
        self.samples[RESTORE].append(restored_s - opened_s)
        self.samples[MODEL].append(assigned_s - begin_s)

    def _read_keras(self) -> None:
        begin_s = time.perf_counter()
        self._files.model.load_weights(self._files.weights)
        self._files.wait_for_model()
        self.samples[KERAS].append(time.perf_counter() - begin_s)


def summarize(samples: Samples, state_bytes: int) -> dict[str, Any]:
    """Medians with their spread, bytes per second, and ratios round by round."""
    summary: dict[str, Any] = {}
    for subject, times in samples.items():
        entry = spread(times)
        if subject in OVER:
            entry["bytes_per_s"] = state_bytes / entry["median"]
            entry["ratios"] = {
                other: common.ratios(times, samples[other]) for other in OVER[subject]
            }
        summary[subject] = entry
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("saves.restore", __doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--array-megabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=15)
    options = common.parse(parser, arguments, QUICK)
    os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported
    with tempfile.TemporaryDirectory(dir=options.directory) as where:
        facts = machine.describe(Path(where))
        array_bytes = int(options.array_megabytes * 1e6)
        files = Files(Path(where), options.megabytes * 1_000_000, array_bytes)
        rounds = Rounds(files)
        rounds.run(1)  # warms up what is not the disk
        rounds.verify()
        rounds.run(options.rounds)
        shards = len([p for p in cold.files_below(files.backup) if p.parent.name == "c"])
        files.raw.close()
    is_cold = max(rounds.resident.values()) <= COLD_ENOUGH
    result = {
        "benchmark": "restore",
        "machine": facts,
        "settings": {
            "state_bytes": files.state_bytes,
            "arrays": len(files.arrays),
            "shards": shards,
            "rounds": options.rounds,
            "keras_backend": "jax",
            "raw_read_threads": floors.READ_THREADS,
            "quick": options.quick,
        },
        "cold": {
            "is_cold": is_cold,
            "method": "fsync, posix_fadvise(POSIX_FADV_DONTNEED); checked by mincore",
            "resident_at_most": rounds.resident,
        },
        "summary": summarize(rounds.samples, files.state_bytes),
        "samples_s": rounds.samples,
    }
    common.write("restore", options, result)
    _show(result)


def _show(result: dict[str, Any]) -> None:
    if not result["cold"]["is_cold"]:
        print(f"NOT COLD: {result['cold']['resident_at_most']}")
    for subject, entry in result["summary"].items():
        line = f"{subject:>18}: {entry['median'] * 1e3:8.1f} ms"
        for other, ratio in entry.get("ratios", {}).items():
            line += f"   {ratio['median']:.2f} x {other}"
        print(line)


if __name__ == "__main__":
    main()
