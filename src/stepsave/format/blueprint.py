"""What all backups of one layout have in common: compiled once, written with each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from stepsave.format import orbax
from stepsave.format.records import FileRecord, LayoutPlan

__all__ = ("Blueprint",)


@dataclasses.dataclass(frozen=True, slots=True)
class Blueprint:
    """What all backups of one layout have in common.

    Attributes:
        plan: The layout.
        files: Constant files by path: those of the layout, and those of the items.
        items: Names of the Orbax checkpointables beside `pytree`.
        records: What proves the constant files.
    """

    plan: LayoutPlan
    files: Mapping[str, bytes]
    items: tuple[str, ...]
    records: frozenset[FileRecord]

    @classmethod
    def compile(
        cls,
        plan: LayoutPlan,
        items: Mapping[str, Mapping[str, str]],
        device: str | None = None,
    ) -> Blueprint:
        """Makes the constant files of a layout.

        Args:
            plan: The layout.
            items: Further checkpointables: dicts of strings by name.
            device: As in `orbax.constant_files`.
        """
        files = orbax.constant_files(plan, device)
        for name, strings in items.items():
            files |= orbax.json_item(name, strings)
        records = frozenset(FileRecord.of(path, data) for path, data in files.items())
        return cls(plan, files, tuple(items), records)
