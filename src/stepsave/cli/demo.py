"""`stepsave demo`."""

from __future__ import annotations

import typer

__all__ = ("demo",)


def demo(context: typer.Context) -> None:
    """Kills a training in the middle of a save, and shows that it goes on with the same bits.

    KERAS_BACKEND chooses the backend: jax (default), tensorflow or torch. Takes half a minute.
    """
    from stepsave.demo.__main__ import main

    raise typer.Exit(main(context.args))
