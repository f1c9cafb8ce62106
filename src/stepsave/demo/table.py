"""The demo's result as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from stepsave.demo.facts import EPOCHS, Comparison, InFlight, Outcome

__all__ = ("cost", "interruption", "result")

_SHOWN_DIGITS = 16


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
    lines = [title]
    for name, *cells in rows:
        lines.append("".join([f"  {name:<24}", *(f"{cell:<18}" for cell in cells)]).rstrip())
    return "\n".join([*lines, ""])
