"""Which of the valid backups to restore, if not all can be read."""

from __future__ import annotations

from collections.abc import Callable

from stepsave.engine.known_files import COMMIT
from stepsave.engine.markers import Markers
from stepsave.engine.reader import StoredBackup
from stepsave.errors import BucketError, CorruptBackupError, PeerError, StepsaveError
from stepsave.format.records import BackupRecord

__all__ = ("restore_newest",)

Read = Callable[[BackupRecord], StoredBackup]


def restore_newest(
    place: str, markers: Markers, read: Read, step: int | None = None
) -> tuple[StoredBackup | None, str]:
    """Reads the newest valid backup, or the newest before it that can be read.

    Falls back whatever the error, and tells the markers so.

    Args:
        place: The directory or the bucket, for texts.
        markers: Its markers.
        read: Reads one.
        step: The only one that will do, by its step.

    Returns:
        The backup, or None if there never was one; and a text that names what is lost if it is
        not the newest.

    Raises:
        CorruptBackupError: If there is one, but none that can be read; or none of that step, but a
            marker that cannot be read.
        ValueError: If there is none of that step.
    """
    markers.read_markers()
    if step is not None:
        return read(_find(place, markers, step)), ""
    error: Exception | None = markers.problems.get(COMMIT)
    for record in markers.records:
        try:
            backup = read(record)
        except (BucketError, PeerError):
            raise  # it is not lost, but out of reach
        except Exception as e:  # noqa: BLE001  whatever it is, one before it may be whole
            if error is None:
                error = e
            else:
                error.add_note(f"That of step {record.step} cannot be read either: {e}")
            continue
        if record is markers.committed:
            return backup, ""
        newest = markers.committed
        markers.fall_back(record)
        return backup, _tell_loss(place, newest, backup, error)
    if error is not None:
        raise _as_corrupt(place, error)
    return None, ""


def _find(place: str, markers: Markers, step: int) -> BackupRecord:
    found = next((record for record in markers.records if record.step == step), None)
    if found is None:
        for problem in markers.problems.values():  # who knows what that marker named
            raise _as_corrupt(place, problem)
        steps = ", ".join(str(record.step) for record in markers.records) or "none"
        raise ValueError(
            f"Invalid value for argument `step`. Received: step={step}. Expected the step of a "
            f"backup in {place}; there are: {steps}. `keep=` says how many stay beside the newest."
        )
    return found


def _tell_loss(
    place: str, newest: BackupRecord | None, backup: StoredBackup, error: Exception | None
) -> str:
    what = "the newest backup" if newest is None else f"the backup of step {newest.step}"
    loss = "" if newest is None else f" {newest.step - backup.step} steps of training are lost."
    return (
        f"stepsave: {what} in {place} cannot be read. Restored the newest that can, of "
        f"step {backup.step}.{loss} The reason: {error or 'its marker COMMIT is missing'}"
    )


def _as_corrupt(place: str, error: Exception) -> Exception:
    if isinstance(error, StepsaveError):
        return error
    found = f"{type(error).__name__}: {error}"  # unlike its `repr`, with the file
    wrapped = CorruptBackupError(f"{place}: the backup cannot be read: {found}.")
    wrapped.__cause__ = error
    return wrapped
