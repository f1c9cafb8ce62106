"""Times whole fits from inside, without changing how Keras runs them.

Imports Keras: set `KERAS_BACKEND` first.
"""

# ruff: noqa: ARG002  Keras calls hooks with arguments that we do not need
from __future__ import annotations

import collections
import dataclasses
import resource
import threading
import time
from collections.abc import Callable
from typing import Any

import keras

HOOKS = ("on_train_batch_begin", "on_train_batch_end")
CUT = "at_cut"  # of stepsave: told of batches that are done between these two hooks


def device_sync(model: Any) -> None:
    """Returns when the device has done everything that was dispatched to it."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        state = getattr(model, "_jax_state", None)
        live = state if state and not model._jax_state_synced else {}
        # Keras wraps the dict in a class of its own, which is no pytree to JAX.
        arrays = [array for part in live.values() for array in part]
        jax.block_until_ready(arrays or [variable.value for variable in model.variables])
    elif backend == "torch":
        import torch

        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    else:
        import tensorflow as tf

        tf.test.experimental.sync_devices()


class Probe(keras.callbacks.Callback):
    """Notes when each batch begins.

    It has no hook at the end of a batch: one would switch asynchronous dispatch off. First
    in the list of callbacks, so that the work of all others is inside the window. What
    stepsave does between two batches belongs to the step before.
    """

    def __init__(self, loop_begin: int = 0, *, sync_each_step: bool = False) -> None:
        super().__init__()
        self.begins_s: list[float] = []
        self.cpu_begin_s = 0.0
        self._loop_begin = loop_begin
        self._sync_each_step = sync_each_step

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._sync_each_step or batch == self._loop_begin:
            device_sync(self._model)
        if not self.begins_s:
            self.cpu_begin_s = cpu_s()
        self.begins_s.append(time.perf_counter())


class End(keras.callbacks.Callback):
    """Notes when the last step, and what others do after it, is really done. Last in the list."""

    def __init__(self) -> None:
        super().__init__()
        self.end_s = 0.0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        device_sync(self._model)
        self.end_s = time.perf_counter()


@dataclasses.dataclass(slots=True)
class FitTimes:
    """One fit. Times of steps are by the number of the batch, from 0.

    Attributes:
        before_s: Until the first batch begins.
        warming_s: From there to the begin of the loop: the steps around the saves for which
            buffers are not there yet.
        loop_s: From there until the last step is done on the device.
        after_s: From there until `fit` returns.
    """

    before_s: float
    warming_s: float
    loop_s: float
    after_s: float
    cpu_before_s: float
    cpu_s: float
    steps_s: list[float]
    blocked_s: list[float]
    saves_s: list[float]


class Hooks:
    """Times the hooks of callbacks, on the thread of `fit` only: what they hold it up.

    Only hooks that a callback defines are wrapped; a wrapped default would switch
    asynchronous dispatch off.

    Args:
        callbacks: The callbacks under test.
        before_cut: Called before a callback is told of a cut, outside the time that is taken:
            to wait for the step, which the probe does only after that.
    """

    def __init__(self, callbacks: list[Any], before_cut: Callable[[], None] | None = None) -> None:
        self._thread = threading.get_ident()
        self.begin_s: collections.Counter[int] = collections.Counter()
        self.end_s: collections.Counter[int] = collections.Counter()
        self._waits = [callback.waits_s for callback in callbacks if hasattr(callback, "waits_s")]
        for callback in callbacks:
            for name in HOOKS:
                hook = getattr(callback, name)
                if not getattr(hook, "_is_default", False):
                    setattr(callback, name, self._timed(hook, name.endswith("begin")))
            if hasattr(callback, CUT):
                setattr(callback, CUT, self._timed_cut(getattr(callback, CUT), before_cut))

    def _timed(self, hook: Callable[..., None], is_begin: bool) -> Callable[..., None]:
        times = self.begin_s if is_begin else self.end_s

        def timed(batch: int, logs: Any = None) -> None:
            begin_s = time.perf_counter()
            hook(batch, logs)
            if threading.get_ident() == self._thread:
                times[batch] += time.perf_counter() - begin_s

        return timed

    def _timed_cut(
        self, hook: Callable[[int], None], before: Callable[[], None] | None
    ) -> Callable[[int], None]:
        def timed(batches_done: int) -> None:
            if before is not None:
                before()
            begin_s = time.perf_counter()
            hook(batches_done)
            self.end_s[batches_done - 1] += time.perf_counter() - begin_s

        return timed

    def batch_s(self, batch: int) -> float:
        """What hooks took in all while this batch was the current one."""
        waits_s = sum(waits.get(batch, 0.0) for waits in self._waits)
        return self.begin_s[batch] + self.end_s[batch] + waits_s

    def save_s(self, done: int) -> float:
        """What the save after so many batches took: at the end of one or before the next."""
        waits_s = sum(waits.get(done, 0.0) for waits in self._waits)
        return self.end_s[done - 1] + self.begin_s[done] + waits_s


def cpu_s() -> float:
    """CPU time of this process and its ended children; the kernel's own threads are in none."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed_fit(
    workload: Any,
    callbacks: list[Any],
    steps: int,
    every: int,
    loop_begin: int,
    *,
    sync_each_step: bool = False,
) -> FitTimes:
    """Runs one fit with callbacks under test and times it; the loop from some batch on."""
    probe, end = Probe(loop_begin, sync_each_step=sync_each_step), End()
    sync = (lambda: device_sync(workload.model)) if sync_each_step else None
    hooks = Hooks(callbacks, sync)
    cpu_before_s, begin_s = cpu_s(), time.perf_counter()
    workload.fit([probe, *callbacks, end], steps)
    done_s, cpu_done_s = time.perf_counter(), cpu_s()
    assert len(probe.begins_s) == steps, f"{len(probe.begins_s)} batches began, not {steps}"
    ends_s = [*probe.begins_s[1:], end.end_s]
    loop_begin_s = probe.begins_s[loop_begin]
    return FitTimes(
        before_s=probe.begins_s[0] - begin_s,
        warming_s=loop_begin_s - probe.begins_s[0],
        loop_s=end.end_s - loop_begin_s,
        after_s=done_s - end.end_s,
        cpu_before_s=probe.cpu_begin_s - cpu_before_s,
        cpu_s=cpu_done_s - probe.cpu_begin_s,
        steps_s=[end - begin for begin, end in zip(probe.begins_s, ends_s, strict=True)],
        blocked_s=[hooks.batch_s(batch) for batch in range(steps)],
        saves_s=[hooks.save_s(done) for done in range(every, steps, every)],
    )


def dispatches_async(callbacks: list[Any]) -> bool:
    """Whether Keras hands the end of a batch to other threads with these callbacks."""
    return keras.callbacks.CallbackList([Probe(), *callbacks, End()])._async_train
