"""How many background threads should write? One, two, and as many as come by default.

The same rounds as in `bench.saves.engine`, floors included, with a checkpointer for each number.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench import common
from bench.common import FRAMEWORKS
from bench.saves import engine

VARIANTS = {
    "1 writer": {"writer_threads": 1},
    "2 writers": {"writer_threads": 2},
    "default writers": {},
}
QUICK = {"megabytes": 20, "rounds": 5}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("saves.writers", __doc__)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--frameworks", nargs="*", choices=FRAMEWORKS, default=["numpy"])
    options = common.parse(parser, arguments, QUICK)
    subjects = [
        engine.Subject(f"{framework}, {name}", framework, dict(settings))
        for framework in options.frameworks
        for name, settings in VARIANTS.items()
    ]
    engine.run("writers", subjects, options)


if __name__ == "__main__":
    main()
