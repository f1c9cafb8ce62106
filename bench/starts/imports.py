"""How long does `import stepsave` take in a fresh process? Against `import numpy`, which it needs.

Neither imports Keras. Many processes, in changing order; what is imported is in the page cache.
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
QUICK = {"rounds": 4}
CODE = """
import json, sys, time
begin_s = time.perf_counter()
import {module}
taken_s = time.perf_counter() - begin_s
found = {{"import_s": taken_s, "modules": len(sys.modules), "keras": "keras" in sys.modules}}
print(json.dumps(found))
"""


def sample(module: str) -> dict[str, Any]:
    """One process: the import by itself, and all of the process."""
    begin_s = time.perf_counter()
    command = [sys.executable, "-c", CODE.format(module=module)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    process_s = time.perf_counter() - begin_s
    found: dict[str, Any] = json.loads(ended.stdout)
    assert not found.pop("keras"), f"{module} imported Keras"
    return found | {"process_s": process_s}


def summarize(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The first round warms up the page cache; it is in the samples only."""
    taken_s = {name: [each["import_s"] for each in found[1:]] for name, found in samples.items()}
    over_s = [a - b for a, b in zip(taken_s["stepsave"], taken_s["numpy"], strict=True)]
    return {
        name: {
            "import_s": spread(taken_s[name]),
            "process_s": spread([each["process_s"] for each in found[1:]]),
            "modules": found[-1]["modules"],
        }
        for name, found in samples.items()
    } | {"over_numpy_s": spread(over_s)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("starts.imports", __doc__)
    parser.add_argument("--rounds", type=int, default=40, help="processes per module")
    options = common.parse(parser, arguments, QUICK)
    samples: dict[str, list[dict[str, Any]]] = {module: [] for module in MODULES}
    for number in range(options.rounds):
        for module in random.Random(number).sample(MODULES, len(MODULES)):
            samples[module].append(sample(module))
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


if __name__ == "__main__":
    main()
