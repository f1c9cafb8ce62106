"""The stack of transformer blocks that `bench.gpu` trains: its arrays and its operations."""

from __future__ import annotations

import dataclasses

STATE_BYTES_PER_WEIGHT = 12  # itself and two slots of Adam, in float32
NAMES = ("qkv", "out", "up", "down", "scale")


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """So many blocks, so wide.

    Attributes:
        count: Number of blocks.
        width: Of a token; a multiple of `head_width`.
        sequence: Tokens that attend to each other.
        head_width: Of an attention head.
    """

    count: int
    width: int
    sequence: int
    head_width: int

    @classmethod
    def of(cls, size_bytes: int, *, quick: bool) -> Shape:
        """The shape whose training state comes closest to a size."""
        width = 64 if quick else 1024 if size_bytes < 2e9 else 2048
        sequence, head_width = (32, 32) if quick else (512, 128)
        per_block = sum(rows * columns for rows, columns in _sizes(width).values())
        count = max(1, round(size_bytes / STATE_BYTES_PER_WEIGHT / per_block))
        return cls(count, width, sequence, head_width)

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @property
    def weights(self) -> int:
        return self.count * sum(rows * columns for rows, columns in _sizes(self.width).values())

    @property
    def state_bytes(self) -> int:
        return self.weights * STATE_BYTES_PER_WEIGHT

    def blocks(self) -> list[list[str]]:
        """The names of the arrays of each block, in the order of `NAMES`."""
        return [[f"block{i}_{name}" for name in NAMES] for i in range(self.count)]

    def params(self) -> dict[str, tuple[int, int]]:
        """The shape of each array, by name."""
        sizes = list(_sizes(self.width).values())
        return {
            name: size for names in self.blocks() for name, size in zip(names, sizes, strict=True)
        }

    def tokens(self, flops: float, step_s: float) -> int:
        """How many tokens a step takes, for steps of about some length.

        Args:
            flops: Operations per second of a plain matrix product. Half of it is what a
                training reaches; it takes eight operations per weight and token, two of them
                because blocks are computed again in the backward pass.
            step_s: The length aimed at.
        """
        tokens = step_s * flops / 2 / (8 * self.weights)
        return max(1, round(tokens / self.sequence)) * self.sequence


def _sizes(width: int) -> dict[str, tuple[int, int]]:
    shapes = (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width), (2, width)
    return dict(zip(NAMES, shapes, strict=True))
