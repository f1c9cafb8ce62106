"""What of a state this process captures, where it lies on several devices or processes.

Of each array the distinct blocks that devices have; of what several processes have, each takes a
part, and all together take everything once.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from stepsave.errors import InvalidStateError
from stepsave.format.holding import Holding, hold
from stepsave.format.planning import Part, deal_layout
from stepsave.format.records import LeafSpec
from stepsave.snapshot.arrays import HostArray, backends_of, dtype_name
from stepsave.snapshot.leaves import describe_all

__all__ = ("Selection", "Team")

Paths = Sequence[tuple[str, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class Team:
    """The processes that save together.

    Attributes:
        rank: Which one this is.
        count: How many there are.
        keep_all: Whether each keeps all that it has, on a disk of its own, and not only what is
            dealt to it.
    """

    rank: int
    count: int
    keep_all: bool = False


_ALONE = Team(0, 1)


class Selection:
    """What of states of one structure this process captures.

    Attributes:
        plan: The layout of the backup that it is for.
        share: What of it this process captures.
        holding: Which part of a backup of all that is; None if it is that backup.
        paths: Of the parts.
    """

    def __init__(self, paths: Paths, leaves: Sequence[Any], team: Team | None) -> None:
        """Deals a state out.

        Raises:
            InvalidStateError: If it cannot be saved, naming what.
        """
        team = team or _ALONE
        self._paths = paths
        self._looks = _looks(leaves)
        spreads: Any = None
        if "jax" in sys.modules:
            spreads = importlib.import_module("stepsave.snapshot.jax_blocks").Spreads(
                is_alone=team.count == 1
            )
        specs = [
            LeafSpec(path, form.shape, dtype_name(path, form))
            for path, form in zip(paths, describe_all(paths, leaves), strict=True)
        ]
        lies: list[Any] = [None] * len(leaves)
        if spreads is not None:
            for number, leaf in enumerate(leaves):
                try:
                    lies[number] = spreads.of(leaf)
                except InvalidStateError as e:
                    raise InvalidStateError(f"State {'/'.join(paths[number])!r}: {e}") from e
        deal = deal_layout(specs, lies, team.count)
        self.holding: Holding | None = None
        if team.keep_all:
            self.plan, self.share = hold(deal, team.rank)
            first, end = deal.first_shards[team.rank : team.rank + 2]
            self.holding = Holding(team.rank, team.count, first, end - first, None, deal.plan)
        else:
            self.plan, self.share = deal.plan, deal.share(team.rank)
        parts = self.share.parts
        if parts is None:
            parts = [Part(i, (0,) * len(spec.shape), None) for i, spec in enumerate(specs)]
        shards: dict[tuple[int, Any], int | None] = {}
        for part in parts:
            key = part.leaf, part.block
            if spreads is not None and key not in shards:
                shards[key] = spreads.choose(leaves[part.leaf], lies[part.leaf], part.block)
        # Of each part the array, and which of its shards.
        self._sources = [(part.leaf, shards.get((part.leaf, part.block))) for part in parts]
        self._cuts = [part.cut for part in parts]
        self._has_cuts = any(cut is not None for cut in self._cuts)
        self.paths: Paths = [paths[part.leaf] for part in parts]

    @staticmethod
    def is_needed(leaves: Sequence[Any], team: Team | None) -> bool:
        """Whether a state may be anything else than arrays that are captured as wholes."""
        if team is not None:
            return True
        return "jax" in backends_of(leaves) and bool(
            importlib.import_module("stepsave.snapshot.jax_blocks").has_many_devices()
        )

    def fits(self, paths: Paths, leaves: Sequence[Any]) -> bool:
        """Whether a state is of the structure that was dealt out."""
        is_same = paths is self._paths or list(paths) == list(self._paths)
        return is_same and _looks(leaves) == self._looks

    def parts(self, leaves: Sequence[Any]) -> list[Any]:
        """Returns the arrays that have the parts, each on one device; whole blocks."""
        return [
            leaves[leaf] if shard is None else leaves[leaf].addressable_data(shard)
            for leaf, shard in self._sources
        ]

    def cut(self, views: list[HostArray]) -> list[HostArray]:
        """Returns the parts, of blocks that are on the host."""
        if not self._has_cuts:
            return views
        return [
            view if cut is None else view[cut] for view, cut in zip(views, self._cuts, strict=True)
        ]

    def cut_on_device(self, parts: list[Any]) -> list[Any]:
        """Returns the parts, of blocks that are on devices: they are cut there."""
        if not self._has_cuts:
            return parts
        module: Any = importlib.import_module("stepsave.snapshot.jax_blocks")
        return module.cut_parts(parts, self._cuts)


def _looks(leaves: Sequence[Any]) -> list[Any]:
    """What two states have in common that are dealt out alike."""
    return [
        (type(leaf), getattr(leaf, "shape", ()), getattr(leaf, "dtype", None), _sharding_of(leaf))
        for leaf in leaves
    ]


def _sharding_of(leaf: Any) -> Any:
    return getattr(leaf, "sharding", None)
