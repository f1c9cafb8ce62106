"""Entry point of the demo: `python -m stepsave.demo`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

_BACKENDS = ("jax", "tensorflow", "torch")


def main(words: Sequence[str] | None = None) -> int:
    """Runs the demo, or in a child process one of its trainings; returns the exit status.

    Args:
        words: Its arguments; None for those of the process.
    """
    backend = os.environ.setdefault("KERAS_BACKEND", "jax")
    arguments = _parse_arguments(words)
    problem = _find_missing(backend)
    if problem:
        print(f"stepsave.demo: {problem}", file=sys.stderr)  # noqa: T201
        return 1
    if arguments.child:
        # Imports Keras, which the parent does without.
        from stepsave.demo import child

        if arguments.child == "train":
            child.train(arguments.directory, arguments.announce_from)
        else:
            child.compare(arguments.directory)
        return 0
    from stepsave.demo import parent  # needs rich, which was looked for just now

    try:
        parent.run()
    except parent.DemoError as e:
        print(f"\nstepsave.demo failed: {e}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stepsave.demo",
        description=(
            "Kills a training of a digits classifier in the middle of a write, starts it again "
            "and shows where it goes on. KERAS_BACKEND chooses the backend: jax (default), "
            "tensorflow or torch."
        ),
    )
    # How the demo starts itself, once per training.
    parser.add_argument("--child", choices=("train", "compare"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("--announce-from", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def _find_missing(backend: str) -> str | None:
    """Says what must be installed or set before the demo can run."""
    if backend not in _BACKENDS:
        return f"expected KERAS_BACKEND to be one of {', '.join(_BACKENDS)}; found {backend!r}."
    missing = [
        f"{package} (import {module})" if package != module else package
        for package, module in (("scikit-learn", "sklearn"), ("rich", "rich"), (backend, backend))
        if importlib.util.find_spec(module) is None
    ]
    if not missing:
        return None
    return f"{' and '.join(missing)} not found. Run: pip install 'stepsave[demo,{backend}]'"


if __name__ == "__main__":
    sys.exit(main())
