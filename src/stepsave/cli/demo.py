"""`stepsave demo`."""

from __future__ import annotations

import typer

__all__ = ("demo",)


def demo(context: typer.Context) -> None:
    """Kill a training in the middle of a save, and go on from it.

    KERAS_BACKEND chooses the backend: jax (default), tensorflow or torch. Takes half a minute.
    """
    from stepsave.demo.__main__ import main

    raise typer.Exit(main(context.args))
