"""What does a save cost when several processes share it, and what beyond the slowest of them?

JAX processes on this machine, with the loopback between them, replicate one state, as in data
parallel training: each captures and writes its part. Rounds of 1, 2 and 4 processes take turns.
They share cores, memory and the disk of one machine, so bytes per process say more than times: on
machines of their own each would have its disk, or its share of a network's.
"""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import common, machine
from bench.common import ARRAY_BYTES, UNSTEADY

COUNTS = (1, 2, 4)
LIMIT_S = 600
QUICK = {"megabytes": 16, "saves": 4, "rounds": 4}


def child(rank: int, count: int, port: int, place: str, megabytes: int, saves: int) -> None:
    """One process: prints what each save, and a restore, took, by the clock of the machine."""
    import jax
    import numpy as np

    import stepsave
    from stepsave.engine import shard_writing

    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def put(array: Any) -> Any:
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    training = common.Training("numpy", max(1, megabytes * 1_000_000 // ARRAY_BYTES), ARRAY_BYTES)
    states = [{name: put(array) for name, array in training.step().items()} for _ in range(3)]
    ended_s: list[float] = []
    real = shard_writing.Shards.write

    def write(self: Any, *arguments: Any) -> Any:
        found = real(self, *arguments)
        ended_s.append(time.perf_counter())
        return found

    shard_writing.Shards.write = write
    told: list[dict[str, float]] = []
    with stepsave.Checkpointer(place) as saver:
        saver.prepare(states[0])
        for step in range(saves):
            time.sleep(0.2)  # as steps would take; all then begin at about the same time
            begin_s = time.perf_counter()
            handle = saver.save(step, states[step % 3])
            handle.wait()
            told.append(
                {
                    "stall_s": handle.stall_s,
                    "durable_s": handle.durable_s or 0.0,
                    "wrote_s": ended_s[-1],
                    "committed_s": begin_s + (handle.durable_s or 0.0),
                    "bytes": handle.bytes,
                }
            )
        begin_s = time.perf_counter()
        backup = saver.restore(like=states[0])
        restore_s = time.perf_counter() - begin_s
        assert backup is not None
        expected = {name: np.asarray(array) for name, array in states[(saves - 1) % 3].items()}
        common.check_same(backup.state, expected)
    print(json.dumps({"saves": told, "restore_s": restore_s}))


def run(count: int, options: Any) -> list[dict[str, Any]]:
    """Returns what each process has told."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        command = [sys.executable, "-m", "bench.saves.processes", "--child"]
        sizes = str(options.megabytes), str(options.saves)
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(count), str(port), f"{place}/backup", *sizes],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            outputs = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"one of {count} processes failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def samples_of(told: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Of one round: what process 0 and the slowest process took, save by save."""
    columns = list(zip(*[one["saves"][UNSTEADY:] for one in told], strict=True))
    return {
        "stall_s": [max(one["stall_s"] for one in column) for column in columns],
        "durable_s": [column[0]["durable_s"] for column in columns],
        "beyond_slowest_s": [
            column[0]["committed_s"] - max(one["wrote_s"] for one in column) for column in columns
        ],
        "bytes": [max(one["bytes"] for one in column) for column in columns],
        "restore_s": [max(one["restore_s"] for one in told)],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    if sys.argv[1:2] == ["--child"] and arguments is None:
        rank, count, port, place, megabytes, saves = sys.argv[2:]
        child(int(rank), int(count), int(port), place, int(megabytes), int(saves))
        return
    parser = common.parser("saves.processes", __doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--saves", type=int, default=12, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    options = common.parse(parser, arguments, QUICK)
    samples: dict[str, dict[str, list[float]]] = {str(count): {} for count in COUNTS}
    for number in range(options.rounds):
        for count in random.Random(number).sample(COUNTS, len(COUNTS)):
            for name, values in samples_of(run(count, options)).items():
                samples[str(count)].setdefault(name, []).extend(values)
    result = {
        "benchmark": "processes",
        "machine": machine.describe(options.directory or Path(tempfile.gettempdir())),
        "settings": {
            "state_bytes": options.megabytes * 1_000_000 // ARRAY_BYTES * ARRAY_BYTES,
            "saves": options.saves,
            "rounds": options.rounds,
            "quick": options.quick,
        },
        "summary": {
            count: {name: common.spread(values) for name, values in found.items()}
            for count, found in samples.items()
        },
        "samples": samples,
    }
    common.write("processes", options, result)
    for count, found in result["summary"].items():
        line = ", ".join(f"{name} {entry['median']:.4g}" for name, entry in found.items())
        print(f"{count} processes: {line}")


if __name__ == "__main__":
    main()
