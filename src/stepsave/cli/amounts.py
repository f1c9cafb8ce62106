"""Sizes and times as people write and read them."""

from __future__ import annotations

import re

__all__ = ("age_text", "parse_size", "size_text", "time_text")

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY_UNITS = {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SHOWN = ("B", "kB", "MB", "GB", "TB", "PB")


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


def size_text(size_bytes: float) -> str:
    """Returns a size in decimal units, with three digits."""
    exponent = 0
    while size_bytes >= 999.5 and exponent < len(_SHOWN) - 1:
        size_bytes, exponent = size_bytes / 1000, exponent + 1
    digits = 0 if exponent == 0 or size_bytes >= 99.95 else 1 if size_bytes >= 9.995 else 2
    return f"{size_bytes:.{digits}f} {_SHOWN[exponent]}"


def time_text(time_s: float) -> str:
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


def age_text(age_s: float) -> str:
    """Returns how long ago something was, in its largest unit."""
    for unit, unit_s in (("day", 86400), ("h", 3600), ("min", 60)):
        if age_s >= 2 * unit_s:
            count = int(age_s // unit_s)
            return f"{count} {unit}s" if unit == "day" else f"{count} {unit}"
    return f"{max(0, age_s):.0f} s"
