"""Processes that train one model are killed at any moment; what they had acknowledged is there.

`python -m proof.joint_kills` does that to more of them, and more often.
"""

import random

import pytest
from bucket_support import s3, s3_target
from proof.joint_kills import KINDS, Trainings

pytestmark = [pytest.mark.once, pytest.mark.xdist_group("buckets")]
__all__ = ("s3", "s3_target")


@pytest.mark.parametrize(("name", "kills"), [("directory", 3), ("bucket", 2)])
def test_processes_killed_at_any_moment_leave_what_was_durable(tmp_path, name, kills, request):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201  shown if the test fails
    kind = KINDS[name]
    place = request.getfixturevalue("s3").place if kind.is_remote else tmp_path / "backup"
    trainings = Trainings(kind, place, tmp_path / "disk", random.Random(seed))
    for _ in range(kills):
        trainings.kill_one()
    trainings.end()
