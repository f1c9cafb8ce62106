"""Every crash state: what a power cut may leave of a directory or a bucket, recovered from.

PYTHONPATH=src:tests:. python -m proof.states [--quick]
"""

import logging
import os
import random
import sys
import traceback
import warnings
from unittest import mock

from bucket_support import (
    BUCKET,
    Proxy,
    gcs_environment,
    gcs_server,
    has_gcs_server,
    s3_environment,
    s3_server,
)

from proof.bucket_states import NAMES, recover_from_bucket
from proof.crash_recording import memory_directory, record_here, record_traced, why_no_strace
from proof.crash_scenarios import ALL, FAULTS, KILLS, SCENARIOS, use_tiny_shards
from proof.record import Campaign, Row, parser
from proof.recovery import recover_from_all
from stepsave.testing.crashes import Sampling

SHOWN = 3  # of what went wrong in one scenario


def main(arguments=None):
    options = parser("states", __doc__).parse_args(arguments)
    # A child that is traced, and recovery, must not warn of anything either.
    warnings.simplefilter("error")
    logging.getLogger("stepsave").setLevel(logging.CRITICAL)
    use_tiny_shards()
    print(f"seed {options.seed}", flush=True)  # noqa: T201
    rng = random.Random(options.seed)
    with memory_directory() as place:
        campaign = Campaign("states", options, place)
        for writer in ("direct", "tensorstore"):
            if writer == "tensorstore" and why_no_strace():
                print(f"tensorstore is left out: {why_no_strace()}", flush=True)  # noqa: T201
                continue
            for what, names in _groups(options, rng, writer):
                campaign.add(_row(f"{what}, {writer} writer", names, writer, place, options, rng))
        names = rng.sample(sorted(SCENARIOS), 2) if options.quick else list(SCENARIOS)
        what = (
            "a disk that does nothing on one sync, and the power fails: what is lost is found out"
        )
        campaign.add(_row(what, names, "direct", place, options, rng, lying=True))
        for row in _bucket_rows(options, rng):
            campaign.add(row)
    sys.exit(1 if campaign.bad else 0)


def _groups(options, rng, writer):
    """Yields lines of the table, and which scenarios are in each."""
    quick = options.quick
    for name in list(SCENARIOS)[:: 6 if quick else 1]:
        yield f"power cut: {name}", [name]
    few = quick or writer == "tensorstore"  # each is recorded in a process of its own
    faults, kills = (
        rng.sample(sorted(names), (1 if quick else 12) if few else len(names))
        for names in (FAULTS, KILLS)
    )
    yield "power cut around a save whose n-th sync failed", faults
    yield "power cut after a process was killed before its n-th sync and another went on", kills


def _row(what, names, writer, place, options, rng, *, lying=False):
    cases, failures = 0, []
    for name in names:
        sampling = Sampling(
            seed=rng.randrange(1 << 32),
            limit=16 if options.quick or len(names) > 1 else 4096,
            samples=4 if options.quick else 32,
        )
        record = record_here if writer == "direct" else record_traced
        recorded, recovered = place / "recorded", place / "recovered"
        recorded.mkdir()
        recovered.mkdir()
        try:
            log = record(name, writer, recorded)
            most = 20 if options.quick else None if len(names) == 1 else 400
            count, bad = recover_from_all(
                log, ALL[name], writer, sampling, recovered, most, lying=lying
            )
        finally:
            _remove(recorded)
            _remove(recovered)
        cases += count
        failures += bad
        for e in bad[:SHOWN]:
            print(f"{name}, {writer}:", flush=True)  # noqa: T201
            traceback.print_exception(e, limit=-4)
    return Row(what, cases, len(failures), "distinct states")


def _bucket_rows(options, rng):
    """Yields lines of the table about requests that had no answer when their trainer died."""
    servers = (
        ("s3", s3_server, False, s3_environment),
        ("gs", gcs_server, True, gcs_environment),
    )
    for scheme, serve, checks_generations, environment in servers:
        if scheme == "gs" and not has_gcs_server():
            print("gs:// is left out: there is no server for this machine", flush=True)  # noqa: T201
            continue
        with (
            serve() as url,
            Proxy.before(url, checks_generations=checks_generations) as proxy,
            mock.patch.dict(os.environ, environment(proxy.url)),
        ):
            for number, name in enumerate(NAMES[:: 4 if options.quick else 1]):
                proxy.place = f"{scheme}://{BUCKET}/states/{number}"
                samples, most = (1, 20) if options.quick else (64, None)
                seed = rng.randrange(1 << 32)
                count, bad = recover_from_bucket(name, proxy, seed, samples, most)
                for e in bad[:SHOWN]:
                    traceback.print_exception(e, limit=-4)
                what = f"death of a trainer, requests done or not: {name}, {scheme}://"
                yield Row(what, count, len(bad), "distinct states")


def _remove(directory):
    for found, names, files in os.walk(directory, topdown=False):
        for name in files:
            os.unlink(os.path.join(found, name))
        for name in names:
            os.rmdir(os.path.join(found, name))
    os.rmdir(directory)


if __name__ == "__main__":
    main()
