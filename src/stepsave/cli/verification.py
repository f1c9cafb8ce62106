"""What `stepsave verify` does: reads all, and names all that is damaged."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from stepsave.cli import jobs
from stepsave.cli.amounts import size_text, time_text
from stepsave.cli.jobs import Job
from stepsave.cli.outcome import FOUND
from stepsave.cli.places import disks_of, open_place, valid_backups
from stepsave.cli.screen import BAD, GOOD, say
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
from stepsave.errors import BackupDirectoryError
from stepsave.store.places import Store
from stepsave.threads import Crew

__all__ = ("run",)


@dataclasses.dataclass(frozen=True, slots=True)
class _Verified:
    """What became of the backups of one place.

    Attributes:
        place: The place.
        damages: What is damaged: of the markers, and of each backup by its step.
        read_bytes: How much was read.
    """

    place: str
    damages: dict[int | None, list[Damage]]
    read_bytes: int

    @property
    def steps(self) -> list[int]:
        return [step for step in self.damages if step is not None]


def run(target: str) -> int:
    """Verifies what is in a place, and prints what is damaged; returns the exit status.

    Raises:
        BackupDirectoryError: If there is no backup.
    """
    began_s = time.monotonic()
    store = open_place(target)
    places = (store, *disks_of(store))

    def work(job: Job, crew: Crew) -> list[_Verified]:
        return [_verify(one, job, crew) for one in places]

    found = jobs.do(work, READ_THREADS - 1)
    found = [one for one in found if one.damages[None] or one.steps]
    if not found:
        raise BackupDirectoryError(
            f"{store.root}: expected a backup to verify, found none. Look for a typing error; "
            "`stepsave inspect` says what lies there."
        )
    took_s = time.monotonic() - began_s
    damaged = [damage for one in found for some in one.damages.values() for damage in some]
    for one in found:
        _tell_damages(one)
    read_bytes = sum(one.read_bytes for one in found)
    speed = f"{size_text(read_bytes)} in {time_text(took_s)}, {size_text(read_bytes / took_s)}/s"
    if damaged:
        say(f"damaged: {_sum_up(damaged)}; read {speed}", BAD)
        return FOUND
    steps = sorted({step for one in found for step in one.steps}, reverse=True)
    say(f"valid: step {', '.join(map(str, steps))}; read {speed}", GOOD)
    return 0


def _verify(store: Store, job: Job, crew: Crew) -> _Verified:
    def look(markers: Markers) -> tuple[_Verified, bool]:
        damages: dict[int | None, list[Damage]] = {None: marker_damages(markers, store)}
        examined = [examine(store, record, crew) for record in valid_backups(markers)]
        job.begin("verifying", sum(one.record.size_bytes for one in examined))
        for one in examined:
            job.note(sum(file.size_bytes for file in one.record.files))
            damages[one.record.step] = [*one.damages, *_scan(store, one, job, crew)]
        return _Verified(str(store.root), damages, job.done_bytes), any(damages.values())

    return settle(look, store)


def _scan(store: Store, examined: Examined, job: Job, crew: Crew) -> list[Damage]:
    if examined.plan is None:
        return check_shard_sizes(store, examined, crew)
    return scan_shards(store, examined.record, examined.plan, crew, on_read=job.note)


def _tell_damages(found: _Verified) -> None:
    for step, damages in found.damages.items():
        if damages:
            say(f"{found.place}" + ("" if step is None else f", step {step}"))
        lost: dict[tuple[str, ...], None] = {}
        for damage in damages:
            say(f"  {damage.path}: {damage.text}")
            lost.update(dict.fromkeys(damage.leaves))
        for leaf in lost:
            say(f"  damaged variable: {'/'.join(leaf)}")


def _sum_up(damages: Sequence[Damage]) -> str:
    files = len({damage.path for damage in damages})
    leaves = len({leaf for damage in damages for leaf in damage.leaves})
    return f"{files} file{'' if files == 1 else 's'}, {leaves} variable{'' if leaves == 1 else 's'}"
