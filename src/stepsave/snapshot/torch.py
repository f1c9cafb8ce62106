"""torch tensors on the host."""

from __future__ import annotations

import collections
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from stepsave.errors import InvalidStateError
from stepsave.format.records import DTYPES
from stepsave.snapshot.arrays import SavedArray, bytes_of

__all__ = (
    "describe",
    "has_room",
    "is_on_accelerator",
    "make_like",
    "make_stage",
    "overwrite",
    "view_on_host",
)

_logger = logging.getLogger("stepsave")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Targets = Callable[[], Iterator[tuple[int, int, Bytes]]]
Source = Callable[[int], "np.ndarray[Any, Any] | None"]

_EVENT_BYTES = 32 << 20
"""How much is sent between two events: what has arrived is checked while the rest comes."""

# torch has no NumPy form of these; the bits travel as an unsigned type of the same size.
_BITS = {
    getattr(torch, name): (bits, DTYPES[name])
    for name, bits in {
        "bfloat16": torch.uint16,
        "float8_e4m3fn": torch.uint8,
        "float8_e4m3fnuz": torch.uint8,
        "float8_e5m2": torch.uint8,
        "float8_e5m2fnuz": torch.uint8,
        "float8_e8m0fnu": torch.uint8,
    }.items()
    if hasattr(torch, name) and name in DTYPES
}


def view_on_host(leaves: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Returns tensors as NumPy arrays; CPU tensors share their memory."""
    return [_view_plain(leaf) for leaf in leaves]


def _view_plain(leaf: Any) -> np.ndarray[Any, Any]:
    """`_view`, trying first what is enough for most tensors: a state may have ten thousand."""
    if isinstance(leaf, torch.Tensor) and leaf.dtype not in _BITS:
        try:
            return leaf.detach().numpy()
        except (RuntimeError, TypeError):
            pass  # on a device, conjugated, sparse …: `_view` knows what to do or to say
    return _view(leaf)


def _view(leaf: Any) -> np.ndarray[Any, Any]:
    tensor = _check(leaf)
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    # Lazily conjugated or negated tensors have other bits in memory than they show.
    tensor = tensor.resolve_conj().resolve_neg()
    bits = _BITS.get(tensor.dtype)
    try:
        return tensor.numpy() if bits is None else tensor.view(bits[0]).numpy().view(bits[1])
    except TypeError as e:
        raise InvalidStateError(f"dtype {tensor.dtype} has no NumPy form: {e}") from e


def _check(leaf: Any) -> torch.Tensor:
    if not isinstance(leaf, torch.Tensor):
        raise InvalidStateError(f"expected a torch tensor, found {type(leaf).__name__}.")
    tensor = leaf.detach()
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise InvalidStateError(
            f"expected a dense tensor with values, found layout {tensor.layout}, "
            f"dtype {tensor.dtype}, device {tensor.device}."
        )
    return tensor


def describe(leaves: Sequence[Any]) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Returns shape and dtype of each tensor as it will be on the host."""
    return [(tuple(leaf.shape), _host_dtype(_check(leaf).dtype)) for leaf in leaves]


@functools.cache
def _host_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return _view(torch.empty(0, dtype=dtype)).dtype


def make_like(array: np.ndarray[Any, Any], like: torch.Tensor) -> torch.Tensor:
    """Returns a tensor on the same device, laid out alike; of a parameter, a parameter."""
    source = torch.from_numpy(array) if like.dtype not in _BITS else _from_bits(array, like.dtype)
    made = torch.empty_like(like, requires_grad=False)
    made.copy_(source)
    is_asked = like.requires_grad and like.is_leaf
    if isinstance(like, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=is_asked)
    return made.requires_grad_(is_asked)


def overwrite(tensor: torch.Tensor, array: SavedArray) -> None:
    """Gives a tensor the values of an array of its shape and dtype, in its own memory."""
    with torch.no_grad():
        if not tensor.is_contiguous() or array.dtype.itemsize * tensor.numel() != tensor.nbytes:
            tensor.copy_(make_like(np.asarray(array), tensor.detach()))
            return
        target = tensor.detach().reshape(-1).view(torch.uint8)
        begin = 0
        for part in bytes_of(array):
            target[begin : begin + len(part)].copy_(torch.from_numpy(part))
            begin += len(part)


def _from_bits(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    bits = torch.empty(0, dtype=_BITS[dtype][0]).numpy().dtype
    return torch.from_numpy(array.view(bits)).view(dtype)


def is_on_accelerator(leaves: Sequence[Any]) -> bool:
    """Whether any tensor is on a CUDA device."""
    return any(leaf.is_cuda for leaf in leaves)


def has_room(leaves: Sequence[Any], headroom: float) -> bool:
    """Whether the devices have room for a copy, at the peak of what was in use so far."""
    needed_bytes: collections.Counter[torch.device] = collections.Counter()
    for leaf in leaves:
        needed_bytes[leaf.device] += leaf.nbytes
    for device, size_bytes in needed_bytes.items():
        if device.type != "cuda":
            continue
        free_bytes, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator holds but no step has ever needed is free too.
        idle_bytes = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
        if free_bytes + max(0, idle_bytes) < size_bytes * headroom:
            return False
    return True


def make_stage(*, on_device: bool) -> _Stage:
    """Makes what takes tensors off their devices; see `staging.Stage`."""
    return _Stage(on_device=on_device)


class _Stage:
    """Copies within device memory, then to page-locked arenas on a stream of its own.

    Without a copy on the device the caller has to wait: torch updates tensors in place.
    """

    def __init__(self, *, on_device: bool) -> None:
        self.on_device = on_device
        self.blocks = not on_device
        self._copies: list[torch.Tensor] = []
        self._pinned: list[int] = []

    def prepare(self, leaves: Sequence[Any]) -> None:
        """Checks only; the copies are made by the first save, when it is known if they fit."""
        for leaf in leaves:
            _check(leaf)

    def begin(self, leaves: Sequence[Any], targets: Targets) -> Source:
        tensors = [_check(leaf).resolve_conj().resolve_neg() for leaf in leaves]
        if self.on_device:
            try:
                tensors = self._copy(tensors)
            except torch.cuda.OutOfMemoryError as e:
                self._copies = []
                raise MemoryError(str(e)) from e
        if not is_on_accelerator(tensors):
            return lambda leaf: _view(tensors[leaf])
        return _Transfer(tensors, targets)

    def pin(self, memory: Bytes) -> None:
        """Page-locks an arena, so that the device writes to it directly."""
        if not torch.cuda.is_available():
            return
        code = int(_cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
        if code == 0:
            self._pinned.append(memory.ctypes.data)
            return
        _logger.warning(
            "cannot page-lock %d bytes (CUDA error %d): snapshots take longer. Raise the limit "
            "on locked memory (ulimit -l).",
            memory.nbytes,
            code,
        )

    def unpin(self) -> None:
        for address in self._pinned:
            _cudart().cudaHostUnregister(address)
        self._pinned = []

    def _copy(self, sources: list[torch.Tensor]) -> list[torch.Tensor]:
        if list(map(_form, self._copies)) != list(map(_form, sources)):
            self._copies = []  # first, so that there is room for the new ones
            self._copies = [
                torch.empty(source.shape, dtype=source.dtype, device=source.device)
                for source in sources
            ]
        with torch.no_grad():
            # One launch for many tensors; torch's own optimizers use it, but it has no public name.
            foreach_copy: Any = getattr(torch, "_foreach_copy_")  # noqa: B009
            foreach_copy(self._copies, sources)
        return self._copies


class _Transfer:
    """Tensors on their way from CUDA devices into an arena."""

    def __init__(self, tensors: list[torch.Tensor], targets: Targets) -> None:
        self._tensors = [tensor.contiguous() for tensor in tensors]
        self._targets = targets
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        # Recorded now, by the caller: the tensors are as wanted when these have passed.
        self._taken = {
            device: torch.cuda.current_stream(device).record_event() for device in devices
        }
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._arrived: dict[int, Any] = {}  # CUDA events, by tensor
        self._guard = threading.Lock()

    def __call__(self, leaf: int) -> np.ndarray[Any, Any] | None:
        if not self._tensors[leaf].is_cuda:
            return _view(self._tensors[leaf])
        with self._guard:  # the first thread that asks sends everything
            if not self._arrived:
                self._send()
        self._arrived[leaf].synchronize()
        return None

    def _send(self) -> None:
        for device, event in self._taken.items():
            self._streams[device] = stream = torch.cuda.Stream(device)
            stream.wait_event(event)
        sent: list[int] = []
        sent_bytes = 0
        for leaf, begin, memory in self._targets():
            tensor = self._tensors[leaf]
            if not tensor.is_cuda:
                continue
            run = tensor.reshape(-1).view(torch.uint8)[begin : begin + memory.nbytes]
            with torch.cuda.stream(self._streams[tensor.device]):
                torch.from_numpy(memory).copy_(run, non_blocking=True)
            sent.append(leaf)
            sent_bytes += memory.nbytes
            if sent_bytes >= _EVENT_BYTES:
                self._mark(sent)
                sent, sent_bytes = [], 0
        self._mark(sent)

    def _mark(self, leaves: list[int]) -> None:
        """Notes the event after which all that was sent of these leaves has arrived."""
        events = {device: stream.record_event() for device, stream in self._streams.items()}
        for leaf in leaves:
            self._arrived[leaf] = events[self._tensors[leaf].device]


def _form(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _cudart() -> Any:
    return torch.cuda.cudart()
