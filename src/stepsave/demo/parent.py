"""The plot of the demo: starts the trainings, kills one, and checks what came of it."""

# ruff: noqa: T201  printing is a demo's purpose

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator

import stepsave
from stepsave.demo import table
from stepsave.demo.facts import EPOCHS, SAVE_FREQ, Comparison, InFlight, Outcome

__all__ = ("DemoError", "run")

KILL_EPOCH = 4
KILL_BATCHES = 10
"""The first save after so many of the 22 batches of this epoch (from 0) is interrupted."""

MAX_KILLS = 3
"""A write may end in the instant between its announcement and the kill; then once more."""

ACCURACY_MIN = 0.95

_CHILD_LIMIT_S = 120.0
_SHOWN_LINES = 30  # of what a failed child wrote to stderr


class DemoError(Exception):
    """The demo could not show what it wants to show."""


def run() -> None:
    """Runs the four trainings and prints the table.

    Raises:
        DemoError: If a child failed or a check did not hold.
    """
    backend = os.environ["KERAS_BACKEND"]
    print(f"stepsave {stepsave.__version__}, Keras on {backend}: a convolutional classifier of")
    print(f"handwritten digits, backed up every {SAVE_FREQ} batches", flush=True)
    with tempfile.TemporaryDirectory(prefix="stepsave-demo-") as directory:
        with _told("1/4 training without interruption"):
            uninterrupted = _train(os.path.join(directory, "uninterrupted"))
        with _told("2/4 training again, killed in the middle of a write"):
            backup_dir, killed, committed_step = _kill_in_flight(directory)
        with _told("3/4 the same command once more"):
            resumed = _train(backup_dir)
        with _told("4/4 measuring next to Keras's own callback"):
            line = _run_child(directory, "compare", "--directory", directory)
            comparison = Comparison.from_line(line)
    console = table.console()
    console.print(table.interruption(killed, committed_step, resumed))
    console.print(table.result(uninterrupted, resumed))
    console.print(table.cost(comparison))
    _check(killed, committed_step, uninterrupted, resumed)
    print(
        "All checks hold: it went on at the batch after the last committed step; no batch was\n"
        "trained twice, none was left out; and the resumed model equals the uninterrupted one bit\n"
        "for bit, with the state of its optimizer and of its dropout."
    )


def _check(killed: InFlight, committed_step: int, uninterrupted: Outcome, resumed: Outcome) -> None:
    """Raises `DemoError` naming each check that does not hold."""
    failures: list[str] = []
    steps = killed.steps_per_epoch
    if committed_step >= killed.step:
        failures.append(
            f"expected to kill a write in flight, but in {MAX_KILLS} attempts each had ended "
            "just before"
        )
    if resumed.first_step != committed_step:
        failures.append(
            f"expected to resume at the last committed step {committed_step}, but resumed at "
            f"{resumed.first_step}"
        )
    expected, found = divmod(committed_step, steps), (resumed.first_epoch, resumed.first_batch)
    if found != expected:
        failures.append(
            f"expected to go on in epoch {expected[0] + 1} with batch {expected[1] + 1}, but went "
            f"on in epoch {found[0] + 1} with batch {found[1] + 1}"
        )
    failures += _compare(uninterrupted, resumed, steps * EPOCHS)
    if failures:
        raise DemoError("\n".join(failures))


def _compare(uninterrupted: Outcome, resumed: Outcome, steps: int) -> list[str]:
    """Names each check of what both trainings reached that does not hold."""
    failures: list[str] = []
    last_steps = (uninterrupted.last_step, resumed.last_step)
    if last_steps != (steps, steps):
        failures.append(f"expected {steps} optimizer steps in both trainings, found {last_steps}")
    accuracies = (uninterrupted.accuracy, resumed.accuracy)
    if min(accuracies) <= ACCURACY_MIN or len(set(accuracies)) > 1:
        failures.append(f"expected equal accuracies above {ACCURACY_MIN}, found {accuracies}")
    if resumed.digest != uninterrupted.digest:
        failures.append(
            "expected the resumed model to equal the uninterrupted one bit for bit, found digests "
            f"{resumed.digest} and {uninterrupted.digest}. (Uninterrupted trainings may differ "
            "too where operations are not deterministic, as some are on GPUs.)"
        )
    return failures


def _train(backup_dir: str) -> Outcome:
    line = _run_child(os.path.dirname(backup_dir), "train", "--directory", backup_dir)
    return Outcome.from_line(line)


def _kill_in_flight(directory: str) -> tuple[str, InFlight, int]:
    """Kills a training while it writes.

    Returns:
        The backup directory it left, the save that was in flight, and the step that is
        committed. The save had ended after all if these are the same step.
    """
    backup_dir, killed, committed_step = "", None, -1
    for attempt in range(MAX_KILLS):
        backup_dir = os.path.join(directory, f"killed-{attempt}")
        batches = KILL_BATCHES + attempt * SAVE_FREQ
        killed = _kill_when_announced(directory, backup_dir, batches)
        with stepsave.Checkpointer(backup_dir) as saver:
            backup = saver.restore()
        if backup is None:
            raise DemoError("expected a backup after the kill, found none")
        committed_step = backup.step
        if committed_step < killed.step:
            break
    assert killed is not None
    return backup_dir, killed, committed_step


def _kill_when_announced(directory: str, backup_dir: str, batches: int) -> InFlight:
    announce_from = (str(KILL_EPOCH), str(batches))
    arguments = ("train", "--directory", backup_dir, "--announce-from", *announce_from)
    with _start_child(directory, *arguments) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
    if process.returncode != -signal.SIGKILL or not line:
        raise _child_error(directory, "train", process.returncode)
    try:
        return InFlight.from_line(line)
    except TypeError:
        raise DemoError("expected a save in flight, but the training ended without one") from None


def _run_child(directory: str, *arguments: str) -> str:
    """Returns the last line that a child printed.

    Raises:
        DemoError: If it failed.
    """
    with _start_child(directory, *arguments) as process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    if process.returncode or not lines:
        raise _child_error(directory, arguments[0], process.returncode)
    return lines[-1]


@contextlib.contextmanager
def _start_child(directory: str, *arguments: str) -> Generator[subprocess.Popen[str], None, None]:
    """Starts this program as a child, and waits for its end; kills it if it hangs."""
    command = [sys.executable, "-m", "stepsave.demo", "--child", *arguments]
    environment = {
        # Threads of torch that spin while they wait keep the writers off a small machine.
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    with (
        open(os.path.join(directory, "stderr.txt"), "w", encoding="utf-8") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        ) as process,
    ):
        timer = threading.Timer(_CHILD_LIMIT_S, process.kill)
        timer.start()
        try:
            yield process
            process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()


def _child_error(directory: str, name: str, returncode: int) -> DemoError:
    with open(os.path.join(directory, "stderr.txt"), encoding="utf-8") as stderr:
        shown = stderr.read().splitlines()[-_SHOWN_LINES:]
    return DemoError(
        f"the child process {name!r} ended with status {returncode} (limit {_CHILD_LIMIT_S:.0f} "
        f"s) and wrote:\n" + "\n".join(shown)
    )


@contextlib.contextmanager
def _told(what: str) -> Generator[None, None, None]:
    """Prints what is going on, and how long it took."""
    print(f"  {what} ...", end="", flush=True)
    began_s = time.perf_counter()
    try:
        yield
    except BaseException:
        print(" failed", flush=True)
        raise
    print(f" {time.perf_counter() - began_s:.0f} s", flush=True)
