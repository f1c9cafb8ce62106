"""From a filled arena to a committed backup, in the background.

One thread, the *keeper*, has the directory to itself: it opens it, writes one save after the
other, restores and closes, in the order in which it was asked. So nothing of this is ever
concurrent or interrupted. The shards of a save are written by the keeper and helpers together.

    accepted ─ begin ─ shards … ─ seal ─ publish ─ retired
                  └────────┴─────────┴─ abandoned, on any error before the commit point
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Literal

from stepsave.engine.agreement import Leading, Order, Report, SkippedError
from stepsave.engine.bucket_commit import BucketCommit
from stepsave.engine.commit import CommitProtocol
from stepsave.engine.saves import SaveHandle, SaveLog
from stepsave.engine.shard_writing import Shards
from stepsave.errors import BackupDirectoryError, PeerError, StepsaveError
from stepsave.format.checksum import crc32c
from stepsave.snapshot.arena import copy_thread_count
from stepsave.snapshot.capture import Snapshot
from stepsave.store.bucket import BucketStore
from stepsave.store.lock import READ_ONLY_ADVICE, ProcessHold
from stepsave.store.places import Store
from stepsave.threads import Crew

__all__ = (
    "SaveRequest",
    "Writer",
    "WriterKind",
    "carry_out",
    "choose_direct",
    "start_threads",
)

_logger = logging.getLogger("stepsave")

WriterKind = Literal["auto", "direct", "tensorstore"]


@dataclasses.dataclass(frozen=True, slots=True)
class SaveRequest:
    """A save as its caller hands it over.

    Attributes:
        snapshot: The state.
        handle: Told when the save ends.
        training: Contents of `training.json`.
    """

    snapshot: Snapshot
    handle: SaveHandle
    training: bytes


def carry_out(
    request: SaveRequest,
    log: SaveLog,
    save: Callable[[SaveRequest], None],
    pass_over: Callable[[int], None],
) -> None:
    """Carries a save out; says in its handle and in the log how it ended.

    Args:
        request: The save.
        log: Of the checkpointer.
        save: Makes it durable.
        pass_over: Called with the step if the save was dropped before.
    """
    handle = request.handle
    if not handle.claim.accept():
        pass_over(handle.step)  # the call that claimed it was interrupted
        return
    error = None
    try:
        save(request)
    except SkippedError:
        log.count_skipped(handle)
        handle.skip()
        return
    except BaseException as e:  # noqa: BLE001  kept, and raised to the user by the handle
        error = e
    took_s = log.count_end(handle, committed=error is None)
    handle.end(None if error else took_s, error)


class Writer:
    """Writes saves into a directory, one after the other. For the keeper's thread."""

    def __init__(
        self,
        store: Store,
        protocol: CommitProtocol | BucketCommit,
        log: SaveLog,
        helpers: Crew,
        *,
        direct: bool,
        lanes: int,
        hold: ProcessHold,
        leading: Leading | None = None,
    ) -> None:
        self._protocol = protocol
        self._hold = hold
        self._leading = leading
        self._log = log
        self._shards = Shards(store, helpers, direct=direct, lanes=lanes)

    def write(self, request: SaveRequest) -> None:
        """Makes a save durable, or says in its handle why it is not."""
        carry_out(request, self._log, self._save, self.pass_over)

    def pass_over(self, step: int) -> None:
        """Says to other processes that a save is skipped."""
        self._drop(step, SkippedError())

    def _save(self, request: SaveRequest) -> None:
        try:
            self._commit(request)
        except SkippedError as e:
            self._drop(request.handle.step, e)
            raise
        except BaseException as e:
            self._drop(request.handle.step, e)  # first, or others would wonder where it has gone
            self._abandon(e)
            raise

    def _commit(self, request: SaveRequest) -> None:
        snapshot, handle, training = request.snapshot, request.handle, request.training
        blueprint, share = snapshot.blueprint, snapshot.share
        try:
            self._hold.check()
            directory = self._protocol.begin(blueprint, handle.step)
            written = self._protocol.take_written(blueprint.plan, share.shards)
            if self._leading is not None:
                held = "" if written is None else written.nonce
                order = Order(handle.step, directory, held, crc32c(training))
                self._leading.begin(order)
            known = None if written is None else written.contents
            with handle.course.writing():
                digests, written_bytes = self._shards.write(directory, snapshot, known)
            held = snapshot.filling.held
            handle.changed_bytes, handle.written_bytes = held.changed_bytes(), written_bytes
        finally:
            snapshot.filling.wait_left()
            handle.claim.release()  # its bytes are on disk, or given up
        report = Report(blueprint.layout_crc32c, digests, ())
        if self._leading is not None:
            report = self._leading.gather(report, handle.bytes)
        self._hold.check()  # what follows takes the place of what is valid
        record = self._protocol.seal(
            blueprint, handle.step, training, report.digests, held.now, report.files
        )
        self._protocol.publish(record)
        if self._leading is not None:
            try:
                self._leading.end(record.nonce)
            except PeerError as e:  # it is committed all the same; the next save finds out
                _logger.warning("step %d is saved, but others do not know: %s", handle.step, e)

    def _drop(self, step: int, error: BaseException) -> None:
        """Says to other processes, if there are any, that a save is given up."""
        if self._leading is None:
            return
        try:
            self._leading.drop(step, error)
        except PeerError as e:
            error.add_note(f"The other processes could not be told: {e}")

    def _abandon(self, error: BaseException) -> None:
        try:
            self._hold.check()
        except StepsaveError:
            return  # what lies there may be another's by now
        try:
            self._protocol.abandon()
        except BaseException as e:  # noqa: BLE001  as above
            if str(e) != str(error):
                error.add_note(f"Cleaning up after it failed too: {e!r}")


def start_threads(directory: str, lanes: int) -> tuple[Crew, Crew]:
    """Returns the keeper, and helpers that are enough to write and to copy at once.

    All are started now: a limit on threads must show before training, and not as a save that
    never runs.
    """
    try:
        return Crew(1, "stepsave-keeper"), Crew(lanes - 1 + copy_thread_count(), "stepsave-helper")
    except RuntimeError as e:
        raise BackupDirectoryError(
            f"{directory}: cannot start {lanes} writer threads: {e}. Raise the limit on threads "
            "(ulimit -u)."
        ) from e


def choose_direct(store: Store, writer: WriterKind) -> bool:
    """Returns whether to write with `O_DIRECT`, as asked for or as the file system lets it."""
    if isinstance(store, BucketStore):
        if writer == "direct":
            raise BackupDirectoryError(
                f"{store.root}: direct writes (O_DIRECT) are for directories, this is a bucket. "
                "Use writer='auto' or 'tensorstore'."
            )
        return False  # what may be written there, opening it has found out
    try:
        if writer == "tensorstore":
            store.probe()
            return False
        works = store.can_write_direct()
    except OSError as e:
        raise BackupDirectoryError(
            f"{store.root}: cannot write to the backup directory: {e.strerror or e}. Free space "
            f"on it, mend it, or choose another. {READ_ONLY_ADVICE}"
        ) from e
    if writer == "direct" and not works:
        raise BackupDirectoryError(
            f"{store.root}: its file system does not take direct writes (O_DIRECT). Use "
            "writer='auto' or 'tensorstore'."
        )
    return works
