"""Snapshots that training need not wait for until they are on the host.

On an accelerator a state can be copied within device memory, dozens of times faster than to
the host; the way to the host then hides behind later steps. Without device memory to spare
the state goes to the host at once, through memory that the device can write to directly.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from stepsave.errors import InvalidStateError
from stepsave.format.records import LayoutPlan
from stepsave.snapshot.arrays import ArrayForm, HostArray, backend_of, backends_of

__all__ = ("SnapshotMode", "Source", "Stager", "choose_stager")

_logger = logging.getLogger("stepsave")

SnapshotMode = Literal["auto", "device", "host"]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Targets = Callable[[], Iterator[tuple[int, int, Bytes]]]
"""Yields where in an arena each run of bytes goes: leaf, its first byte in the leaf, memory."""

Source = Callable[[int], HostArray | None]
"""Gives a leaf on the host, waiting for it; None if it is in the arena already."""

_STAGED = {"jax", "torch", "tensorflow"}

HEADROOM = 1.1
"""How many times its own size a state must find free on its device to be copied there."""


class Stage(Protocol):
    """How arrays of one backend leave their devices; one state at a time.

    Attributes:
        on_device: Whether the arrays are copied within device memory first.
        blocks: Whether the arrays must not change until all of them are on the host.
    """

    on_device: bool
    blocks: bool

    def prepare(self, leaves: Sequence[Any]) -> None:
        """Compiles what can be compiled ahead; allocates nothing."""
        ...

    def begin(self, leaves: Sequence[Any], targets: Targets) -> Source:
        """Takes a state over. All of the one before is on the host.

        Returns:
            What waits until a leaf is on the host, called by several threads.

        Raises:
            MemoryError: If the device has no room for a copy after all.
        """
        ...

    def pin(self, memory: Bytes) -> None:
        """Makes an arena a fast target for transfers, where that takes anything."""
        ...

    def unpin(self) -> None:
        """Undoes `pin`."""
        ...


class Stager:
    """Stages the leaves of a state: arrays of one backend, and NumPy arrays and numbers."""

    def __init__(self, kind: str, mode: SnapshotMode, leaves: Sequence[Any]) -> None:
        """Makes nothing yet.

        Args:
            kind: The backend, by the name of its module here.
            mode: Where snapshots are taken; "auto" is decided by the first.
            leaves: A state like those to be staged.
        """
        kinds = [backend_of(leaf) for leaf in leaves]
        self._module: Any = importlib.import_module(f"stepsave.snapshot.{kind}")
        self._mode: SnapshotMode = mode
        self._kinds = list(kinds)
        self._types = list(map(type, leaves))
        self._staged = [i for i, other in enumerate(kinds) if other == kind]
        self._place = {leaf: place for place, leaf in enumerate(self._staged)}
        self._stage: Stage | None = None
        self._arenas: Sequence[Bytes] = ()

    @property
    def mode(self) -> SnapshotMode:
        """Where snapshots are taken; "auto" as long as it is not decided."""
        return self._mode

    @property
    def blocks(self) -> bool:
        """Whether the state must not change until it is on the host."""
        return self._stage is not None and self._stage.blocks

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
        try:
            described = iter(self._module.describe([leaves[i] for i in self._staged]))
        except InvalidStateError as e:
            if len(leaves) > 1:  # say which one
                for i in self._staged:
                    one = Stager(self._kinds[i], self._mode, leaves[i : i + 1])
                    one.describe([paths[i]], [leaves[i]])
            raise InvalidStateError(f"State {'/'.join(paths[0])!r}: {e}") from e
        forms: list[ArrayForm] = []
        for i, leaf in enumerate(leaves):
            if i in self._place:
                forms.append(ArrayForm(*next(described)))
            else:
                forms.append(ArrayForm(np.shape(leaf), np.asarray(leaf).dtype))
        return forms

    def prepare(self, leaves: Sequence[Any]) -> None:
        """Does what can be done before the first save."""
        self._make_stage(leaves, on_device=self._mode != "host")

    def begin(self, leaves: Sequence[Any], plan: LayoutPlan, arena: Bytes) -> Source:
        """Takes a state over; returns what gives its leaves on the host."""
        staged = [leaves[i] for i in self._staged]
        if self._mode == "auto":
            # Only now is it known what a training step needs.
            self._mode = "device" if self._module.has_room(staged, HEADROOM) else "host"
            _logger.info("snapshots are taken on the %s", self._mode)
        on_device = self._mode == "device"
        if self._stage is None or self._stage.on_device != on_device:
            self._make_stage(leaves, on_device=on_device)
        stage = self._stage
        assert stage is not None
        try:
            source = stage.begin(staged, lambda: self._targets(plan, arena))
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
        # NumPy arrays and numbers are few and small beside arrays of a backend.
        others = {i: np.array(leaf) for i, leaf in enumerate(leaves) if i not in self._place}
        place = self._place

        def host(leaf: int) -> HostArray | None:
            return source(place[leaf]) if leaf in place else others[leaf]

        return host

    def pin(self, arenas: Sequence[Bytes]) -> None:
        """Takes note of the arenas that snapshots go to, for as long as `unpin` is not called."""
        self._arenas = arenas
        if self._stage is not None:
            for memory in arenas:
                self._stage.pin(memory)

    def unpin(self) -> None:
        """Forgets the arenas, before their memory goes. No transfer may be in flight."""
        if self._stage is not None:
            self._stage.unpin()
        self._arenas = ()

    def close(self) -> None:
        """Gives up device memory. No transfer may be in flight."""
        if self._stage is not None:
            self._stage.unpin()
            self._stage = None

    def _make_stage(self, leaves: Sequence[Any], *, on_device: bool) -> None:
        self.close()
        self._stage = stage = self._module.make_stage(on_device=on_device)
        stage.prepare([leaves[i] for i in self._staged])
        for memory in self._arenas:
            stage.pin(memory)

    def _targets(self, plan: LayoutPlan, arena: Bytes) -> Iterator[tuple[int, int, Bytes]]:
        for chunk in sorted(plan.chunks, key=lambda chunk: chunk.offset_bytes):
            if chunk.leaf in self._place:
                memory = arena[chunk.offset_bytes : chunk.offset_bytes + chunk.data_bytes]
                yield self._place[chunk.leaf], chunk.source_bytes, memory


def choose_stager(leaves: Sequence[Any], mode: SnapshotMode) -> Stager | None:
    """Returns what stages these leaves; None if they are copied on the host directly.

    Args:
        leaves: The arrays.
        mode: "device" forces copies within device memory, whatever the device is; "host"
            forbids them; "auto" allows them where there is an accelerator.

    Raises:
        InvalidStateError: If "device" is asked for and the leaves allow no such copy.
    """
    kinds = backends_of(leaves)
    backends = kinds - {"numpy"}
    if len(backends) != 1 or not backends <= _STAGED:
        if mode != "device":
            return None
        found = ", ".join(sorted(kinds)) or "no array at all"
        raise InvalidStateError(
            "snapshot='device' needs a state of JAX, torch or TensorFlow arrays, all of one "
            f"backend; found {found}. Use snapshot='auto'."
        )
    (kind,) = backends
    stager = Stager(kind, mode, leaves)
    return stager if mode == "device" or stager.is_worthwhile(leaves) else None
