"""Runs the matrix of exact resume, and makes docs/exact-resume.md from what passed.

python -m bench.publish.exact            # runs the tests on all backends: half an hour
python -m bench.publish.exact --only zoo # runs those that pytest's -k selects, and keeps the others
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
from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
JSON = DOCS / "exact-resume.json"
TABLE = DOCS / "exact-resume.md"
TEMPLATE = Path(__file__).with_name("exact-resume.md")
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
TESTS = ("tests/fit/test_exact_resume.py", "tests/fit/test_sources.py", "tests/fit/test_zoo.py")
PLACES = {"middle": "within an epoch", "validation": "in validation", "epoch end": "between epochs"}
ENDS = ("exception", "SIGTERM", "SIGKILL")

# Cases are named "exception middle, SIGKILL validation, SIGTERM epoch end-arrays".
_CHAIN = re.compile(r"equals_the_uninterrupted_one\[([\w, ]+)-(.+)\](?:@.*)?$")
_DOUBT = re.compile(r"test_position_only\[(.+)\](?:@.*)?$")
_MODEL = re.compile(r"model_of_every_kind\[(.+)\](?:@.*)?$")


def run_tests(backends: list[str], only: str | None) -> dict[str, dict]:
    found = json.loads(JSON.read_text()) if JSON.exists() else {}
    for backend in backends:
        with tempfile.TemporaryDirectory() as directory:
            report = Path(directory) / "report.xml"
            two_at_a_time = ["-n", "2", "--dist", "loadgroup"]
            command = [sys.executable, "-m", "pytest", *TESTS, *two_at_a_time, "-q"]
            command += ["-k", only] if only else []
            subprocess.run(
                [*command, f"--junitxml={report}", "-o", "junit_family=xunit1"],
                env=os.environ | {"KERAS_BACKEND": backend},
                check=False,
            )
            now = read_report(report)
            before = found.get(backend, {}) if only else {}
            found[backend] = {kind: before.get(kind, {}) | now[kind] for kind in now}
        import keras

        found[backend]["keras"] = keras.__version__
    return found


def read_report(path: Path) -> dict[str, dict]:
    cells: dict[str, dict[str, dict[str, bool]]] = {}
    doubts: dict[str, str] = {}
    models: dict[str, bool] = {}
    for case in ET.parse(path).getroot().iter("testcase"):
        passed = not any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
        if chain := _CHAIN.search(case.get("name", "")):
            ends, source = chain.groups()
            for end in ends.split(", "):
                how, where = end.split(" ", 1)
                cells.setdefault(source, {}).setdefault(where, {})[how] = passed
        elif model := _MODEL.search(case.get("name", "")):
            models[model[1]] = passed
        elif doubt := _DOUBT.search(case.get("name", "")):
            (reason,) = [p.get("value") for p in case.iter("property") if p.get("name") == "reason"]
            assert passed, doubt[1]
            doubts[doubt[1]] = re.sub(r"^.*another order: |\. Training goes on.*$", "", reason)
    return {"cells": cells, "doubts": doubts, "models": models}


def table(found: dict[str, dict]) -> str:
    cells = {backend: found[backend]["cells"] for backend in BACKENDS}
    sources = list(dict.fromkeys(source for c in cells.values() for source in c))
    models = {backend: found[backend].get("models", {}) for backend in BACKENDS}
    names = sorted({name for each in models.values() for name in each}, key=str.lower)
    verdicts = {True: "all", False: "**not all**", None: "not there"}
    reasons: dict[tuple[str, str], list[str]] = {}
    for backend, title in BACKENDS.items():
        for name, reason in found[backend]["doubts"].items():
            reasons.setdefault((name, reason), []).append(title)
    parts = {
        "places": ", ".join(PLACES.values()),
        "ends": "an exception, `SIGTERM` and `SIGKILL`",
        "tests": str(sum(len(w) for c in cells.values() for s in c.values() for w in s.values())),
        "versions": ", ".join(sorted({found[backend]["keras"] for backend in BACKENDS})),
        "data": rows(
            [source, *(verdict(cells[backend].get(source)) for backend in BACKENDS)]
            for source in sorted(sources, key=order)
        ),
        "doubts": rows([n, ", ".join(on), r] for (n, r), on in sorted(reasons.items())),
        "models": rows(
            [name, *(verdicts[models[backend].get(name)] for backend in BACKENDS)] for name in names
        ),
    }
    return re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], TEMPLATE.read_text())


def rows(cells: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


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
    parser.add_argument("--only", metavar="EXPRESSION")
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=list(BACKENDS))
    arguments = parser.parse_args()
    if not arguments.publish:
        found = run_tests(arguments.backends, arguments.only)
        JSON.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    TABLE.write_text(table(json.loads(JSON.read_text())))


if __name__ == "__main__":
    main()
