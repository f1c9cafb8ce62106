"""The commands put together.

A module of a command imports what takes time only when the command runs, so that `--help` comes
at once. None imports a backend, and Keras only where it says so.
"""

from __future__ import annotations

import sys

import typer

from stepsave.cli import looking
from stepsave.cli.bench import bench
from stepsave.cli.cp import cp
from stepsave.cli.demo import demo
from stepsave.cli.export import export
from stepsave.cli.gc import gc
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

app.command()(looking.inspect)
app.command()(looking.verify)
app.command()(looking.diff)
app.command()(export)
app.command()(cp)
app.command()(gc)
app.command()(bench)
app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(demo)


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
