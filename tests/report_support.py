"""Saves, steps and a report, made up."""

from stepsave.engine.step_times import StepSummary
from stepsave.engine.timeline import SaveRecord

COMMITTED = SaveRecord(
    10, "committed", 1.0, 0.25, write_began_s=1.5, write_ended_s=2.0, ended_s=2.125, state_bytes=8
)
FAILED = SaveRecord(20, "failed", 3.0, 0.125, write_began_s=3.5, ended_s=3.75)
SKIPPED = SaveRecord(30, "skipped", 4.0, ended_s=4.125)
FLYING = SaveRecord(40, "in flight", 5.0, 0.125)
STEPS = StepSummary(3, 3.5, 1.0, 1.5, 1.5, (1.0, 2.5, 3.5), (1.0, 1.5, 1.0))

_STATS = {
    "started": 24,
    "committed": 22,
    "failed": 1,
    "skipped": 3,
    "state_bytes": 24 * 300_000_000,
    "changed_bytes": 6_000_000_000,
    "written_bytes": 6_000_000_000,
    "stall_total_s": 0.541,
    "stall_median_s": 0.0221,
    "stall_max_s": 0.27,
    "durable_median_s": 0.31,
    "arena_count": 2,
    "arena_bytes": 300_000_000,
    "writer": "direct",
    "remote_step": 120,
    "remote_age_s": 31.04,
}
_SAVE = {
    "step": 9,
    "outcome": "in flight",
    "began_s": 40.0,
    **dict.fromkeys(("stall_s", "write_began_s", "write_ended_s", "ended_s")),
    **dict.fromkeys(("state_bytes", "changed_bytes", "written_bytes"), 0),
}
FACTS = {
    "stats": _STATS,
    "saves": [_SAVE],
    "steps": {
        "count": 300,
        "total_s": 40.0,
        "p50_s": 0.0121,
        "p99_s": 0.0341,
        "max_s": 1.2,
        "ended_s": [1.0],
        "took_s": [0.5],
    },
    "opened_at_s": 1.8e9,
    "elapsed_s": 45.08,
    "stall_p99_s": 0.031,
    "durable_p99_s": 0.49,
    "durable_max_s": 0.52,
    "write_total_s": 5.36,
    "unwritten_bytes": 1_210_000_000,
    "cpu_s": 2.31,
    "age_s": 0.6,
    "worst_age_s": 6.1,
}
