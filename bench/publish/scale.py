"""What `docs/scale.md` shows: measured with several processes, and simulated with thousands."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.goodput import (
    ACCELERATORS,
    Inputs,
    best_interval_s,
    mean_time_between_failures_s,
    share_lost,
)
from bench.publish.collected import Collected, Result, markdown_table, ms, number, subject
from bench.publish.details import machine_line
from bench.publish.pictures import FAINT, LOOKS, STYLE

RESTART_S = 300.0
"""Assumed, and the same for all: until a machine is replaced and all processes have started."""

LABELS = {
    "stepsave": "stepsave",
    "keras": "Keras BackupAndRestore",
    "orbax_keras_tuned": "Keras OrbaxCheckpoint, tuned",
}
_SHOWN = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 6 * 3600: "6 h"}
_PERCENTS = (0.01, 0.1, 1, 10, 100)


def inputs(collected: Collected) -> dict[str, Inputs]:
    """What was measured, by system; empty if something is missing."""
    fits, engine = collected.main_fits("jax"), collected.summary("engine")
    starts = [r for name, r in collected.results.items() if name.startswith("starts-jax")]
    resumes = max(starts, key=lambda r: len(r["summary"]), default=None)
    if fits is None or resumes is None or "jax durable" not in engine:
        return {}
    durable_s = engine["jax durable"]["median"]
    found: dict[str, Inputs] = {}
    for key in LABELS:
        stall = subject(fits, key)
        resume = resumes["summary"].get("orbax_keras" if key.startswith("orbax") else key, {})
        if stall is None or "resume warm" not in resume:
            continue
        stall_s = max(0.0, stall["stall_over_none_s"]["median"])
        own_s = stall_s if key == "keras" else max(durable_s, stall_s)
        longer_s = resume["resume warm"]["over_none_s"]["median"]
        found[key] = Inputs(stall_s, own_s, RESTART_S + longer_s)
    return found


def text(collected: Collected, base: Path) -> str:
    """The tables, and the picture, as a document in a folder shows them."""
    sections = (
        (
            "Measured: one state, saved by 1, 2 and 4 processes",
            collected.get("processes"),
            _processes,
        ),
        ("Measured: deciding who saves what", collected.get("planning"), _planning),
        ("Simulated: the share of time that failures cost", inputs(collected), _goodput),
    )
    lines: list[str] = []
    for title, found, table in sections:
        lines += [f"### {title}", "", *(table(found) if found else ["Not measured."]), ""]
    picture = collected.directory / "goodput.svg"
    if picture.exists():
        what = "Time lost to saves and failures, by the time between two saves"
        lines += [f"![{what}]({os.path.relpath(picture, base)})", ""]
    return "\n".join([f"On {machine_line(collected)}.", "", *lines])


def _processes(result: Result) -> list[str]:
    settings, summary = result["settings"], result["summary"]
    caption = (
        f"{settings['state_bytes'] / 1e6:.0f} MB of replicated JAX arrays; all processes on one "
        f"machine of {result['machine']['cpus']} cores with one disk, so that what falls with "
        "their number is bytes, and times as far as they do not share cores; "
        f"{settings['rounds']} rounds of {settings['saves']} saves, median (10th to 90th "
        "percentile). *Beyond the slowest writer*: from when the last process has written its "
        "shards until the backup is committed."
    )
    head = ["processes", "bytes of each", "stall", "durable", "beyond the slowest writer"]
    rows = [
        [
            count,
            f"{found['bytes']['median'] / 1e6:.0f} MB",
            ms(found["stall_s"]),
            ms(found["durable_s"]),
            ms(found["beyond_slowest_s"]),
            ms(found["restore_s"]),
        ]
        for count, found in summary.items()
    ]
    return [caption, "", *markdown_table([*head, "restore, each all of it"], rows)]


def _planning(result: Result) -> list[str]:
    settings, summary = result["settings"], result["summary"]
    mesh = settings["mesh"]
    said = (
        f"{settings['variables']:,} variables, {settings['state_bytes'] / 1e9:.0f} GB, on a mesh "
        f"of {mesh['data']} x {mesh['model']} devices of {settings['processes']:,} processes, "
        f"simulated by JAX on a CPU: {settings['chunks']:,} chunks. Once per structure of the "
        f"state, a process needs {number(summary['a process']['median'])} s to know which "
        f"{settings['parts_of_a_process']} parts are its own, process 0 "
        f"{number(summary['process 0']['median'])} s with the files that all backups have in "
        f"common ({settings['files_bytes'] / 1e6:.0f} MB). Loads differ by "
        f"{(settings['balance'] - 1) * 100:.1f} %."
    )
    return [said]


def _goodput(found: dict[str, Inputs]) -> list[str]:
    head = ["", "a save holds up", "a resume takes longer by"]
    for count in ACCELERATORS:
        hours = mean_time_between_failures_s(count) / 3600
        head.append(f"{count:,} accelerators, a failure every {number(hours)} h")
    rows: list[list[str]] = []
    for key, one in found.items():
        cells = [
            LABELS[key],
            f"{number(one.stall_s * 1e3)} ms",
            f"{number(one.resume_s - RESTART_S)} s",
        ]
        for count in ACCELERATORS:
            failing_s = mean_time_between_failures_s(count)
            best_s = best_interval_s(one, failing_s)
            lost = share_lost(one, best_s, failing_s) * 100
            cells.append(f"{number(lost)} % (saving every {number(best_s)} s)")
        rows.append(cells)
    return markdown_table(head, rows)


def draw(collected: Collected) -> None:
    """Draws the simulation beside the results, if there are inputs."""
    path = collected.directory / "goodput.svg"
    found = inputs(collected)
    if not found:
        path.unlink(missing_ok=True)
        return
    with mpl.style.context(["default", STYLE]):
        figure = _figure(found)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _figure(found: dict[str, Inputs]) -> Figure:
    figure = Figure(figsize=(8.2, 4.4))
    intervals_s = np.geomspace(1, 6 * 3600, 60)
    shared = None
    for place, count in enumerate(ACCELERATORS, 1):
        axes = shared = figure.add_subplot(1, len(ACCELERATORS), place, sharey=shared)
        failing_s = mean_time_between_failures_s(count)
        for key, one in found.items():
            color, marker = LOOKS[key]
            lost = [share_lost(one, interval_s, failing_s) * 100 for interval_s in intervals_s]
            axes.plot(intervals_s, lost, color=color, label=LABELS[key])
            best_s = best_interval_s(one, failing_s)
            axes.plot(
                [best_s], [share_lost(one, best_s, failing_s) * 100], marker=marker, color=color
            )
        anyway = RESTART_S / failing_s * 100
        label = f"starting again alone ({RESTART_S:.0f} s, assumed)"
        axes.axhline(anyway, color=FAINT, linestyle=":", linewidth=1, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(list(_SHOWN)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _SHOWN.get(round(x), "")))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(FixedLocator(_PERCENTS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", labelsize=7, rotation=45)
        axes.set_title(
            f"{count:,} accelerators\na failure every {number(failing_s / 3600)} h", fontsize=9
        )
        axes.set_xlabel("training between two saves")
        if place == 1:
            axes.set_ylabel("time lost")
            handles, labels = axes.get_legend_handles_labels()
    title = "Time lost to saves and failures, simulated; the mark is Young's interval"
    figure.suptitle(title, fontsize=10)
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=7)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure
