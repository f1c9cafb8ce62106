"""The demo's result as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from stepsave.demo.facts import EPOCHS, Comparison, InFlight, Outcome

__all__ = ("console", "cost", "interruption", "result")

_SHOWN_DIGITS = 16
_NAME_WIDTH, _CELL_WIDTH = 22, 16  # at least, so that the tables below each other line up
_FILE_WIDTH = 100


def console() -> Console:
    """Prints tables: in a terminal as wide as that is, into a file as wide as all of them need."""
    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = _FILE_WIDTH
    return made


def interruption(killed: InFlight, committed_step: int, resumed: Outcome) -> Table:
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
    return _table(
        ["Interruption", ""],
        [
            ("killed by SIGKILL at", killed_at),
            ("save in flight", in_flight),
            ("last committed step", f"step {committed_step}"),
            ("resumed at", resumed_at),
        ],
    )


def result(uninterrupted: Outcome, resumed: Outcome) -> Table:
    """Compares what both trainings reached."""
    runs = (uninterrupted, resumed)
    return _table(
        ["Model at the end", "uninterrupted", "killed and resumed"],
        [
            ("optimizer steps", *(f"{run.last_step}" for run in runs)),
            ("test accuracy", *(f"{run.accuracy:.4f}" for run in runs)),
            ("SHA-256 of its bits", *(f"{run.digest[:_SHOWN_DIGITS]}" for run in runs)),
        ],
    )


def cost(comparison: Comparison) -> Table:
    """Compares what saving costs with both callbacks."""
    c = comparison
    title = f"Saving {c.state_bytes / 1e6:.1f} MB,\nmedians of {c.saves} saves"
    return _table(
        [title, "stepsave", "keras.callbacks.BackupAndRestore"],
        [
            ("stall per save", _milliseconds(c.stall_s), _milliseconds(c.keras_stall_s)),
            ("durable after", _milliseconds(c.durable_s), "not durable: it calls no fsync"),
            ("writer", c.writer, "HDF5, on the training thread"),
        ],
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Makes a table; what it is about stands in the head, above the names of its rows."""
    table = Table(box=box.SIMPLE_HEAD)
    name, *others = head
    table.add_column(name, min_width=_NAME_WIDTH)
    for other in others:
        table.add_column(other, min_width=_CELL_WIDTH, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
