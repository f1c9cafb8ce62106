"""What is compared by resources: stepsave, Orbax by hand, and the least that a save must do.

Imports each library only when its saver is made.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

State = Mapping[str, Any]
PIECE_BYTES = 8 << 20


class Saver(Protocol):
    """One system, saving into one directory."""

    def prepare(self, state: State) -> None: ...
    def save(self, step: int, state: State) -> None: ...
    def wait(self) -> None: ...
    def restore(self) -> State: ...
    def facts(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class Stepsave:
    """`stepsave.Checkpointer` as it comes."""

    def __init__(self, directory: Path) -> None:
        import stepsave

        self._saver = stepsave.Checkpointer(directory)

    def prepare(self, state: State) -> None:
        self._saver.prepare(state)

    def save(self, step: int, state: State) -> None:
        self._saver.save(step, state)

    def wait(self) -> None:
        self._saver.wait()

    def restore(self) -> State:
        backup = self._saver.restore()
        assert backup is not None
        return backup.state

    def facts(self) -> dict[str, Any]:
        stats, record = self._saver.stats(), self._saver.committed
        assert stats.failed == stats.skipped == 0
        shards = 0
        if record is not None:
            shards = len(os.listdir(Path(self._saver.directory, record.directory, "pytree/d/c")))
        return {
            "arena_bytes": stats.arena_bytes,
            "arena_count": stats.arena_count,
            "shards": shards,
            "writer": stats.writer,
        }

    def close(self) -> None:
        self._saver.close()


class Orbax:
    """`ocp.CheckpointManager` over an `AsyncCheckpointer`, one checkpoint kept."""

    def __init__(self, directory: Path, *, compress: bool) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=True),
            item_handlers=ocp.PyTreeCheckpointHandler(use_compression=compress),
        )

    def prepare(self, state: State) -> None:
        """Orbax has nothing to do ahead."""

    def save(self, step: int, state: State) -> None:
        args = self._ocp.args.PyTreeSave(dict(state))
        if not self._manager.save(step, args=args):
            raise RuntimeError(f"Orbax did not begin the save of step {step}.")

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def restore(self) -> State:
        restored: State = self._manager.restore(
            self._manager.latest_step(), args=self._ocp.args.PyTreeRestore()
        )
        return restored

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._manager.close()


class Floor:
    """One copy, one checksum, one `O_DIRECT` write over one file and its sync, in sequence.

    What a save cannot do without; no names, no commit, no threads.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "floor"

    def prepare(self, state: State) -> None:
        from bench.floors import PAGE_BYTES, private_memory

        size_bytes = sum(array.nbytes for array in state.values())
        self._memory = private_memory(-(-size_bytes // PAGE_BYTES) * PAGE_BYTES)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._bytes[:] = 0
        self._templates = {name: (array.dtype, array.shape) for name, array in state.items()}

    def save(self, step: int, state: State) -> None:
        from awscrt.checksums import crc32c

        del step  # one file, whatever the step
        begin = 0
        for array in state.values():
            end = begin + array.nbytes
            np.copyto(self._bytes[begin:end].view(array.dtype).reshape(array.shape), array)
            begin = end
        view = memoryview(self._memory)
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            for start in range(0, len(view), PIECE_BYTES):
                crc32c(view[start : start + PIECE_BYTES])
                done, end = start, min(start + PIECE_BYTES, len(view))
                while done < end:
                    done += os.pwrite(fd, view[done:end], done)
            os.fsync(fd)
        finally:
            os.close(fd)

    def wait(self) -> None:
        """`save` has waited."""

    def restore(self) -> State:
        data, begin, state = np.fromfile(self._path, np.uint8), 0, {}
        for name, (dtype, shape) in self._templates.items():
            end = begin + int(np.prod(shape)) * dtype.itemsize
            state[name] = data[begin:end].view(dtype).reshape(shape)
            begin = end
        return state

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing is kept open."""


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A system, the framework whose arrays it saves, and how it is set up."""

    framework: str
    make: Callable[[Path], Saver]
    settings: str


_DEFAULT = "`CheckpointManager(max_to_keep=1)`, asynchronous, `PyTreeSave`; OCDBT, zstd"
_RAW = f"{_DEFAULT.removesuffix(', zstd')}, `PyTreeCheckpointHandler(use_compression=False)`"


def _orbax(directory: Path) -> Saver:
    return Orbax(directory, compress=True)


def _orbax_raw(directory: Path) -> Saver:
    return Orbax(directory, compress=False)


SUBJECTS = {
    "floor numpy": Subject("numpy", Floor, "copy, CRC-32C, `O_DIRECT` write, `fsync`; no threads"),
    "stepsave numpy": Subject("numpy", Stepsave, "`Checkpointer(dir)`"),
    "stepsave jax": Subject("jax", Stepsave, "`Checkpointer(dir)`"),
    "stepsave torch": Subject("torch", Stepsave, "`Checkpointer(dir)`"),
    "orbax numpy": Subject("numpy", _orbax, _DEFAULT),
    "orbax jax": Subject("jax", _orbax, _DEFAULT),
    "orbax uncompressed numpy": Subject("numpy", _orbax_raw, _RAW),
    "orbax uncompressed jax": Subject("jax", _orbax_raw, _RAW),
}
PEERS = tuple(name for name in SUBJECTS if name.startswith("orbax"))
