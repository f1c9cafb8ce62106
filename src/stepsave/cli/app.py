"""The commands put together.

A module of a command imports what takes time only when the command runs, so that `--help` comes
at once. None imports a backend, and Keras only where it says so.
"""

from __future__ import annotations

import sys

import typer

from stepsave.cli import looking
from stepsave.cli.outcome import FOUND, UNASKED
from stepsave.errors import CorruptBackupError, FormatVersionError, StepsaveError

__all__ = ("app", "run")

app = typer.Typer(
    name="stepsave",
    help="Looks at the backups of stepsave, checks, compares, converts and copies them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options() -> None:
    """One command each, as soon as there are several."""


app.command()(looking.inspect)
app.command()(looking.verify)
app.command()(looking.diff)


def run() -> None:
    """Runs the command that was asked for, and ends the process with its status."""
    try:
        app()
    except FormatVersionError as e:  # it may be whole, for those who can read it
        _end(e, UNASKED)
    except CorruptBackupError as e:
        _end(e, FOUND)
    except (StepsaveError, OSError, ValueError) as e:
        _end(e, UNASKED)


def _end(error: Exception, status: int) -> None:
    print(f"stepsave: {error}", file=sys.stderr)  # noqa: T201
    sys.exit(status)
