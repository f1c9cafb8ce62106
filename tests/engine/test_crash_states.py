"""Each state that a power cut may leave of a backup directory is recovered from.

Here a sample of them, on each push; `python -m proof.states` goes through all.
"""

import logging
import random

import pytest
from bucket_support import gcs, gcs_target, s3, s3_target
from proof.bucket_states import recover_from_bucket
from proof.crash_recording import memory_directory, record_here, record_traced, why_no_strace
from proof.crash_scenarios import ALL, FAULTS, KILLS, SCENARIOS
from proof.recovery import recover_from_all

from stepsave.testing.crashes import Sampling

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("small_shards")]

MOST = 80  # of one scenario

_fixtures = gcs, gcs_target, s3, s3_target


@pytest.fixture
def rng():
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201  shown if the test fails
    return random.Random(seed)


def check(name, writer, rng, record=record_here, most=MOST, *, lying=False):
    # Of files that are somebody else's, recovery tells each time.
    logging.getLogger("stepsave").setLevel(logging.ERROR)
    sampling = Sampling(seed=rng.randrange(1 << 32), limit=16, samples=4)
    with memory_directory() as place:
        recorded, recovered = place / "recorded", place / "recovered"
        recorded.mkdir()
        recovered.mkdir()
        log = record(name, writer, recorded)
        count, bad = recover_from_all(
            log, ALL[name], writer, sampling, recovered, most, lying=lying
        )
    logging.getLogger("stepsave").setLevel(logging.NOTSET)
    assert count > 10, "nothing was pending: was anything recorded?"
    if bad:
        raise ExceptionGroup(f"{len(bad)} of {count} states of {name!r}", bad[:3])


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_state_after_a_power_cut_is_recovered_from(name, rng):
    check(name, "direct", rng)


def test_so_it_is_after_a_sync_that_failed(rng):
    for name in rng.sample(sorted(FAULTS), 3):
        check(name, "direct", rng, most=40)


def test_so_it_is_where_a_process_was_killed_before_and_another_has_gone_on(rng):
    for name in rng.sample(sorted(KILLS), 6):
        check(name, "direct", rng, most=40)


def test_what_a_disk_that_lies_has_lost_is_found_out(rng):
    check("save into a spare", "direct", rng, lying=True)


@pytest.mark.skipif(bool(why_no_strace()), reason=why_no_strace())
@pytest.mark.parametrize("name", ["first save", "save into a spare"])
def test_so_it_is_with_what_tensorstore_writes_by_itself(name, rng):
    check(name, "tensorstore", rng, record_traced)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("s3", "first save"),
        ("s3", "second save"),
        ("s3", "keep=2"),
        ("s3", "delete several"),
        ("gcs", "second save"),
    ],
)
def test_every_state_of_a_bucket_after_a_death_is_recovered_from(kind, name, rng, request):
    proxy = request.getfixturevalue(kind)
    count, bad = recover_from_bucket(name, proxy, rng.randrange(1 << 32), samples=2, most=50)
    assert count > 10, "nothing was under way: was anything recorded?"
    if bad:
        raise ExceptionGroup(f"{len(bad)} of {count} states of {name!r}", bad[:3])
