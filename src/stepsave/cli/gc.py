"""`stepsave gc`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from stepsave.cli.amounts import size_text

__all__ = ("gc",)


def gc(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A directory, s3://… or gs://…")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove it.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="In a bucket: whoever saved there last is not training.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say it as JSON.")] = False,
) -> None:
    """Show what is left over beside the backups; --yes removes it.

    That is what killed saves have left, temporary files, and the directory that the next save would
    write into again: a training has one of the size of its state as long as it goes on. Valid
    backups, and what stepsave did not write, are never touched.
    """
    from stepsave.cli.collecting import Found, collect, look

    found: Found = collect(directory, force=force) if yes else look(directory)
    if as_json:
        typer.echo(json.dumps({"removed": yes, **dataclasses.asdict(found)}))
        return
    typer.echo(f"{found.place}: {_describe(found.valid)}")
    for one in found.leftovers:
        size = "size unknown" if one.used_bytes is None else size_text(one.used_bytes)
        typer.echo(f"  {one.path}  {size}\n      {one.reason}")
    if not found.leftovers:
        typer.echo("Nothing is left over.")
        return
    total = size_text(sum(one.used_bytes or 0 for one in found.leftovers))
    is_all_known = all(one.used_bytes is not None for one in found.leftovers)
    about = total if is_all_known else f"at least {total}"
    if yes:
        typer.echo(f"Removed: {about}.")
    else:
        typer.echo(f"Nothing was changed. --yes removes it and frees {about}.")


def _describe(valid: tuple[int, ...]) -> str:
    if not valid:
        return "no valid backup"
    steps = " and ".join(map(str, valid))
    return f"the backup of step {steps} is valid" if len(valid) == 1 else f"steps {steps} are valid"
