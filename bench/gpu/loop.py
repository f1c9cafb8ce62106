"""What a save costs a training on an accelerator: loops with and without, one after the other.

Knows no framework; `bench.gpu.jax` and `bench.gpu.torch` do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.stats import percentile, spread

BEFORE, AFTER = 2, 10  # steps around a save that are looked at one by one
State = Mapping[str, Mapping[str, Any]]


class Training(Protocol):
    """A training of a framework, with all of its state on the device."""

    @property
    def state(self) -> State:
        """Weights and optimizer slots; the next step donates or overwrites them."""
        ...

    def step(self) -> None:
        """Dispatches one step; waits for the last but one, so that few are in flight."""
        ...

    def sync(self) -> None:
        """Waits for the device."""
        ...


class Saver(Protocol):
    """One system, or a part of what any system must do."""

    def prepare(self, state: State) -> None: ...
    def save(self, step: int, state: State) -> None: ...

    def before_update(self) -> None:
        """Called before each step: to wait, where a step must not overtake a save."""
        ...

    def wait(self) -> None: ...
    def restore(self, like: State) -> State | None: ...
    def facts(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A system and how it is set up.

    Attributes:
        key: Its name in the JSON.
        label: Its name in tables.
        settings: How it is set up.
        make: Makes it for a directory.
        saves: Whether it saves, or is a floor of saving.
    """

    key: str
    label: str
    settings: str
    make: Callable[[Path], Saver]
    saves: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One loop: how often, and how many times, is saved."""

    name: str
    every: int
    saves: int

    @property
    def steps(self) -> int:
        return self.every * self.saves + AFTER

    @property
    def saved_before(self) -> frozenset[int]:
        return frozenset(self.every * (i + 1) for i in range(self.saves))


# In the order of what matters, should the time not suffice for all.
CASES = (
    Case("single", 4, 1),
    Case("every 10", 10, 3),
    Case("every 1", 1, 6),
    Case("every 5", 5, 3),
)


class OutOfTimeError(Exception):
    """There is no time for another loop."""


@dataclasses.dataclass(slots=True)
class Clock:
    """The time that a part of the measurement may take."""

    end_s: float

    @classmethod
    def of(cls, budget_s: float) -> Clock:
        return cls(time.monotonic() + budget_s)

    @property
    def left_s(self) -> float:
        return self.end_s - time.monotonic()

    def need(self, needed_s: float) -> None:
        if needed_s > self.left_s:
            raise OutOfTimeError(f"{needed_s:.0f} s needed, {self.left_s:.0f} s left")


class Measurement:
    """Loops of one subject against loops without saving."""

    def __init__(self, training: Training, saver: Saver, step_s: float) -> None:
        self._training = training
        self._saver = saver
        self._step_s = step_s
        self._number = 0
        self._durable_s = 0.0
        self.samples: dict[str, dict[str, list[Any]]] = {}
        self.steps_s: dict[str, list[list[float]]] = {"with": [], "without": []}

    def warm_up(self) -> None:
        """Two saves, one after the other: the next ones write over retired files."""
        for _ in range(2):
            self._save()
            begin_s = time.perf_counter()
            self._saver.wait()
            self._durable_s = time.perf_counter() - begin_s

    def run(self, case: Case, *, swapped: bool) -> None:
        """One loop with saves and one without, in either order."""
        samples = self.samples.setdefault(
            case.name, {"with_s": [], "without_s": [], "blocked_s": [], "drained_s": []}
        )
        for saving in (False, True) if swapped else (True, False):
            total_s, blocked_s = self._loop(
                case.steps, case.saved_before if saving else frozenset()
            )
            samples["with_s" if saving else "without_s"].append(total_s)
            if saving:
                samples["blocked_s"].append(blocked_s)
                begin_s = time.perf_counter()
                self._saver.wait()
                samples["drained_s"].append(time.perf_counter() - begin_s)

    def trace(self) -> None:
        """Steps around one save, each waited for."""
        for kind, place in (("without", -1), ("with", BEFORE)):
            self._training.sync()
            taken_s: list[float] = []
            for i in range(BEFORE + AFTER + 1):
                begin_s = time.perf_counter()
                if i == place:
                    self._save()
                self._saver.before_update()
                self._training.step()
                self._training.sync()
                taken_s.append(time.perf_counter() - begin_s)
            self.steps_s[kind].append(taken_s)
            self._saver.wait()

    def expected_s(self, case: Case) -> float:
        """How long a pair of loops will take, if saves queue for the disk."""
        return 2 * case.steps * self._step_s + case.saves * self._durable_s

    def check_restored(self) -> int:
        """Saves once more, restores, and compares each bit; returns how many arrays.

        Raises:
            AssertionError: If one came back different.
        """
        self._training.sync()
        self._save()
        self._saver.wait()
        state = self._training.state
        restored = self._saver.restore(state)
        assert restored is not None, "nothing was found to restore"
        count = 0
        for group, arrays in state.items():
            for name, array in arrays.items():
                expected, found = to_bytes(array), to_bytes(restored[group][name])
                assert np.array_equal(expected, found), f"{group}/{name}: other bits than saved"
                count += 1
        return count

    def _loop(self, steps: int, saved_before: frozenset[int]) -> tuple[float, list[float]]:
        blocked_s: list[float] = []
        self._training.sync()
        begin_s = time.perf_counter()
        for i in range(steps):
            if i in saved_before:
                blocked_s.append(self._save())
            if saved_before:
                self._saver.before_update()
            self._training.step()
        self._training.sync()
        return time.perf_counter() - begin_s, blocked_s

    def _save(self) -> float:
        self._number += 1
        begin_s = time.perf_counter()
        self._saver.save(self._number, self._training.state)
        return time.perf_counter() - begin_s


def to_bytes(array: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of an array of any framework, on the host."""
    if hasattr(array, "cpu"):  # torch
        array = array.detach().cpu().numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def state_bytes(state: State) -> int:
    return sum(array.nbytes for arrays in state.values() for array in arrays.values())


def step_time_s(training: Training, count: int = 8) -> float:
    """How long a step takes, in a loop of some."""
    training.sync()
    begin_s = time.perf_counter()
    for _ in range(count):
        training.step()
    training.sync()
    return (time.perf_counter() - begin_s) / count


def measure(
    training: Training, subject: Subject, directory: Path, clock: Clock, rounds: int
) -> dict[str, Any]:
    """All that is asked of one subject, as far as its time goes.

    Args:
        training: What is trained.
        subject: What saves it.
        directory: Where; empty.
        clock: When to stop.
        rounds: How many pairs of loops of each case at most.
    """
    found: dict[str, Any] = {"label": subject.label, "settings": subject.settings}
    began_s = time.monotonic()
    saver = subject.make(directory)
    try:
        training.sync()
        saver.prepare(training.state)
        found["prepare_s"] = time.monotonic() - began_s
        measurement = Measurement(training, saver, step_time_s(training))
        measurement.warm_up()
        found["stopped"] = _run_cases(measurement, clock, rounds)
        if subject.saves:
            found["restored_equal"] = measurement.check_restored()
        found["facts"] = saver.facts()
    finally:
        saver.close()
    found["cases"] = {
        case.name: summarize(case, measurement.samples[case.name])
        for case in CASES
        if case.name in measurement.samples
    }
    found["steps_s"] = measurement.steps_s
    return found


def _run_cases(measurement: Measurement, clock: Clock, rounds: int) -> str | None:
    """Runs the cases in rounds; says why it stopped before the last, if it did."""
    try:
        for number in range(rounds):
            for case in CASES:
                clock.need(measurement.expected_s(case))
                measurement.run(case, swapped=bool(number % 2))
            if number < 3:
                clock.need(measurement.expected_s(CASES[0]))
                measurement.trace()
    except OutOfTimeError as e:
        return str(e)
    return None


def summarize(case: Case, samples: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Medians of what pairs of loops say; a pair cut short is left out."""
    pairs = list(zip(samples["with_s"], samples["without_s"], strict=False))
    blocked_s = [each for loop in samples["blocked_s"] for each in loop]
    if not pairs:
        return {"samples": dict(samples)}
    return {
        "every": case.every,
        "saves": case.saves,
        "steps": case.steps,
        "step_s": spread([without / case.steps for _, without in pairs]),
        "true_stall_s": spread([(with_s - without) / case.saves for with_s, without in pairs]),
        "loop_over_none": spread([with_s / without for with_s, without in pairs]),
        "blocked_s": {
            "p50": percentile(blocked_s, 50),
            "p99": percentile(blocked_s, 99),
            "max": max(blocked_s),
        },
        "drained_s": spread(samples["drained_s"]),
        "samples": dict(samples),
    }
