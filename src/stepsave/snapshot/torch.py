"""torch tensors on the host."""

from __future__ import annotations

import collections
import functools
import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stepsave.errors import InvalidStateError
from stepsave.format.records import DTYPES
from stepsave.snapshot.arrays import SavedArray, bytes_of
from stepsave.snapshot.page_locks import NoPins, PageLocks
from stepsave.snapshot.pieces import Pieces
from stepsave.snapshot.torch_transfer import Clones, Lanes, Transfer, parts_of

__all__ = (
    "describe",
    "has_room",
    "is_on_accelerator",
    "make",
    "make_like",
    "make_pins",
    "make_stage",
    "overwrite",
    "signature",
    "view_on_host",
    "wait_computed",
)

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all devices

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


def wait_computed(leaves: Sequence[Any]) -> None:
    """Returns when all that was begun on their devices has ended; on the CPU it has."""
    for device in {leaf.device for leaf in leaves if leaf.is_cuda}:
        torch.cuda.synchronize(device)


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
        raise InvalidStateError(f"dtype {tensor.dtype} has no NumPy form: {e}. Convert it.") from e


def _is_spread(leaf: Any) -> bool:
    """Whether a tensor lies on the devices of several processes, as parts."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(leaf, module.DTensor)


def _check(leaf: Any) -> torch.Tensor:
    if not isinstance(leaf, torch.Tensor):
        raise InvalidStateError(
            f"expected a torch tensor, found {type(leaf).__name__}. Convert it."
        )
    if _is_spread(leaf):
        raise InvalidStateError(
            "found a DTensor, of which other processes have parts (FSDP, tensor parallelism). Only "
            "what each process has as a whole can be saved: gather it (`full_tensor()`, or "
            "`get_model_state_dict` with `full_state_dict`), or use torch.distributed.checkpoint."
        )
    tensor = leaf.detach()
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise InvalidStateError(
            f"expected a dense tensor with values, found layout {tensor.layout}, "
            f"dtype {tensor.dtype}, device {tensor.device}. Convert it, or leave it out."
        )
    return tensor


def describe(leaves: Sequence[Any]) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Returns shape and dtype of each tensor as it will be on the host."""
    return [(tuple(leaf.shape), _host_dtype(_check(leaf).dtype)) for leaf in leaves]


signature = operator.attrgetter("shape", "dtype", "device", "layout")
"""Of a tensor; two with the same one are described alike."""


@functools.cache
def _host_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return _view(torch.empty(0, dtype=dtype)).dtype


def make(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Returns a tensor on the host. The memory is its own.

    Raises:
        TypeError: If torch has no such dtype.
    """
    dtype = next((name for name, (_, host) in _BITS.items() if host == array.dtype), None)
    source = torch.from_numpy(array) if dtype is None else _from_bits(array, dtype)
    return source.clone()


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
    tensor = tensor.detach()
    if not tensor.is_contiguous() or array.dtype.itemsize * tensor.numel() != tensor.nbytes:
        tensor.copy_(make_like(np.asarray(array), tensor))
        return
    target = tensor.reshape(-1).view(torch.uint8)
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


def has_room(leaves: Sequence[Any], headroom: float, reserve: float) -> bool:
    """Whether the devices have room for a copy, at the peak of what was in use so far."""
    needed_bytes: collections.Counter[torch.device] = collections.Counter()
    for leaf in leaves:
        needed_bytes[leaf.device] += leaf.nbytes
    for device, size_bytes in needed_bytes.items():
        if device.type != "cuda":
            continue
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        # What torch's allocator holds but no step has ever needed is free too.
        idle_bytes = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
        if free_bytes + max(0, idle_bytes) < size_bytes * headroom + total_bytes * reserve:
            return False
    return True


def make_pins(leaves: Sequence[Any]) -> PageLocks | NoPins:
    """Makes what page-locks arenas for transfers of such tensors; see `staging.Pins`."""
    devices = [leaf.device for leaf in leaves if leaf.is_cuda]
    return PageLocks(_Cuda(devices[0])) if devices else NoPins()


class _Cuda:
    """The driver of CUDA devices, by torch's copy of the runtime; see `page_locks.Driver`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, size_bytes: int) -> int:
        # On a device in use: the first call on another one would take memory there.
        with torch.cuda.device(self._device):
            return int(_cudart().cudaHostRegister(address, size_bytes, _PORTABLE))

    def unregister(self, address: int) -> int:
        with torch.cuda.device(self._device):
            return int(_cudart().cudaHostUnregister(address))


def _cudart() -> Any:
    return torch.cuda.cudart()


def make_stage(_: object, *, on_device: bool) -> _Stage:
    """Makes what takes tensors off their devices; see `staging.Stage`."""
    return _Stage(on_device=on_device)


class _Stage:
    """Copies within device memory, then to page-locked arenas on a stream of its own.

    Without a copy on the device the caller has to wait until all has arrived, as torch updates
    tensors in place; but not until it is checked.
    """

    def __init__(self, *, on_device: bool) -> None:
        self.on_device = on_device
        self.blocks = False
        self._clones: Clones | None = None
        self._held: Transfer | None = None  # of tensors that the caller must not change yet
        self._lanes = Lanes()

    def prepare(self, leaves: Sequence[Any]) -> None:
        """Checks only; the copies are made by the first save, when it is known if they fit."""
        for leaf in leaves:
            _check(leaf)

    def begin(self, leaves: Sequence[Any], pieces: Pieces, arena: Bytes) -> Transfer:
        # Not by `no_grad`: an interrupt within its `__enter__` or `__exit__` would leave the
        # training's thread without gradients for good.
        tensors = [leaf.detach().resolve_conj().resolve_neg() for leaf in leaves]
        if not self.on_device:
            self._held = Transfer(self._lanes, parts_of(tensors, pieces), arena)
            return self._held
        try:
            clones = self._clones
            if clones is None or not clones.fit(tensors, pieces):
                self._clones = clones = None  # first, so that there is room for others
                self._clones = clones = Clones(tensors, pieces)
            clones.take(tensors)
        except torch.cuda.OutOfMemoryError as e:
            self._clones = None
            raise MemoryError(str(e)) from e
        return Transfer(self._lanes, clones.parts, arena)

    def release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.send()
            self._lanes.settle()

    def free(self) -> None:
        self._clones = None

    def settle(self) -> None:
        self._lanes.settle()
