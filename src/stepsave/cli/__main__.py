"""Entry point of `stepsave` and of `python -m stepsave.cli`."""

from __future__ import annotations

import sys

__all__ = ("main",)


def main() -> None:
    """Runs the command line; says what to install if it is not all there."""
    try:
        from stepsave.cli import app  # its packages may be missing
    except ModuleNotFoundError as e:
        if e.name not in ("rich", "typer"):
            raise
        sys.exit(f"stepsave: {e.name} not found. Run: pip install 'stepsave[cli]'")
    app.run()


if __name__ == "__main__":
    main()
