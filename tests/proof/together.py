"""Processes, forks, threads and interrupts at once: one has the directory, each save is whole.

PYTHONPATH=src:tests:. python -m proof.together [--quick] [--seed N]
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from engine_support import assert_is_state_of, run_python, state_of
from interrupting import Interrupted, enumerate_lines

import stepsave
from proof.record import Campaign, Row, parser

PATIENCE_S = 60
OUTCOMES = ("committed", "skipped", "refused", "closed")


class HandlerError(ValueError):
    """What a signal handler may raise that is no interrupt."""


def races(directory, count, seed):
    """Has processes race; returns what `proof.racing` found."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "proof.racing", directory, str(count), str(seed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE, text=True, timeout=60 + 15 * count, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


FORKS = """
import contextlib, os, random, signal, subprocess, sys, time, warnings
import stepsave
from engine_support import assert_is_state_of, check_python, state_of

directory, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
chance = random.Random(seed)
endings = ["os._exit", "sys.exit", "end of main", "exec", "kill"]

def refused(saver, handle, step):
    uses = [lambda: saver.save(step + 1, state_of(0)), saver.restore,
            lambda: saver.prepare(state_of(0)), lambda: stepsave.Checkpointer(directory)]
    if not handle.done:  # nobody here can end it
        uses += [handle.wait, saver.wait, saver.drain, lambda: saver.committed]
    for use in uses:
        try:
            use()
        except stepsave.DirectoryBusyError:
            continue
        raise AssertionError("not refused")
    saver.stats(), saver.report()
    saver.close(delete_backup=True)
    with stepsave.Checkpointer(f"{directory}.child") as own:
        own.save(step, state_of(step)).wait(30)
        assert_is_state_of(own.restore())
        own.close(delete_backup=True)

def reap(child):
    deadline_s = time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline_s:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(ended[1])

saver = stepsave.Checkpointer(directory)
in_flight = 0
for number in range(1, count + 1):
    ending = endings[number % len(endings)]
    handle = saver.save(number, state_of(number))
    time.sleep(chance.uniform(0, 0.004))
    in_flight += not handle.done
    child = os.fork()
    if child == 0:
        try:
            refused(saver, handle, number)
        except BaseException as e:
            os.write(2, f"{ending}: {e!r}\\n".encode())
            os._exit(9)
        if ending == "os._exit":
            os._exit(0)
        if ending == "exec":  # what it has open then must not be ours
            look = f"ls -l /proc/$$/fd | grep -F {directory} && exit 8; exit 0"
            os.execv("/bin/sh", ["sh", "-c", look])
        if ending == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if ending == "sys.exit":
            sys.exit(0)
        break
    status = reap(child)
    assert status == (-signal.SIGKILL if ending == "kill" else 0), (ending, status)
    found = subprocess.run(
        ["sh", "-c", f"ls -l /proc/$$/fd | grep -cF {directory}"],
        close_fds=False, capture_output=True, text=True, timeout=60, check=False)
    assert found.stdout.strip() == "0", found
    handle.wait(60)
    backup = saver.restore()
    assert backup.step == number
    assert_is_state_of(backup)
else:
    told = check_python(
        "import stepsave, sys\\n"
        "try: stepsave.Checkpointer(sys.argv[1])\\n"
        "except stepsave.DirectoryBusyError as e: print(e)", directory)
    assert f"pid {os.getpid()}" in told, told
    saver.close()
    with stepsave.Checkpointer(directory) as saver:
        assert_is_state_of(saver.restore())
    print(in_flight)
"""
"""A training that forks while its saves are in flight, in each way that a child may end."""


def forks(directory, count, seed):
    """Forks so often; returns how many saves were in flight then, or raises."""
    done = run_python(FORKS, directory, count, seed, timeout=60 + 3 * count)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


class Users:
    """Threads that use one checkpointer at once, and what each save of theirs came to."""

    def __init__(self, directory, seed, **options):
        self.saver = stepsave.Checkpointer(directory, **options)
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.errors = []
        self._durable = -1
        self._steps = iter(range(1, 1_000_000))
        self._guard = threading.Lock()
        self._seed = seed

    def run(self, count, uses, *, closes=False):
        """Has threads make so many uses each; with the last, one closes it under the others."""
        self._closes_at = count // 2 if closes else None
        threads = [
            threading.Thread(target=self._use, args=(number, count, uses), daemon=True)
            for number in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S + count)
            assert not thread.is_alive(), "a thread waits for ever"
        if self.errors:
            raise self.errors[0]

    def _use(self, number, count, uses):
        chance = random.Random(f"{self._seed} {number}")
        try:
            for turn in range(count):
                if number == 0 and turn == self._closes_at:
                    self.saver.close()
                try:
                    getattr(self, chance.choice(uses))(chance)
                except stepsave.CheckpointerClosedError:
                    assert self._closes_at is not None
                    self._count("closed")
                    return
        except BaseException as e:  # noqa: BLE001  raised by `run`
            self.errors.append(e)

    def _count(self, outcome):
        with self._guard:
            self.outcomes[outcome] += 1

    def save(self, chance):
        with self._guard:
            step = next(self._steps)
        try:
            handle = self.saver.save(step, state_of(step))
        except ValueError as e:  # another thread was faster, with a later step
            if f"step={step}" not in str(e):
                raise
            self._count("refused")
            return
        if chance.random() < 0.5 or handle.skipped:
            handle.wait(PATIENCE_S)
        else:
            self.saver.wait(PATIENCE_S)
            assert handle.done
        self._count("skipped" if handle.skipped else "committed")
        if not handle.skipped:
            with self._guard:
                self._durable = max(self._durable, step)

    def restore(self, _):
        durable = self._durable
        backup = self.saver.restore()
        assert (-1 if backup is None else backup.step) >= durable
        if backup is not None:
            assert_is_state_of(backup)

    def ask(self, _):
        durable, committed = self._durable, self.saver.committed
        assert (-1 if committed is None else committed.step) >= durable
        stats = self.saver.stats()
        assert stats.started >= stats.committed + stats.failed
        str(self.saver.report())
        self.saver.prepare(state_of(1))

    def check(self, directory):
        """Closes it; returns the number of saves."""
        closed = self.saver
        closed.close()
        with stepsave.Checkpointer(directory) as saver:
            self.saver = saver
            self.restore(None)
        stats = closed.stats()
        assert stats.failed == 0
        assert stats.committed == stats.started >= self.outcomes["committed"]
        return stats.started


def threads_at_once(directory, count, seed):
    """Uses by four threads of each kind of checkpointer; returns how many saves there were."""
    saves = 0
    for number, options in enumerate([{}, {"when_busy": "skip"}, {"writer": "tensorstore"}]):
        for closes in (False, True):
            place = Path(directory, f"{number} {closes}")
            users = Users(place, seed, **options)
            users.run(count, ("save", "save", "restore", "ask"), closes=closes)
            saves += users.check(place)
            assert (users.outcomes["skipped"] == 0) or "when_busy" in options
    return saves


def _saver_with_one(directory):
    saver = stepsave.Checkpointer(directory)
    step = 0 if saver.committed is None else saver.committed.step
    saver.save(step + 1, state_of(step + 1)).wait(PATIENCE_S)
    return saver


def interrupts(directory, use, **options):
    """Interrupts one use of a checkpointer wherever it can be; returns at how many places.

    After each, the next save and a restore work, both buffers are there, and its bits are right.

    Args:
        directory: The backup.
        use: A name of `USES`.
        options: Of `interrupted_at_line`.
    """
    saver = _saver_with_one(directory)

    def make_body():
        nonlocal saver
        if saver.closed:
            saver = _saver_with_one(directory)
        before = saver.committed.step
        step = before + 1
        if use in ("wait", "close"):
            saver.save(step, state_of(step))

        def check():
            nonlocal saver
            if use in ("close", "open"):
                saver.close()
                saver = stepsave.Checkpointer(directory)
            saver.wait(PATIENCE_S)
            backup = saver.restore()
            assert backup.step in (before, step)
            assert_is_state_of(backup)
            saver.save(step + 1, state_of(step + 1)).wait(PATIENCE_S)
            saver.drain()
            assert all(arena.is_unclaimed for arena in saver._capture._pool._arenas)

        return lambda: USES[use](saver, step), check

    try:
        count = enumerate_lines(make_body, **options)
    finally:
        saver.close()
    with stepsave.Checkpointer(directory) as again:
        assert_is_state_of(again.restore())
    return count


USES = {
    "save": lambda saver, step: saver.save(step, state_of(step)),
    "restore": lambda saver, _: saver.restore(),
    "restore like": lambda saver, _: saver.restore(like=state_of(0)),
    "wait": lambda saver, _: saver.wait(PATIENCE_S),
    "report": lambda saver, _: str(saver.report()),
    "prepare": lambda saver, _: saver.prepare(state_of(0)),
    "close": lambda saver, _: saver.close(),
}

KINDS = {
    "each line": {},
    "each instruction": {"instructions": True},
    "each line, and again 3 lines later": {"again": 3},
    "each line, by another error of a handler": {"error": HandlerError},
}


def count_threads():
    """Threads of checkpointers; those of one that was closed are gone a little later."""
    deadline_s = time.monotonic() + PATIENCE_S
    while left := [t for t in threading.enumerate() if "keeper" in t.name or "helper" in t.name]:
        if time.monotonic() > deadline_s:
            return len(left)
        time.sleep(0.01)
    return 0


def main(arguments=None):
    options = parser("together", __doc__.split("\n", maxsplit=1)[0]).parse_args(arguments)
    print(f"seed {options.seed}", flush=True)  # noqa: T201
    quick, seed = options.quick, options.seed
    with tempfile.TemporaryDirectory() as directory:
        campaign = Campaign("together", options, Path(directory))

        def row(what, function, notes=""):
            try:
                cases, notes = function()
                campaign.add(Row(what, cases, 0, notes))
            except (AssertionError, stepsave.StepsaveError, Interrupted, HandlerError) as e:
                campaign.add(Row(what, 1, 1, repr(e)[:300]))

        def race_row():
            found = races(_made(directory, "races"), 20 if quick else 1000, seed)
            assert not found["bad"], found["bad"]
            counts = ", ".join(f"{key} {count}" for key, count in found["counts"].items())
            return sum(found["counts"].values()), f"how the winner ended: {counts}"

        def fork_row():
            count = 10 if quick else 300
            flying = forks(_made(directory, "forks") / "backup", count, seed)
            return count, f"{flying} with a save in flight"

        def thread_row():
            count = 5 if quick else 60
            return threads_at_once(_made(directory, "threads"), count, seed), "saves, 4 threads"

        row("two or three processes race for one directory", race_row)
        row("a training forks", fork_row)
        row("threads save, restore, ask and close at once", thread_row)
        for kind, how in KINDS.items():

            def interrupt_row(kind=kind, how=how):
                # There are some ten thousand instructions in the others.
                is_short = quick or "instructions" in how
                uses = ["wait", "close"] if is_short else list(USES)
                found = {
                    use: interrupts(_made(directory, f"{kind} {use}"), use, **how) for use in uses
                }
                assert count_threads() == 0
                return sum(found.values()), ", ".join(f"{u} {n}" for u, n in found.items())

            row(f"a caller is interrupted at {kind}", interrupt_row)
    return 1 if campaign.bad else 0


def _made(directory, name):
    path = Path(directory, name)
    path.mkdir()
    return path


if __name__ == "__main__":
    sys.exit(main())
