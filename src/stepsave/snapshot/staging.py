"""Snapshots that training need not wait for until they are on the host.

On an accelerator a state can be copied within device memory, dozens of times faster than to
the host; the way to the host then hides behind later steps. Without device memory to spare
the state goes to the host at once, through memory that the device can write to directly.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from stepsave.errors import InvalidStateError
from stepsave.format.records import LayoutPlan
from stepsave.snapshot.arrays import ArrayForm, HostArray, backend_of, backends_of
from stepsave.snapshot.page_locks import NoPins
from stepsave.snapshot.pieces import Piece, Pieces

__all__ = ("Pins", "SnapshotMode", "Source", "Stager", "choose_stager")

_logger = logging.getLogger("stepsave")

SnapshotMode = Literal["auto", "device", "host"]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

Source = Callable[[int], HostArray | None]
"""Gives a leaf on the host, waiting for it; None if it is in the arena already."""

_STAGED = {"jax", "torch", "tensorflow"}

HEADROOM = 1.1
"""How many times its own size a state must find free on its device to be copied there."""

RESERVE = 0.05
"""How much of all memory of the device must be free besides: what has not run yet by the first
save, a validation say, may need more than all that has, and finds the copy there."""


class Pins(Protocol):
    """What makes transfers to host memory fast, for all stages of a stager. Of any thread."""

    def pin(self, memory: Bytes) -> None:
        """Makes an arena, whose pages are present, a fast target; once is enough.

        Raises:
            MemoryError: If no transfer to it could be trusted.
        """
        ...

    def unpin(self) -> None:
        """Undoes `pin`, for all arenas. No transfer may be in flight."""
        ...


class Stage(Protocol):
    """How arrays of one backend leave their devices; one state at a time.

    Attributes:
        on_device: Whether the arrays are copied within device memory first.
        blocks: Whether the arrays must not change until all of them are in the arena.
    """

    on_device: bool
    blocks: bool

    def prepare(self, leaves: Sequence[Any]) -> None:
        """Compiles what can be compiled ahead; allocates nothing."""
        ...

    def begin(self, leaves: Sequence[Any], pieces: Pieces, arena: Bytes) -> Source:
        """Takes a state over. All of the one before is on the host.

        Args:
            leaves: The arrays.
            pieces: Where their bytes go, in the order of the arena. What lies between pieces
                whose numbers follow each other may be overwritten until their leaves are there.
                The same object again says that nothing of it has changed.
            arena: The memory.

        Returns:
            What waits until a leaf is on the host, called by several threads.

        Raises:
            MemoryError: If the device has no room for a copy after all.
        """
        ...

    def release(self) -> None:
        """Returns when the arrays of the last `begin` may change, unless `blocks` is set."""
        ...

    def free(self) -> None:
        """Gives device memory up until the next `begin`. All that was begun is on the host."""
        ...

    def settle(self) -> None:
        """Returns when no transfer writes to an arena, whatever has become of its save."""
        ...


class Stager:
    """Stages the leaves of a state: arrays of one backend, and NumPy arrays and numbers."""

    def __init__(
        self, kind: str, mode: SnapshotMode, leaves: Sequence[Any], pins: Pins | None = None
    ) -> None:
        """Makes no stage yet.

        Args:
            kind: The backend, by the name of its module here.
            mode: Where snapshots are taken; "auto" is decided by the first.
            leaves: A state like those to be staged.
            pins: What has pinned the arenas for a stager before it; None to make them.
        """
        kinds = [backend_of(leaf) for leaf in leaves]
        self._kind = kind
        self._module: Any = importlib.import_module(f"stepsave.snapshot.{kind}")
        self._mode: SnapshotMode = mode
        self._types = list(map(type, leaves))
        self._staged = [i for i, other in enumerate(kinds) if other == kind]
        self._place = {leaf: place for place, leaf in enumerate(self._staged)}
        self._stage: Stage | None = None
        self._pins = pins or self._module.make_pins([leaves[i] for i in self._staged])
        # Of what was described last; asking again takes longer than comparing.
        self._described: tuple[list[Any], list[ArrayForm]] | None = None
        # Replaced as one, so that no interruption leaves pieces under the name of another plan.
        self._layout: tuple[LayoutPlan, Pieces, Pieces] | None = None

    @property
    def mode(self) -> SnapshotMode:
        """Where snapshots are taken; "auto" as long as it is not decided."""
        return self._mode

    @property
    def blocks(self) -> bool:
        """Whether the state must not change until it is in the arena."""
        return self._stage is not None and self._stage.blocks

    def release(self) -> None:
        """Returns when the state that was begun last may change, unless `blocks` is set."""
        if self._stage is not None:
            self._stage.release()

    def free(self) -> None:
        """Gives device memory up until the next `begin`. All that was begun is on the host."""
        if self._stage is not None:
            self._stage.free()

    def is_worthwhile(self, leaves: Sequence[Any]) -> bool:
        """Whether the leaves are on a device from which a plain copy is slow."""
        return bool(self._module.is_on_accelerator([leaves[i] for i in self._staged]))

    def accepts(self, leaves: Sequence[Any]) -> bool:
        """Whether leaves are of the types that this stager was made for."""
        return list(map(type, leaves)) == self._types

    def describe(self, paths: Sequence[tuple[str, ...]], leaves: Sequence[Any]) -> list[ArrayForm]:
        """Returns what each leaf will be on the host, without a transfer.

        Raises:
            InvalidStateError: If a leaf cannot be saved.
        """
        staged = [leaves[i] for i in self._staged]
        signatures = list(map(self._module.signature, staged))
        if self._described is None or self._described[0] != signatures:
            found = [ArrayForm(*form) for form in self._describe(paths, staged)]
            self._described = signatures, found
        if len(staged) == len(leaves):
            return self._described[1]
        forms = iter(self._described[1])
        return [
            next(forms) if i in self._place else ArrayForm(np.shape(leaf), np.asarray(leaf).dtype)
            for i, leaf in enumerate(leaves)
        ]

    def _describe(self, paths: Sequence[tuple[str, ...]], staged: Sequence[Any]) -> Sequence[Any]:
        try:
            return self._module.describe(staged)
        except InvalidStateError:
            for place, leaf in zip(self._staged, staged, strict=True):  # say which one
                try:
                    self._module.describe([leaf])
                except InvalidStateError as e:
                    raise InvalidStateError(f"State {'/'.join(paths[place])!r}: {e}") from e
            raise

    def prepare(self, leaves: Sequence[Any]) -> None:
        """Does what can be done before the first save."""
        self._make_stage(leaves, on_device=self._mode != "host")

    def begin(self, leaves: Sequence[Any], plan: LayoutPlan, arena: Bytes) -> Source:
        """Takes a state over; returns what gives its leaves on the host."""
        staged = [leaves[i] for i in self._staged]
        if self._mode == "auto":
            # Only now is it known what a training step needs.
            is_room = self._module.has_room(staged, HEADROOM, RESERVE)
            self._mode = "device" if is_room else "host"
            _logger.info("snapshots are taken on the %s", self._mode)
        on_device = self._mode == "device"
        if self._stage is None or self._stage.on_device != on_device:
            self._make_stage(leaves, on_device=on_device)
        stage = self._stage
        assert stage is not None
        pieces, others = self._pieces(plan)
        try:
            source = stage.begin(staged, pieces, arena)
        except MemoryError:
            if not on_device:
                raise
            self._mode = "host"
            warnings.warn(
                "stepsave: the device has no room for a copy of the training state. From now "
                "on training waits for each snapshot until it is on the host.",
                stacklevel=2,
            )
            return self.begin(leaves, plan, arena)
        # NumPy arrays and numbers may be changed by the next step. They are few and small beside
        # arrays of a backend, but for the best weights that a callback keeps.
        for piece in others:
            data = np.ascontiguousarray(leaves[piece.leaf]).reshape(-1).view(np.uint8)
            end_bytes = piece.source_bytes + piece.size_bytes
            target = arena[piece.offset_bytes : piece.offset_bytes + piece.size_bytes]
            np.copyto(target, data[piece.source_bytes : end_bytes])
        place = self._place

        def host(leaf: int) -> HostArray | None:
            return source(place[leaf]) if leaf in place else None

        return host

    def pin(self, arenas: Sequence[Bytes]) -> None:
        """Makes arenas fast targets, all pages of which are present. Of any thread.

        Who calls it off the thread of the caller has it return before `unpin` or `close` is called.

        Raises:
            MemoryError: If no transfer to one of them could be trusted.
        """
        for memory in arenas:
            self._pins.pin(memory)

    def unpin(self) -> None:
        """Undoes `pin`, before the memory goes. The saves of all snapshots have ended."""
        if self._stage is not None:
            self._stage.settle()  # what has failed may have left transfers behind
        self._pins.unpin()

    def give_way(self, kind: str) -> Pins | None:
        """Gives up device memory, and hands what is pinned to a stager of some backend.

        The saves of all snapshots have ended. Page-locking takes a second for some gigabytes.
        """
        if kind != self._kind or isinstance(self._pins, NoPins):
            self.close()
            return None
        self._drop_stage()
        return self._pins

    def close(self) -> None:
        """Undoes `pin`, and gives up device memory. The saves of all snapshots have ended."""
        self.unpin()
        self._stage = None

    def _drop_stage(self) -> None:
        if self._stage is not None:
            self._stage.settle()
            self._stage = None

    def _make_stage(self, leaves: Sequence[Any], *, on_device: bool) -> None:
        self._drop_stage()  # first, so that there is room for another
        stage = self._module.make_stage(self._pins, on_device=on_device)
        stage.prepare([leaves[i] for i in self._staged])
        self._stage = stage

    def _pieces(self, plan: LayoutPlan) -> tuple[Pieces, Pieces]:
        """Where the staged leaves go, and where the others."""
        if self._layout is None or self._layout[0] is not plan:
            staged: list[Piece] = []
            others: list[Piece] = []
            chunks = sorted(plan.chunks, key=lambda chunk: chunk.offset_bytes)
            for number, chunk in enumerate(chunks):
                is_staged = chunk.leaf in self._place
                piece = Piece(
                    number,
                    self._place[chunk.leaf] if is_staged else chunk.leaf,
                    chunk.source_bytes,
                    chunk.offset_bytes,
                    chunk.data_bytes,
                )
                (staged if is_staged else others).append(piece)
            self._layout = plan, staged, others
        return self._layout[1:]


def choose_stager(
    leaves: Sequence[Any], mode: SnapshotMode, former: Stager | None = None
) -> Stager | None:
    """Returns what stages these leaves; None if they are copied on the host directly.

    Args:
        leaves: The arrays.
        mode: "device" forces copies within device memory, whatever the device is; "host"
            forbids them; "auto" allows them where there is an accelerator.
        former: What staged leaves of other types until now; it gives way.

    Raises:
        InvalidStateError: If "device" is asked for and the leaves allow no such copy.
    """
    kinds = backends_of(leaves)
    backends = kinds - {"numpy"}
    if len(backends) != 1 or not backends <= _STAGED:
        if former is not None:
            former.close()
        if mode != "device":
            return None
        found = ", ".join(sorted(kinds)) or "no array at all"
        raise InvalidStateError(
            "snapshot='device' needs a state of JAX, torch or TensorFlow arrays, all of one "
            f"backend; found {found}. Use snapshot='auto'."
        )
    (kind,) = backends
    stager = Stager(kind, mode, leaves, former and former.give_way(kind))
    return stager if mode == "device" or stager.is_worthwhile(leaves) else None
