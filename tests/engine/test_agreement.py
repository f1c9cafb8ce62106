"""Several JAX processes save a state that is spread over them, and restore it onto any mesh."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from bucket_support import s3, s3_environment, s3_target
from engine_support import assert_same_bits, flip_bit
from peers_support import Processes
from spread_support import PRELUDE, assert_is_spread_state, devices, value_of

import stepsave

pytestmark = pytest.mark.once
__all__ = ("s3", "s3_target")

SAVE = (
    PRELUDE
    + """
from stepsave.snapshot import filling, runs
filling._BRIDGE_BYTES, runs._PACK_BYTES = 0, 8 << 10
writer = sys.argv[7]
with stepsave.Checkpointer(place, writer=writer) as saver:
    saver.prepare(state_of(0))
    for step in range(1, int(sys.argv[6]) + 1):
        handle = saver.save(step, state_of(step), {"of": step, "rank": rank})
        if step % 2:
            handle.wait()
    saver.wait()
    stats = saver.stats()
    backup = saver.restore(like=state_of(0))
    assert_is_state_of(backup.state, step)
    assert backup.metadata == {"of": step, "rank": rank}
    print(json.dumps([stats.started, stats.committed, stats.state_bytes, stats.written_bytes]))
"""
).replace("import sys\n", "import json\nimport sys\n", 1)

RESTORE = (
    PRELUDE
    + """
from stepsave.store.local import LocalStore
read, real = [], LocalStore.read_into
def read_into(self, path, size_bytes, pieces, *more):
    pieces = list(pieces)
    read.extend(len(memory) for _, memory in pieces)
    real(self, path, size_bytes, pieces, *more)
LocalStore.read_into = read_into
from stepsave.engine import extents
extents._BRIDGE_BYTES = 0

like = state_of(0)
with stepsave.Checkpointer(place) as saver:
    backup = saver.restore(like=like)
    assert_is_state_of(backup.state, backup.step)
    assert all(backup.state[name].sharding == like[name].sharding for name in SPECS)
    print(sum(read))
    saver.save(backup.step + 1, state_of(backup.step + 1)).wait()
    assert_is_state_of(saver.restore(like=like).state, backup.step + 1)
"""
)

_ELEMENTS = 64 * 300 + 1000 * 128 + 32 * 40 * 8 + 16 * 16 * 9 + 120 * 100 + 7 + 1
TOTAL_BYTES = 4 * _ELEMENTS + 4 * 8


def assert_stock_readers_read(place, step):
    directory = f"{place}/{step}"
    with ocp.PyTreeCheckpointer() as stock:
        found = stock.restore(f"{directory}/pytree")
    assert set(found) > {"rows", "tiles", "host"}
    for name, array in found.items():
        if name in ("host", "step"):
            continue
        expected = value_of(name, array.shape, step)
        assert_same_bits(np.asarray(array), expected)
        base = {"driver": "ocdbt", "base": f"file://{directory}/pytree/", "path": name}
        stored = ts.open({"driver": "zarr3", "kvstore": base}, read=True).result().read().result()
        assert_same_bits(stored, expected)


@pytest.mark.parametrize(
    ("count", "per_process", "mesh", "writer"),
    [(2, 1, "1x2", "auto"), (4, 1, "2x2", "auto"), (2, 2, "2x2", "tensorstore")],
)
def test_each_process_writes_its_part_and_any_number_restores_what_it_needs(
    tmp_path, count, per_process, mesh, writer
):
    place = tmp_path / "backup"
    environment = devices(per_process)
    with Processes(SAVE, place, mesh, 6, writer, count=count, environment=environment) as processes:
        told = [json.loads(lines[-1]) for lines in processes.results()]
    assert [one[:2] for one in told] == [[6, 6]] * count
    assert sum(one[2] for one in told) == 6 * TOTAL_BYTES, "each byte is captured once"
    assert max(one[2] for one in told) < 1.3 * 6 * TOTAL_BYTES / count
    if writer == "auto":
        assert sum(one[3] for one in told) < 5 * TOTAL_BYTES, "what stays is not written"
    backup = stepsave.restore(place)  # by one process, as NumPy arrays
    assert backup.step == 6
    assert_is_spread_state(backup)
    assert_stock_readers_read(place, 6)
    most = 8 if count == 4 else 4
    for other, its_devices, its_mesh in [(2, 2, "1x4"), (1, 2, "2x1"), (most, 1, f"{most}x1")]:
        with Processes(
            RESTORE, place, its_mesh, count=other, environment=devices(its_devices)
        ) as processes:
            read = [int(lines[-1]) for lines in processes.results()]
        if its_mesh == "1x4":  # half of what is spread, all of the rest; in pages
            assert max(read) < 0.75 * TOTAL_BYTES + (80 << 10)


@pytest.mark.xdist_group("buckets")
def test_each_process_writes_its_part_into_a_bucket(s3):
    def environment(rank, count, port):
        return devices(1)(rank, count, port) | s3_environment(s3.url)

    with Processes(SAVE, s3.place, "1x2", 3, "auto", environment=environment) as processes:
        told = [json.loads(lines[-1]) for lines in processes.results()]
    assert [one[:2] for one in told] == [[3, 3]] * 2
    assert stepsave.restore(s3.place).step == 3


FAIL = (
    PRELUDE
    + """
from stepsave.engine import agreement, shard_writing
warnings.simplefilter("error")
warnings.simplefilter("always", stepsave.SaveFailedWarning)
real = shard_writing.Shards.write
how = sys.argv[6]

def write(self, directory, snapshot, known):
    number = len(told)
    if number == 3 and rank == 1:
        if how == "late":
            time.sleep(4)
        elif how == "fails":
            raise OSError(28, "No space left on device")
    return real(self, directory, snapshot, known)

told = []
shard_writing.Shards.write = write
if how == "late":
    agreement.LIMIT_S = 3.0
with stepsave.Checkpointer(place) as saver:
    for step in range(1, 8):
        told.append(step)
        state = state_of(step)
        if how == "other structure" and step == 3 and rank == 1:
            state["small"] = np.zeros(8)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                handle = saver.save(step, state)
        except stepsave.SaveFailedError as e:
            print("raised", str(e), flush=True)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                handle = saver.save(step, state)
        for one in caught:
            print("warned", str(one.message).replace(chr(10), " "), flush=True)
        handle.wait_ended(60)
        print("ended", handle, flush=True)
    found = saver.restore(like=state_of(0))
    assert_is_state_of(found.state, 7)
print("over", flush=True)
"""
)


@pytest.mark.parametrize("how", ["late", "fails", "other structure"])
def test_a_process_that_cannot_do_its_part_is_named_and_the_next_save_is_whole(tmp_path, how):
    place = tmp_path / "backup"
    with Processes(FAIL, place, "1x2", how, environment=devices(1)) as processes:
        lines = processes.results()
    for rank in (0, 1):
        ended = [line for line in lines[rank] if line.startswith("ended")]
        assert ["failed" in line for line in ended] == [False, False, True] + [False] * 4, ended
    (said,) = [line for line in lines[0] if line.startswith(("warned", "raised"))]
    assert said.startswith("warned stepsave: the save of step 3 is lost, and training goes on")
    expected = {
        "late": "has waited 3 s for the part of process(es) 1 of a save",
        "fails": "a part failed. Mend what it names: process 1: OSError: [Errno 28] No space left",
        "other structure": "the state of process 1 has another structure",
    }
    assert expected[how] in said
    (said,) = [line for line in lines[1] if line.startswith(("warned", "raised"))]
    assert said.startswith("raised" if how == "fails" else "warned"), said
    assert ("saves with others, and process 0 has given it up" in said) == (how != "fails")
    assert stepsave.restore(place).step == 7
    assert_stock_readers_read(place, 7)


SKIP = (
    PRELUDE
    + """
from stepsave.engine import shard_writing
real = shard_writing.Shards.write

def write(self, directory, snapshot, known):
    time.sleep(0.3 if rank == 1 else 0)
    return real(self, directory, snapshot, known)

shard_writing.Shards.write = write
with stepsave.Checkpointer(place, when_busy="skip") as saver:
    handles = [saver.save(step, state_of(step)) for step in range(1, 30)]
    saver.wait()
    last = saver.save(30, state_of(30))
    last.wait()
    assert all(handle.done for handle in handles)
    stats = saver.stats()
    assert stats.skipped + stats.committed == 30, stats
    print([handle.step for handle in handles if not handle.skipped], last.skipped)
    assert_is_state_of(saver.restore(like=state_of(0)).state, 30)
    client = jax._src.distributed.global_state.client
    print(len(client.key_value_dir_get("stepsave")))
"""
)


def test_a_save_that_one_process_skips_is_skipped_by_all_and_nothing_piles_up(tmp_path):
    with Processes(SKIP, tmp_path / "backup", "1x2", environment=devices(1)) as processes:
        lines = processes.results()
    assert lines[0][-2] == lines[1][-2]
    assert lines[0][-2].endswith("False")
    assert 1 <= lines[0][-2].count(",") < 25
    assert max(int(one[-1]) for one in lines) < 25, "keys in the service, of 30 saves"


FALL_BACK = (
    PRELUDE
    + """
begin = int(sys.argv[6])
with stepsave.Checkpointer(place, double_checkpoint=True) as saver:
    if begin:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            backup = saver.restore(like=state_of(0))
        for one in caught:
            print("warned", str(one.message).replace(chr(10), " "), flush=True)
        print("step", backup.step, flush=True)
        assert_is_state_of(backup.state, backup.step)
        begin = backup.step
    for step in range(begin + 1, begin + 3):
        saver.save(step, state_of(step)).wait()
"""
)


def test_what_one_process_cannot_read_none_restores(tmp_path):
    place = tmp_path / "backup"
    with Processes(FALL_BACK, place, "1x2", 0, environment=devices(1)) as processes:
        processes.results()
    right = value_of("columns", (1000, 128), 2)[5, 64:].tobytes()  # of process 1 alone
    (shard,) = [path for path in place.glob("2/pytree/d/c/*") if right in path.read_bytes()]
    flip_bit(shard, shard.read_bytes().index(right))
    with Processes(FALL_BACK, place, "1x2", 1, environment=devices(1)) as processes:
        lines = processes.results()
    assert [one[-1] for one in lines] == ["step 1"] * 2
    assert "the backup of step 2" in lines[0][-2]
    assert "process 1 cannot. All must see all of it. The reason: Corrupt" in lines[0][-2]
    assert "data of 'columns'" in lines[0][-2]
    assert stepsave.restore(place).step == 3


KEEP = (
    PRELUDE
    + """
with stepsave.Checkpointer(place, keep=2) as saver:
    for step in range(1, 6):
        saver.save(step, state_of(step)).wait()
    for step in (3, 5, 4):
        backup = saver.restore(like=state_of(0), step=step)
        assert_is_state_of(backup.state, step)
    try:
        saver.restore(like=state_of(0), step=1)
    except (ValueError, stepsave.StepsaveError) as e:
        print(str(e).replace(chr(10), " "), flush=True)
    saver.save(6, state_of(6)).wait()
    assert_is_state_of(saver.restore(like=state_of(0)).state, 6)
"""
)


def test_all_restore_the_kept_backup_that_was_asked_for(tmp_path):
    place = tmp_path / "backup"
    with Processes(KEEP, place, "1x2", environment=devices(1)) as processes:
        lines = processes.results()
    assert all("there are: 5, 4, 3." in one[-1] for one in lines)
    for step in (4, 5, 6):
        for name, array in stepsave.restore(place, step=step).state.items():
            if name not in ("host", "step"):
                assert_same_bits(array, value_of(name, array.shape, step))


ELSEWHERE = (
    PRELUDE
    + """
from jax.sharding import SingleDeviceSharding
there = SingleDeviceSharding(jax.devices()[1])
parts = [jax.device_put(np.zeros(3), jax.devices()[1])] if rank == 1 else []
state = {"mine": jax.make_array_from_single_device_arrays(
    (3,), there, parts, dtype=np.dtype("float32"))}
with stepsave.Checkpointer(place) as saver:
    if rank == 0:
        try:
            saver.prepare(state)
        except stepsave.InvalidStateError as e:
            print(e, flush=True)
"""
)


def test_what_lies_with_another_process_alone_is_refused(tmp_path):
    with Processes(ELSEWHERE, tmp_path / "backup", "1x2", environment=devices(1)) as processes:
        lines = processes.results()
    assert "'mine': expected an array of which this process has a part" in lines[0][-1]
