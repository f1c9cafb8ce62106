"""What a `fit` does with the backup that it finds: go on from it, or say why not."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from stepsave.engine.checkpointer import Checkpointer
from stepsave.engine.peers import count_processes
from stepsave.engine.reader import StoredBackup
from stepsave.errors import BackupMismatchError, ChangedTrainingWarning
from stepsave.fit import keras_internals
from stepsave.fit.companions import Companions, Start
from stepsave.fit.keras_data import EpochData
from stepsave.fit.keras_internals import RunningFit
from stepsave.fit.loop import FitLoop
from stepsave.fit.needs import needs_of
from stepsave.fit.phases import BackupOf, Phases
from stepsave.fit.restore_progress import showing_progress
from stepsave.fit.state import RestoredFit, restore_fit

__all__ = ("Resuming",)


@dataclasses.dataclass(frozen=True, slots=True)
class Resuming:
    """A `fit` that is about to begin.

    Attributes:
        model: Its model.
        fit: What is known of it.
        loop: Its loop; None if it can only begin at the head of an epoch.
        phases: The fits that use the backup directory.
        epochs: The epoch at which it ends; None if that is not known.
    """

    model: Any
    fit: RunningFit | None
    loop: FitLoop | None
    phases: Phases
    epochs: int | None

    def begin(
        self,
        saver: Checkpointer,
        companions: Companions,
        owner: Any,
        siblings: Callable[[], Sequence[Any]],
    ) -> RestoredFit | None:
        """Goes on from the newest backup that the callbacks of this `fit` have, if any has one.

        Args:
            saver: Who reads that of the present callback.
            companions: All of them; they are told where the `fit` begins.
            owner: The present one.
            siblings: Returns the other callbacks of the `fit`.

        Returns:
            What was restored, if it was the backup of the present callback.
        """
        others, newest = companions.start, saver.committed
        if others is not None and (newest is None or newest.step <= others.global_step):
            owner.begin_at(others)
            return None
        with showing_progress(needs_of(self.model), verbose=owner.verbose) as needs:
            backup = saver.restore_leaves(needs)
        if backup is None:
            return None
        start, restored = self._go_on_from(backup)
        companions.begin_at(start)
        if start.epoch is not None:
            keras_internals.set_initial_epoch(self.model, start.epoch, owner=owner)
        if self.loop is not None:
            self.loop.resume(None if restored is None else restored.resume(self.model, siblings))
        return restored

    def _go_on_from(self, backup: StoredBackup) -> tuple[Start, RestoredFit | None]:
        """Restores a backup, unless it belongs to another `fit`; warns of what has changed.

        Returns:
            Where to begin, and what is still to be put back when training begins.

        Raises:
            BackupMismatchError: If the backup does not fit; the model is then untouched.
        """
        phase = backup.metadata.get("phase")
        belongs = self.phases.place(phase)
        if belongs is BackupOf.LATER_FIT:
            return self._leave_to_later(backup), None
        if belongs is BackupOf.EARLIER_FIT:
            _warn(
                f"The backup of step {backup.step} is of an earlier `fit` of this script, which "
                "has ended. This one begins anew, with the model as it is"
            )
            return Start(backup.step, None, 0, keeps_backup=False), None
        fit = self.fit
        batch_spec = None if fit is None else lambda: EpochData(fit.epoch_iterator).batch_spec
        restored = restore_fit(self.model, backup, batch_spec)
        if belongs is BackupOf.CHANGED_FIT:
            self._warn_of_changes(phase)
        _warn_of_processes(backup.metadata.get("processes", 1), restored)
        start = self._start(backup, restored)
        doubt = self.phases.doubt(phase)
        if doubt is not None and not start.keeps_backup:
            _warn(doubt)
        return start, restored

    def _leave_to_later(self, backup: StoredBackup) -> Start:
        whose = f"The backup of step {backup.step} is of a later `fit` of this script"
        if self.epochs is None:
            raise BackupMismatchError(
                f"{whose}, and this one, whose end is not known, cannot be passed over. Begin with "
                "the later one, or move the backup away."
            )
        _warn(
            f"{whose}, and this one had ended before it: it trains nothing now, changes nothing in "
            "the model, and leaves the backup to the later one. To train it anew, move the backup "
            "away"
        )
        return Start(backup.step, self.epochs, 0, keeps_backup=True)

    def _start(self, backup: StoredBackup, restored: RestoredFit) -> Start:
        loop, epochs = self.loop, self.epochs
        if loop is not None:
            change = restored.fit_to(loop.batching)
            if change is not None:
                _warn(change)
        position = restored.position
        epoch, batch = position.resume_epoch, 0
        if loop is not None:
            epoch, batch = position.epoch, position.batch
        if epochs is None:
            return Start(position.global_step, epoch, batch, keeps_backup=False)
        if loop is not None and restored.stopped and not backup.ended and epoch < epochs:
            _warn(
                "A callback had stopped this training (`stop_training`), and it was interrupted "
                "before `fit` returned: nothing is left to train"
            )
            epoch, batch = epochs, 0
        elif epoch > epochs or (epoch == epochs and batch):
            _warn(
                f"The backup is from epoch {epoch + 1}, and this `fit` ends with epoch {epochs}: "
                "it trains nothing, and leaves the backup to a `fit` with more epochs"
            )
        elif epoch == epochs:
            _warn(
                f"All {epochs} epochs of this `fit` are in the backup: it trains nothing. To train "
                "on, give it more `epochs`; to train anew, move the backup away"
            )
        beyond = (epoch, batch) > (epochs, 0)
        return Start(position.global_step, epoch, batch, keeps_backup=beyond)

    def _warn_of_changes(self, phase: Any) -> None:
        changes = self.phases.changes(phase)
        if "learning rate" in changes:
            rate = self.phases.present_rate()
            changes += (
                f". The learning rate of the backup, {rate:.6g}, is used. To train with another "
                "one, have a callback set it when an epoch begins (`LearningRateScheduler`)"
            )
        if changes:
            _warn(f"`compile` was given otherwise in the run that made the backup: {changes}")


def _warn_of_processes(then: Any, restored: RestoredFit) -> None:
    now = count_processes()
    if then == now or restored.document is None:
        return
    _warn(
        f"{then} process(es) made the backup, and {now} train(s) now: weights and position are "
        "those of the backup, but it cannot be as if nothing had happened. Random generators go on "
        "as in the process of the same number, or as in process 0 where there was none; and what "
        "each process reads for itself (`auto_shard_dataset=False`) is cut otherwise, so that in "
        "this epoch some of it may be read twice or not at all"
    )


def _warn(message: str) -> None:
    warnings.warn(f"{message}.", ChangedTrainingWarning, stacklevel=2)
