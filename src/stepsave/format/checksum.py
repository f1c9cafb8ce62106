"""CRC-32C (Castagnoli), the checksum of zarr3's `crc32c` codec, of OCDBT and of our markers.

From `awscrt`, because it is the one that computes it with the widest instructions that the
processor has, at twice the speed of the narrow ones for data in cache, and releases the
interpreter's lock meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from awscrt import checksums

__all__ = ("combine_crc32c", "crc32c")

crc32c = cast("Callable[..., int]", checksums.crc32c)
"""`crc32c(data, before=0)`: of contiguous bytes, going on from the checksum of those before."""

combine_crc32c = cast("Callable[[int, int, int], int]", checksums.combine_crc32c)
"""Of two stretches of bytes one after the other: their checksums, and the length of the second."""
