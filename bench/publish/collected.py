"""The committed results of one machine, as publishing needs them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

Result = dict[str, Any]
BACKEND_NAMES = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
FRAMEWORK_NAMES = {"numpy": "NumPy", "jax": "JAX", "torch": "PyTorch"}


@dataclasses.dataclass(frozen=True, slots=True)
class Collected:
    """All results in one folder, by the name of their file."""

    directory: Path
    results: dict[str, Result]

    @classmethod
    def load(cls, directory: Path) -> Collected:
        paths = sorted(directory.glob("*.json"))
        return cls(directory, {path.stem: json.loads(path.read_text()) for path in paths})

    @property
    def facts(self) -> Result | None:
        """The newest description of the machine: that with the most in it."""
        found = [result["machine"] for result in self.results.values() if "machine" in result]
        return max(found, key=len, default=None)

    def get(self, name: str) -> Result | None:
        return self.results.get(name)

    def summary(self, name: str) -> Result:
        """A result's summary; empty if it was not measured."""
        return self.results.get(name, {}).get("summary", {})

    def fits(self, backend: str, kind: str = "fits") -> list[Result]:
        """All runs of whole fits on a backend."""
        return [
            result
            for result in self.results.values()
            if result.get("benchmark") == kind and result["settings"]["backend"] == backend
        ]

    def main_fits(self, backend: str) -> Result | None:
        """The run with most systems: the one in which all were compared."""
        return max(self.fits(backend), key=lambda found: len(found["subjects"]), default=None)

    def sweep(self, varied: str) -> list[Result]:
        """The runs on JAX that differ from the main one, or each other, in one setting only."""
        main = self.main_fits("jax")
        if main is None:
            return []
        fixed = {"every", "megabytes", "variables"} - {varied}
        groups: dict[tuple[Any, ...], list[Result]] = {}
        for result in self.fits("jax"):
            at = tuple(result["settings"][name] for name in sorted(fixed))
            groups.setdefault(at, []).append(result)
        longest = max(groups.values(), key=len)
        with_main = groups[tuple(main["settings"][name] for name in sorted(fixed))]
        chosen = with_main if len(with_main) == len(longest) else longest
        return sorted(chosen, key=lambda found: found["settings"][varied])


def subject(result: Result | None, key: str) -> Result | None:
    """A system's figures in a run of fits; None if it was not in it or failed."""
    return None if result is None else result["summary"]["subjects"].get(key)


def ms(entry: Result, *, bold: bool = False) -> str:
    """Median and spread of a time in seconds, as milliseconds."""
    mark = "**" if bold else ""
    median, low, high = (number(entry[key] * 1e3) for key in ("median", "p10", "p90"))
    return f"{mark}{median} ms{mark} ({low} to {high})"


def times(entry: Result, *, bold: bool = False) -> str:
    """Median and spread of a ratio."""
    mark = "**" if bold else ""
    median, low, high = (number(entry[key]) for key in ("median", "p10", "p90"))
    return f"{mark}{median}{mark} ({low} to {high})"


def duration(entry: Result, *, bold: bool = False) -> str:
    """Median and spread of a time in seconds, in seconds or milliseconds."""
    mark = "**" if bold else ""
    factor, unit = (1, "s") if abs(entry["median"]) >= 0.9995 else (1e3, "ms")
    median, low, high = (number(entry[key] * factor) for key in ("median", "p10", "p90"))
    return f"{mark}{median} {unit}{mark} ({low} to {high})"


def number(value: float) -> str:
    """Three digits at most, none of them invented."""
    size = abs(value)
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    text = f"{value:.{digits}f}"
    return "0" if float(text) == 0 else text


def percent_over(entry: Result) -> str:
    """A ratio of loops, as what it adds in percent."""
    added = (entry["median"] - 1) * 100
    return f"{added:+.1f} %" if abs(added) < 9.95 else f"{added:+.0f} %"


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table, line by line."""
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
