"""Tensors on their way into an arena, by way of copies on the device where there is room."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from stepsave.snapshot.pieces import Piece, Pieces

__all__ = ("Clones", "Lanes", "Part", "Transfer", "parts_of")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_STRETCH_BYTES = 64 << 20
"""How much is sent by one copy: enough for full speed, in less than two milliseconds."""

_EVENT_BYTES = 32 << 20
"""How much is sent between two events: what has arrived is checked while the rest comes."""

# What one launch can copy many tensors of. It has a kernel for some more in newer versions.
_LAUNCHED_TOGETHER = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What is sent by one copy.

    Attributes:
        source: The bytes, flat, on any device.
        offset_bytes: Where they go in the arena.
        leaves: The leaves that are in it.
    """

    source: torch.Tensor
    offset_bytes: int
    leaves: tuple[int, ...]


class Clones:
    """A copy of a state on its devices, in buffers that look like stretches of the arena.

    What lies between two leaves goes to the arena too: zeros, and room for checksums, which are
    written when the leaves are there. So a stretch ends before a leaf that is not staged.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], pieces: Pieces) -> None:
        """Takes the memory.

        Raises:
            torch.cuda.OutOfMemoryError: If there is not enough.
        """
        self._pieces = pieces
        self._forms = list(map(_form, tensors))
        self.parts: list[Part] = []
        spans: dict[int, list[tuple[Piece, torch.Tensor]]] = {}
        for stretch in _stretches(tensors, pieces):
            begin_bytes = stretch[0].offset_bytes
            buffer = torch.zeros(
                stretch[-1].end_bytes - begin_bytes,
                dtype=torch.uint8,
                device=tensors[stretch[0].leaf].device,
            )
            leaves = tuple(piece.leaf for piece in stretch)
            self.parts.append(Part(buffer, begin_bytes, leaves))
            for piece in stretch:
                span = buffer[piece.offset_bytes - begin_bytes : piece.end_bytes - begin_bytes]
                spans.setdefault(piece.leaf, []).append((piece, span))
        self._together: list[tuple[list[int], list[torch.Tensor]]] = []
        self._alone: list[tuple[int, torch.Tensor]] = []
        self._cut: list[tuple[int, list[tuple[Piece, torch.Tensor]]]] = []
        self._sort(tensors, spans)

    def _sort(
        self,
        tensors: Sequence[torch.Tensor],
        spans: dict[int, list[tuple[Piece, torch.Tensor]]],
    ) -> None:
        """Finds out what can be copied together: torch looks for one dtype, one device."""
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[torch.Tensor]]] = {}
        for leaf, places in spans.items():
            tensor = tensors[leaf]
            if len(places) > 1:
                self._cut.append((leaf, places))
                continue
            clone = places[0][1].view(tensor.dtype).view(tensor.shape)
            if tensor.dtype in _LAUNCHED_TOGETHER and tensor.is_contiguous():
                group = groups.setdefault((tensor.device, tensor.dtype), ([], []))
                group[0].append(leaf)
                group[1].append(clone)
            else:
                self._alone.append((leaf, clone))
        self._together = list(groups.values())

    def fit(self, tensors: Sequence[torch.Tensor], pieces: Pieces) -> bool:
        """Whether these are copies of tensors like that."""
        return pieces is self._pieces and list(map(_form, tensors)) == self._forms

    def take(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copies a state over the one before, on the streams of the caller."""
        # torch's own optimizers use it, but it has no public name.
        copy_together: Any = getattr(torch, "_foreach_copy_")  # noqa: B009
        for leaves, clones in self._together:
            copy_together(clones, [tensors[leaf] for leaf in leaves])
        for leaf, clone in self._alone:
            clone.copy_(tensors[leaf])
        for leaf, places in self._cut:
            flat = _flat(tensors[leaf])
            for piece, span in places:
                span.copy_(flat[piece.source_bytes : piece.source_bytes + piece.size_bytes])


def parts_of(tensors: Sequence[torch.Tensor], pieces: Pieces) -> list[Part]:
    """What is sent if the tensors themselves are."""
    flat = list(map(_flat, tensors))
    return [
        Part(
            flat[piece.leaf][piece.source_bytes : piece.source_bytes + piece.size_bytes],
            piece.offset_bytes,
            (piece.leaf,),
        )
        for piece in pieces
    ]


class Transfer:
    """One state on its way into an arena; see `arrays.Source`."""

    def __init__(self, lanes: Lanes, parts: Sequence[Part], arena: Bytes) -> None:
        """Of the caller: what its streams have done by now is what will be sent."""
        self._lanes = lanes
        self._parts = parts
        self._arena = arena
        self._is_sent = False
        self._arrived: dict[int, Any] = {}  # the event of each leaf that waits for one
        self._guard = threading.Lock()
        lanes.follow({part.source.device for part in parts})

    def __call__(self, leaf: int) -> None:
        self.send()
        event = self._arrived.get(leaf)
        if event is not None:
            event.synchronize()

    def send(self) -> None:
        """Sends everything, unless that was done: for the first thread that comes to it."""
        with self._guard:
            if not self._is_sent:
                try:
                    self._send()
                except BaseException:
                    self._lanes.settle()  # or what was sent would arrive in the midst of another
                    raise
                self._is_sent = True

    def _send(self) -> None:
        waiting: dict[Lane, list[int]] = {}  # for the next event
        sent_bytes: collections.Counter[Lane] = collections.Counter()  # since the last one
        for part in self._parts:
            begin_bytes = part.offset_bytes
            target = torch.from_numpy(self._arena[begin_bytes : begin_bytes + part.source.nbytes])
            lane = self._lanes.of(part.source.device)
            if lane is None:
                target.copy_(part.source)
                continue
            lane.send(target, part.source)
            waiting.setdefault(lane, []).extend(part.leaves)
            sent_bytes[lane] += part.source.nbytes
            if sent_bytes[lane] >= _EVENT_BYTES:
                self._arrived |= dict.fromkeys(waiting.pop(lane), lane.mark())
                sent_bytes[lane] = 0
        for lane, leaves in waiting.items():
            self._arrived |= dict.fromkeys(leaves, lane.mark())


class Lane:
    """The stream on which transfers from one CUDA device follow each other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._ready = torch.cuda.Event()
        self._events: list[Any] = []
        self._used = 0

    def follow(self) -> None:
        """Has what is sent from now on wait for what the caller's stream has to do by now."""
        self._ready.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(self._ready)
        self._used = 0

    def send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        """Returns an event after which all that was sent has arrived."""
        if self._used == len(self._events):
            # Who waits sleeps; others would keep a core busy that the training may want.
            self._events.append(torch.cuda.Event(blocking=True))
        event = self._events[self._used]
        self._used += 1
        event.record(self._stream)
        return event

    def settle(self) -> None:
        self._stream.synchronize()


class Lanes:
    """The lanes of all CUDA devices; other devices have none, what they send has arrived."""

    def __init__(self) -> None:
        self._lanes: dict[torch.device, Lane | None] = {}

    def of(self, device: torch.device) -> Lane | None:
        return self._lanes[device]

    def follow(self, devices: Iterable[torch.device]) -> None:
        """See `Lane.follow`."""
        for device in devices:
            if device not in self._lanes:
                self._lanes[device] = _make_lane(device)
            lane = self._lanes[device]
            if lane is not None:
                lane.follow()

    def settle(self) -> None:
        """Returns when all that was sent has arrived."""
        for lane in self._lanes.values():
            if lane is not None:
                lane.settle()


def _make_lane(device: torch.device) -> Lane | None:
    return Lane(device) if device.type == "cuda" else None


def _stretches(tensors: Sequence[torch.Tensor], pieces: Pieces) -> Iterator[list[Piece]]:
    """Groups neighbours on one device."""
    stretch: list[Piece] = []
    for piece in pieces:
        if stretch:
            last = stretch[-1]
            is_next = piece.number == last.number + 1
            is_near = piece.end_bytes - stretch[0].offset_bytes <= _STRETCH_BYTES
            if not (
                is_next and is_near and tensors[piece.leaf].device == tensors[last.leaf].device
            ):
                yield stretch
                stretch = []
        stretch.append(piece)
    if stretch:
        yield stretch


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _form(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device, bool]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous()
