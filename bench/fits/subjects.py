"""What is compared, and how each is set up. Imports frameworks only when a subject is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEVER = 1_000_000_000
WEIGHTS_FILE = "model.weights.h5"
ALL_BACKENDS = ("jax", "tensorflow", "torch")


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A system under test.

    Attributes:
        key: Its name in the JSON.
        label: Its name in tables and pictures.
        settings: How it is set up, as published.
        syncs: What it syncs to disk before it says done: "nothing", "data" (but not the
            files and names that make it findable) or "everything".
        maker: Makes its callbacks for a directory and a number of steps between saves.
        loader: Reads back what it wrote by its own means; None for one that saves nothing.
        backends: Where it exists.
        is_floor: Whether it does a part of what a save is, and saves nothing.
    """

    key: str
    label: str
    settings: str
    syncs: str
    maker: Callable[[Path, int], list[Any]]
    loader: Callable[[Path, Any], Any] | None = None
    backends: tuple[str, ...] = ALL_BACKENDS
    is_floor: bool = False

    def make(self, directory: Path, every: int) -> list[Any]:
        return self.maker(directory, every)

    def saves(self, steps: int, every: int) -> int:
        """How many saves a fit of so many steps makes."""
        return steps // every if self.loader is not None or self.is_floor else 0

    def describe(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "settings": self.settings,
            "syncs": self.syncs,
        }


def saves_made(callbacks: list[Any]) -> int:
    """How many saves callbacks say they made in the last fit."""
    made = 0
    for callback in callbacks:
        if hasattr(callback, "saves"):
            made += callback.saves
        elif hasattr(callback, "stats"):
            stats = callback.stats()
            assert stats.failed == stats.skipped == 0, stats
            made += stats.started
    return made


def _nothing(_directory: Path, _every: int) -> list[Any]:
    return []


def _sync(_directory: Path, _every: int) -> list[Any]:
    from bench.fits import peers

    return [peers.SyncDispatch()]


def _stepsave(directory: Path, every: int) -> list[Any]:
    import stepsave

    return [stepsave.BackupAndRestore(directory, save_freq=every, delete_checkpoint=False)]


def _idle(directory: Path, _every: int) -> list[Any]:
    return _stepsave(directory, NEVER)


def _copy(directory: Path, every: int) -> list[Any]:
    from bench.fits import peers

    return [peers.CopyOnly(directory, save_freq=every, delete_checkpoint=False)]


def _copy_write(directory: Path, every: int) -> list[Any]:
    from bench.fits import peers

    return [peers.CopyAndWrite(directory, save_freq=every, delete_checkpoint=False)]


def _bare(_directory: Path, _every: int) -> list[Any]:
    import keras

    return [keras.callbacks.Callback()]


def _keras(directory: Path, every: int) -> list[Any]:
    import keras

    from bench.fits import peers

    callback = keras.callbacks.BackupAndRestore(
        str(directory), save_freq=every, delete_checkpoint=False
    )
    return [peers.counted(callback, "_save_model")]


def _model_checkpoint(directory: Path, every: int) -> list[Any]:
    import keras

    from bench.fits import peers

    callback = keras.callbacks.ModelCheckpoint(
        str(directory / WEIGHTS_FILE), save_weights_only=True, save_freq=every
    )
    return [peers.counted(callback, "_save_model")]


def _orbax_keras(directory: Path, every: int) -> list[Any]:
    from bench.fits import peers

    return [peers.orbax_keras(directory, every, compress=True)]


def _orbax_keras_tuned(directory: Path, every: int) -> list[Any]:
    from bench.fits import peers

    return [peers.orbax_keras(directory, every, compress=False)]


def _orbax_async(directory: Path, every: int) -> list[Any]:
    from bench.fits import peers

    return [peers.OrbaxAsync(directory, every)]


def _dcp(directory: Path, every: int) -> list[Any]:
    from bench.fits import peers

    return [peers.Dcp(directory, every)]


def _load_stepsave(directory: Path, workload: Any) -> Any:
    from bench.fits import peers

    return peers.load_stepsave(directory, workload)


def _load_keras(directory: Path, workload: Any) -> Any:
    from bench.fits import peers

    return peers.load_weights(directory / "latest.weights.h5", workload)


def _load_model_checkpoint(directory: Path, workload: Any) -> Any:
    from bench.fits import peers

    return peers.load_weights(directory / WEIGHTS_FILE, workload)


def _load_orbax_keras(directory: Path, workload: Any) -> Any:
    from bench.fits import peers

    return peers.load_weights(directory, workload)


def _load_orbax_async(directory: Path, workload: Any) -> Any:
    from bench.fits import peers

    return peers.load_orbax(directory, workload)


def _load_dcp(directory: Path, workload: Any) -> Any:
    from bench.fits import peers

    return peers.load_dcp(directory, workload)


_LISTED = (
    Subject("none", "no callback", "`fit` without callbacks", "nothing", _nothing),
    Subject(
        "sync",
        "empty callback",
        "a callback that does nothing at the end of each batch; it alone makes Keras wait for "
        "the device at every step on JAX and PyTorch",
        "nothing",
        _sync,
    ),
    Subject(
        "idle",
        "stepsave, no save due",
        "`stepsave.BackupAndRestore` with a `save_freq` that is never reached",
        "nothing",
        _idle,
    ),
    Subject(
        "copy",
        "copy only",
        "the snapshot of `stepsave.BackupAndRestore`, into the same host memory, with its "
        "checksums, and nothing of the rest of a save: no write, no commit, no background",
        "nothing",
        _copy,
        is_floor=True,
    ),
    Subject(
        "copy_write",
        "copy and raw write",
        "the same snapshot; then one thread writes it with `O_DIRECT` over one file and syncs "
        "that: no directories, no seal, no commit",
        "data",
        _copy_write,
        is_floor=True,
    ),
    Subject(
        "bare",
        "callback without hooks",
        "`keras.callbacks.Callback()`: what Keras does for any callback in the list",
        "nothing",
        _bare,
    ),
    Subject(
        "stepsave",
        "stepsave",
        "`stepsave.BackupAndRestore(dir, save_freq=k)`; two backups on disk, taking turns",
        "everything",
        _stepsave,
        _load_stepsave,
    ),
    Subject(
        "keras",
        "Keras `BackupAndRestore`",
        "`keras.callbacks.BackupAndRestore(dir, save_freq=k)`: HDF5, synchronous",
        "nothing",
        _keras,
        _load_keras,
    ),
    Subject(
        "orbax_keras",
        "Keras `OrbaxCheckpoint`",
        "`keras.callbacks.OrbaxCheckpoint(dir, save_freq=k, max_to_keep=1)`: asynchronous, "
        "OCDBT, zstd; as it comes",
        "data",
        _orbax_keras,
        _load_orbax_keras,
    ),
    Subject(
        "orbax_keras_tuned",
        "Keras `OrbaxCheckpoint`, tuned",
        "the same, saving in an Orbax context with `array.saving.use_compression = False`",
        "data",
        _orbax_keras_tuned,
        _load_orbax_keras,
    ),
    Subject(
        "orbax_async",
        "Orbax by hand",
        "`ocp.CheckpointManager(max_to_keep=1)`, asynchronous, `StandardSave`, otherwise "
        "defaults; called as a batch begins, with the live arrays on JAX and NumPy views "
        "elsewhere, which Orbax copies",
        "data",
        _orbax_async,
        _load_orbax_async,
    ),
    Subject(
        "dcp",
        "PyTorch DCP",
        "`torch.distributed.checkpoint.async_save(no_dist=True)` with one `DefaultStager` kept "
        "for the whole fit: buffers reused, asynchronous staging, fence before the optimizer's "
        "update; pinned memory and non-blocking copies with an accelerator, which pinning "
        "needs; keeps one checkpoint",
        "data",
        _dcp,
        _load_dcp,
        ("torch",),
    ),
    Subject(
        "model_checkpoint",
        "Keras `ModelCheckpoint`",
        "`keras.callbacks.ModelCheckpoint(save_weights_only=True, save_freq=k)`: one HDF5 "
        "file, overwritten",
        "nothing",
        _model_checkpoint,
        _load_model_checkpoint,
    ),
)
SUBJECTS = {subject.key: subject for subject in _LISTED}
