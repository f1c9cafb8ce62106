"""Measures what a save costs here, with the engine itself."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from stepsave.cli.amounts import size_text
from stepsave.cli.jobs import Job
from stepsave.engine.checkpointer import Checkpointer
from stepsave.engine.known_files import COMMIT
from stepsave.errors import BackupDirectoryError
from stepsave.snapshot.pages import available_bytes
from stepsave.store.lock import LOCK_NAME

__all__ = ("Figures", "measure")

_ARRAY_BYTES = 4 << 20
_UNSTEADY = 2  # saves that write new files, not over retired ones
_ROUNDS = 12
_LIMIT_S = 45.0
_QUICK_ROUNDS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """What was measured: medians.

    Attributes:
        place: Where it was saved.
        state_bytes: How much.
        arrays: In how many arrays.
        backend: Whose they are.
        device: Where they are.
        writer: How they were written.
        saves: How many saves the medians are of.
        stall_s: How long `save` held its caller up.
        durable_s: How long until it was committed.
        to_host_s: How long all arrays take from the device to the host, one by one; None if they
            are there.
    """

    place: str
    state_bytes: int
    arrays: int
    backend: str
    device: str
    writer: str
    saves: int
    stall_s: float
    durable_s: float
    to_host_s: float | None


@dataclasses.dataclass(slots=True)
class _State:
    """Arrays of a framework, of which each has other values after `advance`: what has not changed
    would not be written.
    """

    arrays: dict[str, Any]
    device: str
    advance: Callable[[_State], None]
    fetch: Callable[[Any], Any] | None = None  # to the host, if they are not there


def measure(job: Job, where: str, size_bytes: int, backend: str, *, quick: bool) -> Figures:
    """Saves a state again and again, in a directory of its own that is removed in any case.

    Args:
        job: Told how far it is; what it raises ends it.
        where: The directory in which.
        size_bytes: Of the state, about.
        backend: Whose arrays: `numpy`, `jax`, `torch` or `tensorflow`.
        quick: Whether few saves are enough.

    Raises:
        BackupDirectoryError: If that is no place for it.
        SaveFailedError: If one fails.
    """
    if importlib.util.find_spec(backend) is None:
        raise ValueError(f"{backend} not found. Run: pip install 'stepsave[{backend}]'")
    count = max(1, round(size_bytes / _ARRAY_BYTES))
    each_bytes = max(4, size_bytes // count // 4 * 4)
    _check_place(where, count * each_bytes)
    job.begin("making arrays", None)
    state = _make_state(backend, count, each_bytes)
    rounds = _QUICK_ROUNDS if quick else _ROUNDS
    with tempfile.TemporaryDirectory(prefix="stepsave-bench-", dir=where) as directory:
        stalls_s, durables_s, hosts_s, writer = _save(
            job, directory, state, rounds, count * each_bytes
        )
    return Figures(
        place=os.path.realpath(where),
        state_bytes=count * each_bytes,
        arrays=count,
        backend=backend,
        device=state.device,
        writer=writer,
        saves=len(stalls_s),
        stall_s=statistics.median(stalls_s),
        durable_s=statistics.median(durables_s),
        to_host_s=statistics.median(hosts_s) if hosts_s else None,
    )


def _save(
    job: Job, directory: str, state: _State, rounds: int, state_bytes: int
) -> tuple[list[float], list[float], list[float], str]:
    stalls_s: list[float] = []
    durables_s: list[float] = []
    hosts_s: list[float] = []
    began_s = time.monotonic()
    with Checkpointer(directory) as saver:
        saver.prepare(state.arrays)
        job.begin("saving", rounds * state_bytes)
        for step in range(rounds):
            state.advance(state)
            if state.fetch is not None:
                fetched_s = time.perf_counter()
                for array in state.arrays.values():
                    state.fetch(array)
                hosts_s.append(time.perf_counter() - fetched_s)
            handle = saver.save(step, state.arrays)
            handle.wait()
            assert handle.durable_s is not None
            stalls_s.append(handle.stall_s)
            durables_s.append(handle.durable_s)
            job.note(state_bytes)
            if len(stalls_s) > _UNSTEADY and time.monotonic() - began_s > _LIMIT_S:
                break
        writer = saver.stats().writer
    return stalls_s[_UNSTEADY:], durables_s[_UNSTEADY:], hosts_s[_UNSTEADY:], writer


def _check_place(where: str, state_bytes: int) -> None:
    if not os.path.isdir(where):
        raise BackupDirectoryError(
            f"{where}: expected a directory to measure in, found none. Name the one in which the "
            "backup directory is to lie."
        )
    for name in (COMMIT, LOCK_NAME):
        if os.path.lexists(os.path.join(where, name)):
            raise BackupDirectoryError(
                f"{where}: expected a directory to measure in, found a backup directory, which "
                "holds nothing else. Name the one in which it lies."
            )
    free, memory = shutil.disk_usage(where).free, available_bytes()
    # On the disk a backup and the one that is being written; in memory the state and two copies.
    needed = {"disk": (2.2 * state_bytes, free), "memory": (3.3 * state_bytes, memory)}
    for name, (wanted, there) in needed.items():
        if there is not None and there < wanted:
            raise BackupDirectoryError(
                f"{where}: to measure {size_text(state_bytes)} needs {size_text(wanted)} of "
                f"{name}, found {size_text(there)}. Choose a smaller --size, or another place."
            )


def _make_state(backend: str, count: int, each_bytes: int) -> _State:
    block = np.random.default_rng(0).random(each_bytes // 4, np.float32)
    blocks = ((f"w{number}", block + np.float32(number)) for number in range(count))
    return _MAKERS[backend](blocks)


def _of_numpy(blocks: Any) -> _State:
    def advance(state: _State) -> None:
        for array in state.arrays.values():
            np.add(array, 1, out=array)

    return _State(dict(blocks), "cpu", advance)


def _of_jax(blocks: Any) -> _State:
    jax: Any = importlib.import_module("jax")

    def advance(state: _State) -> None:
        state.arrays = jax.block_until_ready({k: array + 1 for k, array in state.arrays.items()})

    device = jax.devices()[0]
    arrays = {name: jax.device_put(block, device) for name, block in blocks}

    def fetch(array: Any) -> Any:
        return np.asarray(array + 0)  # of a copy: an array of JAX keeps what it was fetched as

    if device.platform == "cpu":
        return _State(arrays, "cpu", advance)
    return _State(arrays, f"{device.platform} ({device.device_kind})", advance, fetch)


def _of_torch(blocks: Any) -> _State:
    torch: Any = importlib.import_module("torch")
    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"

    def advance(state: _State) -> None:
        for array in state.arrays.values():
            array.add_(1)
        if has_gpu:
            torch.cuda.synchronize()

    arrays = {name: torch.tensor(block, device=device) for name, block in blocks}
    if not has_gpu:
        return _State(arrays, "cpu", advance)
    return _State(arrays, f"cuda ({torch.cuda.get_device_name()})", advance, torch.Tensor.cpu)


def _of_tensorflow(blocks: Any) -> _State:
    tf: Any = importlib.import_module("tensorflow")
    gpus = tf.config.list_physical_devices("GPU")

    def advance(state: _State) -> None:
        for variable in state.arrays.values():
            variable.assign_add(tf.ones_like(variable))

    arrays = {name: tf.Variable(block) for name, block in blocks}
    return _State(arrays, "gpu", advance, np.asarray) if gpus else _State(arrays, "cpu", advance)


_MAKERS: dict[str, Callable[[Any], _State]] = {
    "numpy": _of_numpy,
    "jax": _of_jax,
    "torch": _of_torch,
    "tensorflow": _of_tensorflow,
}
