"""What does a variable cost, apart from its bytes? Few big and many small ones, same bytes.

The cost per variable is the stall over a warm copy of the same bytes by two threads, divided
by their number; and, without that floor, how much the stall grows from the fewest variables
to the most.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stepsave
from bench import common, floors, machine
from bench.common import FRAMEWORKS, UNSTEADY
from bench.stats import spread

MEMCPY_PER_ROUND = 3
QUICK = {"megabytes": 4, "rounds": 4}

Samples = dict[str, list[float]]


def key(framework: str, count: int, kind: str) -> str:
    """The name of a subject's samples in the JSON."""
    return f"{framework} {count} {kind}"


def measure(
    frameworks: Sequence[str], counts: Sequence[int], size_bytes: int, rounds: int, where: Path
) -> Samples:
    """Runs all frameworks and numbers of variables interleaved; raw samples in seconds."""
    samples: Samples = {}
    subjects = [(framework, count) for framework in frameworks for count in counts]
    trainings = {
        subject: common.Training(subject[0], subject[1], size_bytes // subject[1])
        for subject in subjects
    }
    savers = {
        (framework, count): stepsave.Checkpointer(where / f"{framework}-{count}")
        for framework, count in subjects
    }
    memcpy = floors.Memcpy(size_bytes)
    try:
        for subject, saver in savers.items():
            saver.prepare(trainings[subject].state)
        memcpy.measure_s()
        for step in range(rounds):
            copies_s = [memcpy.measure_s() for _ in range(MEMCPY_PER_ROUND)]
            samples.setdefault("memcpy", []).append(statistics.median(copies_s))
            for subject in random.Random(step).sample(subjects, len(subjects)):
                times = common.timed_save(savers[subject], step, trainings[subject].step())
                for kind in ("stall", "background", "durable"):
                    taken_s = getattr(times, f"{kind}_s")
                    samples.setdefault(key(*subject, kind), []).append(taken_s)
        for subject, saver in savers.items():
            common.check_restored(saver, trainings[subject].state, rounds - 1)
    finally:
        for saver in savers.values():
            saver.close()
        memcpy.close()
    return samples


def summarize(samples: Samples, frameworks: Sequence[str], counts: Sequence[int]) -> dict[str, Any]:
    """By framework and number of variables; the first two saves of each left out."""
    steady = {name: values[UNSTEADY:] for name, values in samples.items()}
    copies = steady["memcpy"]
    summary: dict[str, Any] = {"memcpy_s": spread(copies)}
    few, many = min(counts), max(counts)
    for framework in frameworks:
        entries: dict[str, Any] = {}
        for count in counts:
            stalls = steady[key(framework, count, "stall")]
            over = [(a - b) / count * 1e6 for a, b in zip(stalls, copies, strict=True)]
            entries[str(count)] = {
                "stall_s": spread(stalls),
                "background_s": spread(steady[key(framework, count, "background")]),
                "durable_s": spread(steady[key(framework, count, "durable")]),
                "stall_over_memcpy": common.ratios(stalls, copies),
                "over_memcpy_us_per_variable": spread(over),
            }
        for kind in ("stall", "background"):
            pairs = zip(
                steady[key(framework, many, kind)], steady[key(framework, few, kind)], strict=True
            )
            growth = [(a - b) / max(1, many - few) * 1e6 for a, b in pairs]
            entries[f"{kind}_growth_us_per_variable"] = spread(growth)
        summary[framework] = entries
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("saves.variables", __doc__)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--counts", nargs="*", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--frameworks", nargs="*", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    options = common.parse(parser, arguments, QUICK)
    size_bytes = options.megabytes * 1_000_000
    if any(size_bytes % (4 * count) for count in options.counts):
        parser.error("the bytes must be whole float32 numbers for each of --counts")
    with tempfile.TemporaryDirectory(dir=options.directory) as where:
        samples = measure(
            options.frameworks, options.counts, size_bytes, options.rounds, Path(where)
        )
        facts = machine.describe(Path(where))
    result = {
        "benchmark": "variables",
        "machine": facts,
        "settings": {
            "state_bytes": size_bytes,
            "frameworks": options.frameworks,
            "counts": options.counts,
            "rounds": options.rounds,
            "memcpy_per_round": MEMCPY_PER_ROUND,
            "quick": options.quick,
        },
        "summary": summarize(samples, options.frameworks, options.counts),
        "samples_s": samples,
    }
    common.write("variables", options, result)
    _show(result)


def _show(result: dict[str, Any]) -> None:
    summary = result["summary"]
    print(f"memcpy {summary['memcpy_s']['median'] * 1e3:.1f} ms")
    print("                stall ms  over memcpy, µs per variable  background ms  durable ms")
    for framework in result["settings"]["frameworks"]:
        for count in result["settings"]["counts"]:
            entry = summary[framework][str(count)]
            stall, background, durable = (
                entry[f"{kind}_s"]["median"] * 1e3 for kind in ("stall", "background", "durable")
            )
            over_us = entry["over_memcpy_us_per_variable"]["median"]
            print(
                f"{framework:>8} {count:>6} {stall:8.1f} {over_us:29.2f} "
                f"{background:14.1f} {durable:11.1f}"
            )
        growth = summary[framework]["stall_growth_us_per_variable"]["median"]
        print(f"{framework:>8} stall grows by {growth:.2f} µs per variable")


if __name__ == "__main__":
    main()
