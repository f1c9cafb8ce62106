"""How long does a save stall its caller, and how long until it is durable?

Every round measures, one after the other and in changing order, the two floors and a save
of the same bytes from arrays of each framework; so a slow moment of the machine hits all.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import stepsave
from bench import common, floors, machine
from bench.common import ARRAY_BYTES, FRAMEWORKS, UNSTEADY
from bench.stats import spread

FLOORS = {
    "copy": "memcpy",  # the checked one
    "stall": "memcpy",
    "background": "raw write",
    "durable": "raw write",
}
QUICK = {"megabytes": 20, "rounds": 5}


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A checkpointer under test.

    Attributes:
        name: Its name in the JSON.
        framework: Whose arrays it saves.
        options: What its `Checkpointer` is made with.
    """

    name: str
    framework: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def measure(
    subjects: Sequence[Subject], size_bytes: int, rounds: int, where: Path
) -> dict[str, list[float]]:
    """Runs all subjects interleaved; returns raw samples in seconds, by subject and kind."""
    kinds = ("stall", "background", "durable")
    samples: dict[str, list[float]] = {"memcpy": [], "checked copy": [], "raw write": []}
    samples |= {f"{subject.name} {kind}": [] for subject in subjects for kind in kinds}
    count = size_bytes // ARRAY_BYTES
    trainings = {s.name: common.Training(s.framework, count, ARRAY_BYTES) for s in subjects}
    savers = {s.name: stepsave.Checkpointer(where / s.name, **s.options) for s in subjects}
    memcpy, raw = floors.Memcpy(size_bytes), floors.RawWrite(where, size_bytes)

    def save(subject: Subject, step: int) -> None:
        times = common.timed_save(savers[subject.name], step, trainings[subject.name].step())
        for kind in kinds:
            samples[f"{subject.name} {kind}"].append(getattr(times, f"{kind}_s"))

    measured: list[Callable[[int], None]] = [
        lambda _step: samples["memcpy"].append(memcpy.measure_s()),
        lambda _step: samples["checked copy"].append(memcpy.checked_s()),
        lambda _step: samples["raw write"].append(raw.measure_s()),
        *(lambda step, s=subject: save(s, step) for subject in subjects),
    ]
    try:
        for subject in subjects:
            savers[subject.name].prepare(trainings[subject.name].state)
        for _ in range(3):
            memcpy.measure_s()
        for step in range(rounds):
            for action in random.Random(step).sample(measured, len(measured)):
                action(step)
        for subject in subjects:
            state = trainings[subject.name].state
            common.check_restored(savers[subject.name], state, rounds - 1)
    finally:
        for saver in savers.values():
            saver.close()
        memcpy.close()
    return samples


def summarize(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Medians with their spread, and each save as a ratio of its floor, round by round.

    The first two saves of a subject write new files, not over retired ones; they are in the
    samples, and not in the summary of the steady state.
    """
    steady = {name: values[UNSTEADY:] for name, values in samples.items()}
    summary: dict[str, Any] = {}
    for name, values in steady.items():
        entry = spread(values)
        floor = FLOORS.get(name.rpartition(" ")[2])
        if floor is not None:
            entry["floor"] = floor
            entry["ratio"] = common.ratios(values, steady[floor])
        summary[name] = entry
    return summary


def run(name: str, subjects: Sequence[Subject], options: Any) -> dict[str, Any]:
    """Measures, keeps the JSON, and prints a small table."""
    size_bytes = options.megabytes * 1_000_000 // ARRAY_BYTES * ARRAY_BYTES
    with tempfile.TemporaryDirectory(dir=options.directory) as where:
        samples = measure(subjects, size_bytes, options.rounds, Path(where))
        result = {
            "benchmark": name,
            "machine": machine.describe(Path(where)),
            "settings": {
                "state_bytes": size_bytes,
                "arrays": size_bytes // ARRAY_BYTES,
                "rounds": options.rounds,
                "quick": options.quick,
                "subjects": [dataclasses.asdict(subject) for subject in subjects],
            },
            "summary": summarize(samples),
            "samples_s": samples,
        }
    common.write(name, options, result)
    for key, entry in result["summary"].items():
        ratio = f"   {entry['ratio']['median']:.2f} x {entry['floor']}" if "ratio" in entry else ""
        print(f"{key:>32}: {entry['median'] * 1e3:7.1f} ms{ratio}")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("saves.engine", __doc__)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--frameworks", nargs="*", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    options = common.parse(parser, arguments, QUICK)
    run("engine", [Subject(name, name) for name in options.frameworks], options)


if __name__ == "__main__":
    main()
