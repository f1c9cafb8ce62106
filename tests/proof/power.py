"""Cuts the power of real file systems while backups are saved; nothing acknowledged may be lost.

Each file system is on a loop device. Its power is cut after every operation of a save, and at
random moments, in one of two ways: it is shut down by `FS_IOC_SHUTDOWN`, so that nothing that is in
memory reaches the disk; or the disk under it, which has a write cache, loses what was not flushed,
or part of that. Then it is mounted again, a backup restored, another one saved, and all removed.
"""

import argparse
import os
import random
import shutil
import sys

from proof.cuts import Trials
from proof.disks import ISOLATED, Disk, folder_in_memory, reason_not_to
from proof.record import Campaign, Row, parser
from proof.volatile_disk import VolatileDisk

MODES = (
    ("ext4", "data=ordered"),
    ("xfs", ""),
    ("btrfs", ""),
    ("ext4", "data=journal"),
    ("ext4", "data=writeback"),
    ("ext4", "nodelalloc"),
    ("ext4", "nobarrier"),
)
RANDOM_CUTS = 60
QUICK = 12
"""How many times less with `--quick`."""


def main(arguments=None):
    options = _options(arguments)
    if reason := reason_not_to():
        print(f"skipped: {reason}")  # noqa: T201
        return 0
    if not options.inside:
        given = sys.argv[1:] if arguments is None else list(arguments)
        command = [*ISOLATED, sys.executable, "-m", "proof.power", *given]
        # The same process, so that whoever ends it ends all that is mounted.
        os.execvp(command[0], [*command, "--inside", f"--seed={options.seed}"])
    print(f"seed {options.seed}", flush=True)  # noqa: T201
    with folder_in_memory() as folder:
        campaign = Campaign("power", options, folder)
        for kind, mount_options in MODES:
            name = f"{kind}, {mount_options or 'as it comes'}"
            if options.only not in name:
                continue
            if not shutil.which(f"mkfs.{kind}"):
                print(f"skipped: {name}: no mkfs.{kind} here")  # noqa: T201
                continue
            for make in (Disk, VolatileDisk):
                # btrfs knows no such call; without barriers, disks must not have such a cache.
                if (make, kind) != (Disk, "btrfs") and (make, mount_options) != (
                    VolatileDisk,
                    "nobarrier",
                ):
                    disk = make(folder / f"{name} on {make.__name__}", kind, mount_options)
                    _run(campaign, name, disk, options)
    return 1 if campaign.bad else 0


def _options(arguments):
    made = parser("power", __doc__)
    made.add_argument("--only", default="", help="of the file systems, those with this in the name")
    made.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return made.parse_args(arguments)


def _run(campaign, name, disk, options):
    """Adds the rows of one file system on one kind of disk."""
    how = "shut down" if disk.goes_on else "disk cache lost"
    rng = random.Random(f"{options.seed} {name} {how}")
    disk.mount()
    try:
        trials = Trials(disk, rng)
        trials.cut_at_steps(every=QUICK if options.quick else 1)
        campaign.add(_row(f"{name}: {how} after an operation of a save", trials))
        trials = Trials(disk, rng)
        trials.cut_at_random(RANDOM_CUTS // (QUICK if options.quick else 1))
        campaign.add(_row(f"{name}: {how} at a random moment", trials))
    finally:
        disk.close()


def _row(what, trials):
    notes = f"{trials.acknowledged} saves acknowledged before" if trials.acknowledged else ""
    return Row(what, trials.cases, len(trials.failures), notes)


if __name__ == "__main__":
    sys.exit(main())
