"""Pictures of the results, by matplotlib: SVG with a background of their own, so that they are
readable on light and dark pages, and the same bytes each time they are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.fits.subjects import SUBJECTS
from bench.publish.collected import Collected, Result

WIDTH_IN, HEIGHT_IN = 7.9, 4.0
LABEL_GAP = 0.055  # between names of lines, as a share of the plot's height
LEAST_PERCENT = 0.1
INK, FAINT, GRID = "#1f2328", "#59636e", "#d8dee4"
COLORS = {
    "none": "#8c959f",
    "stepsave": "#0969da",
    "keras": "#bc4c00",
    "orbax_keras": "#8250df",
    "orbax_keras_tuned": "#bf3989",
    "orbax_async": "#1a7f37",
    "dcp": "#9a6700",
    "model_checkpoint": "#57606a",
}
# Names of parts of an SVG are random without a salt; texts are drawn as paths, from the font that
# comes with matplotlib: no page has to have it.
STYLE = {
    "svg.hashsalt": "stepsave",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One system; points are (place on the x axis, value)."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    width: float = 1.6


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """A line chart with a logarithmic y axis; each x tick is (place, text), places from 0 to 1."""

    title: str
    subtitle: str
    x_title: str
    unit: str
    x_ticks: Sequence[tuple[float, str]]
    lines: Sequence[Line]

    def save(self, path: Path) -> None:
        """Draws it into an SVG file."""
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN))
            axes = figure.add_axes((0.085, 0.13, 0.6, 0.7))
            figure.text(0.025, 0.94, self.title, size=11.5, weight="bold")
            figure.text(0.025, 0.885, self.subtitle, color=FAINT)
            for line in self.lines:
                places, values = zip(*line.points, strict=True)
                axes.plot(places, values, "o-", color=line.color, lw=line.width, ms=3.5)
            self._style(axes)
            self._name_lines(axes)
            figure.savefig(path, metadata={"Date": None, "Creator": None})

    def _style(self, axes: Axes) -> None:
        axes.set_yscale("log")
        values = [value for line in self.lines for _, value in line.points]
        low, high = min(values) / 1.15, max(values) * 1.15
        axes.set(xlim=(0, 1), ylim=(low, high), xlabel=self.x_title)
        axes.set_xticks([place for place, _ in self.x_ticks], [text for _, text in self.x_ticks])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{self.unit}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="both", length=0)
        axes.grid(axis="y", color=GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right"]].set_visible(False)

    def _name_lines(self, axes: Axes) -> None:
        """Each line's name at its right end, moved apart where ends are close."""
        low, high = map(math.log, axes.get_ylim())

        def height(line: Line) -> float:
            return (math.log(line.points[-1][1]) - low) / (high - low)

        ordered = sorted(self.lines, key=height)
        for line, at in zip(ordered, _apart(list(map(height, ordered))), strict=True):
            axes.annotate(
                line.label,
                xy=(line.points[-1][0], height(line)),
                xytext=(1.06, at),
                xycoords="axes fraction",
                color=line.color,
                va="center",
                weight="bold" if line.width > 2 else "normal",
                arrowprops={
                    "arrowstyle": "-",
                    "color": line.color,
                    "alpha": 0.4,
                    "relpos": (0, 0.5),
                },
            )


def draw(collected: Collected) -> None:
    """Draws what there are results for, beside them."""
    for name, chart in (("overhead", overhead(collected)), ("steps", steps(collected))):
        path = collected.directory / f"{name}.svg"
        if chart is not None:
            chart.save(path)
        else:
            path.unlink(missing_ok=True)


def overhead(collected: Collected) -> Chart | None:
    """How much longer the loop takes, by how often is saved."""
    runs = collected.sweep("every")
    every = [run["settings"]["every"] for run in runs]
    if len(set(every)) < 2:
        return None
    low, high = math.log(min(every)), math.log(max(every))

    def place(steps: int) -> float:
        return 0.04 + 0.92 * (math.log(steps) - low) / (high - low)

    found: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        for key, figures in run["summary"]["subjects"].items():
            if key in COLORS and "stall_over_none_s" in figures:
                percent = (figures["loop_over_none"]["median"] - 1) * 100
                at = (place(run["settings"]["every"]), max(percent, LEAST_PERCENT))
                found.setdefault(key, []).append(at)
    lines = [_as_line(key, points) for key, points in found.items() if len(points) > 1]
    settings = runs[0]["settings"]
    return Chart(
        title="How much longer the training loop takes",
        subtitle=f"Keras fit on JAX, {_size(settings)}, steps of {_step(runs[0])}; medians, "
        f"logarithmic, {LEAST_PERCENT:g} % stands for less",
        x_title="steps between saves",
        unit=" %",
        x_ticks=[(place(steps), str(steps)) for steps in every],
        lines=lines,
    )


def steps(collected: Collected) -> Chart | None:
    """How long the steps around a save take."""
    traces = collected.fits("jax", "trace")
    if not traces:
        return None
    trace = max(traces, key=lambda found: len(found["subjects"]))
    lines: list[Line] = []
    offsets: list[int] = []
    for key, figures in trace["summary"]["subjects"].items():
        if key in COLORS and (key == "none" or "stall_over_none_s" in figures):
            offsets = figures["around_save_s"]["offsets"]
            median_s = figures["around_save_s"]["median"]
            places = [_offset_place(offset, offsets) for offset in offsets]
            points = [(at, each * 1e3) for at, each in zip(places, median_s, strict=True)]
            lines.append(_as_line(key, points))
    return Chart(
        title="How long the steps around a save take",
        subtitle=f"Keras fit on JAX, {_size(trace['settings'])}, a device sync before each step; "
        "medians, logarithmic",
        x_title="steps since the save",
        unit=" ms",
        x_ticks=[
            (_offset_place(offset, offsets), f"{offset:+d}" if offset else "save")
            for offset in offsets
        ],
        lines=lines,
    )


def _offset_place(offset: int, offsets: Sequence[int]) -> float:
    return 0.02 + 0.96 * (offset - offsets[0]) / (offsets[-1] - offsets[0])


def _as_line(key: str, points: Sequence[tuple[float, float]]) -> Line:
    label = SUBJECTS[key].label.replace("`", "")
    return Line(label, COLORS[key], points, 3 if key == "stepsave" else 1.6)


def _size(settings: Result) -> str:
    return f"{settings['state_bytes'] / 1e6:.0f} MB"


def _step(run: Result) -> str:
    loop_s = run["summary"]["subjects"]["none"]["loop_s"]["median"]
    return f"{loop_s / run['settings']['steps'] * 1e3:.0f} ms"


def _apart(heights: Sequence[float]) -> list[float]:
    """Moves heights (sorted, from 0 to 1) apart by as little as needed, inside the plot."""
    places = list(heights)
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + LABEL_GAP)
    limit = 1.0
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - LABEL_GAP
    return places
