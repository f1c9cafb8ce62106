"""The engine for any training loop: save, wait, restore, close."""

from __future__ import annotations

import collections
import json
import logging
import math
import operator
import os
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from stepsave.arena import ArenaPool
from stepsave.commit import COMMIT, Blueprint, CommitProtocol
from stepsave.errors import (
    BackupDirectoryError,
    CheckpointerClosedError,
    CorruptBackupError,
    DirectoryBusyError,
    InvalidStateError,
    StepsaveError,
)
from stepsave.layout import compile_layout
from stepsave.reader import read_backup
from stepsave.snapshot import HostArray, dtype_name, view_on_host
from stepsave.spec import FORMAT_VERSION, Backup, BackupRecord, LeafSpec, SaveStats
from stepsave.store.local import LocalStore
from stepsave.store.lock import DirectoryLock
from stepsave.tree import flatten
from stepsave.writer import BackgroundWriter, SaveHandle

__all__ = ("Checkpointer", "WhenBusy", "WriterKind")

_logger = logging.getLogger("stepsave")

WhenBusy = Literal["wait", "skip"]
WriterKind = Literal["auto", "direct", "tensorstore"]

_STATS_WINDOW = 1000  # saves over which medians are taken; bounds the memory they need


class Checkpointer:
    """Saves the state of a training in the background and restores the last durable one.

    A directory belongs to one checkpointer at a time. Methods are called from one thread.

    Example:
        ```python
        with stepsave.Checkpointer("backup") as saver:
            backup = saver.restore()
            step = backup.step if backup else 0
            ...
            saver.save(step, {"weights": weights}, {"epoch": epoch})
        ```
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        double_checkpoint: bool = False,
        when_busy: WhenBusy = "wait",
        writer: WriterKind = "auto",
    ) -> None:
        """Opens a directory, making it if needed, and locks it against other processes.

        Args:
            directory: Where the backup lives. Its own: nothing else may be in it.
            double_checkpoint: Whether to keep the backup before the newest valid too, to
                fall back to if the newest cannot be read. Takes its size on disk once more.
            when_busy: What `save` does while both host buffers are still in use: `"wait"`
                for one, or `"skip"` this save and count it.
            writer: `"direct"` bypasses the page cache; `"tensorstore"` works on every file
                system; `"auto"` takes the first where the file system supports it.

        Raises:
            ValueError: If an argument is invalid.
            BackupDirectoryError: If the directory cannot be used, or holds something else.
            DirectoryBusyError: If it is in use.
        """
        self._lock: DirectoryLock | None = None  # for __del__, should anything below raise
        _check_choice("when_busy", when_busy, ("wait", "skip"))
        _check_choice("writer", writer, ("auto", "direct", "tensorstore"))
        self._when_busy = when_busy
        store = LocalStore(_check_directory(directory))
        store.create()
        lock = DirectoryLock(store.root)
        try:
            self._protocol = CommitProtocol(store, double_checkpoint=double_checkpoint)
            direct = _choose_direct(store, writer)
            self._writer = BackgroundWriter(store, self._protocol, direct=direct)
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        self._store = store
        self._writer_name = "direct" if direct else "tensorstore"
        self._pool: ArenaPool | None = None
        self._blueprint: Blueprint | None = None
        self._paths: Sequence[tuple[str, ...]] = ()
        self._items: Mapping[str, Mapping[str, str]] = {}
        self._last_step = self._protocol.committed.step if self._protocol.committed else -1
        self._pending: collections.deque[SaveHandle] = collections.deque()
        self._counts: collections.Counter[str] = collections.Counter()
        self._stalls_s: collections.deque[float] = collections.deque(maxlen=_STATS_WINDOW)
        self._durables_s: collections.deque[float] = collections.deque(maxlen=_STATS_WINDOW)
        self._stall_total_s = self._stall_max_s = 0.0

    @property
    def directory(self) -> str:
        """The backup directory, absolute."""
        return str(self._store.root)

    @property
    def committed(self) -> BackupRecord | None:
        """The newest valid backup; waits for saves in flight."""
        self.drain()
        return self._protocol.committed

    @property
    def previous(self) -> BackupRecord | None:
        """The backup before it, if `double_checkpoint` keeps one; waits likewise."""
        self.drain()
        return self._protocol.previous

    @property
    def closed(self) -> bool:
        return self._lock is None

    def attach(self, items: Mapping[str, Mapping[str, str]]) -> None:
        """Sets constant texts to store with every backup from now on.

        Args:
            items: Orbax checkpointables beside the state, each a dict of strings. Keras's
                `load_model` looks for `{"model_config": {"config": …}}`.
        """
        if items != self._items:
            self._items = items
            self._blueprint = None

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Does ahead what the first save would have to do: layout, buffers, their pages.

        Args:
            state: A state like those that will be saved; its values do not matter.

        Raises:
            InvalidStateError: If it cannot be saved.
            ArenaMemoryError: If there is no memory for a host copy of it.
        """
        self._check_usable()
        paths, leaves = flatten(state)
        self.prepare_leaves(paths, leaves)

    def prepare_leaves(self, paths: Sequence[tuple[str, ...]], leaves: Sequence[Any]) -> None:
        """`prepare`, for a state that is flat already."""
        self._fit_layout(paths, view_on_host(paths, leaves))
        assert self._pool is not None
        self._pool.wait_touched()

    def save(
        self, step: int, state: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> SaveHandle:
        """Copies the state and returns; background threads make it durable.

        Args:
            step: Number of the step, greater than that of any save before.
            state: Nested dict of NumPy, JAX, torch or TensorFlow arrays, or numbers. On
                return it may be changed or donated.
            metadata: Anything that JSON can hold; comes back with the backup.

        Returns:
            A handle that tells how the save goes on.

        Raises:
            ValueError: If the step is not greater than those saved before.
            InvalidStateError: If the state or the metadata cannot be saved.
            SaveFailedError: If an *earlier* save failed and nobody was told yet. This save
                is then not begun; call again to go on.
            CheckpointerClosedError: After `close`.
        """
        began_s = time.perf_counter()
        self._check_usable()
        paths, leaves = flatten(state)
        return self.save_leaves(step, paths, leaves, metadata, began_s=began_s)

    def save_leaves(
        self,
        step: int,
        paths: Sequence[tuple[str, ...]],
        leaves: Sequence[Any],
        metadata: Mapping[str, Any] | None = None,
        *,
        began_s: float | None = None,
    ) -> SaveHandle:
        """`save`, for a state that is flat already.

        Args:
            step: As in `save`.
            paths: Where each leaf belongs. Passing the same object again saves the
                comparison.
            leaves: The arrays.
            metadata: As in `save`.
            began_s: When the caller began, by `time.perf_counter`.
        """
        began_s = time.perf_counter() if began_s is None else began_s
        self._check_usable()
        self.raise_failed()
        step = self._check_step(step)
        training = _encode_training(step, metadata)
        arena = None
        if self._pool is not None:
            arena = self._pool.acquire(block=self._when_busy == "wait")
            if arena is None:
                self._counts["skipped"] += 1
                return SaveHandle(step, 0, skipped=True)
        try:
            arrays = view_on_host(paths, leaves)
            if not self._layout_fits(paths, arrays):
                if arena is not None and self._pool is not None:
                    self._pool.release(arena)
                    arena = None
                self._fit_layout(paths, arrays)
            assert self._pool is not None
            assert self._blueprint is not None
            arena = arena or self._pool.acquire(block=True)
            assert arena is not None
            self._pool.fill(arena, self._blueprint.plan, arrays)
        except BaseException:
            if arena is not None and self._pool is not None:
                self._pool.release(arena)
            raise
        handle = SaveHandle(step, self._blueprint.plan.state_bytes)
        self._writer.start(
            self._blueprint, arena, handle, training, began_s, release=self._pool.release
        )
        self._last_step = step
        self._pending.append(handle)
        handle.stall_s = time.perf_counter() - began_s
        self._count_start(handle)
        return handle

    def restore(self) -> Backup | None:
        """Reads the newest valid backup, verified; waits for saves in flight first.

        If it cannot be read and the one before it is kept, that is returned, with a
        warning that names what is lost.

        Returns:
            The backup, or None if there is none.

        Raises:
            CorruptBackupError: If there is one, but it cannot be read.
        """
        self._check_usable()
        self.drain()
        protocol = self._protocol
        protocol.read_markers()
        newest, error = self._try_read(protocol.committed, protocol.problems.get(COMMIT))
        if newest is None and (error is not None or protocol.previous is not None):
            newest = self._read_previous(error)
        if newest is not None:
            self._last_step = newest.step
        return newest

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when every save so far is durable.

        Raises:
            SaveFailedError: If one failed and nobody was told yet.
            TimeoutError: If they have not ended within `timeout_s` seconds altogether.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        for handle in list(self._pending):
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            if not handle.done:
                _wait_ended(handle, left_s)
        self.raise_failed()

    def drain(self) -> None:
        """Returns when no save is in flight; failures stay pending."""
        for handle in list(self._pending):
            _wait_ended(handle, None)

    @property
    def in_flight(self) -> int:
        """Number of saves that have not ended."""
        return sum(not handle.done for handle in self._pending)

    def stats(self) -> SaveStats:
        """Sums up what saving has cost so far; medians are over the last 1000 saves."""
        self._settle()
        counts = self._counts
        return SaveStats(
            started=counts["started"],
            committed=counts["committed"],
            failed=counts["failed"],
            skipped=counts["skipped"],
            state_bytes=counts["bytes"],
            stall_total_s=self._stall_total_s,
            stall_median_s=statistics.median(self._stalls_s) if self._stalls_s else math.nan,
            stall_max_s=self._stall_max_s,
            durable_median_s=(
                statistics.median(self._durables_s) if self._durables_s else math.nan
            ),
            arena_count=self._pool.count if self._pool else 0,
            arena_bytes=self._pool.capacity_bytes if self._pool else 0,
            writer=self._writer_name,
        )

    def close(self, *, delete_backup: bool = False) -> None:
        """Waits for saves in flight and lets go of the directory. May be called twice.

        Args:
            delete_backup: Whether to remove the backup, and the directory if nothing else
                is in it. If a save failed, everything is kept.

        Raises:
            SaveFailedError: If a save failed and nobody was told yet.
        """
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        if not lock.is_held:  # in a forked child: the parent's to end
            return
        try:
            self._writer.close()
            if self._pool is not None:
                self._pool.close()
            delete_backup = delete_backup and not self._has_failed()
            if delete_backup:
                self._protocol.delete_all()
        finally:
            lock.release(remove=delete_backup)
            self._pool = None
        if delete_backup:
            self._store.remove_empty_directory("")
        self.raise_failed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except StepsaveError as e:
            if error is None:
                raise
            error.add_note(f"stepsave: {e}")  # never hide the error that ends the loop

    def __del__(self) -> None:
        if self._lock is not None and self._lock.is_held:
            warnings.warn(
                f"stepsave: the checkpointer of {self._store.root} was not closed. Use it in "
                "a `with` statement or call `close()`.",
                ResourceWarning,
                stacklevel=1,
                source=self,
            )
            self._lock.release()

    def _check_usable(self) -> None:
        if self._lock is None:
            raise CheckpointerClosedError(
                f"The checkpointer of {self._store.root} is closed. Make a new one."
            )
        if not self._lock.is_held:
            raise DirectoryBusyError(
                f"{self._store.root}: this checkpointer belongs to the parent of this forked "
                "process. Use it there, or make one with another directory."
            )

    def _check_step(self, step: int) -> int:
        step = operator.index(step)
        if step < 0 or step <= self._last_step:
            raise ValueError(
                f"Invalid value for argument `step`. Received: step={step}. Expected one "
                f"greater than {self._last_step}, the step of the newest backup in "
                f"{self._store.root}. Go on from `restore()`, or use another directory."
            )
        return step

    def _layout_fits(self, paths: Sequence[tuple[str, ...]], arrays: list[HostArray]) -> bool:
        if self._blueprint is None:
            return False
        if paths is not self._paths and list(paths) != list(self._paths):
            return False
        return all(
            array.shape == leaf.shape and array.dtype == dtype
            for array, leaf, dtype in zip(
                arrays, self._blueprint.plan.leaves, self._dtypes, strict=True
            )
        )

    def _fit_layout(self, paths: Sequence[tuple[str, ...]], arrays: list[HostArray]) -> None:
        """Compiles the layout of these arrays, and makes arenas for it if need be."""
        if self._layout_fits(paths, arrays):
            return
        specs = [
            LeafSpec(path, array.shape, dtype_name(path, array))
            for path, array in zip(paths, arrays, strict=True)
        ]
        plan = compile_layout(specs)
        if self._blueprint is not None:
            _logger.debug(
                "%s: the structure of the state changed; layout compiled anew (%d arrays, "
                "%d shards)",
                self._store.root,
                len(specs),
                plan.shard_count,
            )
        if self._pool is None or self._pool.capacity_bytes < plan.arena_bytes:
            if self._pool is not None:
                self.drain()
                self._pool.close()
                self._pool = None  # before the new ones are made: room for both is not needed
            self._pool = ArenaPool(plan)
        self._blueprint = Blueprint.compile(plan, self._items)
        self._paths = paths
        self._dtypes = [array.dtype for array in arrays]

    def _try_read(
        self, record: BackupRecord | None, problem: Exception | None
    ) -> tuple[Backup | None, Exception | None]:
        if record is None:
            return None, problem
        try:
            return read_backup(self._store, record), None
        except Exception as e:  # noqa: BLE001  whatever it is, a second backup may be whole
            return None, e

    def _read_previous(self, error: Exception | None) -> Backup:
        protocol = self._protocol
        lost = protocol.committed
        backup, second_error = self._try_read(protocol.previous, None)
        if backup is None:
            if second_error is not None and error is not None:
                error.add_note(f"The backup before it cannot be read either: {second_error}")
            raise _as_corrupt(self._store.root, error or second_error) from error
        newest = "the newest backup" if lost is None else f"the backup of step {lost.step}"
        passed = "" if lost is None else f" {lost.step - backup.step} steps of training are lost."
        warnings.warn(
            f"stepsave: {newest} in {self._store.root} cannot be read "
            f"({error or 'its marker COMMIT is missing'}). Restored the one before it, of step "
            f"{backup.step}.{passed}",
            stacklevel=3,
        )
        protocol.fall_back()
        return backup

    def _count_start(self, handle: SaveHandle) -> None:
        self._counts["started"] += 1
        self._counts["bytes"] += handle.bytes
        self._stalls_s.append(handle.stall_s)
        self._stall_total_s += handle.stall_s
        self._stall_max_s = max(self._stall_max_s, handle.stall_s)

    def _settle(self) -> None:
        """Counts the saves that have ended; keeps those whose failure was not reported."""
        for handle in [handle for handle in self._pending if handle.done]:
            if handle.durable_s is not None:
                self._counts["committed"] += 1
                self._durables_s.append(handle.durable_s)
                self._pending.remove(handle)
            elif not handle.counted:
                handle.counted = True
                self._counts["failed"] += 1

    def _has_failed(self) -> bool:
        self._settle()
        return any(handle.done for handle in self._pending)

    def raise_failed(self) -> None:
        """Raises `SaveFailedError` if a save failed and nobody was told yet."""
        if not self._pending:
            return
        self._settle()
        for handle in [handle for handle in self._pending if handle.done]:
            self._pending.remove(handle)
            error = handle.take_error()
            if error is not None:
                raise handle.failure() from error


def _wait_ended(handle: SaveHandle, timeout_s: float | None) -> None:
    if not handle.wait_ended(timeout_s):
        raise TimeoutError(f"The save of step {handle.step} has not ended in time.")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(
            f"Invalid value for argument `{name}`. Received: {name}={value!r}. Expected {expected}."
        )


def _check_directory(directory: str | os.PathLike[str]) -> str:
    if not directory:
        raise ValueError("Empty `directory` argument passed")
    path = os.fspath(directory)
    if "://" in path:
        raise BackupDirectoryError(
            f"{path}: expected a directory of a local file system; remote stores are not "
            "supported yet."
        )
    return path


def _choose_direct(store: LocalStore, writer: WriterKind) -> bool:
    if writer == "tensorstore":
        return False
    works = store.can_write_direct()
    if writer == "direct" and not works:
        raise BackupDirectoryError(
            f"{store.root}: its file system does not take direct writes (O_DIRECT). Use "
            "writer='auto' or 'tensorstore'."
        )
    return works


def _encode_training(step: int, metadata: Mapping[str, Any] | None) -> bytes:
    document = {"format": FORMAT_VERSION, "step": step, "metadata": dict(metadata or {})}
    try:
        return json.dumps(document, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidStateError(
            f"Invalid value for argument `metadata`. Expected what JSON can hold (strings, "
            f"finite numbers, booleans, None, lists, dicts), found: {e}."
        ) from e


def _as_corrupt(root: os.PathLike[str], error: Exception | None) -> Exception:
    if isinstance(error, StepsaveError):
        return error
    return CorruptBackupError(
        f"{root}: the backup cannot be read: {error!r}. Nothing was deleted. Mend the cause and "
        "try again, or move the directory away to start afresh."
    )
