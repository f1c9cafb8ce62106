"""What a campaign found, as JSON that is kept."""

import argparse
import dataclasses
import json
import platform
import random
import subprocess
import time
from pathlib import Path

from bench import machine

import stepsave

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of the published table.

    Attributes:
        what: What was done to the backups.
        cases: How many times, each followed by a restore whose every bit was compared.
        bad: Restores that were wrong: neither the last acknowledged backup nor a newer complete
            one, a mixture, an error where there was a valid backup, or debris left for good.
        notes: What else a reader should know, in few words.
    """

    what: str
    cases: int
    bad: int
    notes: str = ""


def parser(module, description):
    """The options that all campaigns have."""
    made = argparse.ArgumentParser(prog=f"python -m proof.{module}", description=description)
    made.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    made.add_argument("--quick", action="store_true", help="few cases, to see that it runs")
    made.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    return made


class Campaign:
    """Collects rows, and writes them down as they are known: what is cut short loses nothing."""

    def __init__(self, name, options, directory):
        """Begins.

        Args:
            name: Of the JSON file.
            options: What `parser` parsed.
            directory: Where backups lie, for the name of its file system.
        """
        self.path = options.results / f"{name}.json"
        self.rows = []
        self._begin_s = time.monotonic()
        facts = machine.describe(directory)
        self._document = {
            "campaign": name,
            "seed": options.seed,
            "quick": options.quick,
            "of": {"stepsave": stepsave.__version__, "commit": _commit()},
            "machine": {"system": platform.system(), **facts},
        }

    def add(self, row):
        self.rows.append(row)
        print(f"{row.what}: {row.cases} cases, {row.bad} bad. {row.notes}", flush=True)  # noqa: T201
        self._write()

    def keep(self, **parts):
        """Keeps what has a shape of its own, beside the rows."""
        self._document |= parts
        self._write()

    def _write(self):
        document = {
            **self._document,
            "took_s": round(time.monotonic() - self._begin_s, 1),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(document, indent=1) + "\n")

    @property
    def bad(self):
        """Wrong restores of all rows: the exit status is to tell."""
        return sum(row.bad for row in self.rows)


def _commit():
    """What was tested: a commit, and whether the working tree differed from it."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
