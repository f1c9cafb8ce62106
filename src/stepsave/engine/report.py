"""What saving has cost a training: as a text, as figures, as a picture and as a trace."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from stepsave.engine import pictures
from stepsave.engine.saves import SaveLog
from stepsave.engine.step_times import StepSummary
from stepsave.engine.timeline import SaveRecord
from stepsave.engine.trace import encode_trace
from stepsave.format.records import SaveStats
from stepsave.store.local import TEMPORARY_SUFFIX, LocalStore

__all__ = ("SaveReport",)


@dataclasses.dataclass(frozen=True, slots=True)
class SaveReport:
    """What saving has cost so far. `str()` of it is a text of a few lines.

    Attributes:
        stats: Sums over all saves.
        saves: The last 1000 saves one by one, and the last 1000 that were skipped.
        steps: The steps of the training, with times since the directory was opened; None where
            nobody timed them.
        opened_at_s: When it was opened, in seconds since the epoch.
        elapsed_s: How long ago that was; of a training that has ended or was interrupted, how
            long it went on.
        stall_p99_s: Of the last 1000 saves one in a hundred held its caller up longer; NaN before
            the first.
        durable_p99_s: One in a hundred took longer until it was durable, likewise.
        durable_max_s: The longest that one took, of all.
        write_total_s: How long bytes were on their way to the disk or bucket, all saves together.
        unwritten_bytes: Bytes that committed saves did not write, as they lay there already.
        cpu_s: CPU time of stepsave's own background threads: copying, checksums, writing, uploads,
            restoring. Not counted are what a copy took of the training's own thread, which is in
            the stall, the threads of tensorstore (which writes where direct writes do not work,
            and into buckets), and a task that has not ended.
        age_s: How old the state of the newest backup is: what would be lost by a crash now.
        worst_age_s: How old it was at worst: the most that a crash could have cost.
    """

    stats: SaveStats
    saves: tuple[SaveRecord, ...]
    steps: StepSummary | None
    opened_at_s: float
    elapsed_s: float
    stall_p99_s: float
    durable_p99_s: float
    durable_max_s: float
    write_total_s: float
    unwritten_bytes: int
    cpu_s: float
    age_s: float
    worst_age_s: float

    @classmethod
    def of(cls, stats: SaveStats, log: SaveLog, steps: StepSummary | None = None) -> SaveReport:
        """Sums up what is known of the saves of a checkpointer, and of the steps between them."""
        timeline = log.timeline
        until_s = timeline.closed_s
        if until_s is None:
            until_s = time.perf_counter()
            if steps is not None:  # a `fit` that was interrupted is not going on since
                until_s = max(steps.ended_s[-1], timeline.last_s())
        if steps is not None:
            ended_s = tuple(each - timeline.opened_s for each in steps.ended_s)
            steps = dataclasses.replace(steps, ended_s=ended_s)
        return cls(
            stats,
            tuple(timeline.records()),
            steps,
            timeline.opened_at_s,
            until_s - timeline.opened_s,
            _p99(timeline.stalls_s()),
            _p99(timeline.durables_s()),
            timeline.durable_max_s,
            timeline.write_total_s,
            timeline.unwritten_bytes,
            sum(clock.cpu_s for clock in log.clocks),
            timeline.age_s(until_s),
            timeline.worst_age_s(until_s),
        )

    @property
    def stall_share(self) -> float:
        """Share of the time that callers were held up."""
        return self.stats.stall_total_s / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def write_bytes_per_s(self) -> float:
        """How fast bytes went to the disk or bucket while some were on their way; NaN before."""
        total_s = self.write_total_s
        return self.stats.written_bytes / total_s if total_s > 0 else math.nan

    def __str__(self) -> str:
        rows = list(self._rows())
        width = max((len(name) for name, _ in rows), default=0) + 3
        return "\n".join([self._head(), *(f"  {name:<{width}}{text}" for name, text in rows)])

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it: what was not measured is None."""
        facts: dict[str, Any] = dataclasses.asdict(self)
        facts["stall_share"] = self.stall_share
        facts["write_bytes_per_s"] = self.write_bytes_per_s
        return _without_nan(facts)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> SaveReport:
        """Returns the report that `to_dict` was called on, from its JSON perhaps."""
        facts = {**facts, "stats": _read(SaveStats, facts["stats"])}
        facts["saves"] = tuple(_read(SaveRecord, save) for save in facts["saves"])
        if facts["steps"] is not None:
            facts["steps"] = _read(StepSummary, facts["steps"])
        return _read(cls, facts)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws how long steps took, and from call to commit what each save did.

        Args:
            path: The file, replaced when the picture is complete; its suffix says of which kind
                it is, `.png`, `.svg` or `.pdf`.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed (`pip install 'stepsave[report]'`).
            ValueError: If the suffix is none that matplotlib knows.
        """
        suffix = os.path.splitext(path)[1][1:] or "png"
        _replace(path, pictures.draw(self.saves, self.steps, self._head(), suffix))

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes a trace for https://ui.perfetto.dev or chrome://tracing.

        Args:
            path: The file, replaced when the trace is complete.
        """
        _replace(path, encode_trace(self.saves, self.steps))

    def _head(self) -> str:
        stats, elapsed = self.stats, _seconds(self.elapsed_s)
        if not stats.started and not stats.skipped:
            return f"Backups: none in {elapsed}"
        counts = [f"{stats.committed} saved", f"{stats.skipped} skipped", f"{stats.failed} failed"]
        in_flight = sum(save.outcome == "in flight" for save in self.saves)
        counts += [f"{in_flight} in flight"] if in_flight else []
        each = f"; {_size(stats.state_bytes / stats.started)} each" if stats.started else ""
        return f"Backups: {', '.join(counts)} in {elapsed}{each}"

    def _rows(self) -> Iterator[tuple[str, str]]:
        stats, steps = self.stats, self.steps
        if stats.started:
            median_s = stats.stall_median_s
            spread = _spread(median_s, self.stall_p99_s, stats.stall_max_s)
            yield "training held up", f"{spread}   {_digits(100 * self.stall_share)} % of the time"
        if stats.committed:
            spread = _spread(stats.durable_median_s, self.durable_p99_s, self.durable_max_s)
            rate = self.write_bytes_per_s
            written = "" if math.isnan(rate) else f"   {_size(rate)}/s"
            yield "durable after", f"{spread}{written}"
        if steps is not None:
            spread = _spread(steps.p50_s, steps.p99_s, steps.max_s)
            yield "steps took", f"{spread}   {steps.count} timed"
        if stats.started or stats.skipped:
            yield "newest backup", f"at most {_seconds(self.worst_age_s)} old"
        if stats.remote_step is not None:
            age = _seconds(stats.remote_age_s)
            yield "in the bucket", f"step {stats.remote_step}, {age} old"
        if self.unwritten_bytes:
            all_of_it = _size(stats.state_bytes)
            text = f"{_size(self.unwritten_bytes)} of {all_of_it}, as it had not changed"
            yield "not written", text
        if stats.started:
            yield "background", f"{_seconds(self.cpu_s)} of CPU time in stepsave's threads"


def _p99(values_s: list[float]) -> float:
    """The value that at most one in a hundred exceeds; NaN if there is none."""
    return sorted(values_s)[math.ceil(0.99 * len(values_s)) - 1] if values_s else math.nan


def _spread(p50_s: float, p99_s: float, max_s: float) -> str:
    named = zip(("p50", "p99", "max"), (p50_s, p99_s, max_s), strict=True)
    return "   ".join(f"{name} {_seconds(value):>7}" for name, value in named)


def _seconds(value_s: float) -> str:
    if math.isnan(value_s):
        return "-"
    for limit_s, unit_s, unit in ((1e-3, 1e-6, "µs"), (1.0, 1e-3, "ms"), (600.0, 1.0, "s")):
        if value_s < 0.9995 * limit_s:
            return f"{_digits(value_s / unit_s)} {unit}"
    return f"{value_s / 60:.0f} min" if value_s < 6000 else f"{value_s / 3600:.1f} h"


def _size(value_bytes: float) -> str:
    for unit_bytes, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value_bytes >= 0.9995 * unit_bytes:
            return f"{_digits(value_bytes / unit_bytes)} {unit}"
    return f"{value_bytes:.0f} B"


def _digits(value: float) -> str:
    """Three digits, and all before the point."""
    places = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(places, 2)}f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _read(kind: type[Any], facts: Mapping[str, Any]) -> Any:
    """Makes a record of what `to_dict` has made of it; other names are left out."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = facts[field.name]
        if value is None and field.type == "float":
            value = math.nan
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _replace(path: str | os.PathLike[str], data: bytes) -> None:
    folder, name = os.path.split(os.path.abspath(path))
    store = LocalStore(folder)
    try:
        store.replace(name, data)
    except OSError:
        store.remove(name + TEMPORARY_SUFFIX)  # half of it, as the disk is full perhaps
        raise
