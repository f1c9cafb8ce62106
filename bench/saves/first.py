"""Is the first save slower than later ones? Each sample in a process of its own.

`prepare` does ahead what a first save would have to do, and has the memory of the buffers come in
the background. Where a model compiles meanwhile that is there by the first save (*later*); a save
right after it (*at once*) pays for it. Both are measured, and how long all of it takes to come. A
fresh process has nothing warm that a real first save would find cold. Python's
garbage collector runs before the first save: a full collection of what importing JAX leaves
behind takes as long as a save, and would fall into the first one by chance.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stepsave
from bench import common, floors, machine
from bench.common import ARRAY_BYTES, FRAMEWORKS
from bench.stats import spread

QUICK = {"megabytes": 20, "rounds": 4}
MEMCPY_SAMPLES = 5
LATER, AT_ONCE = WHEN = ("later", "at once")


def sample(
    framework: str, when: str, size_bytes: int, later: int, directory: Path | None
) -> dict[str, Any]:
    """In a fresh process: `prepare`, the first save, and those after it."""
    training = common.Training(framework, size_bytes // ARRAY_BYTES, ARRAY_BYTES)
    with (
        tempfile.TemporaryDirectory(dir=directory) as where,
        stepsave.Checkpointer(where) as saver,
    ):
        begin_s = time.perf_counter()
        saver.prepare(training.state)
        prepare_s = time.perf_counter() - begin_s
        if when == LATER:
            saver._capture._pool.wait_touched()
        there_s = time.perf_counter() - begin_s
        gc.collect()
        times = [common.timed_save(saver, step, training.step()) for step in range(later + 1)]
        common.check_restored(saver, training.state, later)
    memcpy = floors.Memcpy(size_bytes)
    memcpy_s = statistics.median(memcpy.measure_s() for _ in range(MEMCPY_SAMPLES))
    memcpy.close()
    return {
        "prepare_s": prepare_s,
        "there_s": there_s,
        "stalls_s": [save.stall_s for save in times],
        "durables_s": [save.durable_s for save in times],
        "memcpy_s": memcpy_s,
    }


def summarize(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """First against later saves of the same process, then over all processes."""
    first = [each["stalls_s"][0] for each in samples]
    later = [statistics.median(each["stalls_s"][1:]) for each in samples]
    memcpy = [each["memcpy_s"] for each in samples]
    return {
        "prepare_s": spread([each["prepare_s"] for each in samples]),
        "there_s": spread([each["there_s"] for each in samples]),
        "memcpy_s": spread(memcpy),
        "first_stall_s": spread(first),
        "later_stall_s": spread(later),
        "first_over_later": common.ratios(first, later),
        "first_over_memcpy": common.ratios(first, memcpy),
        "later_over_memcpy": common.ratios(later, memcpy),
        "first_durable_s": spread([each["durables_s"][0] for each in samples]),
        "later_durable_s": spread([statistics.median(each["durables_s"][1:]) for each in samples]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("saves.first", __doc__)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7, help="processes of each kind")
    parser.add_argument("--later", type=int, default=7, help="saves after the first")
    parser.add_argument("--frameworks", nargs="*", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--child", nargs=2, help="framework, and when: measure once, and print it")
    options = common.parse(parser, arguments, QUICK)
    size_bytes = options.megabytes * 1_000_000 // ARRAY_BYTES * ARRAY_BYTES
    if options.child:
        print(json.dumps(sample(*options.child, size_bytes, options.later, options.directory)))
        return
    kinds = [(framework, when) for framework in options.frameworks for when in WHEN]
    samples: dict[str, list[dict[str, Any]]] = {" ".join(kind): [] for kind in kinds}
    with tempfile.TemporaryDirectory(dir=options.directory) as where:
        facts = machine.describe(Path(where))
        for number in range(options.rounds):
            for kind in random.Random(number).sample(kinds, len(kinds)):
                samples[" ".join(kind)].append(_run_child(kind, options, where))
    result = {
        "benchmark": "first",
        "machine": facts,
        "settings": {
            "state_bytes": size_bytes,
            "arrays": size_bytes // ARRAY_BYTES,
            "processes": options.rounds,
            "later_saves": options.later,
            "quick": options.quick,
        },
        "summary": {
            framework: {when: summarize(samples[f"{framework} {when}"]) for when in WHEN}
            for framework in options.frameworks
        },
        "samples": samples,
    }
    common.write("first", options, result)
    _show(result["summary"])


def _run_child(kind: tuple[str, str], options: argparse.Namespace, where: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.saves.first", "--child", *kind]
    command += ["--directory", where]
    command += ["--megabytes", str(options.megabytes), "--later", str(options.later)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _show(summary: dict[str, Any]) -> None:
    for framework, by_when in summary.items():
        for when, entry in by_when.items():
            prepare, there, first, later = (
                entry[f"{key}_s"]["median"] * 1e3
                for key in ("prepare", "there", "first_stall", "later_stall")
            )
            print(
                f"{framework:>8} {when:>8}: prepare {prepare:6.1f}, begun after {there:7.1f} ms, "
                f"first stall {first:6.1f} ms, later {later:6.1f} ms, "
                f"{entry['first_over_later']['median']:.2f} x"
            )


if __name__ == "__main__":
    main()
