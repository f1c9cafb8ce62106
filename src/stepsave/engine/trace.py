"""A report as a trace, for https://ui.perfetto.dev and chrome://tracing.

The format is Chrome's "Trace Event Format", its JSON object: complete events (`X`) with a beginning
and a duration in microseconds, instants (`i`), and metadata (`M`) that name process and threads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from stepsave.engine.step_times import StepSummary
from stepsave.engine.timeline import SaveRecord

__all__ = ("encode_trace",)

_THREADS = {"training": 1, "writer": 2}


def encode_trace(saves: Sequence[SaveRecord], steps: StepSummary | None) -> bytes:
    """Returns the trace file: what the training's thread did, and what the writer did for it.

    Args:
        saves: The saves, with times since the trace begins.
        steps: The steps, likewise; None to leave them out.
    """
    events = [
        _name("process_name", 0, "stepsave"),
        *(_name("thread_name", tid, name) for name, tid in _THREADS.items()),
        *_steps(steps),
    ]
    for save in saves:
        events += _save(save)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()


def _steps(steps: StepSummary | None) -> Iterator[dict[str, Any]]:
    if steps is not None:
        for ended_s, took_s in zip(steps.ended_s, steps.took_s, strict=True):
            yield _slice("training", "step", ended_s - took_s, ended_s, {})


def _save(save: SaveRecord) -> Iterator[dict[str, Any]]:
    facts = {"step": save.step, "outcome": save.outcome}
    sizes = {"state_bytes": save.state_bytes, "written_bytes": save.written_bytes}
    if save.stall_s is not None:
        ended_s = save.began_s + save.stall_s
        yield _slice("training", f"stall, step {save.step}", save.began_s, ended_s, facts)
    if save.write_began_s is not None:
        ended_s = save.write_ended_s if save.write_ended_s is not None else save.ended_s
        if ended_s is not None:
            name = f"write, step {save.step}"
            yield _slice("writer", name, save.write_began_s, ended_s, facts | sizes)
    if save.write_ended_s is not None and save.ended_s is not None:
        name = f"commit, step {save.step}"
        yield _slice("writer", name, save.write_ended_s, save.ended_s, facts)
    if save.outcome in ("failed", "skipped") and save.ended_s is not None:
        thread = "writer" if save.outcome == "failed" else "training"
        name = f"{save.outcome}, step {save.step}"
        event = _event("i", thread, name, save.ended_s, facts)
        yield event | {"s": "t"}  # it concerns its thread only


def _slice(
    thread: str, name: str, began_s: float, ended_s: float, facts: dict[str, Any]
) -> dict[str, Any]:
    duration = max(0.0, round((ended_s - began_s) * 1e6, 3))
    return _event("X", thread, name, began_s, facts) | {"dur": duration}


def _event(
    phase: str, thread: str, name: str, at_s: float, facts: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": name.partition(",")[0],
        "ph": phase,
        "ts": round(at_s * 1e6, 3),
        "pid": os.getpid(),
        "tid": _THREADS[thread],
        "args": facts,
    }


def _name(what: str, tid: int, name: str) -> dict[str, Any]:
    return {
        "name": what,
        "ph": "M",
        "ts": 0,
        "pid": os.getpid(),
        "tid": tid,
        "args": {"name": name},
    }
