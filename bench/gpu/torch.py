"""A training on PyTorch for `bench.gpu`, what its device can do at best, and what saves it."""

from __future__ import annotations

import collections
import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch.nn import functional

from bench.gpu.loop import State, Subject
from bench.gpu.savers import Floor, Stepsave, stepsave_subjects
from bench.gpu.shape import Shape

PACKAGES = ("torch", "torch_checkpointing")


def device_name() -> str:
    return torch.cuda.get_device_name() if has_accelerator() else "cpu"


def has_accelerator() -> bool:
    return torch.cuda.is_available()


def memory_bytes() -> int | None:
    """Device memory that is free; None without a device."""
    return torch.cuda.mem_get_info()[0] if has_accelerator() else None


def _device() -> torch.device:
    return torch.device("cuda" if has_accelerator() else "cpu")


def _sync() -> None:
    if has_accelerator():
        torch.cuda.synchronize()


def matmul_flops(size: int) -> float:
    """Operations per second of a square product in bfloat16."""
    a = torch.randn(size, size, device=_device(), dtype=torch.bfloat16)
    times_s = [_timed_s(lambda: a @ a) for _ in range(5)]
    return 2 * size**3 / min(times_s[1:])


def floors(size_bytes: int, repeats: int) -> dict[str, list[float]]:
    """Seconds for each way to the host, and for a copy on the device, of one tensor."""
    source = torch.zeros(size_bytes // 4, device=_device())
    pageable, copy = torch.zeros(size_bytes // 4), torch.empty_like(source)
    found: dict[str, list[float]] = {"pageable": [], "pinned": [], "device copy": []}
    pinned = torch.zeros(size_bytes // 4).pin_memory() if has_accelerator() else None
    for _ in range(repeats):
        found["pageable"].append(_timed_s(lambda: pageable.copy_(source)))
        if pinned is not None:
            found["pinned"].append(_timed_s(lambda: pinned.copy_(source, non_blocking=True)))
        found["device copy"].append(_timed_s(lambda: copy.copy_(source)))
    return found


def _timed_s(work: Any) -> float:
    _sync()
    begin_s = time.perf_counter()
    work()
    _sync()
    return time.perf_counter() - begin_s


class Block(torch.nn.Module):
    """A transformer block whose arrays have the sizes that `Shape` says."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.qkv = torch.nn.Linear(width, 3 * width, bias=False)
        self.out = torch.nn.Linear(width, width, bias=False)
        self.up = torch.nn.Linear(width, 4 * width, bias=False)
        self.down = torch.nn.Linear(4 * width, width, bias=False)
        self.scale = torch.nn.Parameter(torch.ones(2, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(functional.rms_norm(x, x.shape[-1:], self.scale[0]))
        parts = heads.reshape(*x.shape[:2], 3, self.shape.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            parts[0], parts[1], parts[2], is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(
            functional.gelu(self.up(functional.rms_norm(x, x.shape[-1:], self.scale[1])))
        )


class Training:
    """Transformer blocks in bfloat16 (autocast) with Adam in float32, changed in place."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        torch.manual_seed(0)
        size = (tokens // shape.sequence, shape.sequence, shape.width)
        self._inputs, self._targets = (torch.randn(size, device=_device()) for _ in range(2))
        with _device():
            self._blocks = torch.nn.ModuleList(Block(shape) for _ in range(shape.count))
        self._optimizer = torch.optim.Adam(self._blocks.parameters(), fused=True)
        self._in_flight: collections.deque[Any] = collections.deque()
        # As Keras has them beside its weights: a state of one dtype is easier to copy.
        self._counters = {
            "iteration": torch.zeros((), dtype=torch.int32, device=_device()),
            "seed": torch.zeros(2, dtype=torch.int64, device=_device()),
        }
        self.step()  # makes the slots
        self.sync()

    @property
    def state(self) -> State:
        params = {name: param.detach() for name, param in self._blocks.named_parameters()}
        slots = {
            name: self._optimizer.state[param] for name, param in self._blocks.named_parameters()
        }
        return {
            "params": params,
            "m": {name: slot["exp_avg"] for name, slot in slots.items()},
            "v": {name: slot["exp_avg_sq"] for name, slot in slots.items()},
            "counters": self._counters,
        }

    def step(self) -> None:
        with torch.autocast(_device().type, torch.bfloat16):
            x = self._inputs
            for block in self._blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            loss = functional.mse_loss(x.float(), self._targets)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for counter in self._counters.values():
            counter.add_(1)
        if has_accelerator():
            self._in_flight.append(torch.cuda.current_stream().record_event())
        if len(self._in_flight) > 2:
            self._in_flight.popleft().synchronize()

    def sync(self) -> None:
        _sync()
        self._in_flight.clear()


class _DeviceCopy(Floor):
    """A call per dtype copies all tensors over the copies before: nothing leaves the device."""

    def prepare(self, state: State) -> None:
        self._copies = [torch.empty_like(tensor) for tensor in _tensors(state)]
        self._dtypes = {copy.dtype for copy in self._copies}

    def save(self, step: int, state: State) -> None:
        del step
        pairs = list(zip(self._copies, _tensors(state), strict=True))
        for dtype in self._dtypes:
            some = [pair for pair in pairs if pair[0].dtype == dtype]
            torch._foreach_copy_([copy for copy, _ in some], [tensor for _, tensor in some])

    def wait(self) -> None:
        _sync()


class _Transfer(Floor):
    """Copies to pinned memory on a side stream; the next step waits for them on the device.

    It could wait later, before the optimizer changes the first weight; then forward and
    backward pass hide some of it. That takes a place inside the user's step.
    """

    def prepare(self, state: State) -> None:
        self._targets = [torch.empty_like(each, device="cpu") for each in _tensors(state)]
        self._stream: Any = None
        if has_accelerator():
            self._targets = [target.pin_memory() for target in self._targets]
            self._stream = torch.cuda.Stream()

    def save(self, step: int, state: State) -> None:
        del step
        if self._stream is None:
            for target, tensor in zip(self._targets, _tensors(state), strict=True):
                target.copy_(tensor)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for target, tensor in zip(self._targets, _tensors(state), strict=True):
                target.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._stream)

    def wait(self) -> None:
        _sync()


def _tensors(state: State) -> list[torch.Tensor]:
    return [tensor for tensors in state.values() for tensor in tensors.values()]


class _Dcp:
    """`torch.distributed.checkpoint.async_save`, with a stager that keeps pinned buffers."""

    def __init__(self, directory: Path) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._directory = directory
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=has_accelerator(),
                use_shared_memory=False,
                use_async_staging=True,
                use_non_blocking_copy=has_accelerator(),
            )
        )
        # In torch 2.11 each save closes the stager, which then cannot be used again.
        self._close_stager, self._stager.close = self._stager.close, lambda: None
        self._response: Any = None
        self._newest: Path | None = None

    def prepare(self, state: State) -> None:
        """DCP does nothing ahead."""

    def save(self, step: int, state: State) -> None:
        import torch.distributed.checkpoint as dcp

        self.wait()  # two saves at a time would overwrite the stager's buffers
        self._pending = self._directory / str(step)
        self._response = dcp.async_save(
            _flat(state), checkpoint_id=self._pending, async_stager=self._stager, no_dist=True
        )
        self._is_staged = False

    def before_update(self) -> None:
        """The optimizer changes tensors in place, so they must have been staged."""
        if self._response is not None and not self._is_staged:
            self._response.staging_completion.result()
            self._is_staged = True

    def wait(self) -> None:
        if self._response is None:
            return
        self._response.staging_completion.result()
        self._response.upload_completion.result()
        self._response = None
        if self._newest is not None:
            shutil.rmtree(self._newest)
        self._newest = self._pending

    def restore(self, like: State) -> State | None:
        import torch.distributed.checkpoint as dcp

        self.wait()
        flat = {name: torch.zeros_like(each, device="cpu") for name, each in _flat(like).items()}
        dcp.load(flat, checkpoint_id=self._newest, no_dist=True)
        return {
            group: {name: flat[f"{group}/{name}"].numpy() for name in tensors}
            for group, tensors in like.items()
        }

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.wait()
        self._close_stager()


class _TorchCheckpointing:
    """`torch_checkpointing`, Meta's successor of DCP: a process of its own writes."""

    def __init__(self, directory: Path) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        self._directory = directory
        config = CheckpointManager.Config.with_async_save()
        # 0.1.1 writes unaligned through O_DIRECT, which file systems refuse.
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        if not has_accelerator():  # without one its defaults are refused
            staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
            config.save = AsyncCheckpointSaverConfig(staging_config=staging)
        self._manager = config.build()
        self._write: Any = None
        self._newest: Path | None = None

    def prepare(self, state: State) -> None:
        self._manager.prewarm_staging(state)

    def save(self, step: int, state: State) -> None:
        self.wait()  # as the others: one save at a time, and at most one backup is kept
        self._pending = self._directory / str(step)
        self._write = self._manager.save(str(self._pending), state)

    def before_update(self) -> None:
        """As it says to guard the optimizer: waits as long as a capture is in progress."""
        with self._manager.lock():
            pass

    def wait(self) -> None:
        if self._write is None:
            return
        self._write.result()
        self._write = None
        if self._newest is not None:
            shutil.rmtree(self._newest)
        self._newest = self._pending

    def restore(self, like: State) -> State | None:
        self.wait()
        into = {
            group: {name: torch.zeros_like(each, device="cpu") for name, each in tensors.items()}
            for group, tensors in like.items()
        }
        loaded = self._manager.load(str(self._newest), into)
        return {
            group: {name: each.numpy() for name, each in tensors.items()}
            for group, tensors in loaded.items()
        }

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _flat(state: State) -> dict[str, torch.Tensor]:
    return {
        f"{group}/{name}": tensor
        for group, tensors in state.items()
        for name, tensor in tensors.items()
    }


def host_bandwidth_s(directory: Path, state: State, repeats: int) -> list[float]:
    """Seconds until a snapshot of the state is in our arena; the device is idle."""
    return Stepsave(directory, "host").snapshot_s(state, repeats)


def _optional_peers() -> tuple[Subject, ...]:
    if not importlib.util.find_spec("torch_checkpointing"):
        return ()
    how = (
        "`CheckpointManager` with asynchronous saves, warmed ahead, without direct output, which "
        "fails; the update waits for `lock()`"
    )
    peer = Subject("torch_checkpointing", "torch_checkpointing", how, _TorchCheckpointing)
    return (peer,)


SUBJECTS = (
    *stepsave_subjects(rehearsal=not has_accelerator()),
    Subject(
        "dcp",
        "PyTorch DCP, asynchronous",
        "`async_save` with a `DefaultStager` of persistent pinned buffers, staged "
        "asynchronously; the step waits until it is",
        _Dcp,
    ),
    *_optional_peers(),
    Subject(
        "device copy",
        "floor: copy on the device",
        "`_foreach_copy_` of all tensors of a dtype over the copies before",
        lambda _: _DeviceCopy(),
        saves=False,
    ),
    Subject(
        "transfer",
        "floor: transfer to pinned memory",
        "copies on a side stream, for which the next step waits on the device",
        lambda _: _Transfer(),
        saves=False,
    ),
)
