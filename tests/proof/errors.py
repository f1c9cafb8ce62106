"""Errors of the operating system, one after the other, at each operation of a save.

After each: the save fails and tells the cause, the old backup is restored bit for bit, the next
save works, and threads, descriptors, memory and files are what they were before.
"""

import itertools
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

from proof import injected
from proof.faults import ERRORS, Sufferer
from proof.power_lives import set_small_shards
from proof.record import Campaign, Row, parser
from proof.slowness import train_on_one_that_stands_still
from stepsave.errors import StepsaveError

WRITERS = "auto", "tensorstore"
KERNEL = (
    ("auto", "pwrite64", "EIO"),
    ("auto", "pwrite64", "EDQUOT"),
    ("auto", "fdatasync", "EIO"),
    ("auto", "fsync", "EIO"),
    ("auto", "rename", "ENOSPC"),
    ("tensorstore", "write,writev,pwrite64", "EIO"),
    ("tensorstore", "write,writev,pwrite64", "EDQUOT"),
    ("tensorstore", "fsync,fdatasync", "EIO"),
    ("tensorstore", "rename,renameat,renameat2", "EDQUOT"),
)
QUICK = 7


def main(arguments=None):
    options = parser("errors", __doc__).parse_args(arguments)
    print(f"seed {options.seed}", flush=True)  # noqa: T201
    turn = random.Random(options.seed).randrange(100)
    set_small_shards()
    with tempfile.TemporaryDirectory(prefix="stepsave-errors-") as folder:
        campaign = Campaign("errors", options, folder)
        for writer, double, lasts in itertools.product(WRITERS, (False, True), (False, True)):
            what = "all operations from one on fail" if lasts else "one operation fails"
            kept = "two kept" if double else "one kept"
            directory = Path(tempfile.mkdtemp(dir=folder), "backup")
            sufferer = Sufferer(directory, writer=writer, double_checkpoint=double)
            bad = _suffer(sufferer, turn, lasts, QUICK if options.quick else 1)
            campaign.add(Row(f"{what}: writer {writer}, {kept}", sufferer.cases, bad))
        for writer in () if options.quick else WRITERS:
            campaign.add(_stand_still(Path(tempfile.mkdtemp(dir=folder), "backup"), writer))
        if reason := injected.reason_not_to():
            print(f"skipped: errors by strace: {reason}")  # noqa: T201
            return 0
        for writer, calls, error in KERNEL:
            place = Path(tempfile.mkdtemp(dir=folder))
            outcome, failed = injected.fail_a_save(place / "backup", writer, calls, error, place)
            is_bad = not failed or not outcome.startswith("failed")
            campaign.add(Row(f"{calls} says {error} (strace), {writer}", 1, int(is_bad)))
    return 1 if campaign.bad else 0


def _stand_still(directory, writer):
    bad = 0
    try:
        train_on_one_that_stands_still(directory, writer, time.sleep)
    except (AssertionError, StepsaveError):
        traceback.print_exc()
        bad = 1
    return Row(f"a disk that stands still for ten minutes, writer {writer}", 1, bad)


def _suffer(sufferer, turn, lasts, every):
    """Lets each operation fail, with each error that it may say, until a promise is broken.

    Returns:
        How many were broken: 1 at most, as afterwards nothing can be relied on.
    """
    turns = range(1 if lasts or every > 1 else max(map(len, ERRORS.values())))
    try:
        for leaves, more in itertools.product((None, 13), turns):
            for number in itertools.count(1, every):
                if not sufferer.suffer(number, turn + more, leaves=leaves, lasts=lasts):
                    break
        sufferer.close()
    except (AssertionError, StepsaveError):
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
