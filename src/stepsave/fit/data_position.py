"""How the data of a training was read, and from where it is to be read on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from stepsave.errors import CorruptBackupError

__all__ = ("Batching", "Resume", "Stream")


@dataclasses.dataclass(frozen=True, slots=True)
class Batching:
    """How the data of a `fit` is cut into batches.

    Attributes:
        batch_size: Samples of a batch; None if that is not known.
        steps: Batches of an epoch; None if that is not known.
        steps_per_execution: Batches that are trained at once.
    """

    batch_size: int | None
    steps: int | None
    steps_per_execution: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Any) -> Batching:
        """Raises `CorruptBackupError` if the document is not what `to_json` returns."""
        try:
            return cls(**document)
        except TypeError as e:
            raise CorruptBackupError(f"Expected a batching, found {document!r:.200}.") from e

    def changes(self, then: Batching) -> list[str]:
        """What is known to be cut otherwise than it was then."""
        names = ("the batch size", "the number of batches in an epoch", "`steps_per_execution`")
        pairs = zip(dataclasses.astuple(then), dataclasses.astuple(self), strict=True)
        return [
            f"{name} was {before} and is {now}"
            for name, (before, now) in zip(names, pairs, strict=True)
            if before is not None and now is not None and before != now
        ]

    def place_of(self, batches: int, then: Batching) -> int:
        """Where `batches` of an epoch that was cut otherwise end: none is left out that way.

        Args:
            batches: Batches that were trained.
            then: How the data was cut then.

        Returns:
            Batches of this cutting: by samples where the sizes of batches are known, else by the
            share that was done; rounded down to whole executions.
        """
        if then.steps is not None and batches >= then.steps:
            return batches if self.steps is None else self.steps
        place = None
        if then.batch_size and self.batch_size:
            place = batches * then.batch_size // self.batch_size
        if place is None or (self.steps is not None and place >= self.steps):
            now, before = self.steps, then.steps
            place = batches if now is None or before is None else batches * now // before
        return place - place % self.steps_per_execution

    def describe_change(self, then: Batching, batches: int, place: int) -> str:
        """Says what is cut otherwise, and where training goes on."""
        return (
            "The data is cut into batches otherwise than in the run that made the backup: "
            f"{', '.join(self.changes(then))}. {batches} batches of the epoch were trained then; "
            f"training goes on after {place} of the present ones"
        )


@dataclasses.dataclass(slots=True)
class Stream:
    """A stream of batches and how far it was read.

    Attributes:
        created: Streams made before it in this training.
        used: Those of them that were read from.
        batches: Batches trained of it.
        start: State of the data when it was made; see `Source.state`.
        end: The same when its last batch was trained, if it serves one epoch only.
        before: State of the random generators before it was made.
        first: The same before its first batch was read, which may be an epoch later.
        place: State of the data after `batches`, if the data can tell; see `Source.place`.
    """

    created: int = 0
    used: int = 0
    batches: int = 0
    start: Any = None
    end: Any = None
    before: Any = None
    first: Any = None
    place: Any = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Any) -> Stream:
        """Raises `CorruptBackupError` if the document is not what `to_json` returns."""
        try:
            stream = cls(**document)
            counts = (stream.created, stream.used, stream.batches)
        except TypeError as e:
            raise CorruptBackupError(f"Expected a stream, found {document!r:.200}.") from e
        if not all(type(count) is int and count >= 0 for count in counts):
            raise CorruptBackupError(f"Impossible stream in the backup: {document!r:.200}.")
        return stream


@dataclasses.dataclass(frozen=True, slots=True)
class Resume:
    """What the first epoch of a resumed `fit` is to begin with.

    Attributes:
        batch: Batches of the epoch that were trained before.
        stream: How the data was read up to there; None if that is not known.
        ended: Whether no batch of the epoch was left: its validation was going on.
        at_cut: Called at the cut, when the data is there, with what `fit` trains from, and with
            the global random generators that data draws from in the background (`rng.moved`).
    """

    batch: int
    stream: Stream | None
    ended: bool
    at_cut: Callable[[Any, frozenset[str]], None]
