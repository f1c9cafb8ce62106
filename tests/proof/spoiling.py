"""Spoils every byte of every file of a backup, and puts files where they do not belong.

python -m proof.spoiling
"""

import contextlib
import dataclasses
import os
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from bucket_support import BUCKET, s3_environment, s3_server

from proof.places import (
    MARKERS,
    SHARDS,
    Directory,
    fault_of,
    golden,
    small_shards,
    tiers,
    written,
)
from proof.record import Campaign, Row, parser
from stepsave.format.layout import CHECKSUM_BYTES, decode_layout


@dataclasses.dataclass
class Count:
    """How many cases there were, and what was wrong with them."""

    cases: int = 0
    faults: list = dataclasses.field(default_factory=list)

    def check(self, what, fault):
        self.cases += 1
        if fault:
            self.faults.append(f"{what}: {fault}")
            print(f"BAD {what}: {fault}", file=sys.stderr, flush=True)  # noqa: T201


def small_files(setting):
    """Paths of markers, and of what they vouch for as wholes in the newest backup."""
    newest = setting.records[0]
    found = [name for name in MARKERS if setting.place.has(name)]
    return found, [f"{newest.directory}/{file.path}" for file in newest.files]


def may_pass(path):
    """Whether a restore of the newest backup, by the first of several processes, needs no file."""
    name = path.rpartition("/")[2]
    is_of_others = name.startswith("training.") and name != "training.json"
    return is_of_others or name == "PREVIOUS"


def flipped(data, at, bit):
    spoiled = bytearray(data)
    spoiled[at] ^= 1 << bit
    return bytes(spoiled)


def flip_files(setting, count, rng, share=1.0):
    """One bit of every byte, all bits of markers; or of a share of them."""
    markers, files = small_files(setting)
    for path in (*markers, *files):
        data = setting.place.read(path)
        bits = range(8) if path in markers else (None,)
        cases = [(at, bit) for at in range(len(data)) for bit in bits]
        for at, bit in rng.sample(cases, max(min(len(cases), 2), round(share * len(cases)))):
            which = rng.randrange(8) if bit is None else bit
            fault = fault_of(setting, {path: flipped(data, at, which)}, may_pass=may_pass(path))
            count.check(f"{setting.name}: bit {which} of byte {at} of {path}", fault)


def cut_files(setting, count, rng, share=1.0):
    """Every length that is too short, and something after the end."""
    markers, files = small_files(setting)
    for path in (*markers, *files):
        data = setting.place.read(path)
        ends = sorted({0, 1, len(data) // 2, len(data) - 1})
        ends += rng.sample(range(len(data)), round(share * len(data)))
        for end in {end for end in ends if 0 <= end < len(data)}:
            fault = fault_of(setting, {path: data[:end]}, may_pass=may_pass(path))
            count.check(f"{setting.name}: {path} of {end} bytes", fault)
        for what, other in (("a byte more", data + b"\n"), ("missing", None)):
            if other is None and path == "COMMIT":  # then there is no backup, or an older one
                continue
            fault = fault_of(setting, {path: other}, may_pass=may_pass(path))
            count.check(f"{setting.name}: {path}, {what}", fault)


def spoil_shards(setting, count, rng, flips=40):
    """Bits and lengths of shards; what lies between chunks is no part of any array."""
    record, place = setting.records[0], setting.place
    plan = decode_layout(place.read(f"{record.directory}/layout.json"), "")
    for number in range(plan.shard_count):
        path = f"{record.directory}/{SHARDS}{number}"
        data = place.read(path)
        proved = np.zeros(len(data), bool)
        for chunk in plan.shard_chunks[number]:
            begin = chunk.offset_bytes - number * plan.shard_bytes
            proved[begin : begin + chunk.stored_bytes + CHECKSUM_BYTES] = True
        edges = np.flatnonzero(np.diff(proved, prepend=False, append=False))
        places = {int(at) for edge in edges for at in (edge - 1, edge) if 0 <= at < len(data)}
        places |= {rng.randrange(len(data)) for _ in range(flips)}
        for at in sorted(places):
            fault = fault_of(
                setting, {path: flipped(data, at, rng.randrange(8))}, may_pass=not proved[at]
            )
            count.check(f"{setting.name}: a bit of byte {at} of {path}", fault)
        ends = {0, 1, 4096, len(data) // 2, len(data) - 1, rng.randrange(len(data))}
        for end in sorted(ends - {len(data)}):
            count.check(
                f"{setting.name}: {path} of {end} bytes", fault_of(setting, {path: data[:end]})
            )
        count.check(f"{setting.name}: {path} is missing", fault_of(setting, {path: None}))
        is_longer_noticed = isinstance(place, Directory)  # an object is read to its end and no more
        fault = fault_of(setting, {path: data + b"\0"}, may_pass=not is_longer_noticed)
        count.check(f"{setting.name}: {path} with a byte more", fault)


def exchange_shards(setting, count):
    """Shards of one backup in each other's place, of other backups, and more than there are."""
    place, records = setting.place, setting.records
    shards = [f"{records[0].directory}/{SHARDS}{n}" for n in range(len(records[0].shard_digests))]
    data = {path: place.read(path) for path in shards}
    for one in shards:
        for other in shards:
            if data[one] != data[other]:
                files = {one: data[other], other: data[one]}
                count.check(f"{setting.name}: {one} and {other} swapped", fault_of(setting, files))
    for older in records[1:]:
        for number, path in enumerate(shards[: len(older.shard_digests)]):
            files = {path: place.read(f"{older.directory}/{SHARDS}{number}")}
            what = f"{setting.name}: {path} of step {older.step}"
            count.check(what, fault_of(setting, files))
    if len(records) > 1 and len(records[1].shard_digests) == len(shards):
        stale = {path: place.read(f"{records[-1].directory}{path[len(records[0].directory) :]}")
                 for path in shards}  # fmt: skip
        count.check(f"{setting.name}: all shards of an older step", fault_of(setting, stale))
    for extra in (f"{SHARDS}{len(shards)}", f"{SHARDS}x", "layout.json.tmp", "pytree/d/other"):
        files = {f"{records[0].directory}/{extra}": data[shards[0]]}
        fault = fault_of(setting, files, may_pass=True)
        count.check(f"{setting.name}: {extra} beside", fault)


def exchange_files(setting, count):
    """The small files of another backup, and whole backups, in each other's place."""
    place, records = setting.place, setting.records
    for older in records[1:]:
        there = {file.path: place.read(f"{older.directory}/{file.path}") for file in older.files}
        for file in records[0].files:
            path = f"{records[0].directory}/{file.path}"
            data = there.get(file.path)
            if data is not None and data != place.read(path):
                what = f"{setting.name}: {path} of step {older.step}"
                count.check(what, fault_of(setting, {path: data}))
        whole = {f"{records[0].directory}/{path}": data for path, data in there.items()}
        for number in range(len(older.shard_digests)):
            path = f"{SHARDS}{number}"
            whole[f"{records[0].directory}/{path}"] = place.read(f"{older.directory}/{path}")
        if any(place.read(path) != data for path, data in whole.items() if place.has(path)):
            count.check(f"{setting.name}: all files of step {older.step}", fault_of(setting, whole))


@contextlib.contextmanager
def _servers(*, with_server):
    if not with_server:
        yield None
        return
    with s3_server() as url:
        before = dict(os.environ)
        os.environ.update(s3_environment(url))
        try:
            yield f"s3://{BUCKET}/spoiling"
        finally:
            os.environ.clear()
            os.environ.update(before)


def settings(directory, s3=None):
    """Makes the backups, one setting at a time."""
    yield written("direct writes", directory / "direct", writer="direct")
    yield written("tensorstore's writes", directory / "tensorstore", writer="tensorstore")
    yield written("three kept", directory / "kept", keep=2)
    yield golden("v1", directory / "v1")
    yield golden("v1-kept", directory / "v1-kept")
    yield golden("v1-processes", directory / "v1-processes")
    yield written("a bucket in memory", f"memory://spoiling/{os.getpid()}/one", keep=2)
    yield tiers("disk before a bucket", directory / "disk", f"memory://spoiling/{os.getpid()}/two")
    if s3 is not None:
        yield written("a bucket of S3", s3)


def main(arguments=None):
    options = parser("spoiling", __doc__.splitlines()[0])
    options.add_argument("--share", type=float, default=1.0, help="of all bytes and lengths")
    options = options.parse_args(arguments)
    rng = random.Random(options.seed)
    with (
        tempfile.TemporaryDirectory(prefix="spoiling-") as name,
        _servers(with_server=not options.quick) as s3,
        small_shards(),
    ):
        campaign = Campaign("spoiling", options, name)
        for setting in settings(Path(name), s3):
            share = 0.01 if options.quick else options.share
            share *= 0.02 if setting.name == "a bucket of S3" else 1.0  # each takes ten requests
            for what, spoil in (
                ("a bit of every byte of its small files, every bit of its markers", flip_files),
                ("every length that is too short", cut_files),
            ):
                _add(campaign, setting, what, spoil, rng, share)
            _add(campaign, setting, "bits and lengths of its shards", spoil_shards, rng)
            _add(campaign, setting, "shards in each other's place", exchange_shards)
            _add(campaign, setting, "files of other backups", exchange_files)
    return int(campaign.bad > 0)


def _add(campaign, setting, what, spoil, *arguments):
    count = Count()
    spoil(setting, count, *arguments)
    if count.cases:
        row = Row(f"{setting.name}: {what}", count.cases, len(count.faults), *count.faults[:1])
        campaign.add(row)


if __name__ == "__main__":
    sys.exit(main())
