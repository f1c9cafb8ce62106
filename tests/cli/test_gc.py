"""`stepsave gc`: removes what is nobody's, and nothing else."""

import json
import os
import shutil

import boto3
import pytest
from cli_support import call, check_imports, run
from engine_support import (
    assert_is_state_of,
    flip_bit,
    restore_once,
    state_of,
    tree_bytes,
)

import stepsave


def train(place, *steps, **options):
    with stepsave.Checkpointer(place, **options) as saver:
        for step in steps:
            saver.save(step, state_of(step)).wait()


def used_bytes(directory):
    paths = [os.path.join(at, name) for at, _, names in os.walk(directory) for name in names]
    return sum(os.lstat(path).st_blocks * 512 for path in [directory, *paths])


def look(place, capsys, *options):
    call("gc", place, "--json", *options)
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def littered(tmp_path):
    """A directory with two backups, and all that can lie beside them."""
    place = tmp_path / "backup"
    train(place, 1, 2, 3, double_checkpoint=True)
    assert (place / "spare").is_dir()
    shutil.copytree(place / "3", place / "4")  # sealed, and not published
    (place / "COMMIT.tmp").write_bytes(b"half a mark")
    (place / ".stepsave-probe").write_bytes(b"")
    (place / "spare-0a1b2c3d").mkdir()
    (place / "lost+found").mkdir()
    (place / ".nfs0001").write_bytes(b"of the file system")
    return place


LEFT = [".stepsave-probe", "4", "COMMIT.tmp", "spare", "spare-0a1b2c3d"]


def test_it_says_what_it_would_remove_and_how_much_that_is_and_changes_nothing(littered, capsys):
    before = tree_bytes(littered)
    found = look(littered, capsys)
    assert [one["path"] for one in found["leftovers"]] == LEFT
    assert found["valid"] == [3, 2]
    assert not found["removed"]
    for one in found["leftovers"]:
        path = littered / one["path"]
        is_directory = path.is_dir()
        assert one["used_bytes"] >= (used_bytes(path) if is_directory else 0)
        assert one["reason"]
    call("gc", littered)
    out = capsys.readouterr().out
    assert "Nothing was changed" in out
    assert all(name in out for name in LEFT)
    assert tree_bytes(littered) == before


def test_it_removes_that_and_a_training_goes_on_as_before(littered, capsys):
    valid = {name: tree_bytes(littered / name) for name in ("2", "3")}
    found = look(littered, capsys, "--yes")
    assert found["removed"]
    assert [one["path"] for one in found["leftovers"]] == LEFT
    assert sorted(os.listdir(littered)) == sorted(
        ["2", "3", "COMMIT", "LOCK", "PREVIOUS", "lost+found", ".nfs0001"]
    )
    assert {name: tree_bytes(littered / name) for name in valid} == valid
    assert look(littered, capsys)["leftovers"] == []
    with stepsave.Checkpointer(littered, double_checkpoint=True) as saver:
        assert_is_state_of(saver.restore())
        for step in (4, 5, 6):
            saver.save(step, state_of(step)).wait()
        assert (saver.committed.step, saver.previous.step) == (6, 5)
    assert_is_state_of(restore_once(littered))


def test_what_somebody_put_into_a_leftover_stays(littered, capsys):
    (littered / "4" / "mine.txt").write_text("mine")
    found = look(littered, capsys, "--yes")
    assert (littered / "spare" / "mine.txt").exists() or (littered / "4" / "mine.txt").exists()
    assert sum(one["used_bytes"] for one in found["leftovers"]) > 0
    assert_is_state_of(stepsave.restore(littered))


def test_a_directory_with_other_files_is_refused_as_by_a_training(littered, capsys):
    (littered / "notes.txt").write_text("mine")
    before = tree_bytes(littered)
    for options in ((), ("--yes",)):
        call("gc", littered, *options, status=2)
        assert "notes.txt" in capsys.readouterr().err
    assert tree_bytes(littered) == before
    call("gc", littered / "nothing", "--yes", status=2)
    assert not (littered / "nothing").exists()


@pytest.mark.parametrize("name", ["COMMIT", "PREVIOUS"])
def test_with_a_marker_that_cannot_be_read_nobody_knows_and_nothing_is_removed(
    littered, capsys, name
):
    flip_bit(littered / name, 60)
    before = tree_bytes(littered)
    for options in ((), ("--yes",)):
        call("gc", littered, *options, status=1)
        assert name in capsys.readouterr().err
    after = tree_bytes(littered)
    assert {k: v for k, v in after.items() if k != "LOCK" and "probe" not in k} == {
        k: v for k, v in before.items() if k != "LOCK" and "probe" not in k
    }


def test_a_training_that_goes_on_keeps_its_directory(tmp_path, capsys):
    place = tmp_path / "backup"
    with stepsave.Checkpointer(place) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step)).wait()
        ended = run("gc", place, "--yes", status=2)
        assert "another live process" in ended.stderr
        assert [one["path"] for one in look(place, capsys)["leftovers"]] == ["spare"]
        assert (place / "spare").is_dir()
        saver.save(4, state_of(4)).wait()
    assert_is_state_of(restore_once(place))


def client_of(s3):
    client = boto3.client("s3", endpoint_url=s3.url)
    bucket, _, prefix = s3.place.removeprefix("s3://").partition("/")
    return client, bucket, f"{prefix}/"


def litter_bucket(s3):
    """What a save that was killed leaves there: all but the object that says that it is whole."""
    train(s3.place, 1, 2)
    client, bucket, prefix = client_of(s3)
    dead = "20200101T000000Z-0123456789abcdef"
    size_bytes = 0
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}2")["Contents"]:
        below = entry["Key"].removeprefix(prefix).partition("/")[2]
        if below == "2/commit_success.txt":
            continue
        source = {"Bucket": bucket, "Key": entry["Key"]}
        client.copy_object(Bucket=bucket, Key=f"{prefix}{dead}/{below}", CopySource=source)
        size_bytes += entry["Size"]
    client.put_object(Bucket=bucket, Key=f"{prefix}somebody/else.bin", Body=b"foreign")
    return f"{dead}/2", size_bytes


def test_in_a_bucket_it_removes_what_no_marker_names(s3, capsys):
    dead, size_bytes = litter_bucket(s3)
    found = look(s3.place, capsys)
    assert [(one["path"], one["used_bytes"]) for one in found["leftovers"]] == [(dead, size_bytes)]
    # The process that saved is this one: for a command by itself it may be training still.
    ended = run("gc", s3.place, "--yes", status=2)
    assert f"process {os.getpid()} on" in ended.stderr
    assert len(look(s3.place, capsys)["leftovers"]) == 1
    run("gc", s3.place, "--yes", "--force")
    assert look(s3.place, capsys)["leftovers"] == []
    client, bucket, prefix = client_of(s3)
    kept = client.get_object(Bucket=bucket, Key=f"{prefix}somebody/else.bin")
    assert kept["Body"].read() == b"foreign"
    assert_is_state_of(restore_once(s3.place))
    train(s3.place, 3, 4)
    assert_is_state_of(restore_once(s3.place))


def test_a_bucket_without_debris_stays_that_of_its_training(s3):
    with stepsave.Checkpointer(s3.place) as saver:
        saver.save(1, state_of(1)).wait()
        assert "Nothing is left over" in run("gc", s3.place, "--yes").stdout
        saver.save(2, state_of(2)).wait()
    assert_is_state_of(restore_once(s3.place))


def test_a_bucket_with_debris_alone_is_empty_afterwards(s3, capsys):
    litter_bucket(s3)
    client, bucket, prefix = client_of(s3)
    client.delete_object(Bucket=bucket, Key=f"{prefix}COMMIT")
    assert len(look(s3.place, capsys, "--yes")["leftovers"]) == 2
    (left,) = client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    assert left["Key"] == f"{prefix}somebody/else.bin"
    train(s3.place, 5)
    assert_is_state_of(restore_once(s3.place))


def test_neither_keras_nor_a_backend_is_imported_for_it(tmp_path):
    train(tmp_path / "backup", 1, 2)
    check_imports("gc", tmp_path / "backup", "--yes")
    assert sorted(os.listdir(tmp_path / "backup")) == ["2", "COMMIT", "LOCK"]
