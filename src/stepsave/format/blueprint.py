"""What all backups of one layout have in common: made once, written with each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from stepsave.format import orbax
from stepsave.format.checksum import crc32c
from stepsave.format.holding import HOLDING_PATH, Holding, encode_holding
from stepsave.format.layout import encode_layout
from stepsave.format.records import FileRecord, LayoutPlan

__all__ = ("Blueprint",)


class Blueprint:
    """What all backups of one layout have in common.

    Attributes:
        plan: The layout.
        items: Names of the Orbax checkpointables beside `pytree`.
    """

    def __init__(
        self,
        plan: LayoutPlan,
        items: Mapping[str, Mapping[str, str]],
        device: str | None = None,
        holding: Holding | None = None,
    ) -> None:
        """Makes none of the files yet: whoever writes needs them first, not who trains.

        Args:
            plan: The layout.
            items: Further checkpointables: dicts of strings by name.
            device: As in `orbax.constant_files`.
            holding: Which part of a backup of several processes it is; None if it is a whole.
        """
        self.plan = plan
        self.items = tuple(items)
        self._strings = items
        self._device = device
        self._holding = holding

    @classmethod
    def of_files(cls, plan: LayoutPlan, files: Mapping[str, bytes]) -> Blueprint:
        """Returns that of a backup which was made elsewhere, by its constant files."""
        made = cls(plan, {})
        made.__dict__["files"] = dict(files)
        return made

    @functools.cached_property
    def files(self) -> Mapping[str, bytes]:
        """Constant files by path: those of the layout, and those of the items."""
        files = orbax.constant_files(self.plan, self._device)
        for name, strings in self._strings.items():
            files |= orbax.json_item(name, strings)
        if self._holding is not None:
            holding = dataclasses.replace(self._holding, device=self._device)
            files[HOLDING_PATH] = encode_holding(holding)
        return files

    @functools.cached_property
    def layout_crc32c(self) -> int:
        """By which processes that save together know that they mean the same."""
        return crc32c(encode_layout(self.plan))

    @functools.cached_property
    def records(self) -> frozenset[FileRecord]:
        """What proves the constant files."""
        return frozenset(FileRecord.of(path, data) for path, data in self.files.items())
