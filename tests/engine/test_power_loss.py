"""Power cuts of real file systems, after every operation of a save; `proof.power` makes many more.

What `tests/engine/test_commit.py` shows for each state that a crash may leave, this shows for those
that kernels leave.
"""

import pytest
from engine_support import check_python
from proof.disks import ISOLATED, reason_not_to

pytestmark = pytest.mark.once

RUN = """
import random, sys
from proof.cuts import Trials
from proof.disks import Disk, folder_in_memory
from proof.volatile_disk import VolatileDisk
seed = random.randrange(1 << 32)
print("seed", seed)
rng = random.Random(seed)
with folder_in_memory() as folder:
    disk = {make}(folder / "disk", "ext4")
    disk.mount()
    try:
        {body}
    finally:
        disk.close()
"""

WORST = "ways=list(disk.WAYS)[:1]"


def on_disk(make, body, timeout=240):
    """Runs statements with a disk, of which nothing stays however they end."""
    if reason := reason_not_to():
        pytest.skip(reason)
    script = RUN.format(make=make, body=body.strip().replace("\n", "\n        "))
    check_python(script, prefix=ISOLATED, timeout=timeout)


def test_the_power_may_fail_after_each_operation_of_a_save():
    on_disk("Disk", f"""
trials = Trials(disk, rng, {WORST})
trials.cut_at_steps(["second save"], ["direct"])
assert trials.cases > 20, trials.cases
assert not trials.failures
""")  # fmt: skip


@pytest.mark.parametrize("make", ["Disk", "VolatileDisk"])
def test_the_power_may_fail_in_other_saves_and_with_the_other_writer(make):
    on_disk(make, """
trials = Trials(disk, rng)
trials.cut_at_steps(every=23)
assert trials.cases > 20, trials.cases
assert not trials.failures
""")  # fmt: skip


@pytest.mark.parametrize("make", ["Disk", "VolatileDisk"])
def test_the_power_may_fail_at_any_moment(make):
    on_disk(make, """
trials = Trials(disk, rng)
trials.cut_at_random(4)
assert trials.acknowledged > 4
assert not trials.failures
""")  # fmt: skip


@pytest.mark.parametrize("make", ["Disk", "VolatileDisk"])
def test_a_save_that_syncs_nothing_is_found_out(make):
    """These tests can fail."""
    on_disk(make, f"""
import os
os.fsync = os.fdatasync = lambda fd: None
trials = Trials(disk, rng, {WORST})
trials.cut_at_steps(["second save"], ["direct"], every=17)
assert trials.failures
""")  # fmt: skip
