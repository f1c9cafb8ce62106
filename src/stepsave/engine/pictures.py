"""The picture of a report, by matplotlib."""

from __future__ import annotations

import io
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from stepsave.engine.step_times import StepSummary
from stepsave.engine.timeline import SaveRecord

__all__ = ("draw",)

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#d8dee4",
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "svg.fonttype": "path",
    "svg.hashsalt": "stepsave",  # the same picture is the same bytes
}
_STEP, _STEP_WITH_SAVE = "#8c959f", "#bc4c00"
_STALL, _WAIT, _WRITE, _COMMIT = "#bc4c00", "#d8dee4", "#0969da", "#1a7f37"
_FAILED, _SKIPPED = "#cf222e", "#59636e"
_LEGEND: dict[str, Any] = {  # above its panel, beside the title
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "borderaxespad": 0.3,
}
_WIDE = 10  # how many times the median the longest step may be on a linear axis
_UNITS = ((1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"))


def draw(saves: Sequence[SaveRecord], steps: StepSummary | None, title: str, suffix: str) -> bytes:
    """Returns a picture of the saves, below the steps if they were timed.

    Args:
        saves: In the order in which they began.
        steps: With times as the saves have them.
        title: Stands above.
        suffix: Of the kind of file: `"png"`, `"svg"`, `"pdf"`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If it knows no such kind.
    """
    try:
        from matplotlib import style  # not a dependency: most trainings draw nothing
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "The picture of a report is drawn by matplotlib, which is not installed. Run: "
            "pip install 'stepsave[report]'",
            name=e.name,
        ) from e
    # The style of whoever calls must not show.
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(9, 3.4 if steps is None else 6), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        ends_s = [save.ended_s or save.began_s for save in saves]
        ends_s += () if steps is None else steps.ended_s
        unit_s, unit = _unit(max(ends_s, default=0.0))
        panels = figure.subplots(1 if steps is None else 2, 1, sharex=True, squeeze=False)[:, 0]
        if steps is not None:
            _draw_steps(panels[0], saves, steps, unit_s)
        _draw_saves(panels[-1], saves, unit_s)
        panels[-1].set_xlabel(f"time since the directory was opened, {unit}")
        data = io.BytesIO()
        # Without the time at which it was made, where the format would have it.
        metadata = {"Date": None} if suffix == "svg" else {}
        figure.savefig(data, format=suffix, dpi=150, metadata=metadata)
    return data.getvalue()


def _draw_steps(
    axes: Any, saves: Sequence[SaveRecord], steps: StepSummary, time_unit_s: float
) -> None:
    from matplotlib import ticker

    wide = steps.max_s > _WIDE * steps.p50_s
    unit_s, unit = _unit(steps.p50_s if wide else steps.max_s)
    held_up = _with_saves(saves, steps)
    for with_save, color, label in (
        (False, _STEP, "step"),
        (True, _STEP_WITH_SAVE, "step in which a save was taken"),
    ):
        chosen = [i for i, each in enumerate(held_up) if each == with_save]
        if chosen:
            axes.plot(
                [steps.ended_s[i] / time_unit_s for i in chosen],
                [steps.took_s[i] / unit_s for i in chosen],
                linestyle="",
                marker="o",
                markersize=3,
                markeredgewidth=0,
                color=color,
                label=label,
                zorder=3 if with_save else 2,
            )
    if wide:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.set_title("Steps")
    axes.set_ylabel(f"duration, {unit}" + (" (logarithmic)" if wide else ""))
    axes.legend(ncols=2, markerscale=1.6, **_LEGEND)


def _with_saves(saves: Sequence[SaveRecord], steps: StepSummary) -> list[bool]:
    """Whether a save was begun in each step; both are in order."""
    left = [save.began_s for save in saves if save.outcome != "skipped"]
    found: list[bool] = []
    at = 0
    for ended_s, took_s in zip(steps.ended_s, steps.took_s, strict=True):
        while at < len(left) and left[at] < ended_s - took_s:
            at += 1
        found.append(at < len(left) and left[at] < ended_s)
    return found


def _draw_saves(axes: Any, saves: Sequence[SaveRecord], time_unit_s: float) -> None:
    longest_s = max((top for save in saves for *_, top in _phases(save)), default=1.0)
    unit_s, unit = _unit(longest_s)
    begun_s = [save.began_s for save in saves]
    # As wide as there is room between two of them, and to be seen however many there are.
    gaps_s = [after - before for before, after in itertools.pairwise(begun_s)]
    span_s = begun_s[-1] - begun_s[0] if begun_s else 0.0
    least_s, most_s = span_s / 600, span_s / 40 or 1.0
    width_s = min(max(0.6 * statistics.median(gaps_s), least_s), most_s) if gaps_s else most_s
    labels = {
        "training held up": _STALL,
        "queued, prepared": _WAIT,
        "writes": _WRITE,
        "commits": _COMMIT,
    }
    for label, color in labels.items():
        parts = [
            (save.began_s, low, high)
            for save in saves
            for name, low, high in _phases(save)
            if name == label
        ]
        if parts:
            axes.bar(
                [began_s / time_unit_s for began_s, _, _ in parts],
                [(high - low) / unit_s for _, low, high in parts],
                bottom=[low / unit_s for _, low, _ in parts],
                width=width_s / time_unit_s,
                align="edge",
                color=color,
                label=label,
                linewidth=0,
            )
    for outcome, color in (("failed", _FAILED), ("skipped", _SKIPPED)):
        marked = [save for save in saves if save.outcome == outcome]
        if marked:
            axes.plot(
                [(save.began_s + width_s / 2) / time_unit_s for save in marked],
                [((save.ended_s or save.began_s) - save.began_s) / unit_s for save in marked],
                linestyle="",
                marker="x",
                markersize=5,
                color=color,
                label=outcome,
                clip_on=False,
                zorder=4,
            )
    axes.set_ylim(bottom=0)
    axes.set_title("Saves")
    axes.set_ylabel(f"time since the call of save, {unit}")
    # Bars first; by itself matplotlib begins with what failed.
    handles = [*axes.containers, *axes.get_lines()]
    if handles:
        axes.legend(handles=handles, ncols=6, **_LEGEND)


def _phases(save: SaveRecord) -> list[tuple[str, float, float]]:
    """What a save did one after the other: from when to when after it was called."""
    stall_s = save.stall_s or 0.0
    found = [("training held up", 0.0, stall_s)] if save.outcome != "skipped" else []
    ended_s = None if save.ended_s is None else save.ended_s - save.began_s
    if save.write_began_s is None:
        return found
    # A writer may begin a moment before the call has returned.
    begin_s = max(stall_s, save.write_began_s - save.began_s)
    end_s = ended_s if save.write_ended_s is None else save.write_ended_s - save.began_s
    found.append(("queued, prepared", stall_s, begin_s))
    if end_s is not None:
        found.append(("writes", begin_s, max(begin_s, end_s)))
        if save.write_ended_s is not None and ended_s is not None:
            found.append(("commits", max(begin_s, end_s), max(begin_s, ended_s)))
    return [phase for phase in found if phase[2] > phase[1]]


def _unit(longest_s: float) -> tuple[float, str]:
    """The largest unit of which there is at least one, two of those for an axis of times."""
    fitting = [unit for unit in _UNITS if longest_s >= 2 * unit[0]]
    return fitting[-1] if fitting else _UNITS[0]
