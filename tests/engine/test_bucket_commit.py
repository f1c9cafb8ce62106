"""Backups in buckets: real servers, real processes, and everything that can go wrong between."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import tensorstore
from bucket_support import BUCKET, gcs, gcs_target, memory, s3, s3_environment, s3_target
from engine_support import (
    SMALL_SHARDS,
    assert_is_state_of,
    assert_same_bits,
    child_environment,
    state_of,
)

import stepsave
from stepsave.engine.bucket_commit import BucketCommit
from stepsave.format.marker import RUN_NAME
from stepsave.store import bucket, places

pytestmark = [
    pytest.mark.once,
    pytest.mark.xdist_group("buckets"),
    pytest.mark.usefixtures("small_shards"),
]

STORES = ("s3", "gcs", "memory")
__all__ = ("gcs", "gcs_target", "memory", "s3", "s3_target")


@pytest.fixture(params=STORES)
def place(request):
    return request.getfixturevalue(request.param).place


@pytest.fixture
def impatient(monkeypatch):
    """Gives up after some seconds instead of two minutes."""
    monkeypatch.setattr(bucket, "_PATIENCE_S", 4.0)
    retries = {"max_retries": 2, "initial_delay": "50ms", "max_delay": "100ms"}
    monkeypatch.setattr(bucket, "_RETRIES", retries)


@pytest.fixture
def quick(monkeypatch):
    """Tries as often as usual, with shorter pauses."""
    retries = {"max_retries": 10, "initial_delay": "10ms", "max_delay": "50ms"}
    monkeypatch.setattr(bucket, "_RETRIES", retries)


def keys(place):
    return bucket.BucketStore(stepsave.store.addresses.address_of(place)).list("")


def restored(place):
    backup = stepsave.restore(place)
    if backup is not None:
        assert_is_state_of(backup)
    return backup


def test_a_bucket_holds_the_newest_backup_alone_and_gives_it_back_bit_for_bit(place):
    with stepsave.Checkpointer(place) as saver:
        assert saver.directory == place
        assert saver.restore() is None
        for step in (3, 7, 12):
            saver.save(step, state_of(step), {"epoch": step}).wait()
        backup = saver.restore()
        assert backup.step == 12
        assert backup.metadata == {"epoch": 12}
        assert_is_state_of(backup)
        assert saver.stats().writer == "tensorstore"
        saver.save(15, state_of(15))
    assert restored(place).step == 15
    with stepsave.Checkpointer(place) as saver:
        assert saver.restore().step == 15
        saver.save(16, state_of(16)).wait()
        folders = {key.split("/")[0] for key in keys(place)} - {"COMMIT"}
        assert len(folders) == 1
        assert {key.split("/")[1] for key in keys(place) if "/" in key} == {"16"}
        saver.close(delete_backup=True)
    assert keys(place) == []
    assert stepsave.restore(place) is None


class LoggingBucket(bucket.BucketStore):
    """Tells every change it makes, in order."""

    log: list[str] = []  # noqa: RUF012  shared on purpose: the engine makes the instance

    def tell(self, what, paths):
        self.log.append(f"{what} {' '.join(re.sub(RUN_NAME, 'RUN', path) for path in paths)}")

    def list(self, prefix):
        self.tell("list", [prefix])
        return super().list(prefix)

    def write_all(self, objects):
        super().write_all(objects)
        self.tell("write", objects)

    def write_if(self, path, data, generation):
        self.tell("replace", [path])
        return super().write_if(path, data, generation)

    def remove(self, path):
        super().remove(path)
        self.tell("remove", [path])

    def remove_below(self, prefix):
        super().remove_below(prefix)
        self.tell("remove below", [prefix])


def test_a_save_claims_then_collects_then_seals_then_publishes_then_retires(memory, monkeypatch):
    with stepsave.Checkpointer(memory.place) as saver:
        saver.save(1, state_of(1)).wait()
        debris = f"{saver.committed.directory.partition('/')[0]}/9/layout.json"
        saver._store.write_all({debris: b"of a save that did not end"})
    monkeypatch.setattr(places, "BucketStore", LoggingBucket)
    with stepsave.Checkpointer(memory.place) as saver:
        LoggingBucket.log.clear()
        saver.save(2, state_of(2)).wait()
        constant = LoggingBucket.log.pop(4)
        assert LoggingBucket.log == [
            "list 2",
            "replace COMMIT",
            "remove RUN/9/commit_success.txt",
            "remove below RUN/9/",
            "write RUN/2/training.json RUN/2/_CHECKPOINT_METADATA",
            "write RUN/2/commit_success.txt",
            "replace COMMIT",
            "remove RUN/1/commit_success.txt",
            "remove below RUN/1/",
        ]
        assert constant.startswith("write RUN/2/layout.json")
        assert "RUN/2/commit_success.txt" not in constant.split()
    assert restored(memory.place).step == 2


def test_what_has_no_answer_in_time_is_given_up(memory, monkeypatch):
    monkeypatch.setattr(bucket, "_PATIENCE_S", 0.2)
    store = bucket.BucketStore(stepsave.store.addresses.address_of(memory.place))
    promise, future = tensorstore.Promise.new()
    with pytest.raises(stepsave.BucketError, match="could not look: no answer within 0 s"):
        store.wait(future, "look")
    del promise


def test_two_backups_are_kept_if_asked_for_and_the_older_is_fallen_back_to(memory):
    place = memory.place
    with stepsave.Checkpointer(place, double_checkpoint=True) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step)).wait()
        assert (saver.committed.step, saver.previous.step) == (3, 2)
        store = saver._store
        shard = f"{saver.committed.directory}/pytree/d/c/0"
        spoilt = bytearray(store.read(shard, 1 << 30))
        spoilt[70] ^= 1
        store.write_all({shard: bytes(spoilt)})
        with pytest.warns(UserWarning, match=r"step 3.*cannot be read.*1 steps.*lost"):
            assert saver.restore().step == 2
        saver.save(4, state_of(4)).wait()
        assert {key.split("/")[1] for key in keys(place) if "/" in key} == {"2", "4"}
        assert (saver.committed.step, saver.previous.step) == (4, 2)
    with stepsave.Checkpointer(place) as saver:
        assert saver.restore().step == 4
        saver.save(5, state_of(5)).wait()
        assert {key.split("/")[1] for key in keys(place) if "/" in key} == {"5"}


def test_the_end_of_a_training_is_noted(place):
    with stepsave.Checkpointer(place) as saver:
        saver.save(1, state_of(1))
        saver.close(ended=True)
    assert restored(place).ended


def test_the_newcomer_is_refused_when_the_other_trainer_has_committed_since(place):
    first, second = stepsave.Checkpointer(place), other_process(place)
    first.save(1, state_of(1)).wait()
    with pytest.raises(stepsave.SaveFailedError) as caught:
        second.save(1, state_of(1)).wait()
    assert isinstance(caught.value.__cause__, stepsave.DirectoryBusyError)
    assert re.search(rf"process {os.getpid()} on .* step 1", str(caught.value.__cause__))
    with pytest.raises(stepsave.SaveFailedError):  # and so it stays
        second.save(2, state_of(2)).wait()
    first.save(5, state_of(5)).wait()
    assert second.restore().step == 5  # who wants to go on from that may do so
    second.save(6, state_of(6)).wait()
    with pytest.raises(stepsave.SaveFailedError, match="saves here too"):
        first.save(7, state_of(7)).wait()
    second.close()
    first.close()
    assert restored(place).step == 6


def test_one_that_was_thought_dead_can_neither_publish_nor_harm_what_came_after(place):
    first = stepsave.Checkpointer(place)
    first.save(1, state_of(1)).wait()
    second = other_process(place)
    assert second.restore().step == 1
    second.save(2, state_of(2)).wait()
    with pytest.raises(stepsave.SaveFailedError, match="saves here too"):
        first.save(2, state_of(2, leaves=3)).wait()
    assert restored(place).step == 2
    first.close(delete_backup=True)  # which keeps all if a save failed
    second.save(3, state_of(3)).wait()
    second.close()
    assert restored(place).step == 3


def test_one_that_was_thought_dead_can_not_delete_what_came_after(place):
    first = stepsave.Checkpointer(place)
    first.save(1, state_of(1)).wait()
    with other_process(place) as second:
        second.save(2, state_of(2)).wait()
    with pytest.raises(stepsave.DirectoryBusyError, match="saves here too"):
        first.close(delete_backup=True)
    assert restored(place).step == 2


def test_one_that_is_too_late_to_publish_leaves_nothing_behind(memory, monkeypatch):
    first, second = stepsave.Checkpointer(memory.place), other_process(memory.place)
    first.save(1, state_of(1)).wait()
    assert second.restore().step == 1
    real = BucketCommit.seal

    def seal(self, *args):
        if self is first._directory.protocol:
            second.save(2, state_of(2)).wait()  # which removes what is there, before this:
        return real(self, *args)

    monkeypatch.setattr(BucketCommit, "seal", seal)
    with pytest.raises(stepsave.SaveFailedError, match="saves here too"):
        first.save(5, state_of(5)).wait()
    assert {key.split("/")[1] for key in keys(memory.place) if "/" in key} == {"2"}
    first.close()
    second.close()
    assert restored(memory.place).step == 2


def test_what_a_failed_save_has_sent_may_arrive_late_and_is_removed_then(memory, monkeypatch):
    def fail(*_):
        raise stepsave.BucketError("no answer")

    with stepsave.Checkpointer(memory.place) as saver:
        saver.save(1, state_of(1)).wait()
        folder = saver.committed.directory.partition("/")[0]
        with monkeypatch.context() as patch:
            patch.setattr(bucket.BucketStore, "write_all", fail)
            with pytest.raises(stepsave.SaveFailedError, match="no answer"):
                saver.save(2, state_of(2)).wait()
        saver.save(3, state_of(3)).wait()
        assert saver.committed.directory.partition("/")[0] != folder
        saver._store.write_all({f"{folder}/2/layout.json": b"late"})
        saver.save(4, state_of(4)).wait()
        assert {key.split("/")[1] for key in keys(memory.place) if "/" in key} == {"4"}
    assert restored(memory.place).step == 4


def other_process(place, **options):
    """A checkpointer that nobody in this process knows of."""
    from stepsave.store import lock

    held = set(lock._held)
    lock._held.clear()
    try:
        return stepsave.Checkpointer(place, **options)
    finally:
        lock._held |= held


def once_in(chance, method, fault):
    """Has every n-th request of a method go wrong."""
    seen = []

    def decide(asked, path):
        if asked != method:
            return None
        seen.append(path)
        return fault if len(seen) % chance == 0 else None

    return decide


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "lose", 0.3])
@pytest.mark.parametrize("store", ["s3", "gcs"])
@pytest.mark.usefixtures("quick")
def test_what_passes_is_tried_again(request, store, fault):
    proxy = request.getfixturevalue(store)
    method = "PUT" if store == "s3" else "POST"
    with stepsave.Checkpointer(proxy.place) as saver:
        proxy.fault = once_in(3, method, fault)
        for step in range(1, 3):
            saver.save(step, state_of(step)).wait()
            assert saver.committed.step == step
        proxy.fault = once_in(3, "GET", fault)
        assert_is_state_of(saver.restore())
    assert restored(proxy.place).step == 2


@pytest.mark.parametrize("fault", [500, "cut", 20])
@pytest.mark.usefixtures("impatient")
def test_a_store_that_stays_away_fails_the_save_and_says_so(s3, fault, monkeypatch):
    monkeypatch.setattr(bucket, "_PATIENCE_S", 2.0)
    with stepsave.Checkpointer(s3.place) as saver:
        saver.save(1, state_of(1)).wait()
        s3.fault = lambda *_: fault
        began_s = time.monotonic()
        failed = saver.save(2, state_of(2))
        assert failed.wait_ended(60)
        assert time.monotonic() - began_s < 30
        with pytest.warns(stepsave.SaveFailedWarning, match=r"step 2 is lost.*s3://bucket"):
            saver.save(3, state_of(3)).wait_ended(60)
        s3.fault = None
        with pytest.warns(stepsave.SaveFailedWarning, match="step 3 is lost"):
            saver.save(4, state_of(4)).wait()
        assert saver.stats().failed == 2
        assert_is_state_of(saver.restore())
        for step in range(5, 100):  # what was under way may arrive late
            saver.save(step, state_of(step)).wait()
            left = {key.split("/")[1] for key in keys(s3.place) if "/" in key}
            if left == {str(step)}:
                break
        assert left == {str(step)}
    assert restored(s3.place).step == step


@pytest.mark.usefixtures("impatient")
def test_a_commit_without_an_answer_is_found_out_about(s3):
    """The marker was replaced, the answers to it and to all that came after were lost."""
    with stepsave.Checkpointer(s3.place) as saver:
        saver.save(1, state_of(1)).wait()
        is_away = []

        def lose_the_commit(method, path):
            if method == "PUT" and path.endswith("/COMMIT"):
                is_away.append(path)
                return "lose" if len(is_away) == 1 else "cut"
            return "cut" if is_away else None

        s3.fault = lose_the_commit
        with pytest.raises(stepsave.SaveFailedError):
            saver.save(2, state_of(2)).wait()
        s3.fault = None
        assert restored(s3.place).step == 2  # newer than what was acknowledged, and whole
        saver.save(3, state_of(3)).wait()
        assert {key.split("/")[1] for key in keys(s3.place) if "/" in key} == {"3"}
    assert restored(s3.place).step == 3


@pytest.mark.usefixtures("impatient")
def test_a_store_out_of_reach_is_not_taken_for_a_backup_that_is_lost(s3):
    with stepsave.Checkpointer(s3.place, double_checkpoint=True) as saver:
        for step in (1, 2):
            saver.save(step, state_of(step)).wait()
        s3.fault = lambda _, path: "cut" if "/2/" in path else None
        with pytest.raises(stepsave.BucketError):
            saver.restore()
        s3.fault = None
        assert saver.restore().step == 2


@pytest.mark.parametrize("status", [401, 403])
def test_credentials_that_are_refused_are_named_at_the_start(s3, status):
    s3.fault = lambda *_: status
    with pytest.raises(stepsave.BucketError, match=r"s3://bucket.*Access was denied"):
        stepsave.Checkpointer(s3.place)


def test_a_prefix_that_may_only_be_read_is_refused_at_the_start_and_can_be_read(s3):
    with stepsave.Checkpointer(s3.place) as saver:
        saver.save(1, state_of(1)).wait()
    s3.fault = lambda method, _: 403 if method in ("PUT", "DELETE") else None
    with pytest.raises(stepsave.BucketError, match=r"could not write .*Access was denied"):
        stepsave.Checkpointer(s3.place)
    assert restored(s3.place).step == 1


@pytest.mark.parametrize("store", ["s3", "gcs"])
def test_a_bucket_that_does_not_exist_is_named_at_the_start(request, store):
    place = request.getfixturevalue(store).place.replace(BUCKET, "no-such-bucket")
    with pytest.raises(stepsave.BucketError, match=r"no-such-bucket.*There is no such bucket"):
        stepsave.Checkpointer(place)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_not_there_is_named_at_the_start(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(stepsave.BucketError, match=r"Check the network, the endpoint"):
        stepsave.Checkpointer(s3.place)


@pytest.mark.usefixtures("impatient")
def test_a_bucket_that_vanishes_fails_the_save_and_names_it(s3):
    with stepsave.Checkpointer(s3.place) as saver:
        saver.save(1, state_of(1)).wait()
        s3.fault = lambda *_: 404
        with pytest.raises(stepsave.SaveFailedError) as caught:
            saver.save(2, state_of(2)).wait()
        assert "There is no such bucket" in str(caught.value.__cause__)
        s3.fault = None
        saver.save(3, state_of(3)).wait()
    assert restored(s3.place).step == 3


def test_shards_that_are_gone_or_spoilt_are_named(s3):
    with stepsave.Checkpointer(s3.place) as saver:
        saver.save(1, state_of(1, leaves=40)).wait()
        store, below = saver._store, saver.committed.directory
    for data in (None, b"short", bytes(64 << 10)):
        name = f"{below}/pytree/d/c/0"
        kept = store.read(name, 1 << 30)
        if data is None:
            store.remove(name)
        else:
            store.write_all({name: data})
        with pytest.raises(stepsave.CorruptBackupError, match=r"s3://bucket/.*/1/pytree/d/c/0"):
            stepsave.restore(s3.place)
        store.write_all({name: kept})
    assert restored(s3.place).step == 1
    store.write_all({"COMMIT": b"nonsense"})
    with pytest.raises(stepsave.CorruptBackupError, match="COMMIT"):
        stepsave.restore(s3.place)
    with stepsave.Checkpointer(s3.place) as saver:
        with pytest.raises(stepsave.SaveFailedError, match="COMMIT"):
            saver.save(2, state_of(2)).wait()
        assert store.read("COMMIT", 100) == b"nonsense"


CHILD = (
    SMALL_SHARDS
    + """
import sys
import stepsave
from engine_support import state_of
with stepsave.Checkpointer(sys.argv[1]) as saver:
    found = saver.restore()
    step = found.step if found else 0
    while True:
        step += 1
        saver.save(step, state_of(step)).wait()
        print(step, flush=True)
"""
)


def child_of(proxy, place):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, place],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(**s3_environment(proxy.url)),
    )


@pytest.mark.parametrize("at", [0, 3, 9, 13, 14, 15, 16, 17, 20, 26])
def test_a_process_killed_at_any_request_leaves_a_whole_backup_and_debris_that_goes(s3, at):
    acknowledged = 0
    seen = []

    def hang(method, _):
        if acknowledged >= 2 and method in ("PUT", "DELETE"):
            seen.append(method)
            return 30 if len(seen) > at else None
        return None

    s3.fault = hang
    with child_of(s3, s3.place) as child:
        for line in child.stdout:
            acknowledged = int(line)
            if acknowledged >= 2:
                break
        while len(seen) <= at and child.poll() is None:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        told = [int(line) for line in child.stdout.read().split()]
        noise = child.stderr.read()
    assert not noise
    s3.fault = None
    newest = restored(s3.place).step
    assert newest - max([acknowledged, *told]) in (0, 1)
    with stepsave.Checkpointer(s3.place) as saver:
        assert saver.restore().step == newest
        saver.save(newest + 1, state_of(newest + 1)).wait()
        assert len({key.split("/")[0] for key in keys(s3.place)}) == 2
        assert {key.split("/")[1] for key in keys(s3.place) if "/" in key} == {str(newest + 1)}
    assert restored(s3.place).step == newest + 1


def test_stock_readers_find_a_backup_in_the_bucket_and_in_a_copy_of_it(s3, tmp_path):
    import orbax.checkpoint as ocp
    import tensorstore as ts

    with stepsave.Checkpointer(s3.place) as saver:
        saver.save(1, state_of(1)).wait()
        store, below = saver._store, saver.committed.directory
    spec = {"driver": "ocdbt", "base": store.kvstore(f"{below}/pytree"), "path": "weights.w3/"}
    array = ts.open({"driver": "zarr3", "kvstore": spec}).result().read().result()
    assert_same_bits(array, state_of(1)["weights"]["w3"])
    for key in store.list(""):
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(store.read(key, 1 << 30))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ocp.PyTreeCheckpointer().restore(tmp_path / below / "pytree")
    assert_same_bits(np.asarray(tree["weights"]["w3"]), state_of(1)["weights"]["w3"])
    assert_is_state_of(stepsave.restore(tmp_path))
    with pytest.raises(stepsave.BackupDirectoryError, match="a copy of a bucket"):
        stepsave.Checkpointer(tmp_path)


def test_who_reads_is_not_in_the_way_of_who_saves(place):
    with stepsave.Checkpointer(place) as saver:
        saver.save(1, state_of(1)).wait()
        with stepsave.Checkpointer(place, read_only=True) as reader:
            for step in range(2, 8):
                handle = saver.save(step, state_of(step))
                assert reader.restore().step in (step - 1, step)
                handle.wait()
            assert reader.committed.step == 7
        saver.save(9, state_of(9)).wait()
    assert restored(place).step == 9


def test_one_process_cannot_open_a_place_twice(place):
    with (
        stepsave.Checkpointer(place),
        pytest.raises(stepsave.DirectoryBusyError, match="of this process"),
    ):
        stepsave.Checkpointer(place)


def test_a_bucket_has_no_direct_writes(memory):
    with pytest.raises(stepsave.BackupDirectoryError, match="this is a bucket"):
        stepsave.Checkpointer(memory.place, writer="direct")


def test_objects_of_others_are_left_alone(place):
    with stepsave.Checkpointer(place) as saver:
        store = saver._store
        store.write_all({"notes.txt": b"mine", "20 things/1/x": b"mine", "2024/5/y": b"mine"})
        for step in (1, 2):
            saver.save(step, state_of(step)).wait()
        saver.close(delete_backup=True)
    assert keys(place) == ["20 things/1/x", "2024/5/y", "notes.txt"]


@pytest.mark.parametrize("files", [("credentials",), ("config",), ("credentials", "config")])
def test_a_profile_is_enough_and_the_driver_keeps_silent(s3, files, tmp_path):
    """In a process of its own: what its driver says goes to the standard error."""
    keys = "aws_access_key_id = key\naws_secret_access_key = secret\n"
    place = f"region = us-east-1\nendpoint_url = {s3.url}\n"
    texts = {"credentials": "[lab]\n" + keys, "config": "[profile lab]\n" + place}
    if files != ("credentials", "config"):
        texts = {
            name: text + (place if name == "credentials" else keys) for name, text in texts.items()
        }
    for name in files:
        (tmp_path / name).write_text(texts[name])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | {
        "AWS_PROFILE": "lab",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }
    code = (
        "import sys, numpy, stepsave\n"
        "with stepsave.Checkpointer(sys.argv[1]) as saver:\n"
        "    saver.save(1, {'a': numpy.arange(5)}).wait()\n"
        "    assert (saver.restore().state['a'] == numpy.arange(5)).all()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, s3.place],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
