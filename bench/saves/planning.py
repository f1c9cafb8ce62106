"""How long does it take to decide who saves what, of a large model on many devices?

10,000 variables on a mesh of 16,384 devices, which JAX simulates on this CPU; eight belong to a
process. All of this is done once per structure of the state: what each process does, and what only
process 0 does, which also makes the files that all backups have in common.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from bench import common, machine

AXES = ("data", "model")
WIDTHS = (1024, 2048, 4096, 8192)
QUICK = {"variables": 200, "data": 4, "model": 4}


def leaves_of(count: int, mesh: Any) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and shardings as in transformers: matrices that are spread, vectors that are not."""
    from jax.sharding import NamedSharding, PartitionSpec

    specs = [PartitionSpec(None, "model"), PartitionSpec("model", None), PartitionSpec()]
    made: list[tuple[tuple[int, ...], Any]] = []
    for number in range(count):
        width, spec = WIDTHS[number // 3 % len(WIDTHS)], specs[number % 3]
        shape = (width,) if number % 3 == 2 else (width, 4096)
        made.append((shape, NamedSharding(mesh, spec)))
    return made


def measure(options: Any) -> dict[str, Any]:
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from stepsave.format import orbax
    from stepsave.format.planning import deal_layout
    from stepsave.format.records import LeafSpec
    from stepsave.snapshot.jax_blocks import spread_over

    mesh = Mesh(np.array(jax.devices()).reshape(options.data, options.model), AXES)
    leaves = leaves_of(options.variables, mesh)
    count = options.data * options.model // options.per_process
    begin_s = time.perf_counter()
    known: dict[Any, Any] = {}
    for shape, sharding in leaves:
        if (sharding, shape) not in known:
            known[sharding, shape] = spread_over(
                sharding, shape, lambda device: device.id // options.per_process
            )
    specs = [LeafSpec((f"w{i}",), shape, "float32") for i, (shape, _) in enumerate(leaves)]
    spreads = [known[sharding, shape] for shape, sharding in leaves]
    found_s = time.perf_counter()
    deal = deal_layout(specs, spreads, count)
    dealt_s = time.perf_counter()
    shares = [deal.share(process) for process in (0, count - 1)]
    shared_s = time.perf_counter()
    files = orbax.constant_files(deal.plan)
    made_s = time.perf_counter()
    loads = [deal.share(process).plan.state_bytes for process in range(0, count, count // 16 or 1)]
    return {
        "processes": count,
        "chunks": len(deal.plan.chunks),
        "parts_of_a_process": len(shares[0].plan.leaves),
        "kinds": len(known),
        "state_bytes": deal.plan.state_bytes,
        "files_bytes": sum(map(len, files.values())),
        "balance": max(loads) / min(loads),
        "samples_s": {
            "where arrays lie": found_s - begin_s,
            "dealing": dealt_s - found_s,
            "own share": (shared_s - dealt_s) / len(shares),
            "files, process 0": made_s - shared_s,
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser("saves.planning", __doc__)
    parser.add_argument("--variables", type=int, default=10_000)
    parser.add_argument("--data", type=int, default=1024, help="devices along the axis of the data")
    parser.add_argument("--model", type=int, default=16, help="devices along that of the model")
    parser.add_argument("--per-process", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = common.parse(parser, arguments, QUICK)
    devices = options.data * options.model
    # Before JAX is imported.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    runs = [measure(options) for _ in range(options.repeats)]
    samples = {name: [run["samples_s"][name] for run in runs] for name in runs[0]["samples_s"]}
    samples["a process"] = [
        sum(run["samples_s"][name] for name in ("where arrays lie", "dealing", "own share"))
        for run in runs
    ]
    samples["process 0"] = [sum(run["samples_s"].values()) for run in runs]
    result = {
        "benchmark": "planning",
        "machine": machine.describe(options.directory or common.RESULTS),
        "settings": {
            "variables": options.variables,
            "devices": devices,
            "mesh": {"data": options.data, "model": options.model},
            "quick": options.quick,
            **{name: value for name, value in runs[0].items() if name != "samples_s"},
        },
        "summary": {name: common.spread(times) for name, times in samples.items()},
        "samples_s": samples,
    }
    common.write("planning", options, result)
    for name, entry in result["summary"].items():
        print(f"{name:>20}: {entry['median']:.3f} s")


if __name__ == "__main__":
    main()
