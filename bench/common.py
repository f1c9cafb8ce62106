"""What the benchmarks of the engine share: states, a timed save, its check, the JSON."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import stepsave
from bench import machine
from bench.stats import spread

RESULTS = Path(__file__).parent / "results"
FRAMEWORKS = ("numpy", "jax", "torch")
ARRAY_BYTES = 4_000_000
UNSTEADY = 2  # the first saves of a checkpointer write new files, not over retired ones


class Times(NamedTuple):
    """One save, timed from outside: what a system says of itself is not taken."""

    stall_s: float
    durable_s: float

    @property
    def background_s(self) -> float:
        return self.durable_s - self.stall_s


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all have."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{module}", description=description)
    made.add_argument("--directory", type=Path, default=None, help="where to save")
    made.add_argument("--results", type=Path, default=None, help="where the JSON goes")
    made.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    return made


def parse(
    made: argparse.ArgumentParser, arguments: Sequence[str] | None, quick: Mapping[str, Any]
) -> argparse.Namespace:
    """Parses; `--quick` changes defaults only, so that other options still count."""
    if made.parse_known_args(arguments)[0].quick:
        made.set_defaults(**quick)
    options = made.parse_args(arguments)
    if getattr(options, "rounds", UNSTEADY + 2) < UNSTEADY + 2:
        made.error(f"at least {UNSTEADY + 2} rounds: the first {UNSTEADY} are not summed up")
    return options


def make_state(framework: str, count: int, array_bytes: int, added: float = 0.0) -> dict[str, Any]:
    """Equal states of arrays of any framework, ready: random bits, as weights have."""
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(array_bytes // 4, np.float32) for _ in range(count))
    return {f"w{i}": _as_array(framework, array + added) for i, array in enumerate(arrays)}


class Training:
    """What is saved where nothing trains: states that take turns, so that all values change.

    What has not changed is not written, and each buffer and each backup is compared with the
    next but one; so there are three. Having them ready costs nothing while a save is timed.

    Attributes:
        state: The one that is due.
    """

    def __init__(self, framework: str, count: int, array_bytes: int) -> None:
        self._states = [make_state(framework, count, array_bytes, added) for added in range(3)]
        self.state = self._states[0]

    def step(self) -> dict[str, Any]:
        """Goes on to the next state, and returns it."""
        self._states.append(self._states.pop(0))
        self.state = self._states[0]
        return self.state


def _as_array(framework: str, array: np.ndarray) -> Any:
    if framework == "numpy":
        return array
    if framework == "jax":
        import jax.numpy as jnp

        return jnp.array(array).block_until_ready()
    if framework == "torch":
        import torch

        return torch.tensor(array)
    raise ValueError(framework)


def timed_save(saver: stepsave.Checkpointer, step: int, state: Mapping[str, Any]) -> Times:
    """Saves a state all of which has changed, and waits; nothing else runs meanwhile."""
    times, handle = save_timed(saver, step, state)
    state_bytes = sum(array.nbytes for array in state.values())
    # Or it would be no whole save that is timed. What lies between small arrays counts with them.
    assert handle.changed_bytes >= state_bytes, f"{handle.changed_bytes} of {state_bytes} changed"
    return times


def save_timed(
    saver: stepsave.Checkpointer, step: int, state: Mapping[str, Any]
) -> tuple[Times, stepsave.SaveHandle]:
    """The same, and what the save says of itself."""
    begin_s = time.perf_counter()
    handle = saver.save(step, state)
    stall_s = time.perf_counter() - begin_s
    handle.wait()
    ended_s = time.perf_counter() - begin_s
    assert not handle.skipped
    assert handle.durable_s is not None
    assert handle.durable_s <= ended_s, handle
    return Times(stall_s, handle.durable_s), handle


def told_bytes(of: stepsave.SaveHandle | stepsave.SaveStats) -> dict[str, int | None]:
    """What a save, or all of them, say that changed and was written; None if they do not."""
    # Versions that write whole states have no such attributes. When none is measured any more,
    # read them where this is called, and delete it.
    return {name: getattr(of, name, None) for name in ("changed_bytes", "written_bytes")}


def check_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """A save is only as good as its restore: every bit of every array.

    Raises:
        AssertionError: If anything is missing, more, or different.
    """
    assert found.keys() == expected.keys(), "other arrays than were saved"
    for name, array in expected.items():
        before, after = np.asarray(array), np.asarray(found[name])
        assert after.dtype == before.dtype, f"{name}: another data type"
        assert after.shape == before.shape, f"{name}: another shape"
        same = np.array_equal(before.reshape(-1).view(np.uint8), after.reshape(-1).view(np.uint8))
        assert same, f"{name}: other values than were saved"


def check_restored(saver: stepsave.Checkpointer, state: Mapping[str, Any], step: int) -> None:
    """Restores the newest backup and compares it with what was saved last."""
    backup = saver.restore()
    assert backup is not None
    assert backup.step == step
    check_same(backup.state, state)


def ratios(values: Sequence[float], floors: Sequence[float]) -> dict[str, Any]:
    """Each value as a ratio of its floor, round by round, and then their spread."""
    return spread([a / b for a, b in zip(values, floors, strict=True)])


def write(name: str, options: argparse.Namespace, result: Mapping[str, Any]) -> Path:
    """Keeps a result, with a line per list of numbers: readable, and small enough to commit."""
    text = json.dumps(result, indent=1)
    text = re.sub(r"\[[-+\d.eE,\s]*\]", lambda found: " ".join(found[0].split()), text)
    assert json.loads(text) == json.loads(json.dumps(result))
    directory: Path = options.results or RESULTS / machine.name()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(text + "\n")
    return path
