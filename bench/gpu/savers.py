"""stepsave for `bench.gpu`, as it comes and with snapshots forced to either place."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import stepsave
from bench.gpu.loop import State, Subject
from stepsave.snapshot.arena import Claim

Mode = Literal["auto", "device", "host"]


class Stepsave:
    """`stepsave.Checkpointer` as it comes, but for where snapshots are taken."""

    def __init__(self, directory: Path, mode: Mode) -> None:
        self._saver = stepsave.Checkpointer(directory, snapshot=mode)
        self._durables_s: list[float] = []
        self._handle: stepsave.SaveHandle | None = None

    def prepare(self, state: State) -> None:
        self._saver.prepare(state)

    def save(self, step: int, state: State) -> None:
        self._handle = self._saver.save(step, state)

    def before_update(self) -> None:
        """Nothing: when `save` returns, the state may be changed."""

    def wait(self) -> None:
        self._saver.wait()
        if self._handle is not None and self._handle.durable_s is not None:
            self._durables_s.append(self._handle.durable_s)

    def restore(self, like: State) -> State | None:
        del like
        backup = self._saver.restore()
        return backup.state if backup else None

    def facts(self) -> dict[str, Any]:
        stats = self._saver.stats()
        assert stats.failed == stats.skipped == 0, stats
        stager = self._saver._capture._stager
        return {
            "snapshot": stager.mode if stager is not None else "none",
            "arena_bytes": stats.arena_bytes,
            "writer": stats.writer,
            "durable_s": self._durables_s,
        }

    def close(self) -> None:
        self._saver.close()

    def snapshot_s(self, state: State, repeats: int) -> list[float]:
        """Seconds until all of a snapshot is in the arena; nothing is written."""
        from stepsave.format.tree import flatten

        paths, leaves = flatten(state)
        capture = self._saver._capture
        try:
            self._saver.prepare_leaves(paths, leaves)
            return [_snapshot_s(capture, paths, leaves) for _ in range(repeats)]
        finally:
            self._saver.close()


def _snapshot_s(capture: Any, paths: Any, leaves: Any) -> float:
    begin_s = time.perf_counter()
    claim = Claim()
    snapshot = capture.take(paths, leaves, claim, block=True)
    snapshot.filling.wait_quiet()
    taken_s = time.perf_counter() - begin_s
    claim.release()
    return taken_s


class Floor:
    """What the subjects that save nothing have in common."""

    def prepare(self, state: State) -> None:
        raise NotImplementedError

    def save(self, step: int, state: State) -> None:
        raise NotImplementedError

    def before_update(self) -> None:
        """Nothing to wait for."""

    def wait(self) -> None:
        raise NotImplementedError

    def restore(self, like: State) -> State | None:
        raise NotImplementedError("a floor saves nothing")

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing is kept open."""


def stepsave_subjects(*, rehearsal: bool) -> tuple[Subject, ...]:
    """The two places for a snapshot; the first is what users get.

    Args:
        rehearsal: Whether there is no accelerator, so that "auto" would copy nothing on it.
    """
    first: Mode = "device" if rehearsal else "auto"
    return (
        Subject(
            "stepsave",
            "stepsave",
            f'`Checkpointer(dir, snapshot="{first}")`',
            lambda directory: Stepsave(directory, first),
        ),
        Subject(
            "stepsave host",
            "stepsave, without a copy on the device",
            '`Checkpointer(dir, snapshot="host")`',
            lambda directory: Stepsave(directory, "host"),
        ),
    )
