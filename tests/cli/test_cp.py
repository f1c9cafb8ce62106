"""`stepsave cp`: what arrives is the backup, whole; or nothing that counts."""

import itertools
import json
import os
import random
import shutil
import signal
import threading

import boto3
import numpy as np
import pytest
from cli_support import (
    call,
    check_imports,
    rich_state,
    run,
    shard_files,
    start,
    wait_until,
)
from engine_support import (
    SMALL_SHARDS,
    assert_is_state_of,
    assert_same_bits,
    flip_bit,
    restore_once,
    run_python,
    save_once,
    state_of,
    tree_bytes,
)

import stepsave

pytestmark = pytest.mark.usefixtures("small_shards")


def assert_restores(place, state, step):
    backup = stepsave.restore(place)
    assert backup.step == step
    assert backup.metadata == {"note": step}
    assert_same_bits(backup.state, state)


def save(place, state, step, **options):
    save_once(place, state, step, {"note": step}, **options)


def without_lock(directory):
    return {name: data for name, data in tree_bytes(directory).items() if name != "LOCK"}


def test_a_copy_is_the_same_files_and_a_training_goes_on_from_it(tmp_path, capsys):
    state = rich_state()
    save(tmp_path / "a", state, 12)
    call("cp", tmp_path / "a", tmp_path / "deep" / "b", "--json")
    (told,) = json.loads(capsys.readouterr().out)
    assert told["step"] == 12
    assert not told["was_there"]
    assert without_lock(tmp_path / "deep" / "b") == without_lock(tmp_path / "a")
    assert_restores(tmp_path / "deep" / "b", state, 12)
    with stepsave.Checkpointer(tmp_path / "deep" / "b") as saver:
        assert saver.restore().step == 12
        for step in (13, 14, 15):
            saver.save(step, state_of(step)).wait()
        assert_is_state_of(saver.restore())
    assert_restores(tmp_path / "a", state, 12)


def test_between_directories_and_buckets_in_all_directions(tmp_path, s3):
    state = rich_state()
    save(tmp_path / "a", state, 7)
    places = [tmp_path / "a", f"{s3.place}/1", f"{s3.place}/2", tmp_path / "b"]
    for source, target in itertools.pairwise(places):
        call("cp", source, target)
        assert_restores(target, state, 7)
    assert without_lock(tmp_path / "b") == without_lock(tmp_path / "a")
    for place in places[1:]:  # each of them can be trained on
        with stepsave.Checkpointer(place) as saver:
            assert saver.restore().step == 7
            saver.save(8, state_of(8)).wait()
        assert_is_state_of(restore_once(place))


def test_googles_buckets_too(tmp_path, gcs):
    state = rich_state()
    save(tmp_path / "a", state, 7)
    call("cp", tmp_path / "a", gcs.place)
    call("cp", gcs.place, tmp_path / "b")
    assert_restores(tmp_path / "b", state, 7)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:orbax")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:orbax")
def test_stock_orbax_reads_a_copy_that_was_in_a_bucket(tmp_path, s3):
    ocp = pytest.importorskip("orbax.checkpoint")
    state = {"a": {"b": np.arange(9000.0)}, "c": np.ones((3, 2), np.float32)}
    save(tmp_path / "a", state, 7)
    call("cp", tmp_path / "a", s3.place)
    call("cp", s3.place, tmp_path / "b")
    assert_same_bits(ocp.PyTreeCheckpointer().restore(tmp_path / "b/7/pytree"), state)


def test_a_copy_of_a_bucket_by_other_tools_becomes_a_directory_to_train_on(tmp_path, s3):
    save(s3.place, rich_state(), 7)
    client = boto3.client("s3", endpoint_url=s3.url)
    bucket, _, prefix = s3.place.removeprefix("s3://").partition("/")
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]:
        target = tmp_path / "synced" / entry["Key"].removeprefix(f"{prefix}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, entry["Key"], str(target))
    with pytest.raises(stepsave.BackupDirectoryError, match="copy of a bucket"):
        stepsave.Checkpointer(tmp_path / "synced")
    call("cp", tmp_path / "synced", tmp_path / "b")
    assert_restores(tmp_path / "b", rich_state(), 7)
    save_once(tmp_path / "b", state_of(8), 8)
    call("cp", tmp_path / "b", tmp_path / "synced", status=2)


def test_all_brings_the_backups_before_it_too(tmp_path, s3):
    with stepsave.Checkpointer(tmp_path / "a", keep=2) as saver:
        for step in (3, 5, 8):
            saver.save(step, state_of(step), {"step": step}).wait()
    for place in (tmp_path / "b", s3.place):
        call("cp", "--all", tmp_path / "a", place)
        with stepsave.Checkpointer(place, read_only=True) as reader:
            assert (reader.committed.step, *(one.step for one in reader.kept)) == (8, 5, 3)
            for step in (3, 5, 8):
                assert_is_state_of(reader.restore(step=step))
    flip_bit(shard_files(tmp_path / "b", 8)[0], 0)
    with pytest.warns(UserWarning, match="of step 5"):
        assert_is_state_of(stepsave.restore(tmp_path / "b"))
    call("cp", tmp_path / "a", tmp_path / "one")
    with stepsave.Checkpointer(tmp_path / "one", read_only=True) as reader:
        assert reader.kept == ()


def test_training_goes_back_to_a_kept_backup_at_another_place(tmp_path, s3):
    with stepsave.Checkpointer(tmp_path / "a", keep=2) as saver:
        for step in (3, 5, 8):
            saver.save(step, state_of(step)).wait()
    for place in (tmp_path / "b", s3.place):
        call("cp", f"{tmp_path}/a@5", place)
        with stepsave.Checkpointer(place) as saver:
            assert saver.kept == ()
            backup = saver.restore()
            assert backup.step == 5
            assert_is_state_of(backup)
            saver.save(6, state_of(6)).wait()
    assert stepsave.restore(tmp_path / "a").step == 8
    call("cp", f"{tmp_path}/a@4", tmp_path / "c", status=2)


def test_what_is_there_is_replaced_by_newer_ones_only_unless_asked(tmp_path, s3, capsys):
    for number, step in enumerate((5, 9)):
        save(tmp_path / f"a{number}", state_of(step, leaves=3 + number), step)
    for place in (tmp_path / "b", f"{s3.place}/b"):
        call("cp", tmp_path / "a0", place)
        call("cp", tmp_path / "a0", place)
        assert "was there already" in capsys.readouterr().out
        call("cp", tmp_path / "a1", place)
        assert_restores(place, state_of(9, leaves=4), 9)
        call("cp", tmp_path / "a0", place, status=2)
        assert "found step 9" in capsys.readouterr().err
        assert_restores(place, state_of(9, leaves=4), 9)
        call("cp", "--overwrite", tmp_path / "a0", place)
        assert_restores(place, state_of(5, leaves=3), 5)
    # Another backup of the same step.
    save(tmp_path / "a2", rich_state(), 5)
    call("cp", tmp_path / "a2", tmp_path / "b", status=2)
    call("cp", tmp_path / "a2", tmp_path / "b", "--overwrite")
    assert_restores(tmp_path / "b", rich_state(), 5)
    save_once(tmp_path / "b", state_of(6), 6)


def test_a_place_in_the_other_is_refused(tmp_path, capsys):
    save(tmp_path / "a", rich_state(), 5)
    before = tree_bytes(tmp_path)
    for target in (tmp_path / "a", tmp_path / "a" / "b", tmp_path):
        call("cp", tmp_path / "a", target, status=2)
        assert "another place" in capsys.readouterr().err
    call("cp", tmp_path / "none", tmp_path / "b", status=2)
    (tmp_path / "empty").mkdir()
    call("cp", tmp_path / "empty", tmp_path / "b", status=2)
    (tmp_path / "empty").rmdir()
    assert tree_bytes(tmp_path) == before


def test_a_directory_that_is_trained_on_is_refused_and_one_with_other_files(tmp_path, capsys):
    save(tmp_path / "a", rich_state(), 5)
    with stepsave.Checkpointer(tmp_path / "b") as saver:
        ended = run("cp", tmp_path / "a", tmp_path / "b", status=2)
        assert "another live process" in ended.stderr
        saver.save(1, state_of(1)).wait()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("mine")
    call("cp", tmp_path / "a", tmp_path / "c", status=2)
    assert "mine.txt" in capsys.readouterr().err
    assert os.listdir(tmp_path / "c") == ["mine.txt"]


def test_a_bucket_where_somebody_may_be_training_is_refused_unless_asked(tmp_path, s3):
    save(tmp_path / "a", state_of(9), 9)
    with stepsave.Checkpointer(s3.place) as saver:
        saver.save(1, state_of(1)).wait()
        ended = run("cp", tmp_path / "a", s3.place, status=2)
        assert f"process {os.getpid()} on" in ended.stderr
        saver.save(2, state_of(2)).wait()
        saver.close(ended=True)
    call("cp", tmp_path / "a", s3.place)  # it has ended
    assert stepsave.restore(s3.place).step == 9


def test_a_damaged_source_leaves_what_was_there(tmp_path, capsys):
    save(tmp_path / "a", rich_state(), 5)
    save(tmp_path / "b", state_of(3), 3)
    flip_bit(shard_files(tmp_path / "a", 5)[-1], 8)
    call("cp", tmp_path / "a", tmp_path / "b", status=1)
    assert "CRC-32C" in capsys.readouterr().err
    assert_is_state_of(stepsave.restore(tmp_path / "b"))
    assert sorted(os.listdir(tmp_path / "b")) == ["3", "COMMIT", "LOCK"]
    call("cp", tmp_path / "a", tmp_path / "c", status=1)
    assert not (tmp_path / "c").exists()


def test_a_copy_that_does_not_read_back_does_not_count(tmp_path, monkeypatch, capsys):
    from stepsave.store.local import LocalStore
    from stepsave.store.shard_array import ShardArray

    save(tmp_path / "a", rich_state(), 5)
    save(tmp_path / "b", state_of(3), 3)
    write_direct, write = LocalStore.write_direct, ShardArray.write

    def spoil(data):
        data[5] ^= 1  # what a disk that lies would do

    def write_direct_and_lie(self, path, data, ranges=None):
        if len(data) > 4096:
            spoil(data)
        return write_direct(self, path, data, ranges)

    def write_and_lie(self, number, data):
        spoil(data)
        write(self, number, data)

    monkeypatch.setattr(LocalStore, "write_direct", write_direct_and_lie)
    monkeypatch.setattr(ShardArray, "write", write_and_lie)
    call("cp", tmp_path / "a", tmp_path / "b", status=1)
    assert "CRC-32C" in capsys.readouterr().err
    assert_is_state_of(stepsave.restore(tmp_path / "b"))
    assert not (tmp_path / "b" / "5").exists()


def test_a_training_may_go_on_at_the_source(tmp_path):
    stop = threading.Event()

    def train():
        with stepsave.Checkpointer(tmp_path / "a") as saver:
            step = 0
            while not stop.wait(0.05):
                step += 1
                saver.save(step, state_of(step))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        wait_until((tmp_path / "a" / "COMMIT").exists)
        for number in range(3):
            call("cp", tmp_path / "a", tmp_path / f"b{number}")
            assert_is_state_of(restore_once(tmp_path / f"b{number}"))
    finally:
        stop.set()
        thread.join()


def test_a_source_that_is_replaced_meanwhile_is_read_at_once_the_next_time(tmp_path, monkeypatch):
    from stepsave.engine import copying

    save_once(tmp_path / "a", state_of(1), 1)
    read_shard, write_direct = copying.read_shard, copying.LocalStore.write_direct
    calls, guard = [], threading.Lock()

    def read(store, record, *arguments):
        with guard:
            calls.append(("read", record.step, store.root.name))
            if len(calls) == 1:
                save_once(tmp_path / "a", state_of(2), 2)
            read_shard(store, record, *arguments)

    def write(self, path, *arguments):
        if self.root.name == "b" and "/d/c/" in path:
            calls.append(("write",))
        return write_direct(self, path, *arguments)

    monkeypatch.setattr(copying, "read_shard", read)
    monkeypatch.setattr(copying.LocalStore, "write_direct", write)
    call("cp", tmp_path / "a", tmp_path / "b")
    assert stepsave.restore(tmp_path / "b").step == 2
    assert_is_state_of(stepsave.restore(tmp_path / "b"))
    reads = [at for at, one in enumerate(calls) if one == ("read", 2, "a")]
    assert len(reads) == len(shard_files(tmp_path / "a", 2)) > 1
    assert ("write",) not in calls[reads[0] : reads[-1]]
    assert ("write",) in calls[reads[-1] :]


# Kills its own process at the n-th operation on the destination.
KILL = (
    SMALL_SHARDS
    + """
import os, signal, sys
from stepsave.cli import app
from stepsave.store.bucket import BucketStore
from stepsave.store.local import LocalStore
from stepsave.store.shard_array import ShardArray

left = int(sys.argv.pop(1))
target = sys.argv[-1]

def counted(kind, name):
    original = getattr(kind, name)
    def call(self, *arguments, **options):
        global left
        store = getattr(self, "_store", self)
        if str(store.root) == target:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, **options)
    setattr(kind, name, call)

for name in ("write", "write_direct", "replace", "rename", "remove", "sync_directory", "read_into"):
    counted(LocalStore, name)
for name in ("write_all", "write_if", "remove", "remove_below", "read_into", "read_versioned"):
    counted(BucketStore, name)
counted(ShardArray, "write")
app.run()
"""
)


def killed_copies(source, target):
    """Copies, killed some operations later each time, until one comes to its end."""
    for number in range(random.randrange(1, 6), 200, 5):
        ended = run_python(KILL, number, "cp", source, target)
        if ended.returncode == 0:
            assert number > 9, "hardly anything was counted: the test tests nothing"
            return
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        yield number
    raise AssertionError("it never ends")


def test_killed_at_any_instant_it_leaves_the_old_backup_or_the_new_one(tmp_path):
    save(tmp_path / "a", state_of(9), 9)
    save(tmp_path / "b", state_of(4), 4)
    found = []
    for number in killed_copies(tmp_path / "a", tmp_path / "b"):
        backup = stepsave.restore(tmp_path / "b")
        assert_is_state_of(backup)
        found.append(backup.step)
        shutil.copytree(tmp_path / "b", tmp_path / f"b{number}")
        save_once(tmp_path / f"b{number}", state_of(10), 10)  # it can be trained on
        assert_is_state_of(stepsave.restore(tmp_path / f"b{number}"))
        if backup.step == 9:
            break
    assert found == sorted(found)
    assert found[0] == 4
    call("cp", tmp_path / "a", tmp_path / "b")
    assert_is_state_of(stepsave.restore(tmp_path / "b"))


def test_killed_while_it_makes_a_directory_it_leaves_none_that_counts(tmp_path):
    save(tmp_path / "a", state_of(9), 9)
    for _ in killed_copies(tmp_path / "a", tmp_path / "b"):
        backup = stepsave.restore(tmp_path / "b") if (tmp_path / "b").exists() else None
        if backup is not None:
            assert_is_state_of(backup)
            break
        call("gc", tmp_path / "b", "--yes")
        assert os.listdir(tmp_path / "b") == ["LOCK"]
    call("cp", tmp_path / "a", tmp_path / "b")
    assert_is_state_of(stepsave.restore(tmp_path / "b"))


def test_killed_at_any_instant_a_bucket_has_the_old_backup_or_the_new_one(tmp_path, s3):
    save(tmp_path / "a", state_of(9), 9)
    with stepsave.Checkpointer(s3.place) as saver:
        saver.save(4, state_of(4)).wait()
        saver.close(ended=True)  # or the next process could not know that it has
    found = []
    for _ in killed_copies(tmp_path / "a", s3.place):
        backup = stepsave.restore(s3.place)
        assert_is_state_of(backup)
        found.append(backup.step)
        if backup.step == 9:
            break
    assert found[0] == 4
    call("cp", tmp_path / "a", s3.place)
    assert_is_state_of(stepsave.restore(s3.place))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_leaves_nothing(tmp_path, signum):
    save_once(tmp_path / "a", {f"a{i}": np.full(1 << 21, i, "float32") for i in range(30)})
    process = start("cp", tmp_path / "a", tmp_path / "b")
    wait_until((tmp_path / "b" / "spare").exists)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, err
    assert "stopped" in err
    assert not (tmp_path / "b").exists()


def test_neither_keras_nor_a_backend_is_imported_for_a_copy(tmp_path):
    save(tmp_path / "a", rich_state(), 5)
    check_imports("cp", tmp_path / "a", tmp_path / "b")
    assert_restores(tmp_path / "b", rich_state(), 5)
