"""What `stepsave inspect` finds, as a document; docs/cli.md describes its fields."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import time
from collections.abc import Iterable
from typing import Any

from stepsave.cli import jobs
from stepsave.cli.inspection_text import show
from stepsave.cli.jobs import Job
from stepsave.cli.lying_there import find_holding, find_others
from stepsave.cli.outcome import FOUND
from stepsave.cli.places import disks_of, open_place, valid_backups
from stepsave.cli.statistics import Statistics, Summing
from stepsave.engine.examining import (
    READ_THREADS,
    Damage,
    Examined,
    check_shard_sizes,
    examine,
    marker_damages,
    settle,
)
from stepsave.engine.markers import Markers
from stepsave.engine.scanning import scan_shards
from stepsave.errors import CorruptBackupError
from stepsave.format.records import LayoutPlan
from stepsave.position import TrainingPosition
from stepsave.store.places import Store
from stepsave.threads import Crew

__all__ = ("position_of", "run")

Document = dict[str, Any]

_FORMAT = 1
"""Of the document. Fields may be added to it; a field that is there keeps its meaning."""


def run(target: str, *, as_json: bool, with_statistics: bool) -> int:
    """Prints what is in a place; returns the exit status of the command."""
    store = open_place(target)

    def work(job: Job, crew: Crew) -> Document:
        return {"format": _FORMAT} | _inspect(store, job, crew, with_statistics)

    document = jobs.do(work, READ_THREADS - 1)
    if as_json:
        print(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))  # noqa: T201
    else:
        show(document)
    return FOUND if document["is_damaged"] else 0


def _inspect(store: Store, job: Job, crew: Crew, with_statistics: bool) -> Document:
    def look(markers: Markers) -> tuple[Document, bool]:
        job.begin("looking", None)
        document = _describe_place(store, markers, crew)
        job.check()
        for backup in document["backups"][: 1 if with_statistics else 0]:
            _add_statistics(store, markers, job, crew, backup)
            document["is_damaged"] |= bool(backup["damages"])
        return document, document["is_damaged"]

    document = settle(look, store)
    disks = [_inspect(disk, job, crew, with_statistics) for disk in disks_of(store)]
    document["disks"] = disks
    document["is_damaged"] |= any(disk["is_damaged"] for disk in disks)
    return document


def _describe_place(store: Store, markers: Markers, crew: Crew) -> Document:
    damages = marker_damages(markers, store)
    backups: list[Document] = []
    for record in valid_backups(markers):
        examined = examine(store, record, crew)
        found = [*examined.damages, *check_shard_sizes(store, examined, crew)]
        backups.append(_describe(examined, found, is_newest=record == markers.committed))
    return {
        "place": str(store.root),
        "is_damaged": bool(damages) or any(backup["damages"] for backup in backups),
        "in_use_by": find_holding(store, markers),
        "backups": backups,
        "damages": list(map(_describe_damage, damages)),
        "others": find_others(store, markers),
    }


def _describe(examined: Examined, damages: Iterable[Damage], *, is_newest: bool) -> Document:
    record, plan, metadata = examined.record, examined.plan, examined.metadata
    saved_s, holding, position = examined.saved_at_s, examined.holding, position_of(examined)
    saved = None if saved_s is None else dt.datetime.fromtimestamp(saved_s, dt.UTC)
    return {
        "step": record.step,
        "directory": record.directory,
        "is_newest": is_newest,
        "has_ended": record.ended,
        "saved_at": saved and saved.isoformat(timespec="milliseconds"),
        "age_s": None if saved_s is None else max(0.0, round(time.time() - saved_s, 3)),
        "bytes": record.size_bytes,
        "state_bytes": plan and plan.state_bytes,
        "shards": len(record.shard_digests),
        "format": examined.training.get("format"),
        "position": position and position.to_json(),
        "backend": metadata.get("backend"),
        "keras_version": metadata.get("keras_version"),
        "processes": holding.processes if holding else metadata.get("processes"),
        "process": holding and holding.process,
        "metadata": metadata,
        "variables": plan and _describe_variables(plan),
        "damages": list(map(_describe_damage, damages)),
    }


def _describe_variables(plan: LayoutPlan) -> list[Document]:
    return [
        {
            "path": list(leaf.path),
            "shape": list(leaf.shape),
            "dtype": leaf.dtype,
            "bytes": leaf.size_bytes,
        }
        for leaf in plan.leaves
    ]


def _describe_damage(damage: Damage) -> Document:
    return {"path": damage.path, "text": damage.text, "variables": list(map(list, damage.leaves))}


def position_of(examined: Examined) -> TrainingPosition | None:
    """Where the training was, if its metadata says so as stepsave's callback does."""
    position: TrainingPosition | None = None
    with contextlib.suppress(CorruptBackupError):  # somebody else's metadata, under that name
        if "position" in examined.metadata:
            position = TrainingPosition.from_json(examined.metadata["position"])
    return position


def _add_statistics(store: Store, markers: Markers, job: Job, crew: Crew, backup: Document) -> None:
    record = valid_backups(markers)[0]
    plan = examine(store, record, crew).plan
    if plan is None:
        return
    summing = Summing(plan)
    job.begin("reading", plan.arena_bytes)
    damages = scan_shards(store, record, plan, crew, summing.add, job.note)
    # Its shards were asked for their sizes too, which would be told a second time.
    files = {damage["path"] for damage in map(_describe_damage, damages)}
    others = [damage for damage in backup["damages"] if damage["path"] not in files]
    backup["damages"] = [*others, *map(_describe_damage, damages)]
    for number, variable in enumerate(backup["variables"]):
        variable["statistics"] = _describe_statistics(summing.of_leaf(number))


def _describe_statistics(found: Statistics) -> Document:
    mean = found.mean
    return {
        "min": found.least,
        "max": found.largest,
        "mean": [mean.real, mean.imag] if isinstance(mean, complex) else mean,
        "nan": found.nan_count,
        "infinite": found.infinite_count,
    }
