"""From samples of fits to the figures that are published. Knows no framework."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bench.stats import interval_of_median, percentile, ratio_of_medians, spread

BEFORE, AFTER = 2, 10  # steps shown around a save
WARMING = 2
"""Saves before the loop: for each buffer of a double-buffered system the one that fills it first,
when its memory need not be there yet. What they cost is shown by itself."""

Sample = dict[str, Any]


def summarize(rounds: Any, state_bytes: int, settings: Any) -> dict[str, Any]:
    """Everything round by round against the baselines of the same round, then the medians."""
    by_round = _by_round(rounds.samples, rounds.failed)
    memcpy_s = [statistics.median(values) for values in rounds.memcpy_s[1:]]
    subjects = {
        key: _subject(key, by_round, memcpy_s, state_bytes, settings) for key in by_round[0]
    }
    noise = [_none(fits, -1)["loop_s"] / _none(fits, 0)["loop_s"] for fits in by_round]
    return {
        "memcpy_s": spread(memcpy_s),
        "none_second_to_first": spread(noise),
        "subjects": subjects,
    }


def _by_round(samples: list[Sample], failed: dict[str, str]) -> list[dict[str, list[Sample]]]:
    """The fits of each round by subject, without the warm-up and what failed in between."""
    by_round: list[dict[str, list[Sample]]] = []
    for number in range(1, max(sample["round"] for sample in samples) + 1):
        fits: dict[str, list[Sample]] = {}
        for sample in samples:
            if sample["round"] == number and sample["subject"] not in failed:
                fits.setdefault(sample["subject"], []).append(sample)
        by_round.append(fits)
    return by_round


def _none(fits: dict[str, list[Sample]], which: int) -> Sample:
    return fits["none"][which]


def _mean(fits: dict[str, list[Sample]], key: str, what: str) -> float:
    """Of one subject in one round; only `none` has two fits in it."""
    return statistics.median(sample[what] for sample in fits[key])


def _subject(
    key: str,
    by_round: list[dict[str, list[Sample]]],
    memcpy_s: list[float],
    state_bytes: int,
    settings: Any,
) -> dict[str, Any]:
    def per_round(figure: Callable[[dict[str, list[Sample]]], float]) -> list[float]:
        return [figure(fits) for fits in by_round]

    def over(other: str, what: str) -> list[float]:
        return per_round(lambda fits: _mean(fits, key, what) - _mean(fits, other, what))

    fits = [sample for found in by_round for sample in found[key]]
    saves = max(fits[0]["saves"] - WARMING, 0)  # in the loop
    figures: dict[str, Any] = {
        "saves_per_loop": saves,
        "async_dispatch": all(sample["async_dispatch"] for sample in fits),
        "loop_s": spread([sample["loop_s"] for sample in fits]),
        "start_over_none_s": spread(over("none", "before_s")),
        "end_over_none_s": spread(over("none", "after_s")),
        "step_over_none_s": spread(
            [s / (settings.steps - settings.loop_begin) for s in over("none", "loop_s")]
        ),
    }
    for baseline in ("none", "sync"):
        if all(baseline in found for found in by_round):
            figures[f"loop_over_{baseline}"] = spread(
                per_round(lambda f, b=baseline: _mean(f, key, "loop_s") / _mean(f, b, "loop_s"))
            )
            if settings.idle:
                figures[f"loop_over_{baseline}_interval"] = interval_of_median(
                    per_round(lambda f, b=baseline: _mean(f, key, "loop_s") / _mean(f, b, "loop_s"))
                )
            if saves:
                stalls_s = [value / saves for value in over(baseline, "loop_s")]
                figures[f"stall_over_{baseline}_s"] = spread(stalls_s)
    if saves:
        figures["warming_stall_s"] = spread([s / WARMING for s in over("none", "warming_s")])
        figures |= _saving(key, fits, by_round, memcpy_s, state_bytes)
    if "steps_s" in fits[0]:
        figures["around_save_s"] = around(fits, settings.every)
    return figures


def _saving(
    key: str,
    fits: list[Sample],
    by_round: list[dict[str, list[Sample]]],
    memcpy_s: list[float],
    state_bytes: int,
) -> dict[str, Any]:
    def stalls_s(of: str) -> list[float]:
        return [
            (_mean(found, of, "loop_s") - _mean(found, "none", "loop_s"))
            / (found[of][0]["saves"] - WARMING)
            for found in by_round
        ]

    later_s = [value for sample in fits for value in sample["saves_s"][WARMING:]]
    captured_bytes = fits[0]["saves"] * state_bytes
    gigabytes = captured_bytes / 1e9
    cpu_s = [_mean(found, key, "cpu_s") - _mean(found, "none", "cpu_s") for found in by_round]
    figures: dict[str, Any] = {
        "stall_over_memcpy": ratio_of_medians(stalls_s(key), memcpy_s),
        "cpu_s_per_gb": spread([value / gigabytes for value in cpu_s]),
        "disk_bytes": max(sample["disk_bytes"] for sample in fits),
        **_parts_of_state(fits, captured_bytes),
    }
    if later_s:
        figures["blocked_s"] = {
            "p50": percentile(later_s, 50),
            "p99": percentile(later_s, 99),
            "max": max(later_s),
            "samples": len(later_s),
        }
    if all("stepsave" in found for found in by_round):
        ratio = ratio_of_medians(stalls_s(key), stalls_s("stepsave"))
        if ratio is not None:
            figures["stall_over_stepsave"] = ratio
    return figures


def _parts_of_state(fits: list[Sample], captured_bytes: int) -> dict[str, Any]:
    """What was written and had changed, as parts of all that was saved."""
    figures: dict[str, Any] = {}
    for name in ("disk_write_bytes", "written_bytes", "changed_bytes"):
        found = [sample.get(name) for sample in fits]
        if None not in found:
            figures[name.replace("bytes", "share")] = spread([n / captured_bytes for n in found])
    return figures


def around(fits: list[Sample], every: int) -> dict[str, Any]:
    """Step times from two before a save to ten after it, over all saves in the loop.

    The save is in step 0: that in which hooks of the subject took longest, the one that ends
    when the save is due or the next.
    """
    times: dict[int, list[float]] = {offset: [] for offset in range(-BEFORE, AFTER + 1)}
    for sample in fits:
        steps_s, blocked_s = sample["steps_s"], sample["blocked_s"]
        for done in range((WARMING + 1) * every, len(steps_s) - AFTER, every):
            at = done - 1 if blocked_s[done - 1] > blocked_s[done] else done
            for offset, values in times.items():
                values.append(steps_s[at + offset])
    spreads = [spread(values) for values in times.values()]
    return {"offsets": list(times)} | {
        which: [round(each[which], 6) for each in spreads] for which in ("median", "p10", "p90")
    }


def show(result: dict[str, Any]) -> None:
    """Prints a small table."""
    summary, settings = result["summary"], result["settings"]
    print(
        f"{result['benchmark']}: {settings['backend']}, {settings['state_bytes'] / 1e6:.1f} MB, "
        f"every {settings['every']}, batch size {settings['batch_size']}"
    )
    print(
        f"{'':>18}  loop s   x none  stall ms  x memcpy  x stepsave  blocked p50/p99 ms  CPU s/GB"
        "  first two ms"
    )
    for key, figures in summary["subjects"].items():
        line = f"{key:>18} {figures['loop_s']['median']:7.2f}"
        line += f" {figures['loop_over_none']['median']:8.3f}"
        if "stall_over_none_s" in figures:
            line += f" {figures['stall_over_none_s']['median'] * 1e3:9.1f}"
            line += f" {figures['stall_over_memcpy']['median']:9.2f}"
            ratio = figures.get("stall_over_stepsave")
            line += f" {ratio['median']:11.1f}" if ratio else f" {'-':>11}"
            blocked = figures.get("blocked_s")
            both = f"{blocked['p50'] * 1e3:.1f} / {blocked['p99'] * 1e3:.1f}" if blocked else "-"
            line += f" {both:>19} {figures['cpu_s_per_gb']['median']:9.2f}"
            line += f" {figures['warming_stall_s']['median'] * 1e3:13.1f}"
        print(line)
    for key, error in result["failed"].items():
        print(f"{key:>18} FAILED: {error}")
    for key, found in result["verified"].items():
        counts = ", ".join(
            f"{k.removesuffix('_variables')} {v}" for k, v in found["equal_variables"].items()
        )
        print(f"{key:>18} read back equal: {counts}; {found['disk_bytes'] / 1e6:.1f} MB on disk")
