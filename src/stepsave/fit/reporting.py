"""What a callback tells of its saves: as figures, as a report, and in the logs of each epoch."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

from stepsave.engine.checkpointer import Checkpointer
from stepsave.engine.report import SaveReport
from stepsave.fit.keras_internals import RunningFit
from stepsave.fit.passing_over import tell
from stepsave.fit.progress import Progress
from stepsave.format.records import SaveStats

__all__ = ("Reporting",)


class Reporting:
    """The part of the callback that is asked what saving has cost."""

    verbose: int
    log_metrics: bool
    _options: dict[str, Any]
    _saver: Checkpointer | None
    _progress: Progress
    _last_report: SaveReport | None
    _logged: SaveStats | None

    def stats(self) -> SaveStats | None:
        """What saving has cost in this fit, or the last one; None before the first."""
        if self._saver is not None:
            return self._saver.stats()
        return None if self._last_report is None else self._last_report.stats

    def report(self) -> SaveReport | None:
        """The same, with when each save and step was, to be read, drawn or kept.

        To be called by the thread of `fit`, or after it, however it ended. Steps are timed from one
        to the next as they are dispatched: with `steps_per_execution`, what is done at once.

        Returns:
            None before the first fit.
        """
        if self._saver is None:
            return self._last_report
        return self._saver.report(steps=self._progress.times.summary())

    @property
    def frequency(self) -> str:
        """What `save_freq="auto"` has chosen, and why, in one line; empty if it was not asked."""
        return self._progress.frequency.text

    def _tell(self, message: str) -> None:
        if self.verbose:
            tell(f"\n{message}")

    def _tell_report(self) -> None:
        report = self._last_report
        if self.verbose and report is not None and report.saves:
            tell(str(report))

    def _log_first(self, fit: RunningFit | None) -> None:
        """Has figures in the logs of each epoch before any callback of the `fit` sees them."""
        self._logged = None
        if not self.log_metrics or fit is None:
            return
        callbacks = weakref.ref(fit.callbacks)  # or it would hold itself

        def on_epoch_end(epoch: int, logs: Mapping[str, Any] | None = None) -> None:
            known = callbacks()
            assert known is not None
            logs = dict(logs or {})
            self._log_metrics(logs)
            type(known).on_epoch_end(known, epoch, logs)

        fit.callbacks.on_epoch_end = on_epoch_end

    def _log_metrics(self, logs: Any) -> None:
        """Adds figures to the logs of an epoch, unless another callback of ours has done so."""
        if not self.log_metrics or self._saver is None or not isinstance(logs, dict):
            return
        if "stepsave_saves" in logs:
            return
        report = self._saver.report()
        stats, before = report.stats, self._logged
        for key, name in _OF_EPOCH.items():
            value = getattr(stats, name)
            logs[key] = value if before is None else value - getattr(before, name)
        logs["stepsave_backup_age_s"] = report.age_s
        if self._options["local_dir"] is not None:
            age_s = stats.remote_age_s
            logs["stepsave_remote_age_s"] = report.elapsed_s if math.isnan(age_s) else age_s
        self._logged = stats


_OF_EPOCH = {
    "stepsave_saves": "committed",
    "stepsave_skipped": "skipped",
    "stepsave_failed": "failed",
    "stepsave_stall_s": "stall_total_s",
}
"""What is logged of an epoch, by what it is called in `SaveStats`."""
