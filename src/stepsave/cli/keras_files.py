"""Files of Keras, written by Keras: the model is rebuilt by its config, and given its values.

The one place of the command line that imports Keras.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from stepsave.engine.reader import StoredBackup
from stepsave.errors import BackupMismatchError
from stepsave.format.tree import FlatState

__all__ = ("choose_backend", "rebuild", "write_keras")

_BACKENDS = ("jax", "torch", "tensorflow")
_BY_HAND = (
    "In Python: make the model as the training does, then `model.load_weights(directory)` and "
    "`model.save_weights(file)`. Or export to .safetensors or .npz, which need no model."
)


def choose_backend(saved: str | None) -> str:
    """Has Keras use a backend that there is, on the CPU; returns which.

    That of KERAS_BACKEND; else the one that the backup was made with, or another one.

    Raises:
        BackupMismatchError: If there is none.
    """
    there = [name for name in (saved, *_BACKENDS) if name and importlib.util.find_spec(name)]
    chosen = os.environ.get("KERAS_BACKEND") or next(iter(there), None)
    if chosen is None:
        raise BackupMismatchError(
            "Keras needs a backend to rebuild the model, and none is installed. Install one, such "
            f"as stepsave[{saved or 'jax'}], or export to .safetensors or .npz, which need none."
        )
    os.environ["KERAS_BACKEND"] = chosen
    # Accelerators are for the training, which may be going on: JAX alone would take most of the
    # memory of a GPU.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return chosen


def rebuild(
    backup: StoredBackup, config: str | None, imports: Sequence[str], *, whole: bool
) -> Any:
    """Makes the model of a backup by its config, and gives it its values.

    Args:
        backup: The backup.
        config: JSON that Keras made of the model; None if there is none.
        imports: Modules to import before, which register objects that are not Keras's own.
        whole: Whether it is compiled, with the state of optimizer and metrics.

    Raises:
        BackupMismatchError: If it cannot be made, or does not take the values.
    """
    if config is None:
        raise BackupMismatchError(
            "the backup has no config by which Keras could rebuild its model: that could not be "
            f"made into JSON, has vocabularies, or nests Sequential models. {_BY_HAND}"
        )
    sys.path.insert(0, os.getcwd())  # as for a script there
    for name in imports:
        _import(name)
    import keras

    from stepsave.fit.keras_saving import no_import_of_tensorflow
    from stepsave.fit.state import restore_fit
    from stepsave.fit.variables import prepare_model

    document = json.loads(config)
    if not whole:
        document.pop("compile_config", None)
    try:
        with no_import_of_tensorflow():
            model = keras.models.model_from_json(json.dumps(document))
    except Exception as e:
        raise BackupMismatchError(
            f"Keras cannot rebuild the model: {type(e).__name__}: {_first_line(e)} If it has "
            "layers or functions of your own, name the module that registers them with "
            f"`keras.saving.register_keras_serializable`: --import MODULE. {_BY_HAND}"
        ) from e
    prepare_model(model, backup.metadata.get("build_config"))
    restore_fit(model, backup if whole else _without_training(backup, model))
    return model


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as e:
        raise ValueError(
            f"--import {name}: expected a module in {os.getcwd()} or one that is "
            f"installed, found: {e}."
        ) from e


def write_keras(path: str, model: Any) -> int:
    """Writes what the name of a file says, all or weights alone; returns how many variables.

    Raises:
        OSError: If it cannot be written.
    """
    from stepsave.fit.keras_saving import no_import_of_tensorflow

    try:
        with no_import_of_tensorflow():
            if path.endswith(".keras"):
                model.save(path)
            else:
                model.save_weights(path)
    except RuntimeError as e:  # of h5py, for what the system refuses it when it closes a file
        number = re.search(r"\berrno = (\d+)", str(e))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), path) from e
    optimizer = getattr(model, "optimizer", None)  # none before `compile`
    return len(model.variables) + (0 if optimizer is None else len(optimizer.variables))


def _without_training(backup: StoredBackup, model: Any) -> StoredBackup:
    """The backup without what a model that is not compiled does not have."""
    from stepsave.fit.saveables import SAVEABLES
    from stepsave.fit.variables import ModelVariables

    below = set(ModelVariables(model).below.paths)
    flat = backup.flat
    kept = [
        (path, leaf)
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        if path in below
        or (path[0] != "optimizer_variables" and path[: len(SAVEABLES)] != SAVEABLES)
    ]
    paths, leaves = [path for path, _ in kept], [leaf for _, leaf in kept]
    return dataclasses.replace(backup, flat=FlatState(paths, leaves, []))


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"
