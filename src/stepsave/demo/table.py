"""The demo's result as plain text."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from stepsave.demo.facts import EPOCHS, Comparison, InFlight, Outcome

__all__ = ("cost", "interruption", "result")

_SHOWN_DIGITS = 16
_WIDTH = 100


def interruption(killed: InFlight, committed_step: int, resumed: Outcome) -> str:
    """Tells where training was killed and where it went on."""
    in_flight = f"step {killed.step}"
    if committed_step >= killed.step:
        in_flight += ", but it ended just before the kill"
    resumed_at = (
        f"step {resumed.first_step}, epoch {resumed.first_epoch + 1} of {EPOCHS}, "
        f"with batch {resumed.first_batch + 1} of {killed.steps_per_epoch}"
    )
    killed_at = (
        f"step {killed.step}, epoch {killed.epoch + 1} of {EPOCHS}, "
        f"batch {killed.batches} of {killed.steps_per_epoch}"
    )
    return _format(
        "Interruption",
        [
            ("killed by SIGKILL at", killed_at),
            ("save in flight", in_flight),
            ("last committed step", f"step {committed_step}"),
            ("resumed at", resumed_at),
        ],
    )


def result(uninterrupted: Outcome, resumed: Outcome) -> str:
    """Compares what both trainings reached."""
    runs = (uninterrupted, resumed)
    return _format(
        "Model at the end",
        [
            ("", "uninterrupted", "killed and resumed"),
            ("optimizer steps", *(f"{run.last_step}" for run in runs)),
            ("test accuracy", *(f"{run.accuracy:.4f}" for run in runs)),
            ("SHA-256 of its bits", *(f"{run.digest[:_SHOWN_DIGITS]}" for run in runs)),
        ],
    )


def cost(comparison: Comparison) -> str:
    """Compares what saving costs with both callbacks."""
    c = comparison
    title = f"Saving {c.state_bytes / 1e6:.1f} MB, medians of {c.saves} saves"
    return _format(
        title,
        [
            ("", "stepsave", "keras.callbacks.BackupAndRestore"),
            ("stall per save", _milliseconds(c.stall_s), _milliseconds(c.keras_stall_s)),
            ("durable after", _milliseconds(c.durable_s), "not durable: it calls no fsync"),
            ("writer", c.writer, "HDF5, on the training thread"),
        ],
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _format(title: str, rows: Sequence[Sequence[str]]) -> str:
    grid = Table.grid(padding=(0, 3))
    for row in rows:
        grid.add_row(*row)
    # Into a text of its own: the same in a terminal, a file and a log.
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None, markup=False, highlight=False)
    console.print(title)
    console.print(Padding(grid, (0, 0, 0, 2)))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
