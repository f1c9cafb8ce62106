"""Runs all benchmarks, keeps their raw JSON, and publishes the tables and pictures.

python -m bench                     # everything: about four and a half hours
python -m bench fits trace publish  # some of it
python -m bench --quick             # tiny, elsewhere: to see that everything runs
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import machine
from bench.common import RESULTS
from bench.publish import documents

OTHER_BACKENDS = ("copy", "copy_write", "stepsave", "keras", "orbax_keras_tuned", "dcp")
SWEPT = ("stepsave", "keras", "orbax_keras_tuned")
SCALED = ("stepsave", "keras")
TRACED = ("stepsave", "keras", "orbax_keras", "orbax_keras_tuned", "orbax_async")
# Many saves: the first two of each fit write everything.
CHANGES = "--every 3 --steps 65 --repeats 5"
TEST_PARTS = Path(__file__).parent / "saves" / "test_parts.py"


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One child process: a benchmark, which writes one JSON."""

    group: str
    module: str
    arguments: str = ""

    def command(self, results: Path, *, quick: bool) -> list[str]:
        command = [sys.executable, "-m", self.module, *shlex.split(self.arguments)]
        return [*command, "--results", str(results), *(["--quick"] if quick else [])]


def _fits(group: str, arguments: str, subjects: tuple[str, ...] = ()) -> Run:
    chosen = f" --subjects {' '.join(subjects)}" if subjects else ""
    return Run(group, "bench.fits", arguments + chosen)


RUNS = (
    Run("engine", "bench.saves.engine"),
    Run("engine", "bench.saves.first"),
    Run("engine", "bench.saves.variables"),
    Run("engine", "bench.saves.writers"),
    Run("engine", "bench.saves.restore"),
    Run("engine", "bench.saves.buckets"),
    Run("engine", "bench.saves.processes"),
    Run("engine", "bench.saves.planning"),
    _fits("fits", "--backend jax --steps 73"),
    _fits("fits", "--backend tensorflow --repeats 5", OTHER_BACKENDS[:-1]),
    _fits("fits", "--backend torch --repeats 5", OTHER_BACKENDS),
    _fits("idle", "--backend jax --idle --repeats 60"),
    _fits("idle", "--backend torch --idle --steps 500 --repeats 30"),
    _fits("idle", "--backend tensorflow --idle --steps 500 --repeats 60"),
    _fits("trace", "--backend jax --trace --repeats 5", TRACED),
    # Not 10,000 variables: Orbax takes half an hour to have its calls counted.
    Run("resources", "bench.resources", "--counts 100 1000"),
    Run("resume", "bench.resume", "--backend jax"),
    Run("resume", "bench.resume", "--backend tensorflow"),
    Run("resume", "bench.resume", "--backend torch"),
    Run("starts", "bench.starts.imports"),
    Run("starts", "bench.starts", "--megabytes 1000"),
    Run("starts", "bench.starts", "--backend jax --megabytes 100"),
    Run("starts", "bench.starts", "--backend jax --megabytes 2000"),
    Run("starts", "bench.starts", "--backend jax --megabytes 1000 --matrices large"),
    Run("changes", "bench.saves.changes"),
    _fits("changes", f"--backend jax --trains everything {CHANGES}"),
    _fits("changes", f"--backend jax --trains adapters {CHANGES}"),
    _fits("changes", f"--backend jax --trains embeddings --batch-size 8 {CHANGES}"),
    _fits("sweep", "--backend jax --every 1 --steps 12 --repeats 5", SWEPT),
    _fits("sweep", "--backend jax --every 5 --steps 43 --repeats 5", SWEPT),
    _fits("sweep", "--backend jax --megabytes 10 --repeats 5", SCALED),
    _fits("sweep", "--backend jax --megabytes 100 --repeats 5", SCALED),
    _fits("sweep", "--backend jax --megabytes 1000 --repeats 5", SCALED),
    _fits("sweep", "--backend jax --megabytes 40 --variables 100 --repeats 5", SCALED),
    _fits("sweep", "--backend jax --megabytes 40 --variables 1000 --repeats 5", SCALED),
    _fits("sweep", "--backend jax --megabytes 40 --variables 10000 --repeats 5", SCALED),
)
# The same questions, tiny: each path through the code once.
QUICK_RUNS = (
    *(run for run in RUNS if run.group in ("engine", "idle", "resources", "resume")),
    Run("starts", "bench.starts.imports"),
    Run("starts", "bench.starts"),
    Run("starts", "bench.starts", "--backend torch --matrices large --subjects none stepsave"),
    Run("changes", "bench.saves.changes"),
    _fits("changes", "--backend jax --trains everything"),
    _fits("changes", "--backend jax --trains adapters"),
    _fits("changes", "--backend jax --trains embeddings"),
    _fits("fits", "--backend jax"),
    _fits("fits", "--backend tensorflow"),
    _fits("fits", "--backend torch"),
    _fits("sweep", "--backend jax --every 1", SWEPT),
    _fits("sweep", "--backend jax --every 2", SWEPT),
    _fits("sweep", "--backend jax --megabytes 1", SCALED),
    _fits("sweep", "--backend jax --megabytes 1 --variables 300", SCALED),
    _fits("trace", "--backend jax --trace", TRACED),
)
GROUPS = (
    *("engine", "changes", "fits", "sweep", "idle", "trace", "resources", "resume", "starts"),
    *("parts", "publish"),
)


def parts(results: Path, *, quick: bool) -> list[str]:
    """The command for the parts of a save by themselves, by pytest-benchmark."""
    command = [sys.executable, "-m", "pytest", str(TEST_PARTS), "-p", "no:cacheprovider"]
    if quick:
        return [*command, "--benchmark-disable"]
    columns = "--benchmark-columns=median,iqr,rounds"
    return [*command, "--benchmark-only", columns, f"--benchmark-json={results / 'parts.json'}"]


def _without_host_name(path: Path) -> None:
    """A result names no host; pytest-benchmark would."""
    result = json.loads(path.read_text())
    result["machine_info"].pop("node", None)
    path.write_text(json.dumps(result, indent=1) + "\n")


def measure(groups: list[str], results: Path, *, quick: bool) -> list[str]:
    """Runs what was asked for, to the end; returns the commands that failed."""
    failed: list[str] = []
    commands = [
        run.command(results, quick=quick)
        for run in (QUICK_RUNS if quick else RUNS)
        if run.group in groups
    ]
    if "parts" in groups:
        commands.append(parts(results, quick=quick))
    for number, command in enumerate(commands, 1):
        shown = shlex.join(command[1:])
        print(f"== {number} of {len(commands)}: python {shown}", flush=True)
        begin_s = time.monotonic()
        if subprocess.run(command, check=False).returncode:
            failed.append(shown)
        print(f"-- {time.monotonic() - begin_s:.0f} s", flush=True)
    if (path := results / "parts.json").exists():
        _without_host_name(path)
    return failed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="tiny, into a temporary directory")
    parser.add_argument("--results", type=Path, default=None, help="folder of all machines")
    options = parser.parse_args(arguments)
    groups = options.groups or list(GROUPS)
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    root = options.results or RESULTS
    if options.quick and options.results is None:
        root = Path(tempfile.mkdtemp(prefix="bench-"))
    results = root / machine.name()
    results.mkdir(parents=True, exist_ok=True)
    failed = measure(groups, results, quick=options.quick)
    if "publish" in groups:
        documents.main(_publish_arguments(root))
    if options.quick:
        print(f"quick results are in {root}")
    for command in failed:
        print(f"FAILED: python {command}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _publish_arguments(root: Path) -> list[str]:
    """Results elsewhere are published elsewhere: into copies of the documents beside them."""
    if root == RESULTS:
        return []
    copies = {"--readme": root / "README.md", "--details": root / "bench-README.md"}
    for source, copy in zip((documents.README, documents.DETAILS), copies.values(), strict=True):
        shutil.copy(source, copy)
    pairs = ((name, str(path)) for name, path in copies.items())
    return ["--results", str(root), *(text for pair in pairs for text in pair)]


if __name__ == "__main__":
    main()
