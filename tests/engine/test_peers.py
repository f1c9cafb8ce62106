"""Several processes of JAX and PyTorch: process 0 saves, all restore the same."""

import json

import pytest
from bucket_support import s3, s3_environment, s3_target
from engine_support import assert_same_bits, flip_bit, state_of
from peers_support import Processes

import stepsave
from stepsave.engine import follower
from stepsave.engine.agreement import Following
from stepsave.engine.follower import FollowerDirectory
from stepsave.engine.peers import Board, Peers, find_peers
from stepsave.engine.retention import Retention
from stepsave.engine.saves import SaveLog
from stepsave.store.local import LocalStore
from stepsave.threads import Crew

pytestmark = pytest.mark.once
__all__ = ("s3", "s3_target")

LOOP = """
SHARES = False
import hashlib, sys, time
import numpy as np
import stepsave

def train(place, steps, start, step, to_numpy, pause_s=0.0):
    with stepsave.Checkpointer(place) as saver:
        state = start()
        backup = saver.restore(like=state)
        begin = 0
        if backup is not None:
            begin, state = backup.step, backup.state
        print("from", begin, flush=True)
        for number in range(begin + 1, steps + 1):
            state = step(state, number)
            handle = saver.save(number, state, {"of": number})
            assert handle.by_another == (rank > 0 and not SHARES)
            if number % 2 == 0:
                handle.wait()
            print("step", number, flush=True)
            time.sleep(pause_s)
    arrays = to_numpy(state)
    print(hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest(), flush=True)

rank, count, port = map(int, sys.argv[1:4])
place, steps, pause_s = sys.argv[4], int(sys.argv[5]), float(sys.argv[6])
"""

TORCH = (
    LOOP
    + """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
torch.manual_seed(1)
torch.set_num_threads(1)
model = DistributedDataParallel(torch.nn.Linear(40, 30))
optimizer = torch.optim.Adam(model.parameters(), 0.1)

def start():
    for p in model.parameters():  # so that the optimizer has all that it will have
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}

def step(state, number):
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    generator = torch.Generator().manual_seed(number * count + rank)
    x = torch.randn(16, 40, generator=generator)
    optimizer.zero_grad()
    (model(x) ** 2).mean().backward()
    optimizer.step()
    return {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}

def to_numpy(state):
    return [v.numpy() for v in state["model"].values()]

train(place, steps, start, step, to_numpy, pause_s)
dist.destroy_process_group()
"""
)

JAX = (
    LOOP.replace("SHARES = False", "SHARES = True")
    + """
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()), ("batch",))
everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))

def replicate(array):
    return jax.make_array_from_callback(array.shape, everywhere, array.__getitem__)

def start():
    rng = np.random.default_rng(0)
    return {"w": replicate(rng.standard_normal((40, 30), np.float32)), "n": replicate(np.zeros(3))}

@jax.jit
def update(state, x):
    loss = lambda w: ((x @ w) ** 2).mean()
    return {"w": state["w"] - 0.1 * jax.grad(loss)(state["w"]), "n": state["n"] + 1}

def step(state, number):
    x = np.random.default_rng(number).standard_normal((16, 40), np.float32)
    x = jax.make_array_from_callback(x.shape, split, x.__getitem__)
    return jax.block_until_ready(update(state, x))

def to_numpy(state):
    return [np.asarray(state["w"]), np.asarray(state["n"])]

train(place, steps, start, step, to_numpy, pause_s)
"""
)
TENSORFLOW = (
    LOOP
    + """
import json, os
workers = [f"127.0.0.1:{port + number}" for number in range(count)]
task = {"type": "worker", "index": rank}
os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
import tensorflow as tf

strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    w = tf.Variable(np.random.default_rng(0).standard_normal((40, 30), np.float32))

def start():
    return {"w": w.read_value()}

def replica(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((x @ w) ** 2)
    gradient = tape.gradient(loss, w)
    gradient = tf.distribute.get_replica_context().all_reduce("MEAN", gradient)
    w.assign_sub(0.1 * gradient)

@tf.function
def update(x):
    strategy.run(replica, args=(x,))

def step(state, number):
    w.assign(state["w"])
    rng = np.random.default_rng(number * count + rank)
    update(tf.constant(rng.standard_normal((16, 40), np.float32)))
    return {"w": w.read_value()}

train(place, steps, start, step, lambda state: [state["w"].numpy()], pause_s)
"""
)
SCRIPTS = {"torch": TORCH, "jax": JAX, "tensorflow": TENSORFLOW}


@pytest.mark.parametrize("framework", SCRIPTS)
def test_process_0_saves_and_all_go_on_from_its_backup(framework, tmp_path):
    code = SCRIPTS[framework]
    with Processes(code, tmp_path / "whole", 12, 0) as whole:
        expected = whole.results()
    assert expected[0][-1] == expected[1][-1]
    assert expected[0][0] == "from 0"
    backup = stepsave.restore(tmp_path / "whole")
    assert (backup.step, backup.metadata) == (12, {"of": 12})
    with Processes(code, tmp_path / "killed", 12, 0.05) as killed:
        killed.wait_for("step 5")
        killed.kill()
    begun = stepsave.restore(tmp_path / "killed").step
    assert 3 <= begun < 12
    with Processes(code, tmp_path / "killed", 12, 0) as again:
        found = again.results()
    assert [lines[0] for lines in found] == [f"from {begun}"] * 2
    assert [lines[-1] for lines in found] == [expected[0][-1]] * 2


@pytest.mark.xdist_group("buckets")
def test_processes_share_a_bucket(s3):
    def environment(rank, count, port):  # noqa: ARG001
        return s3_environment(s3.url)

    for steps, begun in ((4, 0), (7, 4)):
        with Processes(TORCH, s3.place, steps, 0, environment=environment) as processes:
            found = processes.results()
        assert [lines[0] for lines in found] == [f"from {begun}"] * 2
        assert found[0][-1] == found[1][-1]
    assert stepsave.restore(s3.place).step == 7


@pytest.mark.parametrize("framework", SCRIPTS)
def test_what_process_0_cannot_open_the_others_are_told(framework, tmp_path):
    (tmp_path / "mine").write_text("not stepsave's")
    with Processes(SCRIPTS[framework], tmp_path, 12, 0) as processes:
        errors = [child.communicate(timeout=200)[1] for child in processes.children]
    assert "BackupDirectoryError" in errors[0]
    assert "found 'mine' in it" in errors[0]
    assert "BackupDirectoryError: Process 0 could not open it" in errors[1]


SHARDED = TORCH.replace(
    "model = DistributedDataParallel(torch.nn.Linear(40, 30))",
    """
from torch.distributed.fsdp import fully_shard
model = torch.nn.Linear(40, 30)
fully_shard(model)
type(model).module = property(lambda self: self)
""",
)


def test_a_torch_model_in_parts_is_refused_by_all_processes(tmp_path):
    with Processes(SHARDED, tmp_path / "backup", 3, 0) as processes:
        errors = [child.communicate(timeout=200)[1] for child in processes.children]
    for error in errors:
        assert "InvalidStateError: State 'model/weight': found a DTensor" in error, error[-2000:]


def fake_board(told, *, count=2):
    def hear(key, limit_s):
        assert limit_s
        return json.dumps(told[key.rsplit("/", 1)[-1]])

    said = {}
    return Board(Peers(1, count, "nobody", said.__setitem__, hear, said.get), "here"), said


def follow(directory, board):
    return FollowerDirectory(LocalStore(directory), SaveLog(), Crew(1, "test"), board)


def test_a_directory_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(follower, "_SIGHT_S", 0.2)
    board, _ = fake_board(
        {"open": {"error": "", "step": -1, "nonce": "ab" * 16, "writer": "direct"}}
    )
    directory = follow(tmp_path, board)
    with pytest.raises(stepsave.BackupDirectoryError, match="not shared between the machines"):
        directory.open("auto", 1, Retention(0))
    (tmp_path / "LOCK").write_text("pid 12\n" + "cd" * 16 + "\n")
    with pytest.raises(stepsave.BackupDirectoryError, match="not shared between the machines"):
        directory.open("auto", 1, Retention(0))
    (tmp_path / "LOCK").write_text("pid 12\n" + "ab" * 16 + "\n")
    assert directory.open("auto", 1, Retention(0)) == -1


def test_a_backup_that_only_process_0_sees_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(follower, "_SIGHT_S", 0.2)
    given_up = {"is_found": False, "error": "process 1 cannot"}
    board, said = fake_board({"reads 0": {"nonce": "ab" * 16}, "reads 1": given_up})
    with pytest.raises(stepsave.BackupDirectoryError, match="Process 0 could not restore"):
        follow(tmp_path, board).restore()
    ((key, told),) = said.items()
    assert key.endswith("/read 0 1")
    assert "not to be seen here" in json.loads(told)["error"]


def test_when_one_process_cannot_read_its_part_all_fall_back(tmp_path):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (1, 2):
            saver.save(step, state_of(step)).wait()
        records = saver.previous, saver.committed
    flip_bit(tmp_path / "2/pytree/d/c/0", 70)
    told = [{"nonce": record.nonce} for record in records]
    taken = {"is_found": True, "ended": True, "error": ""}
    board, said = fake_board({"reads 0": told[1], "reads 1": told[0], "reads 2": taken})
    found, lost = follow(tmp_path, board).restore()
    assert (found.step, found.ended, lost) == (1, True, ""), "as process 0 says"
    assert_same_bits(found.state, state_of(1))
    first, second = map(json.loads, said.values())
    assert "CorruptBackupError" in first["error"]
    assert not second["error"]


def test_who_says_nothing_is_named_with_what_was_waited_for():
    def hear(key, limit_s):
        raise TimeoutError(f"{key} after {limit_s}")

    board = Board(Peers(3, 4, "JAX", lambda *_: None, hear, lambda _: None), "/backup")
    with pytest.raises(
        stepsave.PeerError,
        match=r"/backup: process 3 of 4 \(JAX\) waited 2 s for process 0",
    ):
        board.hear("open", 2)


def test_places_and_openings_do_not_mix_up():
    said = {}
    peers = Peers(0, 2, "JAX", said.__setitem__, lambda *_: "", lambda _: None)
    for place in ("/a", "/b", "/a"):
        Board(peers, place).say("open", step=1)
    assert len(said) == 3


def test_one_process_is_no_peer():
    assert find_peers() is None


def test_what_several_processes_cannot_share_is_refused(monkeypatch):
    from stepsave.engine import opening

    peers = Peers(0, 2, "JAX", lambda *_: None, lambda *_: "", lambda _: None)
    monkeypatch.setattr(opening, "find_peers", lambda: peers)
    with pytest.raises(stepsave.BackupDirectoryError, match=r"2 processes \(JAX\).*memory of one"):
        stepsave.Checkpointer("memory://peers")


def test_a_service_that_is_gone_is_told_with_what_was_to_be_said():
    def fail(*_):
        raise ConnectionError("connection refused")

    board = Board(Peers(0, 2, "JAX", fail, fail, fail, hear_all=fail, forget=fail), "/backup")
    for call, what in (
        (board.say, "could not tell the others about `save 0`"),
        (board.hear_all, "could not hear the others about `save 0`"),
        (board.forget, "could not forget `save 0`"),
    ):
        with pytest.raises(stepsave.PeerError, match=f"/backup: .*{what}.*connection refused"):
            call("save 0")


def test_a_step_that_process_0_does_not_save_is_named():
    board, _ = fake_board({"save 0": {"step": 9, "directory": "spare", "nonce": ""}})
    with pytest.raises(stepsave.PeerError, match="saves step 8, and process 0 does not"):
        Following(board).hear_order(8, 0)
