"""What `stepsave diff` shows, from the document that `--json` prints."""

from __future__ import annotations

import json
from typing import Any

from stepsave.cli.inspection_text import position_text
from stepsave.cli.screen import GOOD, lay_out, say, shape_text

__all__ = ("show",)

Document = dict[str, Any]

_SHOWN_METADATA = 20
_SHOWN_CHARACTERS = 30  # of a value there


def show(document: Document) -> None:
    """Prints it."""
    for name in ("a", "b"):
        side = document[name]
        position = side["position"]
        where = "" if position is None else f", {position_text(position)}"
        say(f"{name.upper()}  {side['place']}, step {side['step']}{where}")
    say()
    compared, variables = document["compared"], document["variables"]
    if document["are_equal"]:
        say(f"equal: {compared:,} variables, bit by bit, and their metadata", GOOD)
        return
    say(f"{len(variables):,} of {compared:,} variables differ")
    if variables:
        _show_variables(document)
    for name, title in (("only_in_a", "only in A"), ("only_in_b", "only in B")):
        if document[name]:
            say()
            say(title)
            for path in document[name]:
                say(f"  {'/'.join(path)}")
    if document["forms"]:
        say()
        rows = [
            ["/".join(one["path"]), _form_text(one["a"]), _form_text(one["b"])]
            for one in document["forms"]
        ]
        for line in lay_out(["of another shape or dtype", "A", "B"], rows):
            say(line)
    if document["metadata"]:
        say()
        _show_metadata(document["metadata"])


def _show_variables(document: Document) -> None:
    say()
    variables = document["variables"]
    names = {"nan_in_one": "NaN in one", "same_value": "same value"}
    shown = {name: title for name, title in names.items() if any(one[name] for one in variables)}
    rows = [
        [
            "/".join(one["path"]),
            f"{one['differing']:,}",
            f"{one['elements']:,}",
            "-" if one["max_abs_difference"] is None else f"{one['max_abs_difference']:.4g}",
            *(f"{one[name]:,}" for name in shown),
        ]
        for one in variables
    ]
    head = ["variable", "differing", "elements", "max |A - B|", *shown.values()]
    for line in lay_out(head, rows):
        say(line)


def _form_text(form: Document) -> str:
    return f"{form['dtype']} {shape_text(form['shape'])}"


def _show_metadata(metadata: list[Document]) -> None:
    rows = [
        [
            "/".join(one["path"]).removeprefix("metadata/"),
            _value_text(one["a"]),
            _value_text(one["b"]),
        ]
        for one in metadata[:_SHOWN_METADATA]
    ]
    for line in lay_out(["metadata", "A", "B"], rows):
        say(line)
    left = len(metadata) - _SHOWN_METADATA
    if left > 0:
        say(f"and {left} more: see --json")


def _value_text(value: Any) -> str:
    text = "-" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"
