"""How the data of a training was read, and from where it is to be read on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from stepsave.errors import CorruptBackupError

__all__ = ("Resume", "Stream")


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
        at_cut: Called at the cut, when the data is there; on TensorFlow with the specification
            of a batch.
    """

    batch: int
    stream: Stream | None
    ended: bool
    at_cut: Callable[[Any], None]
