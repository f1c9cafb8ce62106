"""Pictures of the results, by matplotlib.

SVG, the same bytes from the same results: letters are drawn as paths of the font that comes with
matplotlib, and nothing in the file tells when it was made. They are white, so that they can be
read on light and dark pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.fits import summary
from bench.fits.subjects import SUBJECTS
from bench.publish.collected import Collected, Result

SIZE_INCHES = (8.2, 4.2)
PLOT = {"left": 0.085, "right": 0.69, "top": 0.84, "bottom": 0.13}
LINEAR_PERCENT = 10  # below, the axis is linear: a spread may reach to zero and less
PERCENTS = (0, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
MILLISECONDS = (10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000, 2000)
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#d8dee4",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "stepsave",
}
FAINT = "#59636e"
# Color and marker: lines can be told apart without colors too.
LOOKS = {
    "none": ("#8c959f", ""),
    "stepsave": ("#0969da", "o"),
    "keras": ("#bc4c00", "s"),
    "orbax_keras": ("#8250df", "^"),
    "orbax_keras_tuned": ("#bf3989", "v"),
    "orbax_async": ("#1a7f37", "D"),
}


def draw(collected: Collected) -> None:
    """Draws what there are results for, beside them."""
    for name, make in (("overhead", overhead), ("steps", steps)):
        path = collected.directory / f"{name}.svg"
        # The style of whoever runs this must not show.
        with mpl.style.context(["default", STYLE]):
            figure = make(collected)
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def overhead(collected: Collected) -> Figure | None:
    """How much longer the loop takes, by how often is saved."""
    runs = collected.sweep("every")
    if len({run["settings"]["every"] for run in runs}) < 2:
        return None
    settings = runs[0]["settings"]
    figure, axes = _canvas(
        "How much longer the training loop takes",
        f"Keras fit on JAX, {_size(settings)}, steps of {_step(runs[0])}; median, and 10th to "
        "90th percentile of the rounds",
    )
    found: dict[str, list[tuple[int, Result]]] = {}
    for run in runs:
        for key, figures in run["summary"]["subjects"].items():
            if key in LOOKS and "stall_over_none_s" in figures:
                at = (run["settings"]["every"], figures["loop_over_none"])
                found.setdefault(key, []).append(at)
    for place, (key, points) in enumerate(found.items()):
        # Side by side, or the spreads would hide each other.
        shift = 1 + 0.03 * (place - (len(found) - 1) / 2)
        percents = {
            which: [(entry[which] - 1) * 100 for _, entry in points]
            for which in ("median", "p10", "p90")
        }
        axes.errorbar(
            [every * shift for every, _ in points],
            percents["median"],
            yerr=_lengths(percents),
            capsize=2.5,
            elinewidth=1,
            **_look(key),
        )
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=LINEAR_PERCENT)
    entries = [entry for points in found.values() for _, entry in points]
    # By itself matplotlib would leave a third of the picture empty below zero.
    least = (min(entry["p10"] for entry in entries) - 1) * 100
    axes.set_ylim(min(0, least) - 1, (max(entry["p90"] for entry in entries) - 1) * 120)
    every = sorted({run["settings"]["every"] for run in runs})
    axes.xaxis.set_major_locator(FixedLocator(every))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_xlabel("steps from one save to the next")
    axes.set_ylabel(f"added to the loop, % (logarithmic above {LINEAR_PERCENT} %)")
    _finish(axes, PERCENTS)
    return figure


def steps(collected: Collected) -> Figure | None:
    """How long the steps around a save take."""
    traces = collected.fits("jax", "trace")
    if not traces:
        return None
    trace = max(traces, key=lambda found: len(found["subjects"]))
    settings = trace["settings"]
    figure, axes = _canvas(
        "How long the steps around a save take",
        f"Keras fit on JAX, {_size(settings)}, a device sync before each step; median, and 10th "
        "to 90th percentile of the saves",
    )
    offsets: list[int] = []
    for key, figures in trace["summary"]["subjects"].items():
        if key in LOOKS and (key == "none" or "stall_over_none_s" in figures):
            # Round 0 warms up.
            fits = [each for each in trace["samples"] if each["subject"] == key and each["round"]]
            around = summary.around(fits, settings["every"])
            offsets = around["offsets"]
            low, median, high = (
                [each * 1e3 for each in around[which]] for which in ("p10", "median", "p90")
            )
            axes.fill_between(offsets, low, high, color=LOOKS[key][0], alpha=0.13, linewidth=0)
            axes.plot(offsets, median, **_look(key))
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(offsets))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+.0f}" if value else "save")
    )
    axes.set_xlabel("steps since the save")
    axes.set_ylabel("duration of the step, ms (logarithmic)")
    _finish(axes, MILLISECONDS)
    return figure


def _canvas(title: str, subtitle: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES)
    figure.subplots_adjust(**PLOT)
    figure.text(0.02, 0.945, title, fontsize=12, fontweight="bold")
    figure.text(0.02, 0.89, subtitle, color=FAINT)
    return figure, figure.subplots()


def _look(key: str) -> dict[str, Any]:
    color, marker = LOOKS[key]
    ours = key == "stepsave"
    return {
        "label": SUBJECTS[key].label.replace("`", ""),
        "color": color,
        "marker": marker,
        "markersize": 4,
        "linewidth": 2.6 if ours else 1.5,
        "zorder": 4 if ours else 3,
    }


def _lengths(found: Mapping[str, Sequence[float]]) -> list[list[float]]:
    """How far a spread goes down and up from the median."""
    return [
        [abs(end - median) for end, median in zip(found[which], found["median"], strict=True)]
        for which in ("p10", "p90")
    ]


def _finish(axes: Axes, ticks: Sequence[float]) -> None:
    """Round numbers only; and the systems beside the plot, in the order of their last points."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    handles, labels = axes.get_legend_handles_labels()
    lines = [getattr(handle, "lines", [handle])[0] for handle in handles]  # of error bars too
    order = sorted(range(len(lines)), key=lambda i: -max(lines[i].get_ydata()))
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
    )


def _size(settings: Result) -> str:
    return f"{settings['state_bytes'] / 1e6:.0f} MB"


def _step(run: Result) -> str:
    loop_s = run["summary"]["subjects"]["none"]["loop_s"]["median"]
    return f"{loop_s / run['settings']['loop_steps'] * 1e3:.0f} ms"
