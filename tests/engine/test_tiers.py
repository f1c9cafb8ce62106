"""Backups on a disk of the machine, the newest of them in a bucket: each alone is enough."""

import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings

import pytest
from bucket_support import memory, s3, s3_environment, s3_target
from engine_support import SMALL_SHARDS, assert_is_state_of, child_environment, flip_bit, state_of

import stepsave
from stepsave.engine.uploading import UploadPace
from stepsave.store import bucket
from stepsave.store.addresses import address_of

pytestmark = [
    pytest.mark.once,
    pytest.mark.xdist_group("buckets"),
    pytest.mark.usefixtures("small_shards"),
]
__all__ = ("memory", "s3", "s3_target")


@pytest.fixture
def local(tmp_path):
    return tmp_path / "local"


@pytest.fixture
def impatient(monkeypatch):
    retries = {"max_retries": 2, "initial_delay": "10ms", "max_delay": "50ms"}
    monkeypatch.setattr(bucket, "_RETRIES", retries)


def restored(place):
    backup = stepsave.restore(place)
    if backup is not None:
        assert_is_state_of(backup)
    return backup and backup.step


def when(condition, limit_s=30):
    for _ in range(int(limit_s * 200)):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come")


def directories(local):
    return {name for name in os.listdir(local) if name.isdigit() or name == "spare"}


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_saves_go_to_the_disk_and_the_newest_to_the_bucket(request, store, local):
    place = request.getfixturevalue(store).place
    with stepsave.Checkpointer(place, local_dir=local, upload_every=3) as saver:
        assert saver.restore() is None
        assert saver.stats().remote_step is None
        assert math.isnan(saver.stats().remote_age_s)
        for step in range(1, 9):
            saver.save(step, state_of(step), {"of": step}).wait()
            when(lambda: not saver._directory._uploader._is_busy)
            assert restored(local) == step
            assert restored(place) == (step - 1) // 3 * 3 + 1
        assert saver.stats().remote_step == 7
        assert 0 <= saver.stats().remote_age_s < 60
        assert saver.committed.step == 8
    assert restored(place) == restored(local) == 8  # closing brings the newest
    with stepsave.Checkpointer(place, local_dir=local) as saver:
        assert saver.stats().remote_step == 8
        backup = saver.restore()
        assert (backup.step, backup.metadata) == (8, {"of": 8})
        saver.save(9, state_of(9)).wait()
        saver.upload()
        assert restored(place) == 9
        saver.close(delete_backup=True)
    assert restored(place) is None
    assert not local.exists()


def test_a_lost_machine_goes_on_from_the_bucket(memory, local, tmp_path):
    with stepsave.Checkpointer(memory.place, local_dir=local, upload_every=1) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step)).wait()
    shutil.rmtree(local)
    with stepsave.Checkpointer(memory.place, local_dir=tmp_path / "another") as saver:
        backup = saver.restore()
        assert backup.step == 3
        assert_is_state_of(backup)
        saver.save(4, state_of(4)).wait()
    assert restored(tmp_path / "another") == restored(memory.place) == 4


def test_the_newest_of_both_is_restored(memory, local, tmp_path):
    with stepsave.Checkpointer(memory.place, local_dir=local) as saver:
        saver.save(1, state_of(1))
    old = tmp_path / "old"
    shutil.copytree(local, old)
    with stepsave.Checkpointer(memory.place, local_dir=local) as saver:
        saver.save(2, state_of(2))
    with stepsave.Checkpointer(memory.place, local_dir=old) as saver:  # a machine that comes back
        backup = saver.restore()
        assert backup.step == 2
        assert_is_state_of(backup)
        saver.save(3, state_of(3)).wait()
        assert_is_state_of(saver.restore())
    assert restored(old) == restored(memory.place) == 3


def test_the_end_is_noted_at_both_places(memory, local):
    with stepsave.Checkpointer(memory.place, local_dir=local) as saver:
        saver.save(1, state_of(1))
        saver.close(ended=True)
    assert stepsave.restore(local).ended
    assert stepsave.restore(memory.place).ended


@pytest.mark.parametrize("what", ["shard", "marker", "training", "all"])
def test_what_is_spoilt_on_the_disk_is_taken_from_the_bucket(memory, local, what):
    with stepsave.Checkpointer(memory.place, local_dir=local, upload_every=100) as saver:
        saver.save(1, state_of(1)).wait()
        when(lambda: restored(memory.place) == 1)
        saver.save(2, state_of(2)).wait()
        saver._directory.release = lambda **_: None  # as if killed: nothing is uploaded at the end
        saver._directory._uploader.end()
        saver._directory._local.release()
        saver._directory._remote.release()
    if what == "shard":
        flip_bit(local / "2/pytree/d/c/0", 50)
    elif what == "marker":
        (local / "COMMIT").write_bytes(b"nonsense")
    elif what == "training":
        (local / "2/training.json").unlink()
    else:
        shutil.rmtree(local / "2")
    with stepsave.Checkpointer(memory.place, local_dir=local) as saver:
        with pytest.warns(UserWarning, match=r"Restored step 1 from memory://.* instead"):
            backup = saver.restore()
        assert backup.step == 1
        assert_is_state_of(backup)
        for step in (2, 3):
            saver.save(step, state_of(step)).wait()
            assert restored(local) == step
        assert directories(local) <= {"3", "spare"}
    assert restored(memory.place) == 3


def test_an_upload_holds_up_no_save_and_one_backup_more_at_most_is_on_the_disk(s3, local):
    gate = threading.Event()

    def hold():
        gate.wait(30)

    with stepsave.Checkpointer(s3.place, local_dir=local, upload_every=1) as saver:
        saver.save(1, state_of(1)).wait()
        saver.upload()
        s3.fault = lambda method, path: hold() if (method, "/d/c/" in path) == ("PUT", True) else 0
        for step in range(2, 9):
            saver.save(step, state_of(step)).wait(20)
            assert len(directories(local)) <= 3
            assert restored(local) == step
        assert restored(s3.place) == 1
        assert "2" in directories(local)  # what is being read
        gate.set()
        when(lambda: not saver._directory._uploader._is_busy)
        assert restored(s3.place) == 2
        saver.save(9, state_of(9)).wait()
        assert directories(local) == {"9", "spare"}
        assert saver.stats().failed == 0
    assert restored(s3.place) == restored(local) == 9


def test_a_bucket_that_stays_away_costs_uploads_and_no_saves(s3, local, impatient):  # noqa: ARG001
    with stepsave.Checkpointer(s3.place, local_dir=local, upload_every=1) as saver:
        saver.save(1, state_of(1)).wait()
        saver.upload()
        s3.fault = lambda *_: 503
        saver.save(2, state_of(2)).wait()
        when(lambda: saver._log._failed_uploads)
        with pytest.warns(
            stepsave.SaveFailedWarning,
            match=r"step 2 could not be uploaded.*valid on the local disk; .* that of step 1",
        ):
            saver.save(3, state_of(3)).wait()
        with pytest.raises(stepsave.SaveFailedError, match="step 3 could not be uploaded"):
            saver.upload()
        assert saver.stats().failed == 0
        assert saver.stats().remote_step == 1
        s3.fault = None
        saver.save(4, state_of(4)).wait()
        saver.upload()
        assert restored(s3.place) == restored(local) == 4


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_waits_for_no_upload(s3, local):
    gate = threading.Event()

    def hold(method, path):
        if method == "PUT" and "/d/c/" in path:
            gate.wait(30)

    with stepsave.Checkpointer(s3.place, local_dir=local) as saver:
        s3.fault = hold
        saver.save(1, state_of(1)).wait()
        when(lambda: saver._directory._uploader._is_busy)
        child = os.fork()
        if child == 0:
            saver.close()
            os._exit(7)
        try:
            when(lambda: os.waitpid(child, os.WNOHANG) == (child, 7 << 8), limit_s=20)
        finally:
            gate.set()
    assert restored(s3.place) == restored(local) == 1


def test_a_state_of_another_size_is_uploaded_after_a_failure(s3, local, impatient):  # noqa: ARG001
    with stepsave.Checkpointer(s3.place, local_dir=local) as saver:
        s3.fault = lambda method, path: (
            403 if (method, path.endswith("/c/1")) == ("PUT", True) else 0
        )
        saver.save(1, state_of(1)).wait()
        with pytest.raises(stepsave.SaveFailedError, match="step 1 could not be uploaded"):
            saver.upload()
        s3.fault = None
        saver.save(2, state_of(2, leaves=1, shape=(10, 10))).wait()
        saver.upload()
    assert restored(s3.place) == 2


@pytest.mark.filterwarnings("error::stepsave.SaveFailedWarning")
def test_a_warning_that_a_filter_makes_an_error_of_is_raised_once(s3, local, impatient):  # noqa: ARG001
    with stepsave.Checkpointer(s3.place, local_dir=local) as saver:
        s3.fault = lambda method, _: 503 if method == "PUT" else 0
        saver.save(1, state_of(1)).wait()
        when(lambda: saver._log._failed_uploads)
        with pytest.raises(stepsave.SaveFailedWarning, match="step 1 could not be uploaded"):
            saver.save(2, state_of(2))
        s3.fault = None
        saver.save(2, state_of(2)).wait()
        saver.upload()
    assert restored(s3.place) == 2


def test_two_trainers_with_one_bucket_are_told_apart(memory, local, tmp_path):
    with stepsave.Checkpointer(memory.place, local_dir=local) as first:
        first.save(1, state_of(1)).wait()
        first.upload()
        held = dict.fromkeys(stepsave.store.lock._held)
        stepsave.store.lock._held.clear()
        with stepsave.Checkpointer(memory.place, local_dir=tmp_path / "other") as second:
            assert second.restore().step == 1
            second.save(2, state_of(2)).wait()
        stepsave.store.lock._held.update(held)
        first.save(5, state_of(5)).wait()
        with pytest.raises(stepsave.SaveFailedError, match="saves here too"):
            first.upload()
        assert restored(local) == 5
    assert restored(memory.place) == 2


def test_what_is_spoilt_on_the_disk_is_not_uploaded(memory, local):
    with stepsave.Checkpointer(memory.place, local_dir=local, upload_every=100) as saver:
        saver.save(1, state_of(1)).wait()
        saver.upload()
        saver.save(2, state_of(2)).wait()
        flip_bit(local / "2/pytree/d/c/0", 50)
        with pytest.raises(stepsave.SaveFailedError, match="CRC-32C"):
            saver.upload()
    assert restored(memory.place) == 1


CHILD = (
    SMALL_SHARDS
    + """
import sys
import stepsave
from engine_support import state_of
with stepsave.Checkpointer(sys.argv[1], local_dir=sys.argv[2], upload_every=2) as saver:
    found = saver.restore()
    step = found.step if found else 0
    while True:
        step += 1
        saver.save(step, state_of(step)).wait()
        print(step, flush=True)
"""
)


def test_what_an_upload_that_failed_has_left_is_removed_by_the_next_one(memory, local, monkeypatch):
    real, asked = bucket.BucketStore.write_all, []

    def fail_once(self, objects):
        real(self, objects)
        if not asked and "layout.json" in str(objects.keys()):
            asked.append(objects)
            raise stepsave.BucketError("no answer")

    monkeypatch.setattr(bucket.BucketStore, "write_all", fail_once)
    with stepsave.Checkpointer(memory.place, local_dir=local) as saver:
        saver.save(1, state_of(1)).wait()
        when(lambda: asked and not saver._directory._uploader._is_busy)
        with pytest.raises(stepsave.SaveFailedError, match="no answer"):
            saver.upload()
        saver.save(2, state_of(2)).wait()
        saver.upload()
        keys = bucket.BucketStore(address_of(memory.place)).list("")
        assert {key.split("/")[1] for key in keys if "/" in key} == {"2"}
    assert restored(memory.place) == restored(local) == 2


def test_an_older_backup_on_the_disk_is_not_uploaded_over_a_newer_one(memory, local, tmp_path):
    """A machine that comes back, and is stopped again before it restores."""
    with stepsave.Checkpointer(memory.place, local_dir=local) as saver:
        saver.save(1, state_of(1))
    old = tmp_path / "old"
    shutil.copytree(local, old)
    with stepsave.Checkpointer(memory.place, local_dir=local) as saver:
        saver.save(2, state_of(2))
    stepsave.Checkpointer(memory.place, local_dir=old).close()
    assert restored(memory.place) == 2


@pytest.mark.parametrize("steps", [1, 4, 9, 20])
def test_a_killed_process_leaves_both_places_whole(s3, local, steps):
    command = [sys.executable, "-c", CHILD, s3.place, str(local)]
    environment = child_environment(**s3_environment(s3.url))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        for line in child.stdout:
            if int(line) >= steps:
                break
        child.kill()
        told = max([steps, *map(int, child.stdout.read().split())])
    on_disk = restored(local)
    assert on_disk in (told, told + 1)
    in_bucket = restored(s3.place)
    assert in_bucket is None or in_bucket <= on_disk
    with stepsave.Checkpointer(s3.place, local_dir=local) as saver:
        assert saver.restore().step == on_disk
        saver.save(on_disk + 1, state_of(on_disk + 1)).wait()
    assert directories(local) == {str(on_disk + 1), "spare"}
    assert restored(s3.place) == restored(local) == on_disk + 1


@pytest.mark.parametrize(
    ("value", "pace"),
    [(1, (1, 0)), (50, (50, 0)), ("30s", (1, 30)), ("1.5 min", (1, 90)), ("2h", (1, 7200))],
)
def test_a_pace_is_a_number_of_saves_or_a_time(value, pace):
    found = UploadPace.of(value)
    assert (found.saves, found.seconds) == pace


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "30", "s", "1 day", None])
def test_what_is_no_pace_is_refused(value, memory, local):
    with pytest.raises(ValueError, match=r"`upload_every`.*Expected a positive number of saves"):
        stepsave.Checkpointer(memory.place, local_dir=local, upload_every=value)


def test_uploads_at_a_pace_of_time_wait_for_it(memory, local):
    with stepsave.Checkpointer(memory.place, local_dir=local, upload_every="1h") as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step)).wait()
        when(lambda: not saver._directory._uploader._is_busy)
        assert restored(memory.place) == 1
    assert restored(memory.place) == 3


def test_two_tiers_are_a_directory_and_a_bucket(memory, local, tmp_path):
    text = re.escape(f"local_dir={str(local)!r}")
    with pytest.raises(ValueError, match=text):
        stepsave.Checkpointer(tmp_path / "a", local_dir=str(local))
    with pytest.raises(ValueError, match="to be read only"):
        stepsave.Checkpointer(memory.place, local_dir=str(local), read_only=True)
    with pytest.raises(ValueError, match="a bucket to upload"):
        stepsave.Checkpointer(memory.place, local_dir="memory://other")
    assert not local.exists()


def test_nothing_is_warned_of_where_nothing_is_wrong(memory, local):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with stepsave.Checkpointer(memory.place, local_dir=local, double_checkpoint=True) as saver:
            for step in range(1, 6):
                saver.save(step, state_of(step)).wait()
            assert saver.previous.step == 4
    assert directories(local) == {"4", "5", "spare"}
    assert restored(memory.place) == 5


def test_what_is_to_be_gone_back_to_stays_in_the_bucket(memory, local):
    with stepsave.Checkpointer(memory.place, local_dir=local, keep=2) as saver:
        for step in range(1, 7):
            saver.save(step, state_of(step)).wait()
            saver.upload()
        assert [record.step for record in saver.kept] == [5, 4]
        for step in (4, 5, 6):
            backup = saver.restore(step=step)
            assert backup.step == step
            assert_is_state_of(backup)
        saver.save(7, state_of(7)).wait()
    assert directories(local) == {"6", "7", "spare"}
    for step in (5, 6, 7):
        assert_is_state_of(stepsave.restore(memory.place, step=step))
    with pytest.raises(ValueError, match=r"there are: 7, 6, 5\."):
        stepsave.restore(memory.place, step=4)


def test_a_backup_that_goes_from_the_bucket_while_it_is_looked_for_is_named(
    memory, local, monkeypatch
):
    with stepsave.Checkpointer(memory.place, local_dir=local) as saver:
        saver.save(1, state_of(1)).wait()
    flip_bit(local / "1/pytree/d/c/0", 50)
    store, real = bucket.BucketStore(address_of(memory.place)), os.preadv

    def read(*arguments):  # while the disk is read
        store.remove("COMMIT")
        return real(*arguments)

    saver = stepsave.Checkpointer(memory.place, local_dir=local)
    monkeypatch.setattr(os, "preadv", read)
    with pytest.raises(stepsave.CorruptBackupError, match="backup went while it was looked"):
        saver.restore()
    with pytest.raises(stepsave.SaveFailedError, match="could not be uploaded"):
        saver.close()
