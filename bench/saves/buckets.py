"""How long does a save into a bucket take, and a restore from it, against boto3 and the same bytes?

A server of S3 on the loopback (moto) stands for the bucket; it shares the machine, so the times say
little, the ratios what the clients cost. Every round does all, in changing order: stepsave's save
until it is durable, and boto3 with as many bytes: by its transfer manager as one object, which it
cuts into parts, and as an object per shard, all at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import stepsave
from bench import common, machine
from bench.common import ARRAY_BYTES
from bench.stats import spread

BUCKET = "bench"
SAVE, RESTORE = "stepsave save", "stepsave restore"
WHOLE, SHARDS = "boto3 upload, one object", "boto3 upload, an object per shard"
READ = "boto3 download, an object per shard"
OVER = {SAVE: (WHOLE, SHARDS), RESTORE: (READ,)}
QUICK = {"megabytes": 16, "rounds": 4}

Samples = dict[str, list[float]]


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A server of S3 in a process of its own; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=5).close()
                break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


class Rounds:
    """Saves and reads everything interleaved; samples in seconds, by subject."""

    def __init__(self, size_bytes: int) -> None:
        import boto3

        self.samples: Samples = {"stepsave stall": []}
        self._client = boto3.client("s3")
        self._client.create_bucket(Bucket=BUCKET)
        self._training = common.Training("numpy", max(1, size_bytes // ARRAY_BYTES), ARRAY_BYTES)
        self._saver = stepsave.Checkpointer(f"s3://{BUCKET}/backup")
        self._step = 0
        self._save()
        record = self._saver.committed
        assert record is not None
        self.shard_bytes, self.shards = record.shard_bytes, len(record.shard_digests)
        self.state_bytes = sum(array.nbytes for array in self._training.state.values())
        rng = np.random.default_rng(0)
        self._data = rng.bytes(self.shard_bytes * self.shards)
        self._subjects: dict[str, Callable[[], float]] = {
            SAVE: self._save,
            RESTORE: self._restore,
            WHOLE: self._upload_whole,
            SHARDS: self._upload_shards,
            READ: self._download_shards,
        }

    def run(self, rounds: int) -> None:
        for number in range(rounds):
            for subject in random.Random(number).sample(list(self._subjects), len(self._subjects)):
                took_s = self._subjects[subject]()
                self.samples.setdefault(subject, []).append(took_s)

    def close(self) -> None:
        self._saver.close()

    def _save(self) -> float:
        self._step += 1
        times = common.timed_save(self._saver, self._step, self._training.step())
        self.samples["stepsave stall"].append(times.stall_s)
        return times.durable_s

    def _restore(self) -> float:
        begin_s = time.perf_counter()
        backup = self._saver.restore()
        took_s = time.perf_counter() - begin_s
        assert backup is not None
        common.check_same(backup.state, self._training.state)
        return took_s

    def _upload_whole(self) -> float:
        begin_s = time.perf_counter()
        self._client.upload_fileobj(io.BytesIO(self._data), BUCKET, "whole")
        took_s = time.perf_counter() - begin_s
        self._client.delete_object(Bucket=BUCKET, Key="whole")
        return took_s

    def _upload_shards(self) -> float:
        parts = [memoryview(self._data)[begin : begin + self.shard_bytes] for begin in self._begins]

        def put(number: int) -> None:
            self._client.put_object(Bucket=BUCKET, Key=f"shard/{number}", Body=bytes(parts[number]))

        return self._all(put)

    def _download_shards(self) -> float:
        if "Contents" not in self._client.list_objects_v2(Bucket=BUCKET, Prefix="shard/"):
            self._upload_shards()
        found = bytearray(len(self._data))

        def get(number: int) -> None:
            body = self._client.get_object(Bucket=BUCKET, Key=f"shard/{number}")["Body"].read()
            found[self._begins[number] : self._begins[number] + self.shard_bytes] = body

        took_s = self._all(get)
        assert found == self._data
        return took_s

    @property
    def _begins(self) -> range:
        return range(0, len(self._data), self.shard_bytes)

    def _all(self, work: Callable[[int], None]) -> float:
        begin_s = time.perf_counter()
        with ThreadPoolExecutor(min(10, self.shards)) as pool:
            list(pool.map(work, range(self.shards)))
        return time.perf_counter() - begin_s


def summarize(samples: Samples, state_bytes: int) -> dict[str, Any]:
    """Medians with their spread, bytes per second, and ratios round by round."""
    summary: dict[str, Any] = {}
    for subject, times in samples.items():
        entry = spread(times)
        if subject != "stepsave stall":
            entry["bytes_per_s"] = state_bytes / entry["median"]
            entry["ratios"] = {
                other: common.ratios(times, samples[other]) for other in OVER.get(subject, ())
            }
        summary[subject] = entry
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("saves.buckets", __doc__)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=15)
    options = common.parse(parser, arguments, QUICK)
    with tempfile.TemporaryDirectory(dir=options.directory) as where, server() as url:
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL": url,
            "AWS_REGION": "us-east-1",
        }
        facts = machine.describe(Path(where))
        rounds = Rounds(options.megabytes * 1_000_000)
        rounds.run(1)
        for times in rounds.samples.values():
            times.clear()
        rounds.run(options.rounds)
        rounds.close()
    result = {
        "benchmark": "buckets",
        "machine": facts,
        "settings": {
            "state_bytes": rounds.state_bytes,
            "shards": rounds.shards,
            "rounds": options.rounds,
            "quick": options.quick,
        },
        "summary": summarize(rounds.samples, rounds.state_bytes),
        "samples_s": rounds.samples,
    }
    common.write("buckets", options, result)
    for subject, entry in result["summary"].items():
        line = f"{subject:>36}: {entry['median'] * 1e3:8.1f} ms"
        for other, ratio in entry.get("ratios", {}).items():
            line += f"   {ratio['median']:.2f} x {other}"
        print(line)


if __name__ == "__main__":
    main()
