"""Writes the published figures: from committed JSON into the documents, never by hand.

    python -m bench.publish

The README gets what matters most, `bench/README.md` all of it, each between its own marks;
the pictures lie beside the JSON that they are made from.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bench.common import RESULTS
from bench.fits.subjects import SUBJECTS
from bench.publish import details, gpu_table, pictures, scale, targets
from bench.publish.collected import (
    BACKEND_NAMES,
    Collected,
    Result,
    markdown_table,
    ms,
    number,
    percent_over,
    subject,
    times,
)

BENCH = Path(__file__).parents[1]
README = BENCH.parent / "README.md"
DETAILS = BENCH / "README.md"
SCALE = BENCH.parent / "docs" / "scale.md"
NOT_MEASURED = "not measured"
NOISE = "ours is within noise"
SYNCS = {"everything": "yes", "data": "data only", "nothing": "no"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.publish", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all machines")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--details", type=Path, default=DETAILS)
    parser.add_argument("--scale", type=Path, default=SCALE)
    options = parser.parse_args(arguments)
    machines = [
        Collected.load(directory)
        for directory in sorted(options.results.iterdir())
        if directory.is_dir() and any(directory.glob("*.json"))
    ]
    gpus = [collected for collected in machines if gpu_table.results(collected)]
    others = [collected for collected in machines if collected not in gpus]
    for collected in others:
        pictures.draw(collected)
        scale.draw(collected)
    # The one with most results first: it says most. Of others the README has only targets' figures.
    others.sort(key=lambda collected: -len(collected.results))
    short = [overview(others, options.readme.parent)] if others else []
    replace(options.readme, "figures", "\n".join([*short, *gpu_table.overview(gpus)]))
    long = [*map(details.of_machine, others), *("\n".join(gpu_table.details(c)) for c in gpus)]
    replace(options.details, "details", "\n".join(long))
    figures = [scale.text(collected, options.scale.parent) for collected in others[:1]]
    replace(options.scale, "scale", "\n".join(figures))


def replace(document: Path, mark: str, text: str) -> None:
    """Replaces what is between two marks.

    Raises:
        ValueError: If the marks are not there.
    """
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, found_begin, rest = document.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{document.name} lacks the marks {begin} and {end}.")
    document.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")


def overview(machines: Sequence[Collected], base: Path) -> str:
    """What the README says: of the first machine, and what only others measured."""
    collected = machines[0]
    lines = [f"### {details.machine_line(collected)}", ""]
    main_fits = collected.main_fits("jax")
    if main_fits is None:
        lines += [f"Whole fits: {NOT_MEASURED} on this machine.", ""]
    else:
        lines += [*_systems(collected, main_fits), "", *_other_backends(collected), ""]
    lines += [*_pictures(collected, base), *targets.table(machines), ""]
    return "\n".join(lines)


def _systems(collected: Collected, result: Result) -> list[str]:
    settings, summary = result["settings"], result["summary"]
    step_ms = summary["subjects"]["none"]["loop_s"]["median"] / settings["loop_steps"] * 1e3
    caption = (
        f"`fit` on JAX: {settings['state_bytes'] / 1e6:.0f} MB of weights and Adam slots in "
        f"{settings['variables']} arrays, steps of {step_ms:.0f} ms, a save every "
        f"{settings['every']} of {settings['steps']} steps; {settings['repeats']} rounds, all "
        "systems in each, median (10th to 90th percentile; of ratios to our stall by resampling "
        "the rounds). The *true stall* is what saves add to the loop, divided by their number. The "
        "first two, for which memory may not be there yet, come before the loop and are a column "
        f"of their own. A warm copy of the state by two threads takes {ms(summary['memcpy_s'])}. "
        f"Two fits without a callback differ by {_noise(summary)}."
    )
    head = ["", "true stall per save", "against ours", "of each of the first two", "the loop"]
    head += ["held up, p50 / p99", "CPU s per GB", "durable"]
    rows = [_system(collected, result, key) for key in result["subjects"] if key != "none"]
    return [caption, "", *markdown_table(head, rows)]


def _noise(summary: Result) -> str:
    entry = summary["none_second_to_first"]
    low, high = ((entry[key] - 1) * 100 for key in ("p10", "p90"))
    return f"{low:+.1f} to {high:+.1f} %"


def _system(collected: Collected, result: Result, key: str) -> list[str]:
    label = SUBJECTS[key].label if key in SUBJECTS else key
    if key in result["failed"]:
        return [label, "failed, see bench/README.md", *[""] * 6]
    found = result["summary"]["subjects"][key]
    loop = percent_over(found["loop_over_none"])
    if "stall_over_none_s" not in found:
        return [label, "", "", "", loop, "", "", ""]
    against = "1" if key == "stepsave" else NOISE
    if key != "stepsave" and "stall_over_stepsave" in found:
        against = times(found["stall_over_stepsave"], bold=True)
    return [
        label,
        ms(found["stall_over_none_s"], bold=key == "stepsave"),
        against,
        ms(found["warming_stall_s"]),
        loop,
        _held_up(collected, result, key),
        number(found["cpu_s_per_gb"]["median"]),
        SYNCS[result["subjects"][key]["syncs"]],
    ]


def _held_up(collected: Collected, result: Result, key: str) -> str:
    """How long hooks held up the thread of `fit`.

    On JAX that is taken from fits that sync before each step: otherwise a hook that reads the
    state also waits for all steps that were dispatched ahead, which is no cost.
    """
    backend = result["settings"]["backend"]
    traced = max(collected.fits(backend, "trace"), key=lambda r: len(r["subjects"]), default=None)
    found = subject(traced if backend == "jax" else result, key) or {}
    if "blocked_s" not in found:
        return NOT_MEASURED
    return " / ".join(f"{number(found['blocked_s'][p] * 1e3)}" for p in ("p50", "p99")) + " ms"


def _other_backends(collected: Collected) -> list[str]:
    """True stalls where Keras runs on another backend, one column each."""
    found = {name: collected.main_fits(name) for name in BACKEND_NAMES if name != "jax"}
    results = {name: result for name, result in found.items() if result is not None}
    missing = [BACKEND_NAMES[name] for name in found if name not in results]
    lines = [f"{', '.join(missing)}: {NOT_MEASURED}.", ""] if missing else []
    if not results:
        return lines
    names = " | ".join(f"{BACKEND_NAMES[name]}, true stall" for name in results)
    lines += [f"| | {names} |", "|---|" + "---|" * len(results)]
    keys = [key for key, each in SUBJECTS.items() if each.loader is not None or each.is_floor]
    for key in keys:
        cells = [_stall(result, key) for result in results.values()]
        if any(cells):
            lines.append(f"| {SUBJECTS[key].label} | {' | '.join(cells)} |")
    return lines


def _stall(result: Result, key: str) -> str:
    if key in result["failed"]:
        return "failed, see bench/README.md"
    found = subject(result, key)
    if found is None:
        return ""
    text = ms(found["stall_over_none_s"])
    ratio = found.get("stall_over_stepsave")
    if key == "stepsave":
        return text
    return f"{text}, {number(ratio['median'])} x ours" if ratio else f"{text}, {NOISE}"


def _pictures(collected: Collected, base: Path) -> list[str]:
    shown = [
        ("overhead.svg", "How much longer the loop takes, by how often is saved"),
        ("steps.svg", "How long the steps around a save take"),
    ]
    lines: list[str] = []
    for name, text in shown:
        path = collected.directory / name
        if path.exists():
            lines += [f"![{text}]({os.path.relpath(path, base)})", ""]
    return lines
