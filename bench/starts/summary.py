"""From samples of processes to the figures that are published. Knows no framework."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from bench.common import ratios
from bench.starts.plan import COLD, KERAS, NONE, RESUME, START, SUBJECTS, WARM
from bench.stats import spread

Sample = dict[str, Any]
Round = dict[tuple[str, str], Sample]  # by subject and kind
KINDS = (START, f"{RESUME} {WARM}", f"{RESUME} {COLD}")


def kind(sample: Sample) -> str:
    """What of its subject a sample is, as it is named in the summary."""
    return START if sample["phase"] == START else f"{RESUME} {sample['cache']}"


def summarize(samples: Iterable[Sample], failed: dict[str, str]) -> dict[str, Any]:
    """By subject and kind; differences and ratios are taken round by round, without round 0."""
    by_number: dict[int, Round] = {}
    for sample in samples:
        if sample["round"] and sample["subject"] not in failed:
            found = by_number.setdefault(sample["round"], {})
            found[sample["subject"], kind(sample)] = sample
    rounds = list(by_number.values())
    summary: dict[str, Any] = {}
    measured = {subject for found in rounds for subject, _ in found}
    for subject in (each for each in SUBJECTS if each in measured):
        kinds = [each for each in KINDS if _all_have(rounds, subject, each)]
        summary[subject] = {each: _figures(rounds, subject, each) for each in kinds}
        if subject != NONE:
            summary[subject]["saves"] = _saves([found[subject, START] for found in rounds])
    return summary


def _all_have(rounds: list[Round], subject: str, which: str) -> bool:
    return all((subject, which) in found for found in rounds)


def _values(rounds: list[Round], subject: str, which: str, what: str) -> list[float]:
    return [found[subject, which][what] for found in rounds]


def _peaks(rounds: list[Round], subject: str, which: str) -> list[float]:
    """With stepsave's buffers counted whole, whatever part of them was there when it was killed."""
    return [
        found[subject, which]["peak_bytes"] + found[subject, which].get("absent_bytes", 0)
        for found in rounds
    ]


def _figures(rounds: list[Round], subject: str, which: str) -> dict[str, Any]:
    first_s, make_s, peak_first_bytes = (
        _values(rounds, subject, which, what) for what in ("first_s", "make_s", "peak_first_bytes")
    )
    peak_bytes = _peaks(rounds, subject, which)
    figures: dict[str, Any] = {
        "first_s": spread(first_s),
        "make_s": spread(make_s),
        "peak_bytes": spread(peak_bytes),
        "peak_first_bytes": spread(peak_first_bytes),
    }
    if subject != NONE and _all_have(rounds, NONE, START):
        none_s = _values(rounds, NONE, START, "first_s")
        figures["over_none_s"] = spread([a - b for a, b in zip(first_s, none_s, strict=True)])
        figures["peak_over_none"] = ratios(peak_bytes, _peaks(rounds, NONE, START))
    if subject != KERAS and _all_have(rounds, KERAS, which):
        figures["over_keras"] = ratios(first_s, _values(rounds, KERAS, which, "first_s"))
    if which != START:
        figures["peak_over_training"] = ratios(peak_bytes, _peaks(rounds, subject, START))
    return figures


def _saves(samples: list[Sample]) -> dict[str, Any]:
    """The first save of a training against those after it."""
    first_s = [sample["saves_s"][0] for sample in samples]
    later_s = [statistics.median(sample["saves_s"][1:]) for sample in samples]
    figures: dict[str, Any] = {
        "first_s": spread(first_s),
        "later_s": spread(later_s),
        "first_over_later": ratios(first_s, later_s),
    }
    if touched := [sample["touched"] for sample in samples if "touched" in sample]:
        after_first, before_save = zip(*touched, strict=True)
        figures["touched_after_first_batch"] = spread(after_first)
        figures["touched_before_first_save"] = spread(before_save)
        figures["compiling_gave_the_time"] = min(after_first) == 1
    return figures
