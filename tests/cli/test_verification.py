"""`stepsave verify`: all bytes, and all that is wrong with them."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from bucket_support import s3, s3_target
from cli_support import (
    GOLDEN,
    arrays_of_all_dtypes,
    ask,
    chunks_of,
    plan_of,
    refusal,
    run,
    save_two,
    spoil,
)
from engine_support import (
    assert_is_state_of,
    change_json,
    flip_bit,
    in_own_mounts,
    save_once,
    state_of,
    tree_bytes,
    write_marker,
)

import stepsave
from stepsave.cli import verification
from stepsave.format.layout import decode_layout
from stepsave.store.local import LocalStore
from stepsave.store.places import open_store

__all__ = ("s3", "s3_target")

pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.fixture
def backup(tmp_path):
    """Two backups of several shards."""
    save_two(tmp_path / "backup", [state_of(150), state_of(160)])
    assert plan_of(tmp_path / "backup", 160).shard_count > 2
    return tmp_path / "backup"


def lines_of(*arguments):
    return ask("verify", *arguments, status=1).splitlines()


def damaged_variables(lines):
    return [line.partition(": ")[2] for line in lines if line.startswith("  damaged variable")]


def test_a_whole_backup_is_valid_and_a_pipe_hears_one_line(backup):
    told = ask("verify", backup)
    assert re.fullmatch(r"valid: step 160, 150; read \S+ kB in \S+ m?s, \S+ \w?B/s\n", told)


@pytest.mark.parametrize("version", [path.name for path in GOLDEN.iterdir()])
def test_backups_of_all_formats_are_valid(version):
    before = tree_bytes(GOLDEN / version)
    told = ask("verify", GOLDEN / version)
    steps = "1200, 1000, 800, 600" if version == "v1-kept" else "1200"
    assert told.startswith(f"valid: step {steps}; read ")
    assert tree_bytes(GOLDEN / version) == before


def test_each_damaged_variable_and_file_is_named_in_each_backup(backup):
    spoil(backup, 160, "rows", "weights/w3", "weights/w7", "optimizer/step")
    spoil(backup, 150, "frozen")
    flip_bit(backup / "160" / "training.json", 7)
    lines = lines_of(backup)
    of_newest = lines.index(f"{backup}, step 160")
    of_previous = lines.index(f"{backup}, step 150")
    assert of_newest < of_previous
    newest, previous = lines[of_newest:of_previous], lines[of_previous:]
    assert sorted(damaged_variables(newest)) == [
        "optimizer/step", "rows", "weights/w3", "weights/w7"
    ]  # fmt: skip
    assert damaged_variables(previous) == ["frozen"]
    files = [line for line in newest if line.startswith("  160/")]
    assert any(line.startswith("  160/training.json: expected CRC-32C") for line in files)
    assert len(files) == 5
    assert re.fullmatch(r"damaged: \d+ files, 5 variables; read .*", lines[-1])
    with pytest.raises(stepsave.CorruptBackupError):
        stepsave.restore(backup)


@pytest.mark.parametrize("what", ["last byte", "half", "all"])
def test_of_a_truncated_shard_those_variables_are_damaged_that_are_not_there(backup, what):
    shard = backup / "160" / "pytree" / "d" / "c" / "1"
    size = shard.stat().st_size
    left = {"last byte": size - 1, "half": size // 2 + 100, "all": 0}[what]
    os.truncate(shard, left)
    plan = plan_of(backup, 160)
    expected = {
        "/".join(plan.leaves[chunk.leaf].path)
        for chunk in plan.shard_chunks[1]
        if chunk.offset_bytes - plan.shard_bytes + chunk.stored_bytes + 4 > left
    }
    lines = lines_of(backup)
    assert set(damaged_variables(lines)) == expected
    assert bool(expected) == (what != "last byte")
    assert f"  160/pytree/d/c/1: expected {size} bytes, found {left}." in lines
    missing = re.search(r"160/pytree/d/c/1: bytes \d+ to \d+ are not there", "\n".join(lines))
    assert bool(missing) == bool(expected)


@pytest.mark.parametrize("how", ["removed", "a link", "a FIFO"])
def test_a_shard_that_is_no_file_damages_all_variables_in_it(backup, how, tmp_path):
    shard = backup / "160" / "pytree" / "d" / "c" / "2"
    shutil.move(shard, tmp_path / "elsewhere")
    if how == "a link":
        shard.symlink_to(tmp_path / "elsewhere")
    if how == "a FIFO":
        os.mkfifo(shard)
    plan = plan_of(backup, 160)
    expected = {"/".join(plan.leaves[chunk.leaf].path) for chunk in plan.shard_chunks[2]}
    assert set(damaged_variables(lines_of(backup))) == expected


def test_a_shard_of_another_save_is_found(tmp_path):
    states = [{"a": np.arange(9000.0), "b": np.arange(9000.0) + n} for n in range(2)]
    save_two(tmp_path, states)
    for path, _, _ in chunks_of(tmp_path, 160, "b"):
        shutil.copy(tmp_path / "150" / path.relative_to(tmp_path / "160"), path)
    lines = lines_of(tmp_path)
    assert any("a shard of another save" in line for line in lines)
    assert "b" in damaged_variables(lines)


def test_a_flipped_bit_between_variables_is_found_though_it_costs_none(backup):
    (path, offset, chunk), *_ = chunks_of(backup, 160, "optimizer/step")
    flip_bit(path, offset + chunk.stored_bytes + 4)
    lines = lines_of(backup)
    assert damaged_variables(lines) == []
    assert re.search(r"bytes \d+ to \d+, between arrays: expected zeros", lines[1])
    assert_is_state_of(stepsave.restore(backup))


def test_a_structure_that_does_not_fit_is_damage(tmp_path):
    save_once(tmp_path, {"a": [np.arange(3), np.arange(4)]})
    change_json(tmp_path, "training.json", lambda d: d["structure"]["notes"].append([["a"], "int"]))
    lines = lines_of(tmp_path)
    assert "1/training.json" in lines[1]
    with pytest.raises(stepsave.CorruptBackupError):
        stepsave.restore(tmp_path)


def test_a_spoilt_layout_leaves_sizes_to_be_checked(backup):
    flip_bit(backup / "160" / "layout.json", 30)
    os.truncate(backup / "160" / "pytree" / "d" / "c" / "1", 5)
    lines = lines_of(backup)
    assert any("160/layout.json: expected CRC-32C" in line for line in lines)
    assert any("160/pytree/d/c/1: expected" in line for line in lines)


@pytest.mark.parametrize("name", ["COMMIT", "PREVIOUS"])
def test_a_spoilt_marker_is_damage_and_the_other_backup_is_verified(backup, name):
    flip_bit(backup / name, 60)
    other = {"COMMIT": "150", "PREVIOUS": "160"}[name]
    spoil(backup, other, "rows")
    lines = lines_of(backup)
    assert lines[0] == str(backup)
    assert lines[1].startswith(f"  {name}: expected CRC-32C")
    assert lines[2] == f"{backup}, step {other}"
    assert damaged_variables(lines) == ["rows"]


def test_threads_that_cannot_be_started_are_told(backup, monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(
        stepsave.BackupDirectoryError, match=r"Cannot start \d+ threads to read: can't .*ulimit -u"
    ):
        verification.run(str(backup))


def test_of_a_backup_that_is_replaced_each_time_nothing_is_said(backup, monkeypatch):
    steps = itertools.count(200)
    real, guard = LocalStore.read_into, threading.Lock()

    def read_into(self, path, *arguments):
        if path.endswith("/0"):
            with guard:
                # After one save what is being read would lie there still, retired.
                for step in (next(steps), next(steps)):
                    save_once(backup, state_of(step), step)
        real(self, path, *arguments)

    monkeypatch.setattr(LocalStore, "read_into", read_into)
    with pytest.raises(stepsave.BackupDirectoryError, match=r"while they were being read\. Look"):
        verification.run(str(backup))


def test_what_a_newer_stepsave_wrote_is_not_said_to_be_damaged(backup):
    write_marker(backup, {"format": 9}, version=9)
    assert "Install a newer stepsave" in refusal("verify", backup)


@pytest.mark.parametrize("there", ["nothing", "a file", "no backup", "something foreign"])
def test_where_there_is_no_backup_it_cannot_be_asked(tmp_path, there):
    place = tmp_path / "place"
    if there == "a file":
        place.write_text("")
    elif there != "nothing":
        place.mkdir()
    if there == "something foreign":
        (place / "notes.txt").write_text("")
    what = "to verify, found none" if place.is_dir() else "directory to read, found"
    assert f"stepsave: {place}: expected a backup {what}" in refusal("verify", place)


def test_what_may_not_be_read_is_not_said_to_be_damaged(backup, monkeypatch):
    real = os.open

    def deny(path, *arguments, **options):
        if str(path).endswith("layout.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(PermissionError, match=r"layout\.json"):
        verification.run(str(backup))


def test_a_directory_on_a_read_only_file_system_is_verified(backup):
    mount = f"mount --bind {backup} {backup} && mount -o remount,ro,bind {backup}"
    assert ask("verify", backup, prefix=in_own_mounts(mount)).startswith("valid: ")


TRAINING = """
import sys, stepsave
from engine_support import SMALL_SHARDS, state_of
exec(SMALL_SHARDS)
with stepsave.Checkpointer(sys.argv[1], double_checkpoint=True) as saver:
    step = 0
    while True:
        step += 1
        saver.save(step, state_of(step)).wait()
        print(step, flush=True)
"""


def test_while_a_training_saves_there_what_is_replaced_is_not_said_to_be_damaged(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env=environment,
    ) as training:  # fmt: skip
        try:
            for _ in range(3):
                assert training.stdout.readline()
            end = time.monotonic() + 60
            valid = 0
            while valid < 3 and time.monotonic() < end:
                ended = run("verify", tmp_path, status=None)
                gave_up = ended.returncode == 2 and "were replaced 10 times" in ended.stderr
                assert ended.returncode == 0 or gave_up, ended.stdout + ended.stderr
                valid += ended.returncode == 0
        finally:
            training.send_signal(signal.SIGKILL)
    assert valid or gave_up
    assert ask("verify", tmp_path).startswith("valid: step ")


@pytest.mark.xdist_group("buckets")
def test_a_bucket_is_verified(s3):
    save_two(s3.place, [state_of(150), state_of(160)])
    assert ask("verify", s3.place).startswith("valid: step 160, 150; read ")
    store = open_store(s3.place)
    (shard,) = [p for p in store.list("") if "/160/" in p and p.endswith("/d/c/1")]
    data = bytearray(store.read(shard, 1 << 30))
    data[0] ^= 1
    store.write_all({shard: bytes(data)})
    lines = lines_of(s3.place)
    assert len(damaged_variables(lines)) == 1
    short = shard.replace("/d/c/1", "/d/c/0")
    store.write_all({short: bytes(data[:5000])})
    store.remove(shard)
    plan = decode_layout(store.read(shard.partition("/pytree")[0] + "/layout.json", 1 << 20), "")
    lost = [*plan.shard_chunks[1]] + [
        chunk for chunk in plan.shard_chunks[0] if chunk.offset_bytes + chunk.stored_bytes > 4996
    ]
    expected = {"/".join(plan.leaves[chunk.leaf].path) for chunk in lost}
    assert expected <= set(damaged_variables(lines_of(s3.place)))


def test_what_processes_keep_on_disks_of_their_own_is_verified_together(tmp_path):
    for rank in range(2):
        save_once(tmp_path / f"process-{rank}", state_of(7), step=7)
    assert ask("verify", tmp_path).startswith("valid: step 7; read ")
    spoil(tmp_path / "process-1", 7, "rows")
    lines = lines_of(tmp_path)
    assert lines[0] == f"{tmp_path}/process-1, step 7"
    assert damaged_variables(lines) == ["rows"]


def test_no_more_memory_is_used_than_for_some_shards(tmp_path):
    save_once(tmp_path, arrays_of_all_dtypes((3000, 500)))
    code = """
import resource, sys
from stepsave.cli import verification, inspection, comparison
import numpy, rich.progress
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert verification.run(sys.argv[1]) == 0
assert inspection.run(sys.argv[1], as_json=True, with_statistics=True) == 0
assert comparison.run(sys.argv[1], sys.argv[1], as_json=True) == 0
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
print(used, file=sys.stderr)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    size = sum(path.stat().st_size for path in tmp_path.rglob("d/c/*"))
    assert size > 90e6
    assert int(ended.stderr) < size / 2
