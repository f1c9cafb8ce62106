"""What does a save cost beside time? CPU, memory, what it leaves behind, syscalls, calls.

Every figure comes from a fresh process (`--child`) that does nothing but save. How each is
measured is in `bench.resources.usage`, what is compared in `bench.resources.savers`.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import common, machine
from bench.common import ARRAY_BYTES
from bench.resources import syscalls
from bench.resources.savers import PEERS, SUBJECTS
from bench.resources.usage import PROBES, SIDES, WARM_UP, Task
from bench.stats import spread

MEMORY_SLACK_BYTES = 64 << 20
SMALL_ARRAYS = 1000
KINDS = ("cpu", "memory", "growth", "syscalls", "operations")
QUICK = {
    "megabytes": 12,
    "small_megabytes": 4,
    "saves": 3,
    "many_saves": 33,
    "counted_saves": 3,
    "repeats": 1,
    "counts": [10, 100],
}

Found = dict[str, Any]
Samples = dict[str, dict[str, Any]]  # by subject and kind


class ChildFailedError(RuntimeError):
    """A probe ended badly; the text is the last line of what it said."""


class Children:
    """Runs probes, each in a process of its own, and keeps what they say."""

    def __init__(self, options: argparse.Namespace, where: Path) -> None:
        self.samples: Samples = {name: {} for name in options.subjects}
        self.failed: dict[str, str] = {}
        self._options = options
        self._where = where
        self.strace_problem = syscalls.problem(where)

    def run(self) -> None:
        options = self._options
        big = (options.megabytes * 1_000_000 // ARRAY_BYTES, ARRAY_BYTES)
        small = (SMALL_ARRAYS, options.small_megabytes * 1_000_000 // SMALL_ARRAYS)
        runs: dict[str, Callable[[str], Any]] = {
            "memory": lambda name: self._child("memory", name, *big, options.saves),
            "growth": lambda name: self._child("growth", name, *small, options.many_saves),
            "syscalls": lambda name: self._syscalls(name, *big),
            "operations": self._operations,
        }
        if "cpu" in options.kinds:
            for number in range(options.repeats):
                names = random.Random(number).sample(options.subjects, len(options.subjects))
                for name in names:
                    self._guarded("cpu", name, lambda n: self._child("cpu", n, *big, options.saves))
        for kind, run in runs.items():
            for name in options.subjects if kind in options.kinds else ():
                self._guarded(kind, name, run)

    def _guarded(self, kind: str, name: str, run: Callable[[str], Any]) -> None:
        if name in self.failed:
            return
        print(f"{kind}: {name}", file=sys.stderr)
        try:
            found = run(name)
        except ChildFailedError as error:
            if name not in PEERS:
                raise
            # A peer may fail in any way. That is a result, and published.
            traceback.print_exc()
            self.failed[name] = f"{kind}: {error}"[:500]
            return
        if kind == "cpu":
            self.samples[name].setdefault(kind, []).append(found)
        else:
            self.samples[name][kind] = found

    def _child(
        self,
        probe: str,
        name: str,
        arrays: int,
        array_bytes: int,
        saves: int,
        prefix: Sequence[str] = (),
    ) -> Found:
        with tempfile.TemporaryDirectory(dir=self._where) as directory:
            command = [*prefix, sys.executable, "-m", "bench.resources", "--child", probe]
            command += ["--subjects", name, "--arrays", str(arrays), "--saves", str(saves)]
            command += ["--array-bytes", str(array_bytes), "--directory", directory]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
        sys.stderr.write(ended.stderr)
        if ended.returncode:
            said = ended.stderr.strip().rpartition("\n")[2]
            raise ChildFailedError(said.replace(str(self._where), "…"))
        found: Found = json.loads(ended.stdout.splitlines()[-1])
        return found | {"arrays": arrays, "state_bytes": arrays * array_bytes, "saves": saves}

    def _syscalls(self, name: str, arrays: int, array_bytes: int) -> Found | None:
        """Of two children, one makes so many saves more; the rest cancels out."""
        if self.strace_problem:
            return None
        counted = self._options.counted_saves
        counts: list[dict[str, int]] = []
        found: Found = {}
        for saves in (WARM_UP, WARM_UP + counted):
            output = self._where / "strace"
            prefix = syscalls.command(output)
            found = self._child("saves", name, arrays, array_bytes, saves, prefix)
            counts.append(syscalls.read(output))
        return found | {"saves": counted} | syscalls.per_save(*counts, counted)

    def _operations(self, name: str) -> dict[str, Found]:
        options = self._options
        found: dict[str, Found] = {}
        for count in options.counts:
            array_bytes = options.small_megabytes * 1_000_000 // count // 4 * 4
            found[str(count)] = self._child(
                "operations", name, count, array_bytes, options.counted_saves
            )
        return found


def summarize(samples: Samples) -> dict[str, Any]:
    """The figures that are published, by subject and kind; null where there are none."""
    makers = {
        "cpu": _cpu,
        "memory": _memory,
        "growth": lambda found: {k: v for k, v in found.items() if k != "rss_bytes"},
        "syscalls": lambda found: found,
        "operations": _operations,
    }
    return {
        name: {kind: found[kind] and makers[kind](found[kind]) for kind in KINDS if kind in found}
        for name, found in samples.items()
    }


def _cpu(runs: list[Found]) -> dict[str, Any]:
    def per_gb(run: Found, *keys: str) -> float:
        return sum(run[key] for key in keys) / (run["saves"] * run["state_bytes"] / 1e9)

    return {
        "cpu_s_per_gb": spread([per_gb(run, "user_s", "system_s") for run in runs]),
        "user_s_per_gb": spread([per_gb(run, "user_s") for run in runs]),
        "system_s_per_gb": spread([per_gb(run, "system_s") for run in runs]),
        "wall_s_per_gb": spread([per_gb(run, "wall_s") for run in runs]),
        "minor_faults_per_save": spread([run["minor_faults"] / run["saves"] for run in runs]),
    }


def _memory(found: Found) -> dict[str, Any]:
    figures = dict(found)
    figures["peak_over_state"] = found["peak_bytes"] / found["state_bytes"]
    if "arena_bytes" in found:
        limit_bytes = 2 * found["arena_bytes"] + MEMORY_SLACK_BYTES
        figures["limit_bytes"] = limit_bytes
        figures["within_limit"] = found["peak_bytes"] <= limit_bytes
    return figures


def _operations(found: dict[str, Found]) -> dict[str, Any]:
    """Growth per variable is between the fewest and the most variables."""
    few, many = min(found, key=int), max(found, key=int)
    more = max(1, int(many) - int(few))
    return {
        side: {
            "calls_per_save": {count: _calls(each[side]) for count, each in found.items()},
            "calls_per_variable": (_calls(found[many][side]) - _calls(found[few][side])) / more,
            "most_called_per_save": found[many][side]["most_called_per_save"],
        }
        for side in SIDES
    }


def _calls(side: Found) -> float:
    return side["calls_per_save"] + side["c_calls_per_save"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("resources", __doc__)
    parser.add_argument("--megabytes", type=int, default=300, help="for CPU, memory, syscalls")
    parser.add_argument("--small-megabytes", type=int, default=40, help="for growth, operations")
    parser.add_argument("--saves", type=int, default=20, help="for CPU and memory")
    parser.add_argument("--many-saves", type=int, default=220, help="for growth")
    parser.add_argument("--counted-saves", type=int, default=10, help="for syscalls, operations")
    parser.add_argument("--repeats", type=int, default=3, help="processes per subject, for CPU")
    parser.add_argument("--counts", nargs="*", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--subjects", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--child", choices=list(PROBES), help="measure here, and print it")
    parser.add_argument("--arrays", type=int, help="of a child")
    parser.add_argument("--array-bytes", type=int, help="of a child")
    return common.parse(parser, arguments, QUICK)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.child:
        logging.getLogger("absl").setLevel(logging.ERROR)
        (name,) = options.subjects
        task = Task(name, options.arrays, options.array_bytes, options.saves, options.directory)
        print(json.dumps(PROBES[options.child](task)))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as where:
        facts = machine.describe(Path(where))
        children = Children(options, Path(where))
        children.run()
    keys = ("megabytes", "small_megabytes", "saves", "many_saves", "counted_saves", "repeats")
    result = {
        "benchmark": "resources",
        "machine": facts,
        "settings": {key: getattr(options, key) for key in (*keys, "counts", "kinds", "quick")}
        | {"warm_up_saves": WARM_UP, "small_arrays": SMALL_ARRAYS},
        "subjects": {name: {"settings": SUBJECTS[name].settings} for name in options.subjects},
        "failed": children.failed,
        "syscalls_null_because": children.strace_problem,
        "summary": summarize(children.samples),
        "samples": children.samples,
    }
    common.write("resources", options, result)
    _show(result)


def _show(result: dict[str, Any]) -> None:
    """A small table; a dash where nothing was measured."""
    print(f"{'':>25} CPU s/GB  peak / state  slope B/save  syncs+shards  syscalls  calls/variable")
    for name, found in result["summary"].items():
        cells = ["-"] * 6
        if figures := found.get("cpu"):
            cells[0] = f"{figures['cpu_s_per_gb']['median']:.3f}"
        if figures := found.get("memory"):
            cells[1] = f"{figures['peak_over_state']:.2f}"
        if figures := found.get("growth"):
            cells[2] = f"{figures['slope_bytes_per_save']:.0f}"
        if figures := found.get("syscalls"):
            cells[3] = f"{figures['syncs']:.1f} / {figures.get('shards', '-')}"
            cells[4] = f"{figures['all']:.0f}"
        if figures := found.get("operations"):
            sides = (figures[side]["calls_per_variable"] for side in SIDES)
            cells[5] = " + ".join(f"{calls:.3f}" for calls in sides)
        print(f"{name:>25} {cells[0]:>8}  {cells[1]:>12}  {cells[2]:>12}  {cells[3]:>12}", end="")
        print(f"  {cells[4]:>8}  {cells[5]:>14}")
    for name, reason in result["failed"].items():
        print(f"{name:>25} FAILED: {reason}")
    if result["syscalls_null_because"]:
        print(f"no syscalls: {result['syscalls_null_because']}")


if __name__ == "__main__":
    main()
