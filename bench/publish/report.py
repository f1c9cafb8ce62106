"""Runs the program of docs/report.md, and makes its text and picture from what it reported.

python -m bench.publish.report            # trains for some seconds, on PyTorch
python -m bench.publish.report --publish  # only makes them from docs/report.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.publish.documents import replace
from stepsave import SaveReport

DOCS = Path(__file__).parents[2] / "docs"
KEEP = """
import json
with open("report.json", "w") as file:
    json.dump(report.to_dict(), file)
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.publish.report", description=__doc__)
    parser.add_argument("--publish", action="store_true", help="train nothing")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    if not options.publish:
        facts = _rounded(run((options.docs / "report.md").read_text()))
        (options.docs / "report.json").write_text(f"{json.dumps(facts)}\n")
    publish(options.docs)


def run(page: str) -> dict[str, Any]:
    """Runs the first program of the page; returns what it reported."""
    program = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:  # on a disk, unlike /tmp perhaps
        subprocess.run(
            [sys.executable, "-c", program + KEEP],
            cwd=directory,
            # Of one thread: on a machine that others use too, several mostly wait for each other.
            env={"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"} | os.environ,
            check=True,
        )
        return json.loads(Path(directory, "report.json").read_text())


def publish(docs: Path) -> None:
    """Makes text and picture from the figures that are kept beside the page."""
    report = SaveReport.from_dict(json.loads((docs / "report.json").read_text()))
    replace(docs / "report.md", "report", f"```text\n{report}\n```")
    report.plot(docs / "report.svg")


def _rounded(value: Any) -> Any:
    """To microseconds: there is no more to see, and the file is half as large."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
