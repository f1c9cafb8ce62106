"""Runs all benchmarks, keeps their raw JSON and publishes the tables made from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench import engine, machine, publish


def main() -> None:
    engine.main(sys.argv[1:])
    parts = engine.RESULTS / machine.name() / "parts.json"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(Path(__file__).with_name("test_parts.py")),
            "--benchmark-only",
            "--benchmark-columns=median,iqr,rounds",
            f"--benchmark-json={parts}",
        ],
        check=True,
    )
    publish.main()


if __name__ == "__main__":
    main()
