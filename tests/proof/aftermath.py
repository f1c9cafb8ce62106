"""What must hold after a death, whatever it came in the midst of."""

import dataclasses
import os
import warnings
from pathlib import Path

from engine_support import assert_is_state_of, state_of

import stepsave
from stepsave.format import orbax
from stepsave.store.addresses import address_of
from stepsave.store.bucket import BucketStore

LIMIT_S = 60


@dataclasses.dataclass(slots=True)
class Told:
    """What processes said before they died.

    Attributes:
        durable: The newest step that was acknowledged, 0 for none.
        begun: The newest that was to be saved.
        uploaded: The newest that was said to be in the bucket.
        damaged: A step that was spoilt on purpose; 0 for none.
        deleting: Whether nothing need be there any more.
        deleted: Whether nothing may be there any more.
    """

    durable: int = 0
    begun: int = 0
    uploaded: int = 0
    damaged: int = 0
    deleting: bool = False
    deleted: bool = False

    def hear(self, line):
        """Takes note of a line."""
        what, _, step = line.partition(" ")
        if what == "durable":
            self.durable = int(step)
        elif what == "begun":
            self.begun = max(self.begun, int(step))
            self.deleting = self.deleted = False
        elif what == "uploaded":
            self.uploaded = int(step)
        elif what == "damaged":
            self.damaged = int(step)
            self.durable = self.damaged - 1
        elif what == "deleting":
            self.deleting = True
        elif what == "deleted":
            self.deleted, self.durable = True, 0

    def check(self, step):
        """A restored step, 0 for none, is the last that was acknowledged or a newer one."""
        if step == 0 and (self.deleting or self.deleted):
            return
        assert not self.deleted, f"step {step} is there though all was deleted"
        assert self.durable <= step <= self.begun, (
            f"step {self.durable} was acknowledged and {self.begun} begun, {step} was restored"
        )
        assert step != self.damaged or not step, f"step {step} was spoilt"


def check(directory, told, options, place=None):
    """Restores what is there, saves once more, finds nothing else lying there, and deletes it all.

    Args:
        directory: The backup directory.
        told: What processes said.
        options: Of the checkpointer that died.
        place: The bucket behind the directory, if there is one.
    """
    directory = Path(directory)
    step = check_restored(directory, told, options, place)
    go_on(directory, step + 1, told, options, place)


def check_restored(directory, told, options, place=None):
    """What is restored is whole and not too old; returns its step, 0 for none."""
    with warnings.catch_warnings():
        if told.damaged:
            warnings.simplefilter("ignore", UserWarning)  # that a step is lost, which is so
        if directory.exists():
            # Before anybody who may write has opened it.
            _check_backup(stepsave.restore(directory), told)
        if place is not None:
            in_bucket = _whole(stepsave.restore(place))
            assert told.uploaded <= in_bucket <= told.begun
        with _open(directory, options, place) as saver:
            return _check_backup(saver.restore(), told)


def _check_backup(backup, told):
    step = _whole(backup)
    told.check(step)
    return step


def _whole(backup):
    if backup is None:
        return 0
    assert_is_state_of(backup)
    assert backup.metadata == {"step": backup.step}
    return backup.step


def _open(directory, options, place):
    if place is None:
        return stepsave.Checkpointer(directory, **options)
    return stepsave.Checkpointer(place, local_dir=directory, **options)


def go_on(directory, step, told, options, place=None):
    """A save works, and leaves nothing but backups; a deletion leaves nothing."""
    with warnings.catch_warnings():
        if told.damaged:
            warnings.simplefilter("ignore", UserWarning)
        with _open(directory, options, place) as saver:
            saver.restore()
            saver.save(step, state_of(step), {"step": step}).wait(LIMIT_S)
            assert _whole(saver.restore()) == step
            saver.upload()
            records = (saver.committed, *saver.kept)
            disk = records if place is None else records[:1]
            check_nothing_else(directory, disk, keeps=place is not None or bool(saver.kept))
            if place is not None:
                _check_bucket(place, saver)
    assert _whole(stepsave.restore(directory)) == step
    with _open(directory, options, place) as saver:
        saver.close(delete_backup=True)
    assert not directory.exists(), f"left behind: {sorted(directory.rglob('*'))}"
    if place is not None:
        assert _keys(place) == []


def check_nothing_else(directory, records, *, keeps):
    """In a directory are these backups, markers, the lock, and a spare one perhaps."""
    found = set(os.listdir(directory))
    expected = {"COMMIT", "LOCK", *(record.directory for record in records)}
    optional = {"spare"} | ({"PREVIOUS"} if keeps else set())
    assert expected <= found <= expected | optional, f"{sorted(found)}, not {sorted(expected)}"
    for record in records:
        shards = {orbax.shard_path(number) for number in range(len(record.shard_digests))}
        files = {file.path for file in record.files} | shards
        assert _files(directory / record.directory) == files
    litter = [path for path in _files(directory / "spare") if path.endswith((".__lock", ".tmp"))]
    assert not litter, f"in the spare directory: {litter}"


def _files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def _check_bucket(place, saver):
    backups = [os.path.dirname(key) for key in _keys(place) if key.endswith("/layout.json")]
    folders = {key.split("/")[0] for key in _keys(place)} - {"COMMIT"}
    assert len(backups) == 1, backups
    assert len(folders) == 1, folders
    assert backups[0].endswith(f"/{saver.stats().remote_step}")


def _keys(place):
    return sorted(BucketStore(address_of(place)).list(""))
