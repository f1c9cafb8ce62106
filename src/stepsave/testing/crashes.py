"""Each state that a power cut, or the death of a process, may leave of recorded operations.

`stepsave.testing.recording` and `stepsave.testing.strace_log` make the logs,
`stepsave.testing.posix_model` says what may become of an operation. Here the states are
enumerated: all of them where few operations are pending, as ALICE does, otherwise all of what
decides which backup is valid, and a sample of the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from stepsave.testing.posix_model import (
    Blob,
    Disk,
    Effect,
    Mark,
    Operation,
    Pending,
    Rename,
    Sync,
    Tree,
    outcomes_of,
)

__all__ = (
    "ACKNOWLEDGED",
    "DELETED",
    "FAILED_SYNC",
    "LOOK",
    "CrashState",
    "OperationLog",
    "Sampling",
    "crash_states",
    "distinct",
    "materialise",
)

LOOK = "look from here"
"""A mark from which on states are enumerated; what is pending before it may still be lost."""

FAILED_SYNC = "a sync failed: "
"""A mark for one that a test has failed instead of the kernel; the path follows."""

ACKNOWLEDGED = "acknowledged"
DELETED = "deletion began"


@dataclasses.dataclass(frozen=True, slots=True)
class OperationLog:
    """What was done, from a tree that was durable.

    Attributes:
        tree: What was there before.
        operations: What was done, in order.
        acknowledged: The newest step that was acknowledged before; -1 if none was.
    """

    tree: Tree
    operations: list[Operation | Sync | Mark]
    acknowledged: int = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How many of the states at one point of a log are looked at.

    Attributes:
        seed: Of what is drawn.
        limit: All states are, if they are not more.
        samples: Else so many are drawn, beside all combinations of what is vital.
        vital: Names whose operations are combined in every way, as all renames are.
    """

    seed: int = 0
    limit: int = 4096
    samples: int = 64
    vital: Collection[str] = ("COMMIT", "PREVIOUS", "COMMIT.tmp", "PREVIOUS.tmp")


@dataclasses.dataclass(frozen=True, slots=True)
class CrashState:
    """What a crash at one point may leave.

    Attributes:
        files: Contents by path; None for directories.
        key: Hash of them: equal states have equal keys.
        acknowledged: The newest step that was acknowledged before; -1 if none was, or deletion of
            all had begun.
        number: How many operations of the log there were before.
        choice: Which of its outcomes each pending effect had.
        pending: What was pending.
    """

    files: Mapping[str, Blob | None]
    key: bytes
    acknowledged: int
    number: int
    choice: tuple[int, ...]
    pending: tuple[Pending, ...]

    def describe(self) -> str:
        """Says how it came about, for whoever must find out why it cannot be recovered from."""
        said = [f"after {self.number} operations, {self.acknowledged} acknowledged; not synced:"]
        for one, chosen in zip(self.pending, self.choice, strict=True):
            became = "lost" if chosen == 0 else "kept" if chosen == 1 else f"torn ({chosen})"
            said.append(f"  {one.operation.kind} {one.operation.path}: {became}")
        return "\n".join(said)


def crash_states(log: OperationLog, sampling: Sampling) -> Iterator[CrashState]:
    """Yields what a power cut may leave, at each point of a log; equal states again and again.

    All that was done is among it, at each point: what the death of a process leaves.

    Args:
        log: What was recorded. States are those after the last `LOOK` in it, if there is one.
        sampling: How many of them.
    """
    rng = random.Random(sampling.seed)  # noqa: S311  a sample, no secret
    looks = [n for n, one in enumerate(log.operations) if one == Mark(LOOK)]
    begin = looks[-1] if looks else 0
    disk, acknowledged = Disk(log.tree), log.acknowledged
    for number, operation in enumerate(log.operations):
        if isinstance(operation, Mark) and operation.what in (ACKNOWLEDGED, DELETED):
            acknowledged = operation.step
        disk.do(operation)
        if number < begin:
            continue
        pending = tuple(disk.pending)
        outcomes = [outcomes_of(one) for one in pending]
        for choice in _choices(pending, outcomes, sampling, rng):
            effects = _chosen(outcomes, choice)
            files = dict(disk.tree(effects).walk())
            yield CrashState(files, _key(files), acknowledged, number + 1, choice, pending)


def distinct(states: Iterable[CrashState]) -> list[CrashState]:
    """Returns each state once, with the most that any crash that leaves it must keep."""
    found: dict[bytes, CrashState] = {}
    for state in states:
        other = found.get(state.key)
        if other is None or other.acknowledged < state.acknowledged:
            found[state.key] = state
    return list(found.values())


def materialise(state: CrashState, directory: str | os.PathLike[str]) -> None:
    """Makes the files of a state in an empty directory."""
    top = Path(directory)
    for path, blob in state.files.items():
        if blob is None:
            (top / path).mkdir()
        else:
            (top / path).write_bytes(blob.data)


def _choices(
    pending: Sequence[Pending],
    outcomes: Sequence[Sequence[object]],
    sampling: Sampling,
    rng: random.Random,
) -> Iterator[tuple[int, ...]]:
    counts = [len(some) for some in outcomes]
    if math.prod(counts) <= sampling.limit:
        yield from itertools.product(*map(range, counts))
        return
    vital = [n for n, one in enumerate(pending) if _is_vital(one, sampling.vital)]
    rest = [n for n in range(len(pending)) if n not in vital]
    drawn = list(_drawn(counts, rest, sampling.samples, rng))
    some = itertools.product(*(range(counts[n]) for n in vital))
    for chosen in some:
        for choice in drawn[:2]:
            yield _with(choice, vital, chosen)
    for choice in drawn:
        # Each time with something else of what is vital, all of which was with nothing and all.
        yield _with(choice, vital, [_draw(counts[n], rng) for n in vital])


def _drawn(
    counts: Sequence[int], rest: Sequence[int], samples: int, rng: random.Random
) -> Iterator[list[int]]:
    """Nothing, all, and some of what is in between; what is vital always is."""
    everything = [min(1, count - 1) for count in counts]
    nothing = [everything[n] if n not in rest else 0 for n in range(len(counts))]
    yield nothing
    yield everything
    for _ in range(samples):
        choice = list(everything)
        # A few exceptions from one of the two as often as anything.
        base = rng.choice((nothing, everything, None))
        for n in rest:
            if base is None or rng.random() < 2 / len(rest):
                choice[n] = _draw(counts[n], rng)
            else:
                choice[n] = base[n]
        yield choice


def _draw(count: int, rng: random.Random) -> int:
    return rng.choice((0, min(1, count - 1), rng.randrange(count)))


def _with(choice: Sequence[int], places: Sequence[int], chosen: Sequence[int]) -> tuple[int, ...]:
    changed = list(choice)
    for n, one in zip(places, chosen, strict=True):
        changed[n] = one
    return tuple(changed)


def _chosen(
    outcomes: Sequence[Sequence[tuple[Effect, ...]]], choice: Sequence[int]
) -> Iterator[Effect]:
    for some, one in zip(outcomes, choice, strict=True):
        yield from some[one]


def _is_vital(pending: Pending, names: Collection[str]) -> bool:
    path = pending.operation.path
    return isinstance(pending.effect, Rename) or path.rpartition("/")[2] in names


def _key(files: Mapping[str, Blob | None]) -> bytes:
    hashed = hashlib.blake2b(digest_size=16)
    for path in sorted(files):
        blob = files[path]
        hashed.update(path.encode(errors="surrogateescape"))
        hashed.update(b"\0" if blob is None else blob.digest)
    return hashed.digest()
