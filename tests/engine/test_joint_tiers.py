"""Several processes with a disk each and one bucket: what all have on their disks, or have brought
to the bucket, they restore."""

import json
import os
import shutil

import pytest
from bucket_support import s3, s3_target
from engine_support import assert_is_state_of, flip_bit
from peers_support import Processes
from spread_support import PRELUDE, assert_is_spread_state, devices

import stepsave
from stepsave.format.orbax import shard_path

pytestmark = [pytest.mark.once, pytest.mark.xdist_group("buckets")]
__all__ = ("s3", "s3_target")

SAVE = (
    PRELUDE
    + """
planning._CHUNKS_PER_PROCESS = 500  # so that blocks have several
disk, first, last = sys.argv[6], int(sys.argv[7]), int(sys.argv[8])
every = sys.argv[9]
with stepsave.Checkpointer(place, local_dir=disk,
                           upload_every=int(every) if every.isdigit() else every) as saver:
    backup = saver.restore(like=state_of(0))
    found = -1 if backup is None else backup.step
    if backup is not None:
        assert_is_state_of(backup.state, backup.step)
        assert backup.metadata["of"] == backup.step
        assert backup.metadata["rank"] == (rank if rank < int(sys.argv[10]) else 0)
    for step in range(first, last + 1):
        saver.save(step, state_of(step), {"of": step, "rank": rank}).wait()
    if last >= first:
        saver.upload()
        assert_is_state_of(saver.restore(like=state_of(0)).state, last)
    stats = saver.stats()
    print(json.dumps([found, stats.committed, stats.remote_step]))
"""
).replace("import sys\n", "import json\nimport sys\n", 1)


def processes(code, place, disk, mesh, *arguments, count=2, per_process=1):
    return Processes(
        code, place, mesh, disk, *arguments, count=count, environment=devices(per_process)
    )


def run(place, disk, mesh, first, last, every=1, of=4, **options):
    with processes(SAVE, place, disk, mesh, first, last, every, of, **options) as some:
        return [json.loads(lines[-1]) for lines in some.results()]


def assert_bucket_has(place, step=None):
    backup = stepsave.restore(place)
    assert step in (None, backup.step)
    assert_is_spread_state(backup)


@pytest.mark.parametrize(("count", "per_process", "mesh"), [(2, 2, "2x2"), (4, 1, "2x2")])
def test_each_saves_to_its_disk_and_all_to_one_bucket(s3, tmp_path, count, per_process, mesh):
    disk, options = tmp_path / "disk", {"count": count, "per_process": per_process}
    assert run(s3.place, disk, mesh, 1, 4, **options) == [[-1, 4, 4]] * count
    assert sorted(os.listdir(disk)) == [f"process-{rank}" for rank in range(count)]
    for rank in range(count):
        here = {name for name in os.listdir(disk / f"process-{rank}") if name.isdigit()}
        assert here >= {"3", "4"}
        assert len(here) <= 2 + 1 + 2  # one that was uploaded, and two that might have been
    assert_bucket_has(s3.place, 4)
    shutil.move(disk, tmp_path / "away")
    assert run(s3.place, disk, mesh, 5, 4, **options) == [[4, 0, 4]] * count  # the bucket is enough
    shutil.rmtree(disk)
    shutil.move(tmp_path / "away", disk)
    found = run(s3.place, disk, mesh, 5, 6, "1h", **options)
    assert found == [[4, 2, 6]] * count
    assert_bucket_has(s3.place, 6)


KILLED = SAVE.replace(
    "    for step in range(first, last + 1):\n",
    """
    from jax.experimental import multihost_utils
    for step in range(first, last + 1):
        print("step", step, flush=True)
        multihost_utils.sync_global_devices(str(step))  # as a step of a training does
""",
)


def train_and_kill(place, disk, first, last):
    with processes(KILLED, place, disk, "1x2", first, 1000, "1h", 4) as some:
        for rank in (0, 1):
            some.wait_for(f"step {last}", rank)
        some.kill()


def valid(disk, rank):
    with stepsave.Checkpointer(disk / f"process-{rank}", read_only=True) as reader:
        return {record.nonce: record.step for record in (reader.committed, reader.previous)}


def test_the_newest_step_that_all_disks_hold_is_restored(s3, tmp_path):
    disk = tmp_path / "disk"
    assert run(s3.place, disk, "1x2", 1, 2) == [[-1, 2, 2]] * 2
    train_and_kill(s3.place, disk, 3, 9)
    held = [valid(disk, rank) for rank in (0, 1)]
    common = held[0].keys() & held[1].keys()
    begun = max(held[0][nonce] for nonce in common)
    assert begun >= 8
    assert [one[0] for one in run(s3.place, disk, "1x2", 1001, 1001)] == [begun] * 2
    assert_bucket_has(s3.place, 1001)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_disk_has_all_go_back_to_the_bucket(s3, tmp_path, lost):
    disk = tmp_path / "disk"
    assert run(s3.place, disk, "1x2", 1, 3) == [[-1, 3, 3]] * 2
    train_and_kill(s3.place, disk, 4, 6)
    there = stepsave.restore(s3.place).step
    assert there in (3, 4)  # the first of a run goes up at once
    shutil.rmtree(disk / f"process-{lost}")
    found = run(s3.place, disk, "1x2", there + 1, there + 6)  # steps that one disk has already
    assert [one[0] for one in found] == [there] * 2
    assert_bucket_has(s3.place, there + 6)
    assert run(s3.place, disk, "1x2", there + 7, there + 7)[0] == [there + 6, 1, there + 7]


def test_what_one_cannot_read_from_its_disk_none_restores(s3, tmp_path):
    disk = tmp_path / "disk"
    assert run(s3.place, disk, "1x2", 1, 3) == [[-1, 3, 3]] * 2
    flip_bit(disk / "process-1" / "3" / shard_path(0), 100)
    assert run(s3.place, disk, "1x2", 4, 4)[0] == [3, 1, 4]  # from the bucket, which has it too
    assert_bucket_has(s3.place, 4)


def test_another_mesh_or_number_of_processes_restores_from_the_bucket(s3, tmp_path):
    disk = tmp_path / "disk"
    assert run(s3.place, disk, "1x2", 1, 2) == [[-1, 2, 2]] * 2
    assert run(s3.place, disk, "2x1", 3, 3)[0] == [2, 1, 3]
    found = run(s3.place, tmp_path / "others", "4x1", 4, 4, of=2, count=4)
    assert found == [[3, 1, 4]] * 4
    assert_bucket_has(s3.place, 4)


def test_the_part_of_one_process_is_no_backup_for_others(s3, tmp_path):
    disk = tmp_path / "disk"
    run(s3.place, disk, "1x2", 1, 1)
    with pytest.raises(stepsave.BackupDirectoryError, match="keeps on its disk"):
        stepsave.restore(disk / "process-0")


def test_processes_that_are_killed_in_an_upload_leave_what_was_in_the_bucket(s3, tmp_path):
    disk = tmp_path / "disk"
    run(s3.place, disk, "1x2", 1, 1)
    s3.fault = lambda method, _: 0.05 if method == "PUT" else None
    with processes(KILLED, s3.place, disk, "1x2", 2, 1000, 1, 4) as some:
        some.wait_for("step 40", 1)  # one upload after the other all the time
        some.kill()
    s3.fault = None
    assert_bucket_has(s3.place)
    there = stepsave.restore(s3.place).step
    shutil.rmtree(disk)
    assert [one[0] for one in run(s3.place, disk, "1x2", 1001, 1001)] == [there] * 2
    assert_bucket_has(s3.place, 1001)


@pytest.mark.parametrize("marks", [0, 1])
def test_that_a_training_has_ended_is_true_for_all_or_for_none(s3, tmp_path, marks):
    """As when processes are killed while they note it."""
    disk = tmp_path / "disk"
    code = SAVE + f"    saver._directory._local.mark_ended() if rank == {marks} else None\n"
    with processes(code, s3.place, disk, "1x2", 1, 2, 1, 4) as some:
        some.results()
    code = SAVE.replace("found = -1", "print(backup.ended)\n    found = -1")
    with processes(code, s3.place, disk, "1x2", 3, 2, 1, 4) as some:
        found = some.results()
    assert [lines[-2] for lines in found] == [str(marks == 0)] * 2, "as process 0 says"


def test_a_training_that_is_done_leaves_nothing_on_any_disk_nor_in_the_bucket(s3, tmp_path):
    disk = tmp_path / "disk"
    code = SAVE.replace("saver.stats()\n", "saver.stats()\n    saver.close(delete_backup=True)\n")
    with processes(code, s3.place, disk, "1x2", 1, 3, 1, 4) as some:
        assert [json.loads(lines[-1]) for lines in some.results()] == [[-1, 3, 3]] * 2
    assert not disk.exists()
    assert stepsave.restore(s3.place) is None


TORCH = """
import json
import sys
import torch
import torch.distributed as dist
import stepsave
from engine_support import SMALL_SHARDS, assert_is_state_of, state_of
exec(SMALL_SHARDS)

rank, count, port = map(int, sys.argv[1:4])
place, disk, first, last = sys.argv[4], sys.argv[6], int(sys.argv[7]), int(sys.argv[8])
dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)

def state(step):
    return {name: torch.as_tensor(value) if name == "rows" else value
            for name, value in state_of(step).items()}

with stepsave.Checkpointer(place, local_dir=disk, upload_every="1h") as saver:
    backup = saver.restore()
    if backup is not None:
        assert_is_state_of(backup)
    for step in range(first, last + 1):
        assert not saver.save(step, state(step)).by_another
    saver.wait()
    print(json.dumps([backup and backup.step, saver.stats().committed]))
dist.destroy_process_group()
"""


def test_where_all_have_everything_each_keeps_it_and_process_0_uploads_it(s3, tmp_path):
    disk = tmp_path / "disk"

    def train(first, last):
        with Processes(TORCH, s3.place, "", disk, first, last) as some:
            return [json.loads(lines[-1]) for lines in some.results()]

    assert train(1, 3) == [[None, 3]] * 2
    backup = stepsave.restore(s3.place)
    assert backup.step == 3
    assert_is_state_of(backup)
    shutil.move(disk / "process-1", tmp_path / "away")
    assert train(4, 3) == [[3, 0]] * 2
    shutil.rmtree(disk / "process-1")
    shutil.move(tmp_path / "away", disk / "process-1")
    assert train(4, 6) == [[3, 3]] * 2
    assert stepsave.restore(s3.place).step == 6
