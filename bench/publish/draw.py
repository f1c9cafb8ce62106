"""Pictures of the results: SVG, with a background of their own, so that they are readable on
light and dark pages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

from bench.fits.subjects import SUBJECTS
from bench.publish.collected import Collected, Result

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 226, 62, 52  # what is left around the plot
LABEL_GAP = 17
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
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One system; points are (place on the x axis, value)."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    width: float = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """A line chart with a logarithmic y axis; each x tick is (place, text), places from 0 to 1."""

    title: str
    subtitle: str
    x_title: str
    unit: str
    x_ticks: Sequence[tuple[float, str]]
    lines: Sequence[Line]

    def svg(self) -> str:
        values = [value for line in self.lines for _, value in line.points]
        scale = LogScale.around(values)
        size = f"viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}'"
        parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img'>",
            f"<title>{escape(self.title)}</title>",
            f"<rect width='{WIDTH}' height='{HEIGHT}' rx='12' fill='#ffffff'/>",
            _text(20, 28, self.title, size=15, weight=600),
            _text(20, 47, self.subtitle, color=FAINT),
            *self._axes(scale),
            *(part for line in self.lines for part in _line(line, scale)),
            *self._labels(scale),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def _axes(self, scale: LogScale) -> list[str]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts: list[str] = []
        for value in scale.ticks():
            y = scale.y(value)
            parts.append(f"<path d='M{LEFT} {y:.1f}H{right}' stroke='{GRID}'/>")
            parts.append(_text(LEFT - 8, y + 4, f"{value:g}{self.unit}", FAINT, anchor="end"))
        for place, text in self.x_ticks:
            x = _x(place)
            parts.append(f"<path d='M{x:.1f} {bottom}v5' stroke='{FAINT}'/>")
            parts.append(_text(x, bottom + 19, text, FAINT, anchor="middle"))
        parts.append(f"<path d='M{LEFT} {bottom}H{right}' stroke='{FAINT}'/>")
        parts.append(_text((LEFT + right) / 2, HEIGHT - 12, self.x_title, FAINT, anchor="middle"))
        return parts

    def _labels(self, scale: LogScale) -> list[str]:
        """Each line's name at its right end, moved apart where ends are close."""
        ordered = sorted(self.lines, key=lambda line: scale.y(line.points[-1][1]))
        ends = [scale.y(line.points[-1][1]) for line in ordered]
        places = _apart(ends, TOP, HEIGHT - BOTTOM)
        parts: list[str] = []
        for line, end, place in zip(ordered, ends, places, strict=True):
            x, right = _x(line.points[-1][0]), WIDTH - RIGHT
            parts.append(
                f"<path d='M{x + 5:.1f} {end:.1f}L{right + 16} {place:.1f}' stroke='{line.color}' "
                "stroke-opacity='0.4' fill='none'/>"
            )
            weight = 600 if line.width > 2 else 400
            parts.append(_text(right + 20, place + 4, line.label, line.color, weight=weight))
        return parts


@dataclasses.dataclass(frozen=True, slots=True)
class LogScale:
    """From values to heights."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float]) -> LogScale:
        return cls(min(values) / 1.15, max(values) * 1.15)

    def y(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def ticks(self) -> list[float]:
        """Round numbers: 1, 2, 5 of each decade, or only 1 where these were too many."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 300 else (1,)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def draw(collected: Collected) -> None:
    """Draws what there are results for, beside them."""
    for name, chart in (("overhead", overhead(collected)), ("steps", steps(collected))):
        path = collected.directory / f"{name}.svg"
        if chart is not None:
            path.write_text(chart.svg())
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
    return Line(label, COLORS[key], points, 3.5 if key == "stepsave" else 2)


def _size(settings: Result) -> str:
    return f"{settings['state_bytes'] / 1e6:.0f} MB"


def _step(run: Result) -> str:
    loop_s = run["summary"]["subjects"]["none"]["loop_s"]["median"]
    return f"{loop_s / run['settings']['steps'] * 1e3:.0f} ms"


def _x(place: float) -> float:
    return LEFT + place * (WIDTH - RIGHT - LEFT)


def _line(line: Line, scale: LogScale) -> list[str]:
    at = [(_x(place), scale.y(value)) for place, value in line.points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    style = f"stroke='{line.color}' stroke-width='{line.width}' stroke-linejoin='round'"
    dots = [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{line.color}'/>" for x, y in at]
    return [f"<path d='M{path}' fill='none' {style}/>", *dots]


def _apart(ends: Sequence[float], top: float, bottom: float) -> list[float]:
    """Moves heights (sorted) apart by as little as needed, inside the plot."""
    places = list(ends)
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + LABEL_GAP)
    limit = bottom
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - LABEL_GAP
    return [max(place, top) for place in places]


def _text(
    x: float,
    y: float,
    text: str,
    color: str = INK,
    *,
    size: int = 12,
    anchor: str = "start",
    weight: int = 400,
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' fill='{color}' font-size='{size}' font-weight='{weight}' "
        f"text-anchor='{anchor}' {FONT}>{escape(text)}</text>"
    )
