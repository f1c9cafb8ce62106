"""How long does a `fit` take to go on in the midst of an epoch, by source of its data?

Each source is trained up to a batch far into an epoch, which leaves a backup, and to one at
its begin. Resumes of both are timed, from the begin of the epoch until a batch is trained:
what the far one takes longer is the way to its place. It is compared with what reading the
batches between takes. Every resumed batch must be the one that was due.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import common, machine
from bench.fits.subjects import ALL_BACKENDS
from bench.resume.sources import BATCH, SHUFFLE_BUFFER, SOURCES, VALUES, Images
from bench.stats import spread

NEAR = 2  # batches before the near resume
FAR, NEAR_RESUME, READ = "far", "near", "read_s"
QUICK = {"batch": 100, "repeats": 1}

Sample = dict[str, Any]


class Rounds:
    """Times all sources in each round, all that is compared for one source close together."""

    def __init__(self, trainings: dict[str, Any], batch: int) -> None:
        self.samples: list[Sample] = []
        self.failed: dict[str, str] = {}
        self._trainings = trainings
        self._batch = batch

    def run(self, repeats: int) -> None:
        """Round 0 warms up; it is in the samples, not in the summary."""
        sources = list(self._trainings)
        for source in sources:
            self._guarded(source, lambda s=source: self._interrupt(s))
            print(f"{source} interrupted", file=sys.stderr)
        for number in range(repeats + 1):
            for source in random.Random(number).sample(sources, len(sources)):
                if source not in self.failed:
                    self._guarded(source, lambda s=source, n=number: self._measure(s, n))
            print(f"round {number} of {repeats} done", file=sys.stderr)

    def _interrupt(self, source: str) -> None:
        self._trainings[source].build()
        for batch in (NEAR, self._batch):
            self._trainings[source].interrupt(batch)

    def _measure(self, source: str, number: int) -> None:
        training = self._trainings[source]
        fits: dict[str, Callable[[], Any]] = {
            NEAR_RESUME: lambda: training.resume(NEAR),
            FAR: lambda: training.resume(self._batch),
            READ: lambda: training.read_s(NEAR, self._batch),
        }
        order = random.Random(f"{source} {number}").sample(list(fits), len(fits))
        taken = {key: fits[key]() for key in order}
        self.samples.append(_rounded({"round": number, "source": source, **taken}))

    def _guarded(self, source: str, action: Callable[[], None]) -> None:
        """The other sources are still worth measuring; the run fails at its end."""
        try:
            action()
        except Exception as error:  # noqa: BLE001  whatever it is, it is a result
            traceback.print_exc()
            self.failed[source] = f"{type(error).__name__}: {error}"[:500]
            print(f"FAILED: {source}", file=sys.stderr)


def _rounded(value: Any) -> Any:
    """To the microsecond: what is beyond is not known."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def summarize(samples: Sequence[Sample], failed: dict[str, str]) -> dict[str, Any]:
    """By source; differences and ratios are taken round by round."""
    summary: dict[str, Any] = {}
    for source in dict.fromkeys(sample["source"] for sample in samples):
        rounds = [each for each in samples if each["source"] == source and each["round"]]
        if source in failed or not rounds:
            continue
        longer = {
            key: [each[FAR][key] - each[NEAR_RESUME][key] for each in rounds]
            for key in ("restore_s", "to_begin_s", "to_trained_s")
        }
        with_restore_s = map(sum, zip(longer["restore_s"], longer["to_trained_s"], strict=True))
        read_s = [each[READ] for each in rounds]
        summary[source] = {
            "longer_s": spread(longer["to_trained_s"]),
            "longer_to_begin_s": spread(longer["to_begin_s"]),
            "longer_with_restore_s": spread(list(with_restore_s)),
            "read_s": spread(read_s),
            "longer_over_read": common.ratios(longer["to_trained_s"], read_s),
            "near_s": spread([each[NEAR_RESUME]["to_trained_s"] for each in rounds]),
        }
    return {source: summary[source] for source in SOURCES if source in summary}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("resume", __doc__)
    parser.add_argument("--backend", choices=ALL_BACKENDS, default="jax")
    parser.add_argument("--batch", type=int, default=10_000, help="where to resume")
    parser.add_argument("--repeats", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--sources", nargs="*", choices=list(SOURCES), default=list(SOURCES))
    options = common.parse(parser, arguments, QUICK)
    if options.batch <= NEAR:
        parser.error(f"--batch must be more than {NEAR}")
    if options.repeats < 5 and not options.quick:
        parser.error("at least 5 repeats")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.environ["KERAS_BACKEND"] = options.backend  # before Keras is imported
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    from bench.resume.training import Training

    batches = options.batch * 6 // 5  # so that what is read ahead does not end near the place
    with tempfile.TemporaryDirectory(dir=options.directory) as where:
        facts = machine.describe(Path(where))
        images = Images(batches)
        trainings = {
            source: Training(source, images, Path(where) / str(number))
            for number, source in enumerate(options.sources)
        }
        rounds = Rounds(trainings, options.batch)
        rounds.run(options.repeats)
    settings = {
        "backend": options.backend,
        "batch": options.batch,
        "near_batch": NEAR,
        "batches": batches,
        "batch_size": BATCH,
        "values": VALUES,
        "shuffle_buffer": SHUFFLE_BUFFER,
        "repeats": options.repeats,
        "quick": options.quick,
    }
    result = {
        "benchmark": "resume",
        "machine": facts,
        "settings": settings,
        "failed": rounds.failed,
        "summary": summarize(rounds.samples, rounds.failed),
        "samples": rounds.samples,
    }
    common.write(f"resume-{options.backend}", options, result)
    _show(result)
    sys.exit(1 if rounds.failed else 0)


def _show(result: dict[str, Any]) -> None:
    settings = result["settings"]
    print(f"resume: {settings['backend']}, at batch {settings['batch']}")
    print(f"{'':>28}  longer ms  until begin  with restore  reading ms  part of it  near ms")
    for source, found in result["summary"].items():
        longer, begin, restore, read, near = (
            found[f"{key}_s"]["median"] * 1e3
            for key in ("longer", "longer_to_begin", "longer_with_restore", "read", "near")
        )
        part = found["longer_over_read"]["median"]
        line = f"{source:>28} {longer:10.1f} {begin:12.1f} {restore:13.1f}"
        print(f"{line} {read:11.1f} {part:11.3f} {near:8.1f}")
    for source, error in result["failed"].items():
        print(f"{source:>28} FAILED: {error}")


if __name__ == "__main__":
    main()
