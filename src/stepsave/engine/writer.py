"""From a filled arena to a committed backup, on background threads.

A save is cut into *lanes*, all handed to the executor at once: each takes shards until none
is left, and the lane that ends last seals, publishes and retires. Nothing is submitted from
a background thread, because at interpreter exit the executor still finishes what it has
accepted but accepts nothing more; so a save in flight ends well even then.

    queued ─ begin ─ shards … shards ─ seal ─ publish ─ retired
                └──────────┴───────┴─ abandoned, on any error before the commit point
"""

from __future__ import annotations

import collections
import concurrent.futures
import threading
import time
from collections.abc import Callable

from stepsave.engine.commit import CommitProtocol
from stepsave.engine.saves import SaveHandle
from stepsave.errors import BackupDirectoryError
from stepsave.format import orbax
from stepsave.format.records import LayoutPlan
from stepsave.snapshot.capture import Snapshot
from stepsave.store.local import LocalStore
from stepsave.store.shard_array import ShardArray

__all__ = ("DEFAULT_LANES", "BackgroundWriter")

DEFAULT_LANES = 3
"""They mostly sleep in the kernel: enough requests to keep a disk busy."""

ShardWriter = Callable[[int, Snapshot], None]
"""Writes shard `number` of a snapshot durably, as it is being filled, and seals it."""


class BackgroundWriter:
    """The threads of one checkpointer, and how they write."""

    def __init__(
        self, store: LocalStore, protocol: CommitProtocol, *, direct: bool, lanes: int
    ) -> None:
        self._lanes = lanes
        self._store = store
        self._protocol = protocol
        self._direct = direct
        self._executor = concurrent.futures.ThreadPoolExecutor(lanes, "stepsave-write")
        # All threads are started now: a limit on threads must show before training, and
        # not as a save that never runs.
        all_started = threading.Barrier(lanes)
        try:
            for future in [self._executor.submit(all_started.wait) for _ in range(lanes)]:
                future.result()
        except RuntimeError as e:
            all_started.abort()  # or the thread that did start would wait for ever
            self._executor.shutdown()
            raise BackupDirectoryError(
                f"{store.root}: cannot start {lanes} writer threads: {e}. Raise the limit on "
                "threads (ulimit -u)."
            ) from e
        self._last: _Job | None = None

    def start(
        self,
        snapshot: Snapshot,
        handle: SaveHandle,
        training: bytes,
        began_s: float,
    ) -> None:
        """Hands a snapshot over; returns at once.

        Args:
            snapshot: Released when its bytes are on disk, or given up.
            handle: Told when the save ends.
            training: Contents of `training.json`.
            began_s: When `save` was called, by `time.perf_counter`.
        """
        job = _Job(self, snapshot, handle, training, began_s, self._last)
        self._last = job
        for _ in range(self._lanes):
            try:
                self._executor.submit(job.run_lane)
            except RuntimeError as e:  # the interpreter is ending: no work is accepted
                job.end_lane(e)

    def close(self) -> None:
        """Waits for all saves in flight and ends the threads."""
        self._executor.shutdown()

    def open_shards(self, directory: str, plan: LayoutPlan) -> ShardWriter:
        """Returns the function that writes the shards of a plan into a directory."""
        if self._direct:

            def write_direct(number: int, snapshot: Snapshot) -> None:
                arena = snapshot.arena
                self._store.write_direct(
                    f"{directory}/{orbax.shard_path(number)}",
                    arena.shard(number).data,
                    snapshot.filling.ranges(number),
                )

            return write_direct
        shards = ShardArray(self._store, directory, plan)

        def write_whole(number: int, snapshot: Snapshot) -> None:
            collections.deque(snapshot.filling.final(number), maxlen=0)  # until all is there
            shards.write(number, snapshot.arena.shard(number))

        return write_whole

    @property
    def lanes(self) -> int:
        return self._lanes

    @property
    def store(self) -> LocalStore:
        return self._store

    @property
    def protocol(self) -> CommitProtocol:
        return self._protocol


class _Job:
    """One save in the background."""

    def __init__(
        self,
        writer: BackgroundWriter,
        snapshot: Snapshot,
        handle: SaveHandle,
        training: bytes,
        began_s: float,
        before: _Job | None,
    ) -> None:
        self._writer = writer
        self._snapshot = snapshot
        self._blueprint = snapshot.blueprint
        self._plan = snapshot.blueprint.plan
        self._handle = handle
        self._training = training
        self._began_s = began_s
        self._before = before
        self._guard = threading.Lock()
        self._lanes_left = writer.lanes
        self._shards = iter(range(self._plan.shard_count))
        self._digests = [0] * self._plan.shard_count
        self._write: ShardWriter | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()

    def run_lane(self) -> None:
        """Writes shards until none is left; the last lane to get here ends the save."""
        try:
            if self._before is not None:
                # One save writes at a time: there is one spare directory. The lanes waited
                # for were submitted earlier, so they run or have run: no deadlock.
                self._before.wait()
            write = self._begin()
            while self._error is None and (number := self._next_shard()) is not None:
                write(number, self._snapshot)
                self._digests[number] = self._snapshot.arena.digest(number)
        except BaseException as e:  # noqa: BLE001  kept, and raised to the user by the handle
            self.end_lane(e)
        else:
            self.end_lane(None)

    def end_lane(self, error: BaseException | None) -> None:
        """Takes note that a lane ended; the last one ends the save."""
        with self._guard:
            self._error = self._error or error
            self._lanes_left -= 1
            is_last = self._lanes_left == 0
        if is_last:
            self._end()

    def wait(self) -> None:
        self._ended.wait()

    def _begin(self) -> ShardWriter:
        with self._guard:
            if self._error is not None:
                raise self._error
            if self._write is None:
                try:
                    directory = self._writer.protocol.begin(self._blueprint)
                    self._write = self._writer.open_shards(directory, self._plan)
                except BaseException as e:
                    self._error = e  # while others wait: they must not begin again
                    raise
            return self._write

    def _next_shard(self) -> int | None:
        with self._guard:
            return next(self._shards, None)

    def _end(self) -> None:
        self._snapshot.release()  # its bytes are on disk, or given up
        durable_s = None
        protocol = self._writer.protocol
        try:
            if self._error is None:
                record = protocol.seal(
                    self._blueprint, self._handle.step, self._training, tuple(self._digests)
                )
                protocol.publish(record)
                durable_s = time.perf_counter() - self._began_s
        except BaseException as e:  # noqa: BLE001  as above
            self._error = e
        try:
            if self._error is not None:
                protocol.abandon()
        except BaseException as e:  # noqa: BLE001  as above
            assert self._error is not None
            self._error.add_note(f"Cleaning up after it failed too: {e!r}")
        finally:
            self._before = None  # or every save would keep all saves before it alive
            self._handle.end(durable_s, self._error)
            self._ended.set()
