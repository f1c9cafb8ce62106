"""How long does a process take from `fit` to the end of its first batch, and how much memory?

Each sample is a process of its own. One starts without a backup, saves, and kills itself; the
next ones go on from what it left, with the files of the backup in the page cache or dropped
from it, and are killed too. Each that resumed must have, before its first step, the very
variables that the one before it had at its last save.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import common, machine
from bench.fits.subjects import ALL_BACKENDS
from bench.fits.subjects import SUBJECTS as FITTED
from bench.saves import cold
from bench.starts.plan import COLD, EVERY, NONE, OURS, RESUME, SAVES, START, SUBJECTS, WARM, Task
from bench.starts.summary import summarize

WIDTHS = {"small": 1024, "large": 3072}  # of matrices: 4 MiB, and 36 MiB, which is three chunks
ADAM = 3  # arrays per weight
QUICK = {"megabytes": 10, "repeats": 1}
TIMEOUT_S = 900
TAIL_CHARACTERS = 2000

Sample = dict[str, Any]


class Rounds:
    """Starts the processes of all rounds, one at a time, and keeps every sample."""

    def __init__(self, backend: str, options: argparse.Namespace, where: Path) -> None:
        self.samples: list[Sample] = []
        self.failed: dict[str, str] = {}
        self.state_bytes = 0
        self._environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
        self._subjects: list[str] = options.subjects
        self._where = where
        self._width, self._layers = size(options)

    def run(self, repeats: int, *, warm_up: bool) -> None:
        """Round 0 warms up; it is in the samples, not in the summary."""
        for number in range(0 if warm_up else 1, repeats + 1):
            rng = random.Random(number)
            chains = {
                subject: self._chain(subject, number, rng)
                for subject in self._subjects
                if subject not in self.failed
            }
            while chains:
                subject = rng.choice(list(chains))
                if not self._go_on(subject, chains[subject]):
                    del chains[subject]
            print(f"round {number} of {repeats} done", file=sys.stderr)

    def _go_on(self, subject: str, chain: Iterator[None]) -> bool:
        """Starts the next process of a chain; tells whether there was one."""
        try:
            return next(chain, chain) is not chain
        except Exception as error:
            if subject in (NONE, OURS):
                raise
            # A peer may fail in any way on any backend. That is a result, and published.
            self.failed[subject] = f"{type(error).__name__}: {error}"[:500]
            print(f"FAILED: {subject}: {error}", file=sys.stderr)
            return False

    def _chain(self, subject: str, number: int, rng: random.Random) -> Iterator[None]:
        """The processes of one subject in a round: each goes on from what the last one left."""
        directory = Path(tempfile.mkdtemp(dir=self._where))
        left = self._process(Task(subject, START, str(directory), self._width, self._layers))
        self._keep(number, subject, START, None, left)
        yield
        for cache in rng.sample((WARM, COLD), 2) if subject != NONE else ():
            files = cold.files_below(directory)
            share = cold.drop(files)
            if cache == WARM:
                cold.warm(files)
            task = Task(subject, RESUME, str(directory), self._width, self._layers)
            found = self._process(task)
            check_resumed(subject, left, found)
            sample = self._keep(number, subject, RESUME, cache, found)
            sample["in_page_cache"] = share if cache == COLD else None
            left = found
            yield
        shutil.rmtree(directory)

    def _process(self, task: Task) -> Sample:
        os.sync()  # what the last one left dirty must not burden this one
        command = [sys.executable, "-m", "bench.starts.child", task.to_json()]
        ended = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=TIMEOUT_S,
        )
        if ended.returncode != -signal.SIGKILL or not ended.stdout:
            tail = ended.stderr.strip()[-TAIL_CHARACTERS:]
            raise RuntimeError(f"the process ended by itself, with {ended.returncode}: {tail}")
        found: Sample = json.loads(ended.stdout.splitlines()[-1])
        return found

    def _keep(
        self, number: int, subject: str, phase: str, cache: str | None, found: Sample
    ) -> Sample:
        self.state_bytes = found["state_bytes"]
        kept = {
            key: round(value, 6) if isinstance(value, float) else value
            for key, value in found.items()
            if key not in ("restored", "saved", "state_bytes")
        }
        for name in {"saves_s", "touched"} & set(found):
            kept[name] = [round(value, 6) for value in found[name]]
        sample = {"round": number, "subject": subject, "phase": phase, "cache": cache, **kept}
        self.samples.append(sample)
        return sample


def check_resumed(subject: str, left: Sample, found: Sample) -> None:
    """What was restored is what was saved, and `fit` goes on where it should.

    Raises:
        AssertionError: If anything differs.
    """
    for collection in SUBJECTS[subject].restores:
        saved, restored = left["saved"][collection], found["restored"][collection]
        assert restored == saved, f"{subject}: {collection} is {restored}, saved was {saved}"
    due = left["saved_at"] if SUBJECTS[subject].goes_on else 0
    assert found["began_at"] == due, f"{subject} went on at {found['began_at']}, not {due}"


def size(options: argparse.Namespace) -> tuple[int, int]:
    """Width and number of the layers whose weights and Adam slots have about the asked size."""
    width = WIDTHS[options.matrices]
    return width, max(1, round(options.megabytes * 1e6 / (ADAM * 4 * width * width)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("starts", __doc__)
    parser.add_argument("--backend", choices=(*ALL_BACKENDS, "all"), default="all")
    parser.add_argument("--megabytes", type=float, default=1000, help="of weights and Adam slots")
    parser.add_argument("--matrices", choices=list(WIDTHS), default="small", help="4 or 36 MiB")
    parser.add_argument("--repeats", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--subjects", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS))
    options = common.parse(parser, arguments, QUICK)
    if options.repeats < 5 and not options.quick:
        parser.error("at least 5 repeats")
    return options


def measure(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds on one backend."""
    with tempfile.TemporaryDirectory(dir=options.directory) as where:
        facts = machine.describe(Path(where))
        rounds = Rounds(backend, options, Path(where))
        rounds.run(options.repeats, warm_up=not options.quick)
    width, layers = size(options)
    left = [sample["in_page_cache"] for sample in rounds.samples if sample["cache"] == COLD]
    return {
        "benchmark": "starts",
        "machine": facts,
        "settings": {
            "backend": backend,
            "megabytes": options.megabytes,
            "state_bytes": rounds.state_bytes,
            "matrices": options.matrices,
            "matrix_bytes": 4 * width * width,
            "layers": layers,
            "every": EVERY,
            "saves": SAVES,
            "repeats": options.repeats,
            "quick": options.quick,
        },
        "cold": {
            "method": "fsync, posix_fadvise(POSIX_FADV_DONTNEED); checked by mincore",
            "in_page_cache_at_most": max(left, default=None),
        },
        "subjects": {key: SUBJECTS[key].how for key in options.subjects},
        "failed": rounds.failed,
        "summary": summarize(rounds.samples, rounds.failed),
        "samples": rounds.samples,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    for backend in ALL_BACKENDS if options.backend == "all" else (options.backend,):
        result = measure(backend, options)
        suffix = "" if options.matrices == "small" else f"-{options.matrices}"
        common.write(f"starts-{backend}-{options.megabytes:.0f}mb{suffix}", options, result)
        _show(result)


def _show(result: dict[str, Any]) -> None:
    settings = result["settings"]
    print(
        f"starts: {settings['backend']}, {settings['state_bytes'] / 1e6:.0f} MB, matrices of "
        f"{settings['matrix_bytes'] / 2**20:.0f} MiB"
    )
    print(f"{'':>40}  first batch s  over none s  x Keras's  peak GB  x training")
    for subject, kinds in result["summary"].items():
        for kind, found in kinds.items():
            if kind == "saves":
                continue
            line = f"{FITTED[subject].label:>26}, {kind:>12} {found['first_s']['median']:14.2f}"
            for key, width in (("over_none_s", 12), ("over_keras", 10)):
                text = f"{found[key]['median']:.2f}" if key in found else "-"
                line += f" {text:>{width}}"
            line += f" {found['peak_bytes']['median'] / 1e9:8.2f}"
            if "peak_over_training" in found:
                line += f" {found['peak_over_training']['median']:11.3f}"
            print(line)
        if "saves" in kinds:
            saves = kinds["saves"]
            line = f"first save {saves['first_s']['median'] * 1e3:.1f} ms, "
            line += f"{saves['first_over_later']['median']:.2f} x later ones"
            if "touched_after_first_batch" in saves:
                share = saves["touched_after_first_batch"]["median"]
                line += f", {share:.0%} of the buffers touched after the first batch"
            print(f"{FITTED[subject].label:>26}, {line}")
    for subject, error in result["failed"].items():
        print(f"{FITTED[subject].label:>26} FAILED: {error}")


if __name__ == "__main__":
    main()
