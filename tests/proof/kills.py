"""Kills processes at random moments of their saves, restores, uploads and deletions.

Each next one goes on in the directory where the one before was killed. What it resumes from is
looked at first: the newest backup that was acknowledged, or a newer one, whole. Cut short, the
campaign goes on where it was when it is run again with the same count.
"""

import contextlib
import itertools
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

from bucket_support import Proxy, s3_environment, s3_server

from proof.nursery import Nursery, tidy_up_when_terminated, use_small_shards
from proof.random_deaths import Victims, chance_of, mixtures
from proof.record import Campaign, Row, parser

WRITERS = ("auto", "tensorstore")  # the first is the direct one, where the disk takes it
AT_ONCE = 5  # kills in one directory, before the next kind of life


def main(arguments=None):
    options = parser("kills", __doc__)
    options.add_argument("--count", type=int, default=1000, help="how many processes to kill")
    options = options.parse_args(arguments)
    if options.quick:
        options.count = 2 * AT_ONCE * len(mixtures())
    use_small_shards()
    tidy_up_when_terminated()
    progress = Progress(options.results / "kills.progress", options)
    options.seed = progress.seed
    print(f"seed {options.seed}, {progress.done} of {options.count} done before")  # noqa: T201
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        proxy = stack.enter_context(Proxy.before(stack.enter_context(s3_server())))
        environment = s3_environment(proxy.url)
        os.environ.update(environment)
        kill_all(progress, options.count, root, environment)
        campaign = Campaign("kills", options, root)
        for name, mixture in mixtures().items():
            cases, bad = progress.of(name)
            if cases == 0:
                continue  # so few were asked for
            campaign.add(Row(f"Killed at random moments: {mixture.title}", cases, bad))
    progress.remove()
    sys.exit(1 if campaign.bad else 0)


def kill_all(progress, count, root, environment):
    """Goes on from what is done, until so many are killed."""
    kinds = list(itertools.product(mixtures(), WRITERS))
    numbers = itertools.count()
    while progress.done < count:
        turn = progress.done // AT_ONCE
        name, writer = kinds[turn % len(kinds)]
        many = min((turn + 1) * AT_ONCE, count) - progress.done
        chance = chance_of(progress.seed, progress.done)
        # A nursery for each turn: what one leaves behind, a child say, is not met by the next.
        with Nursery(root / "noise", environment) as nursery:
            directory = root / str(next(numbers))
            made = Victims(nursery, mixtures()[name], {"writer": writer}, directory, chance)
            kill_some(progress, name, made, many)


def kill_some(progress, name, victims, many):
    """Kills so many in one directory, fewer if one of them leaves it as it must not be."""
    for number in range(many):
        try:
            step = victims.kill_one()
            if number == many - 1 and not victims.mixture.anew:
                victims.end(step)
        except Exception:  # noqa: BLE001  counted, and shown
            where = f"kill {progress.done} of seed {progress.seed}, {name}, {victims.options}"
            print(f"bad: {where}", flush=True)  # noqa: T201
            traceback.print_exc()
            progress.note(name, bad=True)
            victims.drop()
            return
        progress.note(name, bad=False)


class Progress:
    """What is done, kept in a file, so that nothing of it is lost when the campaign is cut."""

    def __init__(self, path, options):
        self._path = path
        wanted = {"count": options.count, "quick": options.quick}
        with contextlib.suppress(FileNotFoundError):
            self._kept = json.loads(path.read_text())
            if self._kept["wanted"] == wanted:
                return
        self._kept = {"wanted": wanted, "seed": options.seed, "cases": {}, "bad": {}}

    @property
    def seed(self):
        return self._kept["seed"]

    @property
    def done(self):
        return sum(self._kept["cases"].values())

    def of(self, name):
        return self._kept["cases"].get(name, 0), self._kept["bad"].get(name, 0)

    def note(self, name, *, bad):
        cases, wrong = self.of(name)
        self._kept["cases"][name], self._kept["bad"][name] = cases + 1, wrong + bad
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(self._kept))
        os.replace(beside, self._path)

    def remove(self):
        self._path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
