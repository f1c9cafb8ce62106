"""What does saving cost a whole `fit`? All systems, interleaved, in one process per backend.

The true stall of a save is (loop with saving - loop without) / saves, whatever the system
claims: cost that it defers to later steps, or takes from them in the background, is in it. The
first two saves, for which memory may not be there yet, come before the loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import os
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from bench import common, floors, machine
from bench.fits import summary
from bench.fits.subjects import ALL_BACKENDS, SUBJECTS, saves_made
from bench.process import disk_write_bytes

MEMCPY_PER_FIT = 3
OURS = ("none", "sync", "idle", "stepsave")  # without these there is nothing to compare with
IDLE_SUBJECTS = ("bare", "sync", "idle")
LOOP_SUBJECTS = tuple(key for key in SUBJECTS if key != "bare")
TRAINED = ("everything", "adapters", "embeddings")
TRAINED_SUBJECTS = ("copy", "copy_write", "stepsave")
IDLE = {"repeats": 60, "megabytes": 0.05, "variables": 6, "step_ms": 0.35, "steps": 1000}
TRACE = {"steps": 87, "every": 15}
QUICK = {"megabytes": 3.0, "variables": 15, "every": 5, "steps": 18, "repeats": 2, "step_ms": 5.0}


class Rounds:
    """Runs the fits of all rounds and keeps every sample."""

    def __init__(self, options: argparse.Namespace, workload: Any, where: Path) -> None:
        self.samples: list[dict[str, Any]] = []
        self.memcpy_s: list[list[float]] = []
        self.failed: dict[str, str] = {}
        self.verified: dict[str, Any] = {}
        self._options = options
        self._workload = workload
        self._where = where

    def run(self) -> None:
        """Round 0 warms up; it is in the samples, not in the summary."""
        memcpy = floors.Memcpy(self._workload.state_bytes)
        try:
            for number in range(self._options.repeats + 1):
                others = random.Random(number).sample(
                    self._options.subjects, len(self._options.subjects)
                )
                self.memcpy_s.append([])
                for place, key in enumerate(("none", *others, "none")):
                    if key in self.failed:
                        continue
                    self._settle()
                    self.memcpy_s[-1] += [memcpy.measure_s() for _ in range(MEMCPY_PER_FIT)]
                    self._guarded(key, lambda k=key, n=number, p=place: self._fit(k, n, p))
                print(f"round {number} of {self._options.repeats} done", file=sys.stderr)
        finally:
            memcpy.close()

    def verify(self) -> None:
        """A save counts only if what was written can be read back, bit for bit."""
        for key in self._options.subjects:
            if SUBJECTS[key].loader is not None and key not in self.failed:
                self._guarded(key, lambda k=key: self._verify(k))

    def _guarded(self, key: str, action: Any) -> None:
        try:
            action()
        except Exception as error:
            if key in OURS:
                raise
            # A peer may fail in any way on any backend. That is a result, and published.
            traceback.print_exc()
            self.failed[key] = f"{type(error).__name__}: {error}"[:500]
            print(f"FAILED: {key}", file=sys.stderr)

    def _fit(self, key: str, number: int, place: int) -> None:
        from bench.fits.probe import dispatches_async, timed_fit

        options = self._options
        directory = self._fresh_directory()
        callbacks = SUBJECTS[key].make(directory, options.every)
        is_async = dispatches_async(callbacks)
        before_bytes = disk_write_bytes()
        times = timed_fit(
            self._workload,
            callbacks,
            options.steps,
            options.every,
            options.loop_begin,
            sync_each_step=options.trace,
        )
        sample = {
            "round": number,
            "place": place,
            "subject": key,
            "async_dispatch": is_async,
            "saves": saves_made(callbacks),
            "disk_bytes": _bytes_below(directory),
            "disk_write_bytes": disk_write_bytes() - before_bytes,
            **_told(callbacks),
            **dataclasses.asdict(times),
        }
        expected = SUBJECTS[key].saves(options.steps, options.every)
        if sample["saves"] != expected:
            raise RuntimeError(f"{key} made {sample['saves']} saves, not {expected}")
        if not options.trace:
            del sample["steps_s"]  # without a sync these are times of dispatch
        if options.idle:
            del sample["blocked_s"]
        self.samples.append(_rounded(sample))
        shutil.rmtree(directory)

    def _verify(self, key: str) -> None:
        from bench.fits import peers
        from bench.fits.workload import snapshot

        every = min(self._options.every, 5)
        directory = self._fresh_directory()
        callbacks = SUBJECTS[key].make(directory, every)
        self._workload.fit(callbacks, 2 * every)
        expected = snapshot(self._workload.model)
        loader = SUBJECTS[key].loader
        assert loader is not None
        found = peers.compare(loader(directory, self._workload), expected)
        if key == "stepsave":
            assert all(f"{n} of {n}" == text for text in found.values() for n in [text.split()[0]])
        self.verified[key] = {"equal_variables": found, "disk_bytes": _bytes_below(directory)}
        shutil.rmtree(directory)

    def _fresh_directory(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._where))

    @staticmethod
    def _settle() -> None:
        """What a fit leaves behind, garbage and dirty pages, must not burden the next one."""
        gc.collect()
        os.sync()


def _told(callbacks: list[Any]) -> dict[str, int | None]:
    """What callbacks say that changed and was written in all saves of the last fit."""
    for callback in callbacks:
        if hasattr(callback, "stats"):
            return common.told_bytes(callback.stats())
    return {}


def _bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _rounded(sample: dict[str, Any]) -> dict[str, Any]:
    """To the microsecond: what is beyond is not known."""

    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return round(value, 6) if isinstance(value, float) else value

    return {key: rounded(value) for key, value in sample.items()}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.parser("fits", __doc__)
    parser.add_argument("--backend", choices=ALL_BACKENDS, required=True)
    parser.add_argument("--megabytes", type=float, default=300, help="of weights and Adam slots")
    parser.add_argument("--variables", type=int, default=75, help="arrays in the state")
    parser.add_argument("--steps", type=int, default=53)
    parser.add_argument("--every", type=int, default=10, help="steps between saves")
    parser.add_argument("--repeats", type=int, default=7, help="rounds after the warm-up")
    parser.add_argument("--step-ms", type=float, default=50, help="a batch size is chosen for it")
    parser.add_argument("--batch-size", type=int, default=None, help="instead of --step-ms")
    parser.add_argument("--subjects", nargs="*", choices=list(SUBJECTS), default=None)
    parser.add_argument(
        "--trains", choices=TRAINED, help="a model of which that changes, and ours and floors only"
    )
    parser.add_argument("--trace", action="store_true", help="step times around a save")
    parser.add_argument("--idle", action="store_true", help="short steps, no save due")
    kinds = parser.parse_known_args(arguments)[0]
    if kinds.quick:
        parser.set_defaults(**QUICK)
    if kinds.trace:
        parser.set_defaults(**TRACE)
    if kinds.idle:
        parser.set_defaults(**IDLE)
        if kinds.quick:
            parser.set_defaults(steps=50, repeats=3)
    options = parser.parse_args(arguments)
    if options.subjects is None:
        subjects = IDLE_SUBJECTS if options.idle else LOOP_SUBJECTS
        subjects = TRAINED_SUBJECTS if options.trains else subjects
        options.subjects = [
            key
            for key, subject in SUBJECTS.items()
            if options.backend in subject.backends and key in subjects
        ]
    options.subjects = [key for key in options.subjects if key != "none"]
    if options.trace and options.quick:
        options.steps = (summary.WARMING + 1) * options.every + summary.AFTER + 2
    # One step before the first save that counts.
    first = (summary.WARMING + 1) * options.every
    options.loop_begin = 0 if options.idle else first - 1
    _check(parser, options, first)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace, first: int) -> None:
    if options.repeats < 5 and not options.quick:
        parser.error("at least 5 repeats")
    if options.idle:
        return
    if options.steps % options.every < min(3, options.every - 1):
        parser.error("let at least 3 steps follow the last save: cost may be deferred to them")
    if options.steps <= first:
        parser.error(f"more than {first} steps: the first {summary.WARMING} saves warm up")
    if options.trace and options.every < summary.BEFORE + summary.AFTER + 1:
        parser.error("saves must be further apart than the steps that are shown around one")
    if options.trace and options.steps < first + summary.AFTER + 1:
        parser.error("too few steps to show those around the first save that counts")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    os.environ["KERAS_BACKEND"] = options.backend  # before Keras is imported
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    from bench.fits import partly
    from bench.fits.workload import prepare

    build = partly.BUILDERS[options.trains or "everything"]
    workload = build(options.megabytes, options.variables)
    prepare(workload, options.steps, options.step_ms / 1e3, options.batch_size)
    with tempfile.TemporaryDirectory(dir=options.directory) as where:
        facts = machine.describe(Path(where))
        rounds = Rounds(options, workload, Path(where))
        rounds.run()
        rounds.verify()
    result = {
        "benchmark": _kind(options),
        "machine": facts,
        "settings": _settings(options, workload),
        "subjects": {key: SUBJECTS[key].describe() for key in ("none", *options.subjects)},
        "failed": rounds.failed,
        "verified": rounds.verified,
        "summary": summary.summarize(rounds, workload.state_bytes, options),
        "memcpy_s": [[round(value, 6) for value in values] for values in rounds.memcpy_s],
        "samples": rounds.samples,
    }
    common.write(_file_name(options), options, result)
    summary.show(result)


def _settings(options: argparse.Namespace, workload: Any) -> dict[str, Any]:
    return {
        "backend": options.backend,
        "megabytes": options.megabytes,
        "state_bytes": workload.state_bytes,
        "variables": options.variables,
        "trains": options.trains,
        "steps": options.steps,
        "every": options.every,
        "loop_steps": options.steps - options.loop_begin,
        "repeats": options.repeats,
        "batch_size": workload.batch_size,
        "calibrated_step_s": round(workload.step_s, 6),
        "quick": options.quick,
        "memcpy_per_fit": MEMCPY_PER_FIT,
    }


def _kind(options: argparse.Namespace) -> str:
    if options.trains is not None:
        return "changes in fits"
    return "trace" if options.trace else "idle" if options.idle else "fits"


def _file_name(options: argparse.Namespace) -> str:
    if options.idle:
        return f"idle-{options.backend}"
    kind = f"changes-{options.trains}" if options.trains else _kind(options)
    name = f"{kind}-{options.backend}-{options.megabytes:.0f}mb-every{options.every}"
    return name if options.variables in (75, QUICK["variables"]) else f"{name}-{options.variables}v"


if __name__ == "__main__":
    main()
