"""From a backup to a file of another format."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from stepsave.cli import array_files, jobs, keras_files
from stepsave.cli.jobs import Job
from stepsave.engine.choosing import read_chosen
from stepsave.engine.extents import Needs
from stepsave.engine.reader import StoredBackup, read_backup, read_files
from stepsave.errors import BackupDirectoryError, CorruptBackupError, StepsaveError
from stepsave.format.records import BackupRecord, LeafSpec
from stepsave.format.tree import FlatState
from stepsave.snapshot.arrays import ArrayForm, dtype_name
from stepsave.store.places import Store
from stepsave.store.whole_file import new_file
from stepsave.threads import Crew

__all__ = ("FORMATS", "Export", "Exported")

_OF_KERAS = (".weights.h5", ".keras")
FORMATS = (*_OF_KERAS, ".safetensors", ".npz")

_MODEL = ("trainable_variables", "non_trainable_variables")
_BELOW = ("metrics_variables", "stepsave", "saveables")
_CONFIG_PATH = "model_config/_strings.json"

Keys = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        step: Of the backup.
        arrays: How many arrays, or variables of a model.
        of_arrays: How many arrays the backup has.
        size_bytes: Of the file.
        backend: What Keras ran on; None if it was not needed.
    """

    step: int
    arrays: int
    of_arrays: int
    size_bytes: int
    backend: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Export:
    """An order to write one.

    Attributes:
        store: Where the backup is.
        step: Of which step; None for the newest.
        out: The file.
        suffix: One of `FORMATS`.
        everything: Whether all is wanted, not just the model's variables.
        imports: Modules that register custom objects with Keras.
    """

    store: Store
    step: int | None
    out: Path
    suffix: str
    everything: bool
    imports: Sequence[str]

    def write(self, *, overwrite: bool) -> Exported:
        """Writes the file: whole, or not at all.

        Raises:
            CorruptBackupError: If the backup is damaged.
            BackupMismatchError, InvalidStateError: If the format cannot hold it.
            OSError: If it cannot be written, or is there already and not to be replaced.
        """
        with new_file(self.out, self.suffix, overwrite=overwrite) as path:
            done = jobs.do(lambda job, crew: self._write(job, crew, path), self.store.lanes)
            return dataclasses.replace(done, size_bytes=os.path.getsize(path))

    def _write(self, job: Job, crew: Crew, path: str) -> Exported:
        if self.suffix in _OF_KERAS:
            return self._write_keras(job, crew, path)
        backup, of_arrays, _ = self._read(job, crew, _is_of_model)
        flat = backup.flat
        leaves = [
            LeafSpec(keys, tuple(leaf.shape), dtype_name(keys, ArrayForm(leaf.shape, leaf.dtype)))
            for keys, leaf in zip(flat.paths, flat.leaves, strict=True)
        ]
        job.begin("writing", sum(leaf.size_bytes for leaf in leaves))
        write = array_files.write_npz if self.suffix == ".npz" else array_files.write_safetensors
        with self._naming_file():
            write(path, leaves, flat.leaves, {"step": str(backup.step)}, job.note)
        return Exported(backup.step, len(leaves), of_arrays, 0)

    def _write_keras(self, job: Job, crew: Crew, path: str) -> Exported:
        backup, of_arrays, config = self._read(job, crew, _is_not_of_optimizer)
        backend = keras_files.choose_backend(backup.metadata.get("backend"))
        job.begin(f"rebuilding the model with Keras on {backend}", None)
        model = keras_files.rebuild(backup, config, self.imports, whole=self.everything)
        job.begin("writing", None)
        with self._naming_file():
            count = keras_files.write_keras(path, model)
        job.check()
        return Exported(backup.step, count, of_arrays, 0, backend)

    def _read(
        self, job: Job, crew: Crew, is_wanted: Callable[[Keys], bool]
    ) -> tuple[StoredBackup, int, str | None]:
        """Reads what is wanted, verified; says of how many arrays, and the config of the model."""

        def read(record: BackupRecord, _: int) -> tuple[StoredBackup, int, str | None]:
            configs = tuple(file for file in record.files if file.path == _CONFIG_PATH)
            files = read_files(self.store, record, crew, configs)
            wanted: set[Keys] = set()

            def need(leaves: Sequence[LeafSpec]) -> dict[Keys, Sequence[Sequence[slice]]]:
                paths = [leaf.path for leaf in leaves]
                wanted.update(filter(is_wanted, paths))
                if self.everything or not any(keys[0] in _MODEL for keys in paths):
                    wanted.update(paths)  # of a loop of somebody's own nobody knows what is what
                return {keys: () for keys in paths if keys not in wanted}

            job.begin("reading and verifying", None)
            backup = read_backup(self.store, record, crew, Needs(need, job.reach))
            of_arrays = len(backup.flat.paths)
            path = str(self.store.path(f"{record.directory}/{_CONFIG_PATH}"))
            return _cut(backup, wanted), of_arrays, _decode_config(files, path)

        return read_chosen(self.store, self.step, read)

    @contextlib.contextmanager
    def _naming_file(self) -> Generator[None]:
        try:
            yield
        except StepsaveError:
            raise
        except OSError as e:
            raise BackupDirectoryError(
                f"{self.out}: cannot write the file: {e.strerror or e}. Free space there, or "
                "choose another place. Nothing of it was left."
            ) from e


def _is_of_model(keys: Keys) -> bool:
    return keys[0] in _MODEL or keys[: len(_BELOW)] == _BELOW


def _is_not_of_optimizer(keys: Keys) -> bool:
    return keys[0] != "optimizer_variables"


def _cut(backup: StoredBackup, wanted: set[Keys]) -> StoredBackup:
    flat = backup.flat
    kept = [
        (keys, leaf) for keys, leaf in zip(flat.paths, flat.leaves, strict=True) if keys in wanted
    ]
    notes = flat.notes if len(kept) == len(flat.paths) else []
    paths, leaves = [keys for keys, _ in kept], [leaf for _, leaf in kept]
    return dataclasses.replace(backup, flat=FlatState(paths, leaves, notes))


def _decode_config(files: dict[str, bytes], source: str) -> str | None:
    if _CONFIG_PATH not in files:
        return None
    try:
        config = json.loads(files[_CONFIG_PATH])["config"]
    except (ValueError, KeyError, TypeError) as e:
        raise CorruptBackupError(f"{source}: expected the config of a model: {e!r}.") from e
    return str(config)
