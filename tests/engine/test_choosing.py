"""One of the backups at a place, whoever writes there meanwhile."""

import numpy as np
import pytest
from engine_support import flip_bit, save_once

import stepsave
from stepsave.engine.attempts import ATTEMPTS
from stepsave.engine.choosing import find_backup, read_chosen
from stepsave.store.local import LocalStore


@pytest.fixture
def store(tmp_path):
    with stepsave.Checkpointer(tmp_path / "backup", double_checkpoint=True) as saver:
        for step in (3, 8):
            saver.save(step, {"a": np.arange(step)}).wait()
    return LocalStore(tmp_path / "backup")


@pytest.mark.parametrize(("named", "step"), [(None, 8), (8, 8), (3, 3)])
def test_it_is_found_as_it_is_named(store, named, step):
    assert find_backup(store, named).step == step


def test_what_is_not_there_is_said_with_what_is(store, tmp_path):
    with pytest.raises(stepsave.BackupDirectoryError, match="of step 4, found step 8, step 3"):
        find_backup(store, 4)
    (tmp_path / "none").mkdir()
    with pytest.raises(stepsave.BackupDirectoryError, match="expected a backup, found none"):
        find_backup(LocalStore(tmp_path / "none"))
    (tmp_path / "backup/COMMIT").unlink()
    with pytest.raises(stepsave.BackupDirectoryError, match="COMMIT is missing, found step 3"):
        find_backup(store)


def test_a_marker_that_cannot_be_read_is_said_unless_the_other_one_is_meant(store):
    flip_bit(store.root / "COMMIT", 70)
    with pytest.raises(stepsave.CorruptBackupError, match="COMMIT"):
        find_backup(store)
    assert find_backup(store, 3).step == 3


def test_a_backup_that_was_replaced_while_it_was_read_is_read_anew(store):
    tried = []

    def read(record, attempt):
        tried.append((record.step, attempt))
        if len(tried) == 1:
            save_once(store.root, {"a": 1}, 9)
            raise FileNotFoundError(record.directory)
        return "read"

    assert read_chosen(store, None, read) == "read"
    assert tried == [(8, 0), (9, 1)]


def test_an_error_of_a_backup_that_is_still_there_is_raised_at_once(store):
    tried = []

    def read(record, _):
        tried.append(record.step)
        raise stepsave.CorruptBackupError("spoilt")

    with pytest.raises(stepsave.CorruptBackupError, match="spoilt"):
        read_chosen(store, None, read)
    assert tried == [8]


def test_one_that_is_replaced_each_time_is_given_up(store):
    steps = iter(range(10, 100))

    def read(record, _):
        save_once(store.root, {"a": 1}, next(steps))
        raise FileNotFoundError(record.directory)

    with pytest.raises(stepsave.BackupDirectoryError, match=f"replaced {ATTEMPTS} times"):
        read_chosen(store, None, read)
    assert next(steps) == 10 + ATTEMPTS
