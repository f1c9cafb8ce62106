"""What a save uses: measured in a process of its own, which does nothing else.

Each probe sets up one saver, measures saves that were made durable one after the other, and
ends by restoring the last one and comparing every bit.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import importlib
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import common
from bench.process import reset_peak, status_bytes
from bench.resources.savers import SUBJECTS, Saver

WARM_UP = 3  # saves before anything is counted: the first ones write new files
TOP = 8  # most-called functions that are listed
SETTLE_S = 0.2  # a save is acknowledged shortly before its thread is done with it
SIDES = ("caller", "helpers", "background")


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What to measure."""

    subject: str
    arrays: int
    array_bytes: int
    saves: int
    directory: Path


@contextlib.contextmanager
def _set_up(task: Task) -> Iterator[tuple[Saver, common.Training, dict[str, Any]]]:
    """Yields a prepared saver, what it saves, and a dict to be filled; checks and closes after."""
    training = _training(task)
    saver = SUBJECTS[task.subject].make(task.directory)
    found: dict[str, Any] = {}
    try:
        saver.prepare(training.state)
        yield saver, training, found
        found |= saver.facts()
        common.check_same(saver.restore(), training.state)
    finally:
        saver.close()


def _training(task: Task) -> common.Training:
    return common.Training(SUBJECTS[task.subject].framework, task.arrays, task.array_bytes)


def _save(saver: Saver, training: common.Training, first: int, count: int) -> None:
    for step in range(first, first + count):
        saver.save(step, training.step())
        saver.wait()


def saves(task: Task) -> dict[str, Any]:
    """Nothing is measured: for `strace` around it."""
    with _set_up(task) as (saver, training, found):
        _save(saver, training, 0, task.saves)
    return found


def cpu(task: Task) -> dict[str, Any]:
    """CPU seconds of this process, all its threads; the kernel's own threads are in none."""
    with _set_up(task) as (saver, training, found):
        _save(saver, training, 0, WARM_UP)
        before, begin_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        _save(saver, training, WARM_UP, task.saves)
        after, end_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        found["user_s"] = after.ru_utime - before.ru_utime
        found["system_s"] = after.ru_stime - before.ru_stime
        found["wall_s"] = end_s - begin_s
        found["minor_faults"] = after.ru_minflt - before.ru_minflt
    return found


def memory(task: Task) -> dict[str, Any]:
    """Peak memory over that of the same process holding only what it saves.

    Saves follow each other as fast as they are taken, so all buffers are in use at once.
    """
    training = _training(task)
    if task.subject.startswith("orbax"):
        importlib.import_module("orbax.checkpoint")  # stepsave is: both belong to the base
    gc.collect()
    base = status_bytes("VmRSS")
    reset_peak()
    saver = SUBJECTS[task.subject].make(task.directory)
    try:
        saver.prepare(training.state)
        prepared = status_bytes("VmRSS")
        _save(saver, training, 0, 1)
        saved = status_bytes("VmRSS")
        for step in range(1, task.saves):
            saver.save(step, training.step())
        saver.wait()
        peak, after = status_bytes("VmHWM"), status_bytes("VmRSS")
        facts = saver.facts()
        common.check_same(saver.restore(), training.state)
    finally:
        saver.close()
    return facts | {
        "base_bytes": base,
        "after_prepare_bytes": prepared - base,
        "after_first_save_bytes": saved - base,
        "after_last_save_bytes": after - base,
        "peak_bytes": peak - base,
    }


def growth(task: Task) -> dict[str, Any]:
    """What many saves leave behind: memory, objects, threads, open files."""
    settle = task.saves // 11  # 20 of 220
    with _set_up(task) as (saver, training, found):
        _save(saver, training, 0, settle)
        found["early"] = _holdings()
        rss_bytes = np.zeros(task.saves - settle, np.int64)  # no list that grows itself
        for number in range(len(rss_bytes)):
            _save(saver, training, settle + number, 1)
            rss_bytes[number] = status_bytes("VmRSS")
        found["late"] = _holdings()
        found["early"]["saves"], found["late"]["saves"] = settle, task.saves
        # Between two saves, not from before `_holdings`, whose lists of all objects stay with
        # the allocator.
        found["grown_bytes"] = int(rss_bytes[-1] - rss_bytes[0])
        found["rss_bytes"] = rss_bytes.tolist()
        found["slope_bytes_per_save"], found["slope_error_bytes_per_save"] = _slope(rss_bytes)
    return found


def operations(task: Task) -> dict[str, Any]:
    """Calls of Python and C functions per save: by the caller, and on other threads.

    Those on other threads are apart for the time that the caller waits ("helpers") and for
    the time after, when training goes on ("background").
    Only Python's view: `list(map(c_function, items))` makes no event per item, and threads
    that native code starts make none.
    """
    counter = _CallCounter()
    threading.setprofile(counter.count)  # before any thread is started that is to be counted
    with _set_up(task) as (saver, training, found):
        _save(saver, training, 0, WARM_UP)
        time.sleep(SETTLE_S)
        counter.clear()
        for step in range(WARM_UP, WARM_UP + task.saves):
            state = training.step()
            with counter.stall():
                saver.save(step, state)
            saver.wait()
        time.sleep(SETTLE_S)
        found.update(counter.per_save(task.saves))
    threading.setprofile(None)
    return found


class _CallCounter:
    """Counts by thread: the caller's is that which makes the counter."""

    def __init__(self) -> None:
        self._caller = threading.get_ident()
        self._is_stall = False
        # By thread, so that no two threads count in the same place at once.
        self._counts: dict[int, collections.Counter[tuple[str, str, str]]] = {}

    def clear(self) -> None:
        for counts in list(self._counts.values()):
            counts.clear()

    @contextlib.contextmanager
    def stall(self) -> Iterator[None]:
        """While training waits: the caller's calls count only now, those of others apart."""
        self._is_stall = True
        sys.setprofile(self.count)
        yield
        sys.setprofile(None)
        self._is_stall = False

    def count(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            what = frame.f_code if event == "call" else argument
            name = getattr(what, "co_qualname", None) or getattr(what, "__qualname__", "?")
            thread = threading.get_ident()
            side = "background" if not self._is_stall else "helpers"
            side = "caller" if thread == self._caller else side
            counts = self._counts.setdefault(thread, collections.Counter())
            counts[side, event, name] += 1

    def per_save(self, saves: int) -> dict[str, Any]:
        by_side = {side: collections.Counter[tuple[str, str]]() for side in SIDES}
        for counts in list(self._counts.values()):
            for (side, event, name), count in counts.items():
                by_side[side][event, name] += count
        return {side: _calls(counts, saves) for side, counts in by_side.items()}


def _calls(counts: collections.Counter[tuple[str, str]], saves: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{kind}s_per_save": sum(n for (event, _), n in counts.items() if event == kind) / saves
        for kind in ("call", "c_call")
    }
    found["most_called_per_save"] = {
        name: count / saves for (_, name), count in counts.most_common(TOP)
    }
    return found


def _holdings() -> dict[str, int]:
    gc.collect()
    return {
        "rss_bytes": status_bytes("VmRSS"),
        "python_objects": len(gc.get_objects()),
        "threads": len(os.listdir("/proc/self/task")),
        "open_files": len(os.listdir("/proc/self/fd")),
    }


def _slope(values: np.ndarray) -> tuple[float, float]:
    """Least squares: bytes per save, and its standard error."""
    (slope, _), covariance = np.polyfit(np.arange(len(values)), values, 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0]))


PROBES: dict[str, Callable[[Task], dict[str, Any]]] = {
    "saves": saves,
    "cpu": cpu,
    "memory": memory,
    "growth": growth,
    "operations": operations,
}
