"""Runs the matrix of exact resume, and makes docs/exact-resume.md from what passed.

python -m bench.publish.exact            # runs the tests on all backends: a quarter of an hour
python -m bench.publish.exact --publish  # only makes the table from docs/exact-resume.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
JSON = DOCS / "exact-resume.json"
TABLE = DOCS / "exact-resume.md"
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
TESTS = ("tests/fit/test_exact_resume.py", "tests/fit/test_sources.py")
PLACES = {"middle": "within an epoch", "validation": "in validation", "epoch end": "between epochs"}
ENDS = ("exception", "SIGTERM", "SIGKILL")

# Cases are named "exception middle, SIGKILL validation, SIGTERM epoch end-arrays".
_CHAIN = re.compile(r"equals_the_uninterrupted_one\[([\w, ]+)-(.+)\](?:@.*)?$")
_DOUBT = re.compile(r"test_position_only\[(.+)\](?:@.*)?$")

HEAD = """# Exact resume

<!-- Made by `make exact-table` from docs/exact-resume.json. Do not edit. -->

A training that was interrupted and run again ends, bit for bit, as if it had not been
interrupted: the same weights, optimizer slots, seeds, metrics and logs of each epoch, the same
samples in the same order, none twice and none missing. Each cell is a test that compares all of
these: dropout, batch normalisation, shuffling, `EarlyStopping` with its best weights,
`ReduceLROnPlateau`, `LearningRateScheduler` and a callback with a state of its own; interrupted
**{places}**, one after the other in the same training, each by {ends};
{tests} interruptions in all.
"""

AFTER = """
- *exact*: all of the tests of that cell passed. *not tested*: Keras forks these processes, which
  a process with JAX or TensorFlow in it does not always survive. Workers of a `DataLoader` were
  therefore made with `multiprocessing_context="forkserver"` on these backends.
- Exact means: on the same machine, with the same number of threads, and as exact as the
  training itself: where two runs without interruption differ, so do these. Seed your script
  (`keras.utils.set_random_seed`; with a torch `DataLoader` on another backend
  `torch.manual_seed` too).
- Random numbers that are drawn while data is *loaded ahead*, by workers or by `tf.data`, are
  repeated as far as batches are read again; those of a `PyDataset` with workers are not.

## How the data is brought to its place

| data | passed over by | a save adds |
|---|---|---|
| arrays on JAX and PyTorch | drawing the indices only | the generators' states |
| arrays on TensorFlow | reading in `tf.data` | |
| `PyDataset` | handing out one batch instead of loading each | its `get_state()`, if it has one |
| `tf.data` | reading; iterators of earlier epochs are made again | |
| torch `DataLoader` without workers | drawing the indices only | its generators' states |
| torch `DataLoader` with workers | reading, as their generators move with what they load | |
| `StatefulDataLoader` on PyTorch, and on JAX with a CPU | its state | its state |
| grain `MapDataset` | slicing | |
| other grain data on JAX and PyTorch | its state | its state |
| Python generators, and all else | reading | a checksum of the first batches |

## Data of which only the position comes back

Training goes on at the right batch, and no batch is trained twice; but the data may come in
another order. A `stepsave.UnreproducibleDataWarning` says so when training begins:

| data | on | why |
|---|---|---|
"""

END = """
## What is restored besides

All that Keras's `save_weights` stores, below the model too: other optimizers, metrics that are
attributes, buffers of torch modules, what a layer keeps by `save_own_variables`. What a
`train_step` changes in plain Python attributes is not saved; a callback with `get_state()` and
`set_state(state)` carries it.

The position; Keras's seed generators and its global one; the generators of Python, NumPy, torch
and TensorFlow (eager operations); metrics within an epoch; the callbacks `EarlyStopping`,
`ReduceLROnPlateau`, `ModelCheckpoint`, `OrbaxCheckpoint`, `SwapEMAWeights`, `TensorBoard` (its
counters) and each with `get_state()` and `set_state(state)`; with `history="all"` the history.

Not restored: what callbacks have written elsewhere (`CSVLogger` without `append=True` begins its
file anew); random operations of TensorFlow within a `tf.function`, other than Keras's; logs of a
`train_step` that returns something else than the metrics, if validation was interrupted.
"""


def run_tests(backends: list[str]) -> dict[str, dict]:
    found = json.loads(JSON.read_text()) if JSON.exists() else {}
    for backend in backends:
        with tempfile.TemporaryDirectory() as directory:
            report = Path(directory) / "report.xml"
            two_at_a_time = ["-n", "2", "--dist", "loadgroup"]
            command = [sys.executable, "-m", "pytest", *TESTS, *two_at_a_time, "-q"]
            subprocess.run(
                [*command, f"--junitxml={report}", "-o", "junit_family=xunit1"],
                env=os.environ | {"KERAS_BACKEND": backend},
                check=False,
            )
            found[backend] = read_report(report)
        import keras

        found[backend]["keras"] = keras.__version__
    return found


def read_report(path: Path) -> dict[str, dict]:
    cells: dict[str, dict[str, dict[str, bool]]] = {}
    doubts: dict[str, str] = {}
    for case in ET.parse(path).getroot().iter("testcase"):
        passed = not any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
        if chain := _CHAIN.search(case.get("name", "")):
            ends, source = chain.groups()
            for end in ends.split(", "):
                how, where = end.split(" ", 1)
                cells.setdefault(source, {}).setdefault(where, {})[how] = passed
        elif doubt := _DOUBT.search(case.get("name", "")):
            (reason,) = [p.get("value") for p in case.iter("property") if p.get("name") == "reason"]
            assert passed, doubt[1]
            doubts[doubt[1]] = re.sub(r"^.*another order: |\. Training goes on.*$", "", reason)
    return {"cells": cells, "doubts": doubts}


def table(found: dict[str, dict]) -> str:
    cells = {backend: found[backend]["cells"] for backend in BACKENDS}
    tests = sum(len(w) for c in cells.values() for s in c.values() for w in s.values())
    lines = [
        HEAD.format(
            places=", ".join(PLACES.values()),
            ends="an exception, `SIGTERM` and `SIGKILL`",
            tests=tests,
        ),
        "| data | " + " | ".join(BACKENDS.values()) + " |",
        "|---|" + "---|" * len(BACKENDS),
    ]
    sources = list(dict.fromkeys(source for c in cells.values() for source in c))
    for source in sorted(sources, key=order):
        row = [verdict(cells[backend].get(source)) for backend in BACKENDS]
        lines.append(f"| {source} | " + " | ".join(row) + " |")
    versions = ", ".join(sorted({found[backend]["keras"] for backend in BACKENDS}))
    lines.append(f"\nKeras {versions}; the tests run on the oldest Keras that is admitted too.")
    lines.append(AFTER.rstrip("\n"))
    reasons: dict[tuple[str, str], list[str]] = {}
    for backend, title in BACKENDS.items():
        for name, reason in found[backend]["doubts"].items():
            reasons.setdefault((name, reason), []).append(title)
    lines += [f"| {n} | {', '.join(on)} | {r} |" for (n, r), on in sorted(reasons.items())]
    return "\n".join(lines) + "\n" + END


def order(source: str) -> tuple[int, str]:
    kinds = ("arrays", "PyDataset", "tf.data", "torch", "Stateful", "grain", "generator")
    return next(i for i, kind in enumerate(kinds) if source.startswith(kind)), source


def verdict(places: dict[str, dict[str, bool]] | None) -> str:
    if places is None:
        return "not tested"
    failed = [f"{PLACES[w]}: {h}" for w, hows in places.items() for h, ok in hows.items() if not ok]
    complete = set(places) == set(PLACES) and all(set(h) == set(ENDS) for h in places.values())
    assert complete, places
    return "exact" if not failed else "**not exact** (" + "; ".join(failed) + ")"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=list(BACKENDS))
    arguments = parser.parse_args()
    if not arguments.publish:
        found = run_tests(arguments.backends)
        JSON.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    TABLE.write_text(table(json.loads(JSON.read_text())))


if __name__ == "__main__":
    main()
