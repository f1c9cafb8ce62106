"""A target, and the figures that are held against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from bench.publish.collected import Collected, number


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """One number against its target."""

    label: str
    value: float
    text: str
    met: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """One aim, for which there may be several figures; all must reach it.

    Attributes:
        what: What is measured.
        target: The aim, as published.
        figures: Finds what was reached.
        limit: Finds what the machine itself allows, measured in the same runs.
    """

    what: str
    target: str
    figures: Callable[[Collected], Iterator[Figure]]
    limit: Callable[[Collected], str] | None = None

    def row(self, machines: Sequence[Collected]) -> str:
        """A row of the table, of the first machine that has figures; any but the first is named."""
        for collected in machines:
            if found := list(self.figures(collected)):
                break
        else:
            return f"| {self.what} | {self.target} | not measured | | |"
        reached = ", ".join(f"{figure.label} {figure.text}".strip() for figure in found)
        met = all(figure.met for figure in found)
        limit = self.limit(collected) if self.limit else ""
        if collected is not machines[0] and collected.facts:
            reached += f" (on {collected.facts['cpu']})"
        verdict = "met" if met else "**missed**"
        return f"| {self.what} | {self.target} | {reached} | {verdict} | {limit} |"


def at_most(label: str, value: float, limit: float, unit: str) -> Figure:
    return Figure(label, value, f"{number(value)}{unit}", value <= limit)


def at_least(label: str, value: float, limit: float, unit: str) -> Figure:
    return Figure(label, value, f"{number(value)}{unit}", value >= limit)
