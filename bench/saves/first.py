"""Is the first save slower than later ones? Each sample in a process of its own.

`prepare` does ahead what a first save would have to do; what it takes is reported beside
the stalls. A fresh process has nothing warm that a real first save would find cold. Python's
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


def sample(framework: str, size_bytes: int, later: int, directory: Path | None) -> dict[str, Any]:
    """In a fresh process: `prepare`, the first save, and those after it."""
    state = common.make_state(framework, size_bytes // ARRAY_BYTES, ARRAY_BYTES)
    with (
        tempfile.TemporaryDirectory(dir=directory) as where,
        stepsave.Checkpointer(where) as saver,
    ):
        begin_s = time.perf_counter()
        saver.prepare(state)
        prepare_s = time.perf_counter() - begin_s
        gc.collect()
        times = [common.timed_save(saver, step, state) for step in range(later + 1)]
        common.check_restored(saver, state, later)
    memcpy = floors.Memcpy(size_bytes)
    memcpy_s = statistics.median(memcpy.measure_s() for _ in range(MEMCPY_SAMPLES))
    memcpy.close()
    return {
        "prepare_s": prepare_s,
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
    parser.add_argument("--rounds", type=int, default=10, help="processes per framework")
    parser.add_argument("--later", type=int, default=10, help="saves after the first")
    parser.add_argument("--frameworks", nargs="*", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--child", choices=FRAMEWORKS, help="measure once, here, and print it")
    options = common.parse(parser, arguments, QUICK)
    size_bytes = options.megabytes * 1_000_000 // ARRAY_BYTES * ARRAY_BYTES
    if options.child:
        print(json.dumps(sample(options.child, size_bytes, options.later, options.directory)))
        return
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in options.frameworks}
    with tempfile.TemporaryDirectory(dir=options.directory) as where:
        facts = machine.describe(Path(where))
        for number in range(options.rounds):
            for name in random.Random(number).sample(options.frameworks, len(samples)):
                samples[name].append(_run_child(name, options, where))
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
        "summary": {name: summarize(found) for name, found in samples.items()},
        "samples": samples,
    }
    common.write("first", options, result)
    _show(result["summary"])


def _run_child(framework: str, options: argparse.Namespace, where: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.saves.first", "--child", framework]
    command += ["--directory", where]
    command += ["--megabytes", str(options.megabytes), "--later", str(options.later)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _show(summary: dict[str, Any]) -> None:
    for name, entry in summary.items():
        first, later = (entry[f"{key}_stall_s"]["median"] * 1e3 for key in ("first", "later"))
        print(
            f"{name:>8}: prepare {entry['prepare_s']['median'] * 1e3:7.1f} ms, first stall "
            f"{first:6.1f} ms, later {later:6.1f} ms, "
            f"{entry['first_over_later']['median']:.2f} x"
        )


if __name__ == "__main__":
    main()
