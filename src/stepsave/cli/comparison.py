"""What `stepsave diff` finds, as a document; docs/cli.md describes its fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from stepsave.cli import jobs
from stepsave.cli.comparison_text import show
from stepsave.cli.differences import compare_variables
from stepsave.cli.inspection import position_of
from stepsave.cli.jobs import Job
from stepsave.cli.outcome import FOUND
from stepsave.cli.places import open_place, split_step
from stepsave.engine.choosing import choose_backup
from stepsave.engine.examining import READ_THREADS, Examined, examine, settle
from stepsave.engine.markers import Markers
from stepsave.engine.scanning import ChunkReader
from stepsave.errors import BackupDirectoryError, CorruptBackupError
from stepsave.format.records import BackupRecord, LayoutPlan
from stepsave.store.places import Store
from stepsave.threads import Crew

__all__ = ("run",)

Document = dict[str, Any]

_FORMAT = 1
"""Of the document; see `inspection`."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Side:
    """One of the two backups."""

    store: Store
    examined: Examined

    @property
    def record(self) -> BackupRecord:
        return self.examined.record

    @property
    def plan(self) -> LayoutPlan:
        assert self.examined.plan is not None, "looked at when it was opened"
        return self.examined.plan


def run(a: str, b: str | None, *, as_json: bool) -> int:
    """Prints how two backups differ; returns the exit status of the command."""
    found = jobs.do(lambda job, crew: _compare_targets(a, b, job, crew), READ_THREADS - 1)
    document = {"format": _FORMAT} | found
    if as_json:
        print(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))  # noqa: T201
    else:
        show(document)
    return 0 if document["are_equal"] else FOUND


def _compare_targets(a: str, b: str | None, job: Job, crew: Crew) -> Document:
    """Compares them; again, if one was replaced meanwhile."""
    place_a, step_a = split_step(a)
    place_b, step_b = (place_a, step_a) if b is None else split_step(b)
    store_a, store_b = open_place(place_a), open_place(place_b)
    is_alone = b is None and step_a is None  # then the one before is compared with the newest

    def look(markers_a: Markers, markers_b: Markers) -> tuple[Document, bool]:
        if is_alone:
            record_a = _choose_before(store_a, markers_a)
        else:
            record_a = choose_backup(store_a, markers_a, step_a)
        record_b = choose_backup(store_b, markers_b, step_b)
        side_a, side_b = _open(store_a, record_a, crew), _open(store_b, record_b, crew)
        return _compare(side_a, side_b, job, crew), False

    return settle(look, store_a, store_b)


def _choose_before(store: Store, markers: Markers) -> BackupRecord:
    """Returns the backup before the newest."""
    newest = choose_backup(store, markers)
    for record in markers.kept:
        # Between the reading of two markers both may have been replaced, and name the same one.
        if record.nonce != newest.nonce:
            return record
    for problem in markers.problems.values():
        raise problem
    raise BackupDirectoryError(
        f"{store.root}: expected two backups to compare, found step {newest.step} alone. Name "
        "another directory too; `keep=1` keeps the backup before the newest."
    )


def _open(store: Store, record: BackupRecord, crew: Crew) -> _Side:
    examined = examine(store, record, crew)
    for damage in examined.damages:
        raise CorruptBackupError(
            f"{store.path(damage.path)}: {damage.text} `stepsave verify` looks for more."
        )
    return _Side(store, examined)


def _compare(a: _Side, b: _Side, job: Job, crew: Crew) -> Document:
    leaves_a, leaves_b = ({leaf.path: leaf for leaf in side.plan.leaves} for side in (a, b))
    common = [path for path in leaves_a if path in leaves_b]
    unlike = [path for path in common if leaves_a[path] != leaves_b[path]]
    same = [path for path in common if leaves_a[path] == leaves_b[path]]
    job.begin("comparing", a.plan.arena_bytes + b.plan.arena_bytes)
    reader_a, reader_b = (ChunkReader(one.store, one.record, one.plan, job.note) for one in (a, b))
    found = compare_variables(reader_a, reader_b, same, crew)
    variables = [
        {"path": list(path), "elements": leaves_a[path].size_bytes // leaves_a[path].itemsize_bytes}
        | found[path].to_json()
        for path in same
        if found[path].differing
    ]
    forms = [
        {
            "path": list(path),
            "a": {"shape": list(leaves_a[path].shape), "dtype": leaves_a[path].dtype},
            "b": {"shape": list(leaves_b[path].shape), "dtype": leaves_b[path].dtype},
        }
        for path in unlike
    ]
    only_a = [list(path) for path in leaves_a if path not in leaves_b]
    only_b = [list(path) for path in leaves_b if path not in leaves_a]
    metadata = list(_differences(a.examined.training, b.examined.training))
    return {
        "a": _describe(a),
        "b": _describe(b),
        "are_equal": not (variables or forms or only_a or only_b or metadata),
        "compared": len(same),
        "variables": variables,
        "forms": forms,
        "only_in_a": only_a,
        "only_in_b": only_b,
        "metadata": metadata,
    }


def _describe(side: _Side) -> Document:
    position = position_of(side.examined)
    return {
        "place": str(side.store.root),
        "step": side.record.step,
        "position": position and position.to_json(),
    }


def _differences(a: Any, b: Any, at: tuple[str, ...] = ()) -> Iterator[Document]:
    """Yields where two JSON documents differ. A key that is not there is None."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from _differences(a.get(key), b.get(key), (*at, str(key)))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _differences(one, other, (*at, str(number)))
    elif a != b or type(a) is not type(b):
        yield {"path": list(at), "a": a, "b": b}
