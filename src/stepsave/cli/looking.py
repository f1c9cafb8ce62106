"""The commands that only look: they take no lock, and need no permission to write."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ("diff", "inspect", "verify")

_PLACE = "A backup directory, or s3://bucket/prefix, or gs://bucket/prefix."
_BACKUP = _PLACE + " Followed by @STEP it is the backup of that step, otherwise the newest."

Place = Annotated[str, typer.Argument(metavar="DIR", help=_PLACE, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, as docs/cli.md describes it.")]


def inspect(
    directory: Place,
    json: Json = False,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats",
            help="Read all of the newest backup: least, largest and mean value of each variable, "
            "and how many are NaN or infinite.",
        ),
    ] = False,
) -> None:
    """Show which backups there are, what is in them, and what else lies there.

    Reads small files only, unless --stats is given. Ends with 1 if something is damaged.
    """
    from stepsave.cli import inspection  # and NumPy with it

    raise typer.Exit(inspection.run(directory, as_json=json, with_statistics=stats))


def verify(directory: Place) -> None:
    """Read every byte of every valid backup and check it.

    Names each damaged file and variable, and ends with 1 if there is one.
    """
    from stepsave.cli import verification

    raise typer.Exit(verification.run(directory))


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_BACKUP, show_default=False)],
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="B",
            help="What to compare it with, likewise. Without it, the two backups in A are "
            "compared: the one before the newest, if it is kept, with the newest.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare two backups, bit by bit: variables, metadata, and by how much they differ.

    Ends with 0 if they are equal, with 1 if not.
    """
    from stepsave.cli import comparison

    raise typer.Exit(comparison.run(a, b, as_json=json))
