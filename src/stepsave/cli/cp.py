"""`stepsave cp`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from stepsave.cli.amounts import size_text, time_text

__all__ = ("cp",)


def cp(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A directory, s3://… or gs://…; @STEP after it means that of a step.",
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="DST", help="Where to: likewise.")],
    everything: Annotated[bool, typer.Option("--all", help="The backups before it too.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a backup in DST that is not older.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say what was copied as JSON.")] = False,
) -> None:
    """Copy a backup to another directory or bucket.

    The newest one, unless a step is named. The copy is a backup like any other: a training goes on
    from it. It becomes valid in one step, when all of it was read back, so a copy that is
    interrupted does not count; what DST had before stays valid until then. SRC may be in use, DST
    must not be.
    """
    from stepsave.cli.copying import copy

    copied = copy(source, target, everything=everything, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(one) for one in copied]))
        return
    for one in copied:
        if one.was_there:
            typer.echo(f"{one.place}: step {one.step} was there already, and is whole.")
            continue
        speed = f"{size_text(one.size_bytes / one.took_s)}/s"
        typer.echo(
            f"{one.place}: step {one.step}, {size_text(one.size_bytes)} copied and read back in "
            f"{time_text(one.took_s)} ({speed})."
        )
