"""The engine for any training loop: save, wait, restore, close."""

from __future__ import annotations

import functools
import inspect
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from stepsave.engine.arguments import (
    StructureText,
    check_choices,
    check_step,
    check_threads,
    encode_training,
)
from stepsave.engine.extents import Needs
from stepsave.engine.likeness import ArrayKind, check_arrays, needs_of, shape_state
from stepsave.engine.opening import Place
from stepsave.engine.outcomes import Outcomes
from stepsave.engine.reader import StoredBackup
from stepsave.engine.retention import Retention
from stepsave.engine.saves import SaveHandle, SaveLog
from stepsave.engine.turns import Turns
from stepsave.engine.writer import SaveRequest, WriterKind, start_threads
from stepsave.errors import NestedCallError, StepsaveError
from stepsave.format.records import Backup
from stepsave.format.tree import flatten_state
from stepsave.snapshot.capture import Capture
from stepsave.snapshot.leaves import describe_all, open_leaf
from stepsave.snapshot.staging import SnapshotMode
from stepsave.store.places import Target
from stepsave.threads import is_running

__all__ = ("Checkpointer", "WhenBusy", "WriterKind")

WhenBusy = Literal["wait", "skip"]


class Checkpointer(Outcomes):
    """Saves the state of a training in the background and restores the last durable one.

    A directory belongs to one checkpointer at a time. Calls from several threads take turns.

    Example:
        ```python
        with stepsave.Checkpointer("backup") as saver:
            backup = saver.restore()
            step = backup.step if backup else 0
            saver.save(step, {"weights": weights}, {"epoch": epoch})
        ```
    """

    def __init__(
        self,
        directory: Target,
        *,
        double_checkpoint: bool = False,
        keep: int = 0,
        keep_every: int | None = None,
        when_busy: WhenBusy = "wait",
        writer: WriterKind = "auto",
        writer_threads: int | None = None,
        snapshot: SnapshotMode = "auto",
        read_only: bool = False,
        local_dir: str | os.PathLike[str] | None = None,
        upload_every: int | str = 1,
    ) -> None:
        """Opens a directory, making it if needed, and locks it against other processes.

        Args:
            directory: Where the backup lives, alone but for `lost+found` and the like. Or
                `s3://bucket/prefix`, `gs://bucket/prefix`, or a tensorstore spec of the like. In
                tests also a store, such as a `stepsave.testing.FaultStore`.
            double_checkpoint: Whether to keep the backup before the newest too, to fall back to.
            keep: How many to keep before the newest. With `local_dir`, in the bucket.
            keep_every: Of older ones, the first of each so many steps stays too, for good.
            when_busy: What `save` does while both host buffers are in use: `"wait"`, or `"skip"`.
            writer: `"direct"` bypasses the page cache; `"tensorstore"` works on every file system;
                `"auto"` takes the first where it can.
            writer_threads: Background threads that write; None for enough for a disk or a bucket.
            snapshot: `"device"` copies the state within device memory and brings it to the
                host while training goes on; `"host"` brings it to the host first; `"auto"` takes
                the first on accelerators with memory to spare, as measured at the first save.
            read_only: Whether to restore only. Takes no lock: others may save there meanwhile.
            local_dir: A directory of a fast disk, if `directory` is a bucket: saves go there, and
                the newest goes up in the background. Restored is the newest all processes have.
            upload_every: How often: a number of saves, or a time, such as `"30s"` or `"5min"`.

        Raises:
            ValueError: If an argument is invalid.
            BackupDirectoryError: If the directory cannot be used, or holds something else.
            DirectoryBusyError, BucketError: If it is in use; if a bucket refuses.
        """
        check_choices(when_busy=when_busy, writer=writer, snapshot=snapshot)
        self._when_busy = when_busy
        retention = Retention.of(
            double_checkpoint=double_checkpoint, keep=keep, keep_every=keep_every
        )
        place = Place.of(directory, local_dir, upload_every, read_only=read_only)
        self._store = place.store
        lanes = place.lanes if writer_threads is None else check_threads(writer_threads)
        self._log = SaveLog()
        self._turns = Turns()
        self._unfinished: SaveHandle | None = None
        self._close_error: BaseException | None = None
        self._structure = StructureText()
        self._keeper, self._helpers = start_threads(self.directory, lanes)
        self._log.clocks += self._keeper.clock, self._helpers.clock
        self._capture = Capture(self._helpers, self._log.drain, snapshot, place.team)
        self._directory = place.make_directory(self._log, self._helpers)
        try:
            self._last_step = self._keeper.call(
                lambda: self._directory.open(writer, lanes, retention)
            )
        except BaseException:
            # Behind the opening, which goes on if only its caller was interrupted.
            self._keeper.call(self._directory.release)
            self._keeper.end()
            self._helpers.end()
            raise

    @property
    def directory(self) -> str:
        """The backup directory, absolute; or the URL."""
        return str(self._store.root)

    def attach(self, items: Mapping[str, Mapping[str, str]]) -> None:
        """Sets Orbax checkpointables, dicts of strings, to store beside the state from now on."""
        with self._turns.take(self):
            self._capture.attach(items)

    def prepare(self, state: Any) -> None:
        """Does ahead what the first save of such a state would do, mostly in the background.

        Raises:
            InvalidStateError: If it cannot be saved.
            ArenaMemoryError: If there is no memory for a host copy of it.
        """
        self._check_usable()
        self._directory.check_writable()
        flat = flatten_state(state, open_leaf)
        self.prepare_leaves(flat.paths, flat.leaves)

    def prepare_leaves(self, paths: Sequence[tuple[str, ...]], leaves: Sequence[Any]) -> None:
        """`prepare`, for a state that is flat already."""
        with self._turns.take(self):
            if self._directory.saves_here:
                self._capture.prepare(paths, leaves)

    def save(self, step: int, state: Any, metadata: Mapping[str, Any] | None = None) -> SaveHandle:
        """Copies the state and returns; background threads make it durable.

        Args:
            step: Number of the step, greater than that of any save before.
            state: NumPy, JAX, torch or TensorFlow arrays, numbers and None in dicts (with texts
                or integers as keys), lists, tuples, named tuples, and containers that are
                registered with JAX by name. On return it may be changed or donated.
            metadata: Anything that JSON can hold; comes back with the backup.

        Raises:
            ValueError: If the step is not greater than those saved before.
            InvalidStateError: If the state or the metadata cannot be saved.
            SaveFailedError: If an *earlier* save failed and nobody was told yet. This one is then
                not begun; call again to go on. `SaveFailedWarning` if a bucket was out of reach.
            BackupDirectoryError, CheckpointerClosedError: If it is read only, or closed.
        """
        began_s = time.perf_counter()
        with self._turns.take(self):
            self._check_usable()
            flat = flatten_state(state, open_leaf)
            structure = self._structure.encode(flat.notes)
            return self.save_leaves(
                step, flat.paths, flat.leaves, metadata, began_s=began_s, structure=structure
            )

    def save_leaves(
        self,
        step: int,
        paths: Sequence[tuple[str, ...]],
        leaves: Sequence[Any],
        metadata: Mapping[str, Any] | None = None,
        *,
        began_s: float | None = None,
        structure: str = "",
    ) -> SaveHandle:
        """`save`, for a state that is flat already.

        The same object as `paths` again saves the comparison. `began_s` says when the caller
        began, by `time.perf_counter`; `structure` what paths cannot say, as JSON.
        """
        began_s = time.perf_counter() if began_s is None else began_s
        with self._turns.take(self):
            self._check_usable()
            self._directory.check_writable()
            self._log.raise_failed(but_for_outages=True)
            step = check_step(step, self._last_step, self.directory)
            training = encode_training(step, metadata, structure)
            handle = SaveHandle(step, began_s)
            if not self._directory.saves_here:
                describe_all(paths, leaves)  # what process 0 refuses, all refuse
                self._last_step = handle.leave()
                return handle
            # Interrupted from here on, the save is left behind, and the next call settles it.
            self._unfinished = handle
            block = self._when_busy == "wait"
            snapshot = self._capture.take(paths, leaves, handle.claim, block=block)
            if snapshot is None:
                handle.skip()
                self._keeper.put(functools.partial(self._directory.pass_over, step))
            else:
                handle.bytes = snapshot.share.plan.state_bytes
                request = SaveRequest(snapshot, handle, training)
                # The step by which the save happens: before it nobody writes, afterwards
                # somebody does.
                self._keeper.put(functools.partial(self._directory.write, request))
                self._last_step = handle.step
                self._log.add(handle)
            self._unfinished = None
            self._log.add_cost(handle)
            return handle

    def restore(
        self, *, like: Any = None, step: int | None = None, arrays: ArrayKind = "numpy"
    ) -> Backup | None:
        """Reads the newest valid backup, verified; waits for saves in flight first.

        If it cannot be read, one before it is, with a warning that names what is lost.

        Args:
            like: A state like the one that was saved; it is not changed. The backup's is returned
                in its structure (named tuples, PRNG keys, registered containers), each array of its
                kind there: NumPy's; JAX's with its sharding; torch's and TensorFlow's on its
                device, a parameter or variable if it is one. None for arrays in containers.
            step: That of a kept backup, to read that one. It is not gone back to: what is saved
                next must come after the newest, so train on from it with another directory.
            arrays: Without `like`: `"numpy"`, or `"torch"`: tensors, on the host.

        Returns:
            The backup, or None if there is none.

        Raises:
            ValueError: If no backup of that `step` is kept; if `arrays` goes with `like`.
            CorruptBackupError: If there is one, but it cannot be read.
            BackupMismatchError: If paths, shapes or dtypes differ; if torch has no such dtype.
            InvalidStateError: If `like` could not be saved itself.
            BackupDirectoryError: If a backup that is only read was replaced again and again.
        """
        check_arrays(arrays, like)
        found = self.restore_leaves(None if like is None else needs_of(like), step)
        if found is None:
            return None
        # Not by the keeper: where arrays are put may depend on the caller's thread.
        state = shape_state(found, like, arrays, self.directory)
        return Backup(found.step, state, found.metadata, found.ended)

    def restore_leaves(
        self, needs: Needs | None = None, step: int | None = None
    ) -> StoredBackup | None:
        """`restore`, flat; the arrays are views of an arena, for saves when the last has gone.

        Of those of which not all is needed, only that can be had.
        """
        with self._turns.take(self):
            self._check_usable()
            found, lost = self._keeper.call(functools.partial(self._directory.restore, needs, step))
            if lost:
                warnings.warn(lost, stacklevel=3)
            if step is None:
                self._last_step = -1 if found is None else found.step
            if found is not None and self._directory.saves_here:
                self._capture.take_over(found.pages)
            return found

    def free_device_memory(self) -> None:
        """Gives up the copy of the state in device memory until the next save.

        Waits until the last state is on the host, not until it is durable.
        """
        with self._turns.take(self):
            self._check_usable()
            self._capture.free_device_memory()

    def upload(self) -> None:
        """Brings the newest backup into the bucket too, if there are both (`local_dir=`).

        Raises:
            SaveFailedError: If that, or a save, failed and nobody was told yet.
        """
        self.wait()
        self._keeper.call(self._directory.upload)
        self.raise_failed()

    def close(self, *, delete_backup: bool = False, ended: bool = False) -> None:
        """Waits for saves in flight and lets go of the directory. May be called twice.

        Args:
            delete_backup: Whether to remove the backup, unless a save failed, and the directory.
            ended: Whether to note that its training has come to its end, unless a save failed.

        Raises:
            SaveFailedError: If a save failed and nobody was told yet.
        """
        with self._turns.take(self):
            if not self._directory.is_held:  # closed already; or the parent's of a forked child
                self._directory.release()
                return
            self._settle()
            # Closing goes on if its caller is interrupted.
            self._keeper.call(lambda: self._shut(delete_backup=delete_backup, ended=ended))
            self._keeper.join()
            self._helpers.join()
            if self._close_error is not None:
                raise self._close_error
            self.raise_failed()

    def _shut(self, *, delete_backup: bool = False, ended: bool = False) -> None:
        """Ends everything; saves in flight come before it in the keeper's queue."""
        if not self._directory.is_held:
            return
        delete_backup = delete_backup and not self._log.last_failed
        try:
            if delete_backup:
                self._directory.delete_backup()
            elif ended and not self._log.last_failed:
                self._directory.mark_ended()
            self._capture.close()
        except BaseException as e:  # noqa: BLE001  raised by `close`, by another one if need be
            self._close_error = e
        self._directory.release(remove=delete_backup and self._close_error is None)
        self._log.timeline.close()
        self._keeper.end()
        self._helpers.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.close()
        except StepsaveError as e:
            if error is None:
                raise
            error.add_note(f"stepsave: {e}")  # never hide the error that ends the loop

    def __del__(self) -> None:
        directory = getattr(self, "_directory", None)
        if directory is None or not directory.is_held:
            return
        # The next user must not find a save still being written.
        self._keeper.call(self._shut)
        text = "stepsave: the checkpointer of {} was not closed. Use `with`, or call `close()`."
        warnings.warn(text.format(self.directory), ResourceWarning, 1, source=self)

    def _check_usable(self) -> None:
        self._directory.check_held()
        self._settle()

    def _settle(self) -> None:
        """Settles a save whose call was interrupted: it has happened, or it never will."""
        if self._unfinished is not None:
            with self._turns.take(self):  # that of another thread has ended by then
                self._settle_unfinished()

    def _settle_unfinished(self) -> None:
        handle = self._unfinished
        if handle is None:
            return
        if is_running(inspect.currentframe(), _SAVE, "handle", handle):
            raise NestedCallError(
                f"{self._store.root}: a checkpointer was used by a signal handler in the midst "
                "of its own `save`. Have the handler note the signal, and act on it between "
                "two steps."
            )
        # One that is in the log was handed over, and is not to be taken back.
        if handle in self._log or not handle.claim.drop():
            self._last_step = handle.step
            self._log.add(handle)
        else:
            self._keeper.put(functools.partial(self._directory.pass_over, handle.step))
        self._unfinished = None


_SAVE = Checkpointer.save_leaves.__code__
