"""What `stepsave inspect` shows, from the document that `--json` prints."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from stepsave.cli.amounts import age_text, size_text
from stepsave.cli.screen import BAD, lay_out, say, shape_text

__all__ = ("position_text", "show")

Document = dict[str, Any]

_LABEL = 12  # columns
_TOLD = ("backend", "build_config", "keras_version", "phase", "position", "processes", "resume")
"""Metadata of stepsave's callback: shown in words, or of no use to people."""

_TOLD_DAMAGES = 20


def show(document: Document) -> None:
    """Prints it."""
    say(document["place"])
    if document["in_use_by"] is not None:
        say(f"  {_holder_text(document['in_use_by'])}")
    for damage in document["damages"]:
        say(f"  {damage['path']}: {damage['text']}", BAD)
    if not document["backups"] and not document["disks"]:
        say("  no valid backup")
    for backup in document["backups"]:
        say()
        _show_backup(backup)
    if document["others"]:
        say()
        say("also there")
        for line in _lay_out_others(document["others"]):
            say(f"  {line}")
    shown = next((backup for backup in document["backups"] if backup["variables"]), None)
    if shown is not None:
        say()
        for line in lay_out(*_table(shown["variables"])):
            say(line)
    for disk in document["disks"]:
        say()
        show(disk)


def _holder_text(holder: Document) -> str:
    if holder["is_certain"]:
        pid = holder["pid"]
        return f"in use by process {pid}" if pid else "in use by a process on another machine"
    return f"last saved to by process {holder['pid']} on {holder['host']}"


def _show_backup(backup: Document) -> None:
    say(f"step {backup['step']}" + ("" if backup["is_newest"] else ", kept"))
    for label, text in _facts(backup):
        say(f"  {label:<{_LABEL}}{text}")
    for damage in backup["damages"][:_TOLD_DAMAGES]:
        lost = ", ".join("/".join(path) for path in damage["variables"])
        say(f"  {'damaged':<{_LABEL}}{damage['path']}: {damage['text']}", BAD)
        if lost:
            say(f"  {'':<{_LABEL}}lost: {lost}", BAD)
    left = len(backup["damages"]) - _TOLD_DAMAGES
    if left > 0:
        say(f"  {'':<{_LABEL}}and {left} more: `stepsave verify` lists them", BAD)


def _facts(backup: Document) -> Iterator[tuple[str, str]]:
    if backup["saved_at"] is not None:
        at = dt.datetime.fromisoformat(backup["saved_at"])
        yield "saved", f"{age_text(backup['age_s'])} ago, {at:%Y-%m-%d %H:%M:%S} UTC"
    if backup["position"] is not None:
        yield "position", position_text(backup["position"])
    if backup["has_ended"]:
        yield "training", "has come to its end"
    variables = backup["variables"]
    count = "" if variables is None else f" in {_count(len(variables), 'variable')}"
    state_bytes = backup["bytes"] if variables is None else backup["state_bytes"]
    on_disk = f", {size_text(backup['bytes'])} in all files"
    yield "size", f"{size_text(state_bytes)}{count}{on_disk}"
    if backup["backend"] is not None:
        yield "made by", f"Keras {backup['keras_version']} on {backup['backend']}"
    if backup["process"] is not None:
        yield "part", f"what process {backup['process']} of {backup['processes']} has"
    elif (backup["processes"] or 1) > 1:
        yield "processes", f"{backup['processes']}"
    others = [key for key in backup["metadata"] if key not in _TOLD and backup["metadata"][key]]
    if others:
        yield "metadata", ", ".join(others)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def position_text(position: Document) -> str:
    """Returns where in a training that is, counting epochs as Keras prints them."""
    of_steps = "" if position["steps_per_epoch"] is None else f" of {position['steps_per_epoch']}"
    return f"epoch {position['epoch'] + 1}, after batch {position['batch']}{of_steps}"


def _lay_out_others(others: Iterable[Document]) -> Iterator[str]:
    rows = [
        (one["name"], "" if one["bytes"] is None else size_text(one["bytes"]), one["text"])
        for one in others
    ]
    name_width, size_width = (max(len(row[i]) for row in rows) for i in (0, 1))
    for name, size, text in rows:
        yield f"{name:<{name_width}}  {size:>{size_width}}  {text}"


def _table(variables: Sequence[Document]) -> tuple[list[str], list[list[str]]]:
    head = ["variable", "shape", "dtype", "size"]
    rows = [
        ["/".join(one["path"]), shape_text(one["shape"]), one["dtype"], size_text(one["bytes"])]
        for one in variables
    ]
    if any("statistics" in one for one in variables):
        head += ["min", "max", "mean", "NaN", "inf"]
        for row, one in zip(rows, variables, strict=True):
            found = one["statistics"]
            row += [_number(found[name]) for name in ("min", "max", "mean")]
            row += [f"{found['nan']}", f"{found['infinite']}"]
    return head, rows


def _number(value: float | Sequence[float] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, Sequence):
        return f"{complex(*value):.3g}"
    return f"{value}" if isinstance(value, int) and abs(value) < 10**9 else f"{value:.4g}"
