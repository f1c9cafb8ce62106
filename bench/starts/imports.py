"""How long does `import stepsave` take in a fresh process, and how long `stepsave --help`?

The import against `import numpy`, which it needs; the command against a process that does nothing.
None imports Keras. Many processes, in changing order; what is imported is in the page cache.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import common, machine
from bench.stats import spread

MODULES = ("numpy", "stepsave")
COMMANDS = {"help": ["-m", "stepsave.cli", "--help"], "nothing": ["-c", "pass"]}
QUICK = {"rounds": 4}
CODE = """
import json, sys, time
begin_s = time.perf_counter()
import {module}
taken_s = time.perf_counter() - begin_s
found = {{"import_s": taken_s, "modules": len(sys.modules), "keras": "keras" in sys.modules}}
print(json.dumps(found))
"""


def sample(subject: str) -> dict[str, Any]:
    """One process: the import by itself, and all of the process; or that alone of a command."""
    begin_s = time.perf_counter()
    if subject in COMMANDS:
        command = [sys.executable, *COMMANDS[subject]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return {"process_s": time.perf_counter() - begin_s}
    command = [sys.executable, "-c", CODE.format(module=subject)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    process_s = time.perf_counter() - begin_s
    found: dict[str, Any] = json.loads(ended.stdout)
    assert not found.pop("keras"), f"{subject} imported Keras"
    return found | {"process_s": process_s}


def summarize(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The first round warms up the page cache; it is in the samples only."""
    taken_s = {name: [each["import_s"] for each in samples[name][1:]] for name in MODULES}
    over_s = [a - b for a, b in zip(taken_s["stepsave"], taken_s["numpy"], strict=True)]
    return {
        **{
            name: {"process_s": spread([each["process_s"] for each in found[1:]])}
            | (
                {"import_s": spread(taken_s[name]), "modules": found[-1]["modules"]}
                if name in MODULES
                else {}
            )
            for name, found in samples.items()
        },
        "over_numpy_s": spread(over_s),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("starts.imports", __doc__)
    parser.add_argument("--rounds", type=int, default=40, help="processes of each kind")
    options = common.parse(parser, arguments, QUICK)
    subjects = [*MODULES, *COMMANDS]
    samples: dict[str, list[dict[str, Any]]] = {subject: [] for subject in subjects}
    for number in range(options.rounds):
        for subject in random.Random(number).sample(subjects, len(subjects)):
            samples[subject].append(sample(subject))
    result = {
        "benchmark": "imports",
        "machine": machine.describe(Path(__file__).parent),
        "settings": {"processes": options.rounds, "quick": options.quick},
        "summary": summarize(samples),
        "samples": samples,
    }
    common.write("imports", options, result)
    for module in MODULES:
        found = result["summary"][module]
        print(
            f"import {module:>8}: {found['import_s']['median'] * 1e3:6.1f} ms, "
            f"{found['modules']} modules"
        )
    for name in COMMANDS:
        print(f"{name:>15}: {result['summary'][name]['process_s']['median'] * 1e3:6.1f} ms")


if __name__ == "__main__":
    main()
