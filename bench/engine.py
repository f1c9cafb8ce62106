"""How long does a save stall its caller, and how long until it is durable?

Every round measures, one after the other and in changing order, the two floors and a save
of the same bytes from arrays of each framework; so a slow moment of the machine hits all.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import stepsave
from bench import floors, machine

RESULTS = Path(__file__).parent / "results"
ARRAY_BYTES = 4_000_000
FLOORS = {"stall": "memcpy", "background": "raw write", "durable": "raw write"}


def states(size_bytes: int, frameworks: list[str]) -> dict[str, dict[str, Any]]:
    """Makes equal states of arrays of several frameworks: random bits, as weights have."""
    rng = np.random.default_rng(0)
    arrays = {
        f"w{i}": rng.standard_normal(ARRAY_BYTES // 4, np.float32)
        for i in range(size_bytes // ARRAY_BYTES)
    }
    made: dict[str, dict[str, Any]] = {}
    for framework in frameworks:
        if framework == "numpy":
            made[framework] = dict(arrays)
        elif framework == "jax":
            import jax.numpy as jnp

            made[framework] = {name: jnp.array(array) for name, array in arrays.items()}
        elif framework == "torch":
            import torch

            made[framework] = {name: torch.tensor(array) for name, array in arrays.items()}
        else:
            raise ValueError(framework)
    return made


def measure(size_bytes: int, rounds: int, frameworks: list[str], where: Path) -> dict[str, Any]:
    """Runs all subjects interleaved; returns raw samples in seconds, by subject."""
    samples: dict[str, list[float]] = {}
    savers = {name: stepsave.Checkpointer(where / name) for name in frameworks}
    all_states = states(size_bytes, frameworks)
    memcpy, raw = floors.Memcpy(size_bytes), floors.RawWrite(where, size_bytes)
    step = 0

    def save(name: str) -> None:
        handle = savers[name].save(step, all_states[name])
        handle.wait()
        samples.setdefault(f"{name} stall", []).append(handle.stall_s)
        durable_s = handle.durable_s or float("nan")
        samples.setdefault(f"{name} durable", []).append(durable_s)
        samples.setdefault(f"{name} background", []).append(durable_s - handle.stall_s)

    def floor(name: str, measure_s: Callable[[], float]) -> None:
        samples.setdefault(name, []).append(measure_s())

    subjects: list[Callable[[], None]] = [
        lambda: floor("memcpy", memcpy.measure_s),
        lambda: floor("raw write", raw.measure_s),
        *(lambda name=name: save(name) for name in frameworks),
    ]
    try:
        for name, saver in savers.items():
            saver.prepare(all_states[name])
        for step in range(-3, rounds):
            if step < 0:
                memcpy.measure_s()
                continue
            for subject in random.Random(step).sample(subjects, len(subjects)):
                subject()
        _check(savers, all_states, rounds - 1)
    finally:
        for saver in savers.values():
            saver.close()
        memcpy.close()
    return samples


def _check(savers: dict[str, Any], all_states: dict[str, dict[str, Any]], step: int) -> None:
    """A save is only as good as its restore."""
    for name, saver in savers.items():
        backup = saver.restore()
        assert backup is not None
        assert backup.step == step
        for key, array in all_states[name].items():
            np.testing.assert_array_equal(backup.state[key], np.asarray(array))


def summarize(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Medians with their spread, and each save as a ratio of its floor, round by round.

    The first two saves of a subject write new files, not over retired ones; they are in the
    samples, and not in the summary of the steady state.
    """
    steady = {name: values[2:] for name, values in samples.items()}
    summary: dict[str, Any] = {}
    for name, values in steady.items():
        entry = _spread(values)
        kind = name.rpartition(" ")[2]
        floor = FLOORS.get(kind)
        if floor is not None:
            ratios = [a / b for a, b in zip(values, steady[floor], strict=True)]
            entry["floor"] = floor
            entry["ratio"] = _spread(ratios)
        summary[name] = entry
    return summary


def _spread(values: list[float]) -> dict[str, Any]:
    deciles = statistics.quantiles(values, n=10)
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--frameworks", nargs="*", default=["numpy", "jax", "torch"])
    parser.add_argument("--directory", type=Path, default=None, help="where to write")
    options = parser.parse_args(arguments)

    size_bytes = options.megabytes * 1_000_000 // ARRAY_BYTES * ARRAY_BYTES
    with tempfile.TemporaryDirectory(dir=options.directory) as where:
        samples = measure(size_bytes, options.rounds, options.frameworks, Path(where))
        result = {
            "benchmark": "engine",
            "machine": machine.describe(Path(where)),
            "settings": {"state_bytes": size_bytes, "rounds": options.rounds},
            "summary": summarize(samples),
            "samples_s": samples,
        }
    target = RESULTS / machine.name() / "engine.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    for name, entry in result["summary"].items():
        ratio = f"   {entry['ratio']['median']:.2f} x {entry['floor']}" if "ratio" in entry else ""
        print(f"{name:>17}: {entry['median'] * 1e3:7.1f} ms{ratio}")


if __name__ == "__main__":
    main()
