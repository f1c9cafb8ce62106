"""Sizes and times as people write and read them."""

from __future__ import annotations

import re

__all__ = ("parse_size", "show_time")

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY_UNITS = {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(text: str) -> int:
    """Returns the bytes that a text such as `1GB`, `300 MB` or `2GiB` stands for.

    Raises:
        ValueError: If it does not stand for any.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = _UNITS | _BINARY_UNITS | {"": 1}
    unit = None if match is None else units.get(match[2].upper())
    if match is None or unit is None:
        raise ValueError(f"{text!r}: expected a size such as 300MB, 1GB or 2GiB.")
    return round(float(match[1]) * unit)


def show_time(time_s: float) -> str:
    """Returns a time with about two digits."""
    if time_s < 0.0995:
        return f"{time_s * 1e3:.2g} ms"
    if time_s < 0.995:
        return f"{time_s * 1e3:.0f} ms"
    if time_s < 59.95:
        return f"{time_s:.1f} s"
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
