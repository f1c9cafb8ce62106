"""What a process keeps on its disk until it is agreed which step goes to the bucket."""

import threading
import time

import pytest

from stepsave.engine import joint_uploading
from stepsave.engine.joint_uploading import FollowedUpload, LedUpload, name_in_bucket
from stepsave.errors import PeerError
from stepsave.format.records import BackupRecord
from stepsave.store.local import LocalStore

pytestmark = pytest.mark.once


def record_of(step):
    return BackupRecord(step, str(step), f"{step:032x}", (), 4096, ())


class Disk:
    """The markers of a disk on which saves go on."""

    def __init__(self, *steps):
        self.records = [record_of(step) for step in steps]

    @property
    def committed(self):
        return self.records[-1] if self.records else None

    def record_of(self, step):
        return next((one for one in self.records if one.step == step), None)


@pytest.fixture
def make(tmp_path):
    def make(disk, kind=LedUpload):
        return kind(LocalStore(tmp_path), None, disk, None, None)

    return make


def test_what_is_offered_and_what_comes_next_stays_until_one_is_named(make):
    upload = make(Disk(4))
    upload.hold(record_of(4))
    assert upload.holds("4")
    assert not upload.holds("3")
    assert [upload.holds(str(step)) for step in (5, 6, 7, 8)] == [True, True, False, False]
    assert upload.holds("5"), "still"
    upload._disk.records += [record_of(5), record_of(6)]
    assert upload._hold_step(5).step == 5
    assert [upload.holds(str(step)) for step in (4, 5, 6, 7)] == [False, True, False, False]


def test_others_hold_nothing_until_they_are_asked(make):
    upload = make(Disk(2, 3), FollowedUpload)
    upload.hold(record_of(3))
    assert not any(upload.holds(str(step)) for step in (2, 3, 4))
    assert upload._hold_newest().step == 3
    assert [upload.holds(str(step)) for step in (2, 3, 4)] == [False, True, True]


def test_the_newest_is_looked_for_again_if_it_is_not_that_any_more(make):
    class Moving(Disk):
        looks = 0

        @property
        def committed(self):
            self.looks += 1
            return self.records[min(self.looks // 2, 2)]  # another one, as soon as one is held

    upload = make(Moving(1, 2, 3), FollowedUpload)
    assert upload._hold_newest().step == 3
    assert upload.holds("3")


def test_who_is_behind_comes_to_the_step(make):
    disk = Disk(6)
    upload = make(disk)
    upload.hold(record_of(6))
    later = threading.Timer(0.2, lambda: disk.records.append(record_of(7)))
    later.start()
    assert upload._hold_step(7).step == 7
    later.join()


def test_a_step_that_is_gone_or_will_not_come_is_named(make, monkeypatch):
    monkeypatch.setattr(joint_uploading, "_MOMENT_S", 0.1)
    upload = make(Disk(6, 9))
    upload.hold(record_of(9))
    with pytest.raises(PeerError, match=r"backup of step 7, .* found step 9"):
        upload._hold_step(7)
    assert not upload.holds("10"), "nothing is waited for any more"
    upload = make(Disk())
    upload.is_last = True  # the keeper waits, so none will come
    begun_s = time.monotonic()
    with pytest.raises(PeerError, match=r"backup of step 7, .* found none"):
        upload._hold_step(7)
    assert time.monotonic() - begun_s < 10


def test_a_backup_has_another_name_in_the_bucket():
    names = {name_in_bucket(record_of(step).nonce) for step in range(9)}
    assert len(names) == 9
    assert all(len(name) == 32 and int(name, 16) for name in names)
    assert names.isdisjoint(record_of(step).nonce for step in range(9))
