"""Callbacks for systems that bring none for Keras, and stock loaders for what all wrote.

Imports Keras: set `KERAS_BACKEND` first. How each is set up is in `bench.fits.subjects`.
"""

# ruff: noqa: ARG002  Keras calls hooks with arguments that we do not need
from __future__ import annotations

import concurrent.futures
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

import stepsave
from bench.fits import workload
from stepsave.fit.variables import ModelVariables
from stepsave.format.tree import unflatten
from stepsave.snapshot.arena import Claim

State = dict[tuple[str, ...], np.ndarray]
WEIGHTS = ("trainable_variables", "non_trainable_variables")
COLLECTIONS = (*WEIGHTS, "optimizer_variables", "metrics_variables")


class SyncDispatch(keras.callbacks.Callback):
    """Does nothing, but has a hook at the end of a batch; so Keras waits there each step."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        pass


class CopyOnly(stepsave.BackupAndRestore):
    """Snapshots that nobody writes: what no save of this state can cost less than."""

    saves = 0

    def _save(self, epoch: int, batch: int) -> None:
        self._progress.save_is_due = False
        paths, leaves = self._state._leaves(self._saver, (), None)
        claim = Claim()
        snapshot = self._saver._capture.take(paths, leaves, claim, block=True)
        self.saves += 1
        self._pass_on(snapshot, claim)

    def _pass_on(self, snapshot: Any, claim: Claim) -> None:
        claim.release()


class CopyAndWrite(CopyOnly):
    """Snapshots, each followed by the plainest write of it: what a durable save must cost.

    One thread, one file that is there already, `O_DIRECT`, one sync.
    """

    _fd = -1
    _last: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._path = Path(self.backup_dir) / "raw"
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        pool = self._saver._capture._pool
        pool.wait_touched()
        self._write(pool.memories[0].data)  # so that later writes find their blocks allocated

    def _pass_on(self, snapshot: Any, claim: Claim) -> None:
        size_bytes = snapshot.blueprint.plan.arena_bytes

        def write() -> None:
            self._write(snapshot.arena.bytes.data[:size_bytes])
            claim.release()

        self._last = self._writer.submit(write)

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], done)
        os.fdatasync(self._fd)

    def on_train_end(self, logs: Any = None) -> None:
        if self._last is not None:
            self._last.result()
        self._writer.shutdown()
        os.close(self._fd)
        self._path.unlink()
        super().on_train_end(logs)


class SavingCallback(keras.callbacks.Callback):
    """Saves after every so many batches, as the next begins; stepsave does it right before that."""

    def __init__(self, directory: Path, every: int) -> None:
        super().__init__()
        self.directory = directory
        self.every = every
        self.saves = 0
        self._variables: ModelVariables | None = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch and batch % self.every == 0:
            self._save_counted(batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        steps = self.params["steps"]
        if steps % self.every == 0:
            self._save_counted(steps)

    def save(self, step: int, paths: list[tuple[str, ...]], values: list[Any]) -> None:
        raise NotImplementedError

    def _save_counted(self, step: int) -> None:
        # Not `self.model`, which puts the state back into the variables on JAX.
        if self._variables is None:
            self._variables = ModelVariables(self._model)
        self.save(step, self._variables.paths, self._variables.values())
        self.saves += 1


class OrbaxAsync(SavingCallback):
    """Orbax by hand: a `CheckpointManager` with asynchronous checkpointing, as it comes."""

    def on_train_begin(self, logs: Any = None) -> None:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.directory.resolve(), options=options)
        self._args = ocp.args.StandardSave

    def on_train_end(self, logs: Any = None) -> None:
        self._manager.close()  # waits

    def save(self, step: int, paths: list[tuple[str, ...]], values: list[Any]) -> None:
        if keras.backend.backend() != "jax":
            # Views where the host has the values: Orbax copies NumPy arrays itself.
            values = [keras.ops.convert_to_numpy(value) for value in values]
        if not self._manager.save(step, args=self._args(unflatten(paths, values))):
            raise RuntimeError(f"Orbax did not begin the save of step {step}.")


class Dcp(SavingCallback):
    """`torch.distributed.checkpoint.async_save` with a stager that keeps its buffers.

    Staging runs beside forward and backward pass; the optimizer waits for it before it
    changes the first weight. `waits_s` has how long, by batch.
    """

    def __init__(self, directory: Path, every: int) -> None:
        super().__init__(directory, every)
        self.waits_s: dict[int, float] = {}
        self._response: Any = None
        self._saved: Path | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        import torch
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        has_device = torch.accelerator.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=has_device,
                use_shared_memory=False,
                use_async_staging=True,
                use_non_blocking_copy=has_device,
            )
        )
        self._optimizer = self._model.optimizer
        apply = self._optimizer.apply

        def fenced(*arguments: Any, **named: Any) -> Any:
            self._wait_staged()
            return apply(*arguments, **named)

        self._optimizer.apply = fenced

    def on_train_end(self, logs: Any = None) -> None:
        del self._optimizer.apply
        self._finish()
        self._stager.close()

    def save(self, step: int, paths: list[tuple[str, ...]], values: list[Any]) -> None:
        import torch.distributed.checkpoint as dcp

        self._finish()  # two saves at a time would overwrite the stager's buffers
        state = {"/".join(path): value.detach() for path, value in zip(paths, values, strict=True)}
        target = self.directory / str(step)
        self._response = dcp.async_save(
            state, checkpoint_id=target, async_stager=self._stager, no_dist=True
        )
        self._step, self._staged = step, False
        self._pending = target

    def _wait_staged(self) -> None:
        if self._response is None or self._staged:
            return
        begin_s = time.perf_counter()
        self._response.staging_completion.result()
        self._staged = True
        self.waits_s[self._step] = time.perf_counter() - begin_s

    def _finish(self) -> None:
        """Waits for the save in flight; then the one before it is no longer needed."""
        if self._response is None:
            return
        self._response.upload_completion.result()
        self._response = None
        if self._saved is not None:
            shutil.rmtree(self._saved)
        self._saved = self._pending


class WithContext:
    """An Orbax v1 checkpointer that saves with options of its own.

    Keras's `OrbaxCheckpoint` enters a context of defaults right before it saves; the
    innermost one counts.
    """

    def __init__(self, checkpointer: Any, context: Any) -> None:
        self._checkpointer = checkpointer
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpointer, name)

    def save_checkpointables_async(self, step: int, payload: Any) -> Any:
        with self._context:
            return self._checkpointer.save_checkpointables_async(step, payload)


def orbax_keras(directory: Path, every: int, *, compress: bool) -> Any:
    """Keras's own callback; without compression it is given a checkpointer that has it off."""
    callback = keras.callbacks.OrbaxCheckpoint(
        directory=str(directory.resolve()), save_freq=every, max_to_keep=1
    )
    if not compress:
        from orbax.checkpoint import v1 as ocp

        context = ocp.Context()
        context.array.saving.use_compression = False
        callback.checkpointer = WithContext(callback.checkpointer, context)
    return counted(callback, "_save_checkpoint")


def counted(callback: Any, method: str) -> Any:
    """Makes a callback of Keras count its saves."""
    save: Callable[..., None] = getattr(callback, method)
    callback.saves = 0

    def counting(*arguments: Any, **named: Any) -> None:
        save(*arguments, **named)
        callback.saves += 1

    setattr(callback, method, counting)
    return callback


def load_stepsave(directory: Path, _model: Any) -> State:
    with stepsave.Checkpointer(directory) as saver:
        backup = saver.restore()
    assert backup is not None, "no backup was found"
    return _by_path(backup.state)


def load_weights(path: Path, model: Any) -> State:
    """Loads by `load_weights` into a new model of other values; what it changes was loaded."""
    fresh = workload.build(model.megabytes, model.variables).model
    fresh.optimizer.build(fresh.trainable_variables)
    for variable in fresh.variables:
        variable.assign(keras.ops.convert_to_numpy(variable.value) + 1)
    before = workload.snapshot(fresh)
    fresh.load_weights(str(path))
    after = workload.snapshot(fresh)
    return {key: value for key, value in after.items() if not np.array_equal(value, before[key])}


def load_orbax(directory: Path, _model: Any) -> State:
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(directory.resolve()) as manager:
        step = manager.latest_step()
        assert step is not None, "no checkpoint was found"
        return _by_path(manager.restore(step, args=ocp.args.StandardRestore()))


def load_dcp(directory: Path, model: Any) -> State:
    import torch
    import torch.distributed.checkpoint as dcp

    state = {
        path: torch.from_numpy(np.zeros_like(value))
        for path, value in workload.snapshot(model.model).items()
    }
    (newest,) = directory.iterdir()
    dcp.load(
        {"/".join(path): value for path, value in state.items()}, checkpoint_id=newest, no_dist=True
    )
    return {path: value.numpy() for path, value in state.items()}


def _by_path(state: Any) -> State:
    return {path: np.asarray(leaf) for path, leaf in workload.by_path(state).items()}


def compare(saved: State, expected: State) -> dict[str, str]:
    """How many variables of each collection came back, bit for bit.

    Raises:
        AssertionError: If one came back different, or a weight is missing.
    """
    found: dict[str, str] = {}
    for collection in COLLECTIONS:
        paths = [path for path in expected if path[0] == collection]
        present = [path for path in paths if path in saved]
        for path in present:
            assert saved[path].dtype == expected[path].dtype, f"{path}: another dtype"
            same = saved[path].tobytes() == expected[path].tobytes()
            assert same, f"{path}: other values than were saved"
        found[collection] = f"{len(present)} of {len(paths)}"
        if collection in WEIGHTS:
            assert len(present) == len(paths), f"{collection}: only {found[collection]}"
    return found
