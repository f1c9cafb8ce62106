"""What the contracts share: how they look for errors, and memory as saves have it."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Generator, Iterable

import numpy as np

__all__ = ("aligned", "raises", "random_bytes")


@contextlib.contextmanager
def raises(kind: type[BaseException], *told: str) -> Generator[None]:
    """Expects an error.

    Args:
        kind: Of which kind.
        told: What its text must hold.
    """
    found = None
    try:
        yield
    except kind as e:
        found = str(e)
    assert found is not None, f"expected {kind.__name__}, and nothing was raised"
    missing = [part for part in told if part not in found]
    assert not missing, f"the text of the error lacks {missing}: {found}"


def aligned(data: Iterable[int] | bytes) -> memoryview:
    """Returns page-aligned memory with these bytes, as direct writes need it."""
    source = bytes(data)
    memory = mmap.mmap(-1, len(source))
    memory[:] = source
    return memoryview(memory)


def random_bytes(size_bytes: int, seed: int = 0) -> bytes:
    """Returns bytes of which no two parts are alike."""
    return np.random.default_rng(seed).bytes(size_bytes)
