"""The training that the public tester kills, and one way to back it up for each system.

    python -m proof.chaos_trainings SYSTEM {out} --seed 1

Backups lie below `{out}`, where the tester counts and kills. What it compares lies beside that:
`result-RANK`, what came out, and in `said` an empty file for each step whose backup the system has
acknowledged: only that is what a system may be held to, and it says so for those that take turns
between files, or overwrite one, as well as for those that keep all.
"""

import argparse
import hashlib
import os
from pathlib import Path

import numpy as np

STEPS, EVERY = 12, 3
RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
ADDRESS = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m proof.chaos_trainings", description=__doc__)
    parser.add_argument("system")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args(arguments)
    said = Said(options.out.parent / "said")
    if options.system.startswith("fit_"):
        from proof import chaos_fits  # it imports Keras

        weights = chaos_fits.train(options.system, options.out / "backup", options.seed, said)
    else:
        weights = train(LOOPS[options.system](options.out / "backup"), options.seed, said)
    digest = hashlib.sha256(b"".join(np.asarray(value).tobytes() for value in weights))
    (options.out.parent / f"result-{RANK}").write_text(f"{digest.hexdigest()}\n")


class Said:
    """What a system has acknowledged, for the tester to read."""

    def __init__(self, directory):
        self._directory, self._newest = directory, 0
        if RANK == 0:
            directory.mkdir(exist_ok=True)

    def resumed(self, step):
        print(f"resumed from step {step}", flush=True)  # noqa: T201

    def acknowledged(self, newest):
        """A backup of this step stands for all before it, which it may have replaced."""
        if RANK == 0:
            for step in range(self._newest + 1, newest + 1):
                (self._directory / f"step-{step}").touch()
            self._newest = max(newest, self._newest)


def train(system, seed, said):
    """Twelve steps, each of them a function of the seed, the rank and its number."""
    rng = np.random.default_rng(seed)
    state = {
        "weights": {f"w{i}": rng.standard_normal((64, 50), np.float32) for i in range(4)},
        "momentum": {f"w{i}": np.zeros((64, 50), np.float32) for i in range(4)},
    }
    start = system.restore(state)
    said.resumed(start)
    for step in range(start + 1, STEPS + 1):
        rng = np.random.default_rng([seed, step, RANK])
        for weights, momentum in zip(*(part.values() for part in state.values()), strict=True):
            wanted = system.mean(rng.standard_normal(weights.shape, np.float32))
            # In place: a save that still reads what it was given shows.
            momentum *= np.float32(0.9)  # noqa: PLW2901
            momentum += weights - wanted  # noqa: PLW2901
            weights -= np.float32(0.05) * momentum  # noqa: PLW2901
        if step % EVERY == 0:
            # Steps go on during a save, but the next waits for it: all that was begun is known.
            said.acknowledged(system.wait())
            system.save(step, state)
    said.acknowledged(system.wait())
    system.close()
    return state["weights"].values()


def fill(state, found):
    """Puts what was read into the arrays of a training."""
    for part, arrays in state.items():
        for name, array in arrays.items():
            array[...] = np.asarray(found[part][name])


class OnJax:
    """What loops of several JAX processes share: replicated arrays, and a mean over all."""

    _begun = 0

    def __init__(self):
        if RANKS > 1:
            import jax

            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(ADDRESS, RANKS, RANK)
            mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
            self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def mean(self, array):
        if RANKS == 1:
            return array
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array)).sum(axis=0) / np.float32(RANKS)

    def arrays(self, state):
        """The state as it is saved: NumPy's arrays, or JAX's if there are several processes."""
        if RANKS == 1:
            return state
        import jax

        return jax.tree.map(
            # A copy: on a CPU, JAX may go on reading from where the training writes.
            lambda a: jax.make_array_from_callback(a.shape, self._sharding, a.copy().__getitem__),
            state,
        )


class Stepsave(OnJax):
    def __init__(self, directory):
        super().__init__()
        import stepsave

        self._saver = stepsave.Checkpointer(directory)

    def restore(self, state):
        backup = self._saver.restore(like=self.arrays(state) if RANKS > 1 else None)
        if backup is None:
            return 0
        fill(state, backup.state)
        return backup.step

    def save(self, step, state):
        self._saver.save(step, self.arrays(state))
        self._begun = step

    def wait(self):
        self._saver.wait()
        return self._begun

    def close(self):
        self._saver.close()


class Orbax(OnJax):
    def __init__(self, directory):
        super().__init__()
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options)
        self._args = ocp.args

    def restore(self, state):
        step = self._manager.latest_step()
        if step is None:
            return 0
        like = self._args.StandardRestore(self.arrays(state))
        fill(state, self._manager.restore(step, args=like))
        return step

    def save(self, step, state):
        assert self._manager.save(step, args=self._args.StandardSave(self.arrays(state)))
        self._begun = step

    def wait(self):
        self._manager.wait_until_finished()
        return self._begun

    def close(self):
        self._manager.close()


class OnTorch:
    """What loops of several PyTorch processes share."""

    saved = 0

    def __init__(self):
        import torch

        self.torch = torch
        if RANKS > 1:
            torch.distributed.init_process_group("gloo", init_method="env://")

    def mean(self, array):
        if RANKS > 1:
            self.torch.distributed.all_reduce(self.torch.from_numpy(array))
            array /= np.float32(RANKS)
        return array

    def tensors(self, state):
        from_numpy = self.torch.from_numpy
        return {k: {n: from_numpy(a) for n, a in part.items()} for k, part in state.items()}

    def wait(self):
        return self.saved  # what these do is done when they return

    def close(self):
        if RANKS > 1:
            self.torch.distributed.destroy_process_group()


class Overwriting(OnTorch):
    """One file of NumPy's, overwritten: what a tester must find out. Without PyTorch."""

    def __init__(self, directory):
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "checkpoint.npz"

    def restore(self, state):
        if not self._path.exists():
            return 0
        with np.load(self._path) as found:
            for part, arrays in state.items():
                for name, array in arrays.items():
                    array[...] = found[f"{part}/{name}"]
            return int(found["step"])

    def save(self, step, state):
        flat = {f"{part}/{name}": a for part, arrays in state.items() for name, a in arrays.items()}
        with open(self._path, "wb") as file:
            np.savez(file, step=step, **flat)
        self.saved = step


class TorchSave(OnTorch):
    """One file, by process 0; all read it."""

    def __init__(self, directory):
        super().__init__()
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "checkpoint.pt"

    def restore(self, state):
        if not self._path.exists():
            return 0
        found = self.torch.load(self._path)
        fill(state, found)
        return found["step"]

    def save(self, step, state):
        if RANK == 0:
            self.write({**self.tensors(state), "step": step})
        if RANKS > 1:
            self.torch.distributed.barrier()
        self.saved = step

    def write(self, content):
        self.torch.save(content, self._path)


class TorchSaveRenamed(TorchSave):
    """The same, written beside it and renamed over it."""

    def write(self, content):
        temporary = self._path.with_suffix(".new")
        self.torch.save(content, temporary)
        os.replace(temporary, self._path)


class Dcp(OnTorch):
    """A folder for each step; the newest is what a training goes on from."""

    proves = ""

    def __init__(self, directory):
        super().__init__()
        import torch.distributed.checkpoint as dcp

        self._dcp, self._directory = dcp, directory

    def restore(self, state):
        folders = self._directory.glob("[0-9]*")
        found = [int(path.name) for path in folders if (path / self.proves).exists()]
        if not found:
            return 0
        content = {**self.tensors(state), "step": 0}
        self._dcp.load(content, checkpoint_id=self._directory / str(max(found)))
        return content["step"]

    def save(self, step, state):
        content = {**self.tensors(state), "step": step}
        self._dcp.save(content, checkpoint_id=self._directory / str(step))
        self.saved = step


class DcpProved(Dcp):
    """The same, but only what has `.metadata`, which is written last, counts as a checkpoint."""

    proves = ".metadata"


LOOPS = {
    "loop_stepsave": Stepsave,
    "loop_overwriting": Overwriting,
    "loop_orbax": Orbax,
    "loop_dcp": Dcp,
    "loop_dcp_proved": DcpProved,
    "loop_torch_save": TorchSave,
    "loop_torch_save_renamed": TorchSaveRenamed,
}

if __name__ == "__main__":
    main()
