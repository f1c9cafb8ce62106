"""torch tensors on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stepsave.errors import InvalidStateError
from stepsave.spec import DTYPES

__all__ = ("view_on_host",)

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
    return [_view(leaf) for leaf in leaves]


def _view(leaf: Any) -> np.ndarray[Any, Any]:
    if not isinstance(leaf, torch.Tensor):
        raise InvalidStateError(f"expected a torch tensor, found {type(leaf).__name__}.")
    tensor = leaf.detach()
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise InvalidStateError(
            f"expected a dense tensor with values, found layout {tensor.layout}, "
            f"dtype {tensor.dtype}, device {tensor.device}."
        )
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    # Lazily conjugated or negated tensors have other bits in memory than they show.
    tensor = tensor.resolve_conj().resolve_neg()
    bits = _BITS.get(tensor.dtype)
    try:
        return tensor.numpy() if bits is None else tensor.view(bits[0]).numpy().view(bits[1])
    except TypeError as e:
        raise InvalidStateError(f"dtype {tensor.dtype} has no NumPy form: {e}") from e
