"""What a user writes with each public name; a strict type checker must have nothing to say."""

from pathlib import Path

import numpy as np

import stepsave


def callback(directory: Path) -> stepsave.BackupAndRestore:
    return stepsave.BackupAndRestore(
        directory, save_freq=5, double_checkpoint=True, save_before_preemption=True
    )


def loop(place: str) -> float:
    state = {"weights": np.zeros(3, np.float32), "step": 0}
    with stepsave.Checkpointer(place, when_busy="skip") as saver:
        backup: stepsave.Backup | None = saver.restore(like=state)
        first = 0 if backup is None else backup.step + 1
        metadata = {"rng": stepsave.rng.capture().to_json()}
        handle: stepsave.SaveHandle = saver.save(first, state, metadata)
        handle.wait(timeout_s=60.0)
        stats: stepsave.SaveStats = saver.stats()
        report: stepsave.SaveReport = saver.report()
        report.save_trace("trace.json")
    return stats.stall_total_s


def often(place: str) -> str:
    frequency: stepsave.SaveFrequency = stepsave.SaveFrequency.of("auto", max_overhead=0.02)
    with stepsave.Checkpointer(place, keep=2, keep_every=100) as saver:
        for step in range(100):
            if frequency.is_due(step):
                frequency.note(saver.save(step, {"x": np.zeros(3)}))
        steps = [record.step for record in saver.kept]
    return f"{frequency.text} {steps}"


def read(place: str) -> tuple[int, stepsave.TrainingPosition]:
    backup = stepsave.restore(place)
    if backup is None:
        return 0, stepsave.TrainingPosition(0, 0, 0, None)
    stepsave.rng.restore(stepsave.rng.RngState.from_json(backup.metadata["rng"]))
    return backup.step, stepsave.TrainingPosition.from_json(backup.metadata["position"])


ERRORS: tuple[type[stepsave.StepsaveError], ...] = (
    stepsave.ArenaMemoryError,
    stepsave.BackupDirectoryError,
    stepsave.BackupMismatchError,
    stepsave.BucketError,
    stepsave.CheckpointerClosedError,
    stepsave.CorruptBackupError,
    stepsave.DirectoryBusyError,
    stepsave.FormatVersionError,
    stepsave.InvalidStateError,
    stepsave.NestedCallError,
    stepsave.PeerError,
    stepsave.SaveFailedError,
)
WARNINGS: tuple[type[UserWarning], ...] = (
    stepsave.ChangedTrainingWarning,
    stepsave.SaveFailedWarning,
    stepsave.UnreproducibleDataWarning,
)


def code_of(ended: stepsave.Preempted) -> tuple[int, int, float]:
    return ended.EXIT_CODE, ended.step, ended.waited_s
