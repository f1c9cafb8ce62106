"""Whether what is saved on an accelerator comes back, bit for bit: the first part of `bench.gpu`.

Every value of a state is the number of the step. It is saved at each step, and the next step
overwrites it at once: a mixture of two steps, or bytes that went astray, show. Then what only a
real driver can show: a page lock that fails, and a checkpointer that is dropped.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import stepsave
from bench.common import check_same
from bench.gpu.loop import Clock

SAVES, RESTORE_EVERY = 200, 10
Report = Callable[[dict[str, Any]], None]


class Numbers:
    """A state whose values are all the number of the step, of dtypes that need care."""

    DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint8", "uint32", "bool")

    def __init__(self, make: Callable[[tuple[int, ...], int, str], Any], *, quick: bool) -> None:
        """Args: what makes an array of a shape, a value and a dtype; whether to be small."""
        self._make = make
        sizes = (7, 1000, 20_011) if quick else (7, 1000, 300_007)
        self.forms = {
            f"{dtype} {i}-{size}": ((size + i,), dtype)
            for i in range(3)
            for size in sizes
            for dtype in self.DTYPES
        }
        self.forms["large"] = ((50, 1000) if quick else (5000, 1000)), "float32"
        self.forms["scalar"] = (), "int32"

    def state(self, step: int) -> dict[str, Any]:
        return {name: self._make(shape, step, dtype) for name, (shape, dtype) in self.forms.items()}

    def host(self, step: int) -> dict[str, Any]:
        """What is not on the device: changed in place too."""
        return {"numpy": np.full(3000, step % 100), "number": float(step)}

    def expected(self, step: int) -> dict[str, Any]:
        arrays = {
            name: np.full(shape, step % 100).astype(_dtype(dtype))
            for name, (shape, dtype) in self.forms.items()
        }
        return {"device": arrays, "host": self.host(step)}


def _dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)


def of_jax(*, quick: bool) -> tuple[Numbers, Callable[[Any, int], Any]]:
    """The state, and a step that overwrites it: it is donated."""
    import jax
    import jax.numpy as jnp

    def make(shape: tuple[int, ...], step: int, dtype: str) -> Any:
        return jnp.asarray(np.full(shape, step % 100).astype(_dtype(dtype)))  # compiles nothing

    def moved(array: Any, by: Any, flips: Any) -> Any:
        if array.dtype == jnp.bool_:
            return jnp.logical_xor(array, flips)
        return array + by.astype(array.dtype)

    @jax.jit
    def step_values(step: Any) -> Any:
        return jnp.where(step % 100 == 0, -99, 1), step % 100 < 2

    advance = jax.jit(
        lambda state, by, flips: jax.tree.map(lambda a: moved(a, by, flips), state),
        donate_argnums=0,
    )

    def overwrite(state: Any, step: int) -> Any:
        return advance(state, *step_values(step))

    return Numbers(make, quick=quick), overwrite


def of_torch(*, quick: bool) -> tuple[Numbers, Callable[[Any, int], Any]]:
    """The state, and a step that overwrites it in place."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make(shape: tuple[int, ...], step: int, dtype: str) -> Any:
        return torch.full(shape, step % 100, device=device).to(getattr(torch, dtype))

    def overwrite(state: Any, step: int) -> Any:
        for array in state.values():
            array.fill_(step % 100)
        return state

    return Numbers(make, quick=quick), overwrite


FRAMEWORKS = {"jax": of_jax, "torch": of_torch}


def run(options: Any, report: Report) -> dict[str, Any]:
    """All checks of one framework, in this process; each is reported as soon as it is known."""
    clock = Clock.of(options.budget_s)
    lab = importlib.import_module(f"bench.gpu.{options.framework}")
    numbers, overwrite = FRAMEWORKS[options.framework](quick=options.quick)
    mode = "auto" if lab.has_accelerator() else "device"
    saves = 20 if options.quick else SAVES
    found: dict[str, Any] = {"device": lab.device_name(), "checks": {}}
    where = options.directory
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        # "auto" must choose the copy on the device here, as there is room for it.
        f"every step, {mode}": lambda: _saves(
            numbers, overwrite, where / "a", mode, saves, clock.left_s / 3
        ),
        "every step, host": lambda: _saves(
            numbers, overwrite, where / "b", "host", saves, clock.left_s / 2
        ),
        "a checkpointer that was dropped": lambda: _dropped(numbers, overwrite, where / "c"),
    }
    if options.framework == "torch" and lab.has_accelerator():
        checks["a page lock that fails"] = _failed_pin
        checks["the same, on the thread of the training"] = _control
    for name, check in checks.items():
        try:
            found["checks"][name] = check()
        except Exception as e:  # noqa: BLE001 - published as failed, with its error
            traceback.print_exc()
            found["checks"][name] = {"failed": f"{type(e).__name__}: {str(e)[:200]}"}
        print(f"   {name}: {found['checks'][name]}", flush=True)
        report(found)
    return found


def _check(backup: Any, numbers: Numbers, step: int) -> None:
    assert backup is not None
    assert backup.step == step, f"step {backup.step} came back, {step} was saved"
    expected = numbers.expected(step)
    check_same(backup.state["device"], expected["device"])
    check_same(backup.state["host"], expected["host"])


def _saves(
    numbers: Numbers,
    overwrite: Callable[[Any, int], Any],
    directory: Path,
    mode: Any,
    saves: int,
    budget_s: float,
) -> dict[str, Any]:
    """A save of every step, each step overwriting the state as soon as `save` returns."""
    state, host = numbers.state(1), numbers.host(1)
    step, restored = 0, 0
    with stepsave.Checkpointer(directory, snapshot=mode) as saver:
        saver.prepare({"device": state, "host": host})
        clock = Clock.of(budget_s)
        while step < saves and clock.left_s > 0:
            step += 1
            saver.save(step, {"device": state, "host": host})
            state = overwrite(state, step + 1)
            host["numpy"][...] = (step + 1) % 100
            host["number"] = float(step + 1)
            if step % RESTORE_EVERY == 0:
                _check(saver.restore(), numbers, step)
                restored += 1
        _check(saver.restore(), numbers, step)
        stats, stager = saver.stats(), saver._capture._stager
        assert stats.failed == stats.skipped == 0, stats
        return {
            "saves": step,
            "restored": restored + 1,
            "state_bytes": stats.state_bytes // step,
            "snapshot": stager.mode if stager is not None else "none",
            "pins": _pins(stager),
        }


def _pins(stager: Any) -> str:
    """What has become of the memory that transfers go to."""
    pins = getattr(stager, "_pins", None)
    if hasattr(pins, "_held"):
        return f"{len(pins._held)} arenas page-locked"
    if hasattr(pins, "is_refused"):
        return "no pinned memory" if pins.is_refused else "pinned memory of JAX"
    return "none needed"


def _dropped(
    numbers: Numbers, overwrite: Callable[[Any, int], Any], directory: Path
) -> dict[str, Any]:
    """Checkpointers that nobody closes, and new ones, whose arenas may get the same addresses."""
    addresses: list[set[int]] = []
    for turn in range(4):
        state = numbers.state(1)
        saver = stepsave.Checkpointer(directory / str(turn), snapshot="host")
        for step in range(1, 6):
            saver.save(step, {"device": state, "host": numbers.host(step)})
            state = overwrite(state, step + 1)
        _check(saver.restore(), numbers, 5)
        addresses.append({memory.ctypes.data for memory in saver._capture._pool.memories})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del saver
            gc.collect()
    reused = sum(len(a & b) for a, b in itertools.pairwise(addresses))
    return {"checkpointers": len(addresses), "addresses used again": reused}


def _failed_pin() -> dict[str, Any]:
    """A registration that CUDA refuses, through our page locks; then a kernel and a transfer."""
    import torch

    from stepsave.snapshot import torch as torch_module
    from stepsave.snapshot.page_locks import PageLocks
    from stepsave.snapshot.pages import allocate_pages

    driver = torch_module._Cuda(torch.device("cuda", 0))
    codes: list[int] = []
    real = driver.register

    def register(address: int, _: int) -> int:
        codes.append(real(address, 0))  # no bytes: refused
        return codes[-1]

    driver.register = register
    locks = PageLocks(driver)
    memory = allocate_pages(2 << 20)
    locks.pin(memory)
    assert codes[0] != 0, "CUDA refused nothing"
    ones = torch.ones(1000, device="cuda") + 1
    torch.cuda.synchronize()
    target = torch.from_numpy(memory[:4000])
    target.copy_(ones.view(torch.uint8), non_blocking=True)
    torch.cuda.synchronize()
    assert (memory[:4000].view(np.float32) == 2).all()
    driver.register = real
    locks.pin(memory)
    assert list(locks._held) == [memory.ctypes.data]
    locks.unpin()
    return {"refused with": codes[0], "next kernel": "ran"}


CONTROL = """
import torch
torch.ones(1, device="cuda")
print("code", int(torch.cuda.cudart().cudaHostRegister(1 << 40, 0, 1)))
try:
    torch.ones(1000, device="cuda") + 1
    torch.cuda.synchronize()
    print("ran")
except RuntimeError as e:
    print("raised", str(e).splitlines()[0])
"""


def _control() -> dict[str, Any]:
    """What the check before this one would show if the training's thread registered memory."""
    ended = subprocess.run(
        [sys.executable, "-c", CONTROL], capture_output=True, text=True, check=True
    )
    return {"next kernel": ended.stdout.splitlines()}


def failures(found: Mapping[str, Any]) -> list[str]:
    """The checks that failed."""
    return [name for name, check in found.get("checks", {}).items() if "failed" in check]
