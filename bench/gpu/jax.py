"""A training on JAX for `bench.gpu`, what its device can do at best, and what saves it."""

from __future__ import annotations

import collections
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.loop import State, Subject
from bench.gpu.savers import Floor, Stepsave, stepsave_subjects
from bench.gpu.shape import Shape

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "orbax-checkpoint")
LEARNING_RATE = 1e-3


def device_name() -> str:
    return str(jax.devices()[0].device_kind)


def has_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def memory_bytes() -> int | None:
    """Device memory that JAX may use; None where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def matmul_flops(size: int) -> float:
    """Operations per second of a square product in bfloat16."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    times_s = [_timed_s(lambda: product(a, a)) for _ in range(5)]
    return 2 * size**3 / min(times_s[1:])


def floors(size_bytes: int, repeats: int) -> dict[str, list[float]]:
    """Seconds for each way to the host, and for a copy on the device, of one array."""
    fresh = jax.jit(lambda a, by: a + by)
    source = jnp.zeros(size_bytes // 4, jnp.float32)
    over = jax.jit(lambda a, _: jnp.copy(a), donate_argnums=1, keep_unused=True)
    copy = jnp.copy(source)
    found: dict[str, list[float]] = {"pageable": [], "pinned": [], "device copy": []}
    pinned = source.sharding.with_memory_kind("pinned_host") if has_accelerator() else None
    for i in range(repeats):
        # A fresh array each time: JAX keeps what it has brought to the host once.
        array = fresh(source, i).block_until_ready()
        begin_s = time.perf_counter()
        np.asarray(array)
        found["pageable"].append(time.perf_counter() - begin_s)
        if pinned is not None:
            found["pinned"].append(_timed_s(lambda: jax.device_put(source, pinned)))
        begin_s = time.perf_counter()
        copy = over(source, copy).block_until_ready()
        found["device copy"].append(time.perf_counter() - begin_s)
    return found


def _timed_s(make: Any) -> float:
    begin_s = time.perf_counter()
    jax.block_until_ready(make())
    return time.perf_counter() - begin_s


class Training:
    """Transformer blocks in bfloat16 with Adam in float32; the state is donated to each step."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        self._inputs, self._targets = (
            jax.random.normal(
                jax.random.key(seed), (tokens // shape.sequence, shape.sequence, shape.width)
            ).astype(jnp.bfloat16)
            for seed in (1, 2)
        )
        params = {}
        for i, (name, size) in enumerate(shape.params().items()):
            params[name] = jax.random.normal(jax.random.key(10 + i), size) * 0.02
        zeros = jax.tree.map(jnp.zeros_like, params)
        more_zeros = jax.tree.map(jnp.zeros_like, params)  # no buffer may be donated twice
        # As Keras has them beside its weights: a state of one dtype is easier to copy.
        counters = {"iteration": jnp.int32(0), "seed": jnp.zeros(2, jnp.uint32)}
        self._state: State = {"params": params, "m": zeros, "v": more_zeros, "counters": counters}
        self._losses: collections.deque[jax.Array] = collections.deque()
        self._step = jax.jit(functools.partial(_step, shape=shape), donate_argnums=0)
        self._count = 0

    @property
    def state(self) -> State:
        return self._state

    def step(self) -> None:
        self._count += 1
        self._state, loss = self._step(self._state, self._inputs, self._targets, self._count)
        self._losses.append(loss)
        if len(self._losses) > 2:
            self._losses.popleft().block_until_ready()

    def sync(self) -> None:
        jax.block_until_ready((self._state, list(self._losses)))
        self._losses.clear()


def _step(state: Any, inputs: Any, targets: Any, count: Any, *, shape: Shape) -> Any:
    loss, gradients = jax.value_and_grad(_loss)(state["params"], inputs, targets, shape)
    correction = jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)

    def moved(p: Any, m: Any, v: Any) -> Any:
        return p - LEARNING_RATE * correction * m / (jnp.sqrt(v) + 1e-8)

    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], gradients)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state["v"], gradients)
    params = jax.tree.map(moved, state["params"], m, v)
    counters = jax.tree.map(lambda counter: counter + 1, state["counters"])
    return {"params": params, "m": m, "v": v, "counters": counters}, loss


def _loss(params: Any, inputs: Any, targets: Any, shape: Shape) -> Any:
    def block(x: Any, weights: Any) -> Any:
        qkv, out, up, down, scale = (weight.astype(jnp.bfloat16) for weight in weights)
        heads = _normal(x, scale[0]) @ qkv
        heads = heads.reshape(*x.shape[:2], 3, shape.heads, shape.width // shape.heads)
        mixed = jax.nn.dot_product_attention(
            heads[:, :, 0], heads[:, :, 1], heads[:, :, 2], is_causal=True
        )
        x = x + mixed.reshape(x.shape) @ out
        return x + jax.nn.gelu(_normal(x, scale[1]) @ up) @ down

    x = inputs
    for names in shape.blocks():
        x = jax.checkpoint(block)(x, [params[name] for name in names])
    return jnp.mean((x - targets).astype(jnp.float32) ** 2)


def _normal(x: Any, scale: Any) -> Any:
    wide = x.astype(jnp.float32)
    rms = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return (wide * rms).astype(x.dtype) * (1 + scale)


class _DeviceCopy(Floor):
    """One compiled copy of the state over the copy before: nothing leaves the device."""

    def prepare(self, state: State) -> None:
        self._copy = jax.jit(_copies, donate_argnums=1, keep_unused=True)
        self._old = jax.tree.map(jnp.zeros_like, state)

    def save(self, step: int, state: State) -> None:
        del step
        self._old = self._copy(state, self._old)

    def wait(self) -> None:
        jax.block_until_ready(self._old)


def _copies(state: Any, _: Any) -> Any:
    return jax.tree.map(jnp.copy, state)


class _Transfer(Floor):
    """`device_put` to pinned host memory; the step to which the state is donated waits."""

    _sent: Any = None

    def prepare(self, state: State) -> None:
        self._places = jax.tree.map(_pinned, state)

    def save(self, step: int, state: State) -> None:
        del step
        self._sent = jax.device_put(state, self._places, may_alias=False)

    def wait(self) -> None:
        jax.block_until_ready(self._sent)
        self._sent = None


def _pinned(array: jax.Array) -> Any:
    if not has_accelerator():
        return array.sharding
    return array.sharding.with_memory_kind("pinned_host")


class _Orbax:
    """`CheckpointManager` with asynchronous checkpointing."""

    def __init__(self, directory: Path, *, compress: bool) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=True),
            item_handlers=ocp.PyTreeCheckpointHandler(use_compression=compress),
        )

    def prepare(self, state: State) -> None:
        """Orbax does nothing ahead."""

    def save(self, step: int, state: State) -> None:
        if not self._manager.save(step, args=self._ocp.args.PyTreeSave(dict(state))):
            raise RuntimeError(f"Orbax did not begin the save of step {step}.")

    def before_update(self) -> None:
        """Nothing: Orbax has copied what it returns from."""

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def restore(self, like: State) -> State | None:
        del like
        restored: State = self._manager.restore(
            self._manager.latest_step(), args=self._ocp.args.PyTreeRestore()
        )
        return restored

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._manager.close()


def host_bandwidth_s(directory: Path, state: State, repeats: int) -> list[float]:
    """Seconds until a snapshot of the state is in our arena; the device is idle."""
    return Stepsave(directory, "host").snapshot_s(state, repeats)


SUBJECTS = (
    *stepsave_subjects(rehearsal=not has_accelerator()),
    Subject(
        "orbax",
        "Orbax, asynchronous, no compression",
        "`CheckpointManager(max_to_keep=1)`, `PyTreeCheckpointHandler(use_compression=False)`",
        lambda directory: _Orbax(directory, compress=False),
    ),
    Subject(
        "device copy",
        "floor: copy on the device",
        "a jitted copy of all arrays into the memory of the one before",
        lambda _: _DeviceCopy(),
        saves=False,
    ),
    Subject(
        "transfer",
        "floor: transfer to pinned memory",
        "`device_put` of all arrays to `pinned_host`, dropped when there",
        lambda _: _Transfer(),
        saves=False,
    ),
    Subject(
        "orbax compressed",
        "Orbax, asynchronous, as it comes",
        "`CheckpointManager(max_to_keep=1)`; zstd",
        lambda directory: _Orbax(directory, compress=True),
    ),
)
