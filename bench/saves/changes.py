"""What does a save cost if only a part of the state has changed since the last ones?

States of equal size, of which between two saves everything changes, a twentieth of the arrays,
nothing, or a hundredth of the rows of one large table. Each sample is a process of its own,
which saves many times; they take turns in changing order. With `--against` another version's
code is run in other such processes, interleaved: what asking whether something has changed
costs a training in which everything does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import stepsave
from bench import common, floors, machine
from bench.common import FRAMEWORKS
from bench.process import disk_write_bytes
from bench.stats import spread

ALL = "all"
ARRAYS = 80
CHANGING = 4  # of them, if 95 % are frozen
ROW_VALUES = 256
ROWS_SHARE = 0.01
UNSTEADY = 4  # both backups must be there, and be known to be like their buffers
QUICK = {"megabytes": 8, "rounds": 2, "saves": 6}
THIS, OTHER = "this", "other"
MEASURED = ("stall_s", "stall_mean_s", "durable_s", "disk_bytes")

State = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A state, and what of it changes between two saves.

    Attributes:
        label: Its name in tables.
        arrays: How many arrays of equal size there are.
        changing: How many of them change altogether.
        rows: Whether rows change instead, of the one array, and how they are drawn: by
            "uniform" chance, or by "zipf", the first ones most.
    """

    label: str
    arrays: int = ARRAYS
    changing: int = 0
    rows: str | None = None


CASES = {
    ALL: Case("everything changes", changing=ARRAYS),
    "frozen": Case("95 % frozen", changing=CHANGING),
    "nothing": Case("nothing changes"),
    "uniform": Case("1 % of the rows of a table, uniform", arrays=1, rows="uniform"),
    "zipf": Case("1 % of the rows of a table, by Zipf", arrays=1, rows="zipf"),
}


def make_change(framework: str, case: Case, state: State) -> Callable[[], None]:
    """Returns what changes a state in place, each time to what it never was before."""
    if case.rows is None:
        # Spread over the state, as adapters are between the layers that they adapt.
        names = list(state)[:: case.arrays // case.changing] if case.changing else []
        add = _adder(framework)

        def change() -> None:
            for name in names:
                state[name] = add(state[name])

        return change
    (name,) = state
    rows = state[name].shape[0]
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, rows + 1) if case.rows == "zipf" else np.ones(rows)
    add_rows = _row_adder(framework)

    def change_rows() -> None:
        count = max(1, round(ROWS_SHARE * rows))
        ids = rng.choice(rows, count, replace=False, p=weights / weights.sum())
        state[name] = add_rows(state[name], ids)

    return change_rows


def _adder(framework: str) -> Callable[[Any], Any]:
    """Adds one to all values: another value each time, which flipping signs would not give."""
    if framework == "jax":
        import jax

        added = jax.jit(lambda array: array + 1, donate_argnums=0)
        return lambda array: added(array).block_until_ready()

    def add(array: Any) -> Any:
        array += 1
        return array

    return add


def _row_adder(framework: str) -> Callable[[Any, np.ndarray], Any]:
    if framework == "jax":
        import jax

        added = jax.jit(lambda array, ids: array.at[ids].add(1), donate_argnums=0)
        return lambda array, ids: added(array, ids).block_until_ready()

    def add(array: Any, ids: np.ndarray) -> Any:
        array[ids] += 1
        return array

    return add


def sample(
    framework: str, case: Case, size_bytes: int, saves: int, directory: Path | None
) -> dict[str, Any]:
    """In a fresh process: saves, each after a change; the last is restored and compared."""
    array_bytes = size_bytes // case.arrays // (4 * ROW_VALUES) * (4 * ROW_VALUES)
    state: State = common.make_state(framework, case.arrays, array_bytes)
    if case.rows:
        state = {name: array.reshape(-1, ROW_VALUES) for name, array in state.items()}
    change = make_change(framework, case, state)
    memcpy = floors.Memcpy(case.arrays * array_bytes)
    found: dict[str, Any] = {"stall_s": [], "durable_s": [], "disk_bytes": [], "memcpy_s": []}
    told: list[dict[str, int | None]] = []
    with (
        tempfile.TemporaryDirectory(dir=directory) as where,
        stepsave.Checkpointer(where) as saver,
    ):
        saver.prepare(state)
        for step in range(saves):
            change()
            found["memcpy_s"].append(memcpy.measure_s())
            before_bytes = disk_write_bytes()
            times, handle = common.save_timed(saver, step, state)
            found["disk_bytes"].append(disk_write_bytes() - before_bytes)
            found["stall_s"].append(times.stall_s)
            found["durable_s"].append(times.durable_s)
            told.append(common.told_bytes(handle))
        common.check_restored(saver, state, saves - 1)
        in_all = common.told_bytes(saver.stats())
    memcpy.close()
    for name, total in in_all.items():
        if total is not None:
            found[name] = [each[name] for each in told]
            assert total == sum(found[name]), f"{name}: {found[name]}, in all {total}"
    return found | {
        "state_bytes": case.arrays * array_bytes,
        "source": str(Path(stepsave.__file__).parents[1]),
    }


class Children:
    """Runs samples, each in a process that imports the library from one place."""

    def __init__(self, options: argparse.Namespace, where: str) -> None:
        self._options = options
        self._where = where
        self._sources = {THIS: Path(stepsave.__file__).parents[1]}
        if options.against is not None:
            self._sources[OTHER] = options.against.resolve()

    @property
    def keys(self) -> list[tuple[str, str, str]]:
        """What is measured: framework, case and whose code."""
        return [
            (framework, case, code)
            for framework in self._options.frameworks
            for case in self._options.cases
            for code in self._sources
            if code == THIS or case == ALL
        ]

    def run(self, framework: str, case: str, code: str) -> dict[str, Any]:
        options, source = self._options, self._sources[code]
        command = [sys.executable, "-m", "bench.saves.changes", "--child", framework, case]
        command += ["--directory", self._where, "--saves", str(options.saves)]
        command += ["--megabytes", str(options.megabytes)]
        root = Path(__file__).parents[2]  # the benchmark itself is this one, whatever it runs
        paths = [str(source), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        os.sync()
        ended = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        used = Path(found.pop("source"))
        assert used == source, f"{code}: the code of {used} was run, not that of {source}"
        return found


def summarize(samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By framework, case and code: each process counts once, ratios are by round."""
    steady = {key: [_steady(each) for each in found] for key, found in samples.items()}

    def values(key: str, what: str) -> list[float]:
        return [each[what] for each in steady[key]]

    summary: dict[str, Any] = {}
    for key, found in steady.items():
        framework, case, code = key.split()
        entry: dict[str, Any] = {name: spread(values(key, name)) for name in found[0]}
        entry["stall_over_memcpy"] = common.ratios(values(key, "stall_s"), values(key, "memcpy_s"))
        everything = f"{framework} {ALL} {THIS}"
        if everything in steady and key != everything:
            entry["over_all" if code == THIS else "over_this"] = {
                name: common.ratios(values(key, name), values(everything, name))
                for name in MEASURED
            }
        other = f"{framework} {case} {OTHER}"
        if code == THIS and other in steady:
            entry["over_other"] = {
                name: common.ratios(values(key, name), values(other, name)) for name in MEASURED
            }
        summary.setdefault(framework, {}).setdefault(case, {})[code] = entry
    return summary


def _steady(found: dict[str, Any]) -> dict[str, float]:
    """One process without its first saves: medians of times, means of bytes as parts of the state.

    What is done only now and then is in no median; so there is the mean of the stalls too.
    """
    taken = {"stall_mean_s": statistics.mean(found["stall_s"][UNSTEADY:])}
    for name, values in found.items():
        if not isinstance(values, list):
            continue
        if name.endswith("_bytes"):
            taken[name] = statistics.mean(values[UNSTEADY:]) / found["state_bytes"]
        else:
            taken[name] = statistics.median(values[UNSTEADY:])
    return taken


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("saves.changes", __doc__)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7, help="processes of each kind")
    parser.add_argument("--saves", type=int, default=20, help="in each process")
    parser.add_argument("--frameworks", nargs="*", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--against", type=Path, default=None, help="folder that has another version's stepsave/"
    )
    parser.add_argument("--child", nargs=2, help="framework and case: measure once, and print it")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    if options.saves < UNSTEADY + 2:
        parser.error(f"at least {UNSTEADY + 2} saves: the first {UNSTEADY} are not summed up")
    if options.against is not None and not (options.against / "stepsave/__init__.py").exists():
        parser.error(f"--against {options.against}: there is no stepsave/ in it")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    size_bytes = options.megabytes * 1_000_000
    if options.child:
        framework, case = options.child
        found = sample(framework, CASES[case], size_bytes, options.saves, options.directory)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as where:
        facts = machine.describe(Path(where))
        children = Children(options, where)
        samples: dict[str, list[dict[str, Any]]] = {" ".join(key): [] for key in children.keys}
        for number in range(options.rounds):
            for key in random.Random(number).sample(children.keys, len(children.keys)):
                samples[" ".join(key)].append(children.run(*key))
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
    result = {
        "benchmark": "changes",
        "machine": facts,
        "settings": {
            "state_bytes": size_bytes,
            "arrays": ARRAYS,
            "processes": options.rounds,
            "saves": options.saves,
            "unsteady": UNSTEADY,
            "row_bytes": 4 * ROW_VALUES,
            "against_another_version": options.against is not None,
            "quick": options.quick,
        },
        "cases": {name: CASES[name].label for name in options.cases},
        "summary": summarize(samples),
        "samples": samples,
    }
    common.write("changes", options, result)
    _show(result)


def _show(result: dict[str, Any]) -> None:
    print(f"{'':>24}  stall ms  x memcpy  durable ms  on disk  x stall  x on disk")
    for framework, cases in result["summary"].items():
        for case, codes in cases.items():
            for code, found in codes.items():
                line = f"{framework:>8} {case:>8} {code:>6} {found['stall_s']['median'] * 1e3:9.1f}"
                line += f" {found['stall_over_memcpy']['median']:9.2f}"
                line += f" {found['durable_s']['median'] * 1e3:11.1f}"
                line += f" {found['disk_bytes']['median']:8.3f}"
                if over := found.get("over_all") or found.get("over_this"):
                    line += (
                        f" {over['stall_s']['median']:8.2f} {over['disk_bytes']['median']:10.3f}"
                    )
                print(line)


if __name__ == "__main__":
    main()
