"""What saving costs a training on a GPU: JAX and PyTorch, three sizes, under eight minutes.

    python -m bench.gpu                          # needs JAX or PyTorch that see a GPU
    python -m bench.gpu --frameworks torch --sizes 4 --budget-s 120
    python -m bench.gpu --allow-cpu --quick      # a rehearsal, tiny: does it run?

Needs no Keras: only this repository's `bench` and `src`, NumPy, tensorstore, ml_dtypes and
awscrt, all of which may come from a folder of wheels on PYTHONPATH. Each framework and size
runs in a process of its own; what does not fit, fails or is absent is reported as that.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from bench import machine
from bench.common import RESULTS, write
from bench.gpu.loop import Clock, measure, state_bytes, step_time_s
from bench.gpu.shape import Shape
from bench.stats import spread

FRAMEWORKS = ("jax", "torch")
SIZES_GB = (1.0, 4.0, 12.0)
STEP_S = 0.06
FLOOR_BYTES = 10**9
REPEATS, ROUNDS = 7, 7
START_S = 8.0  # of a process: imports, the device
HOST_COPIES = 3.5  # arenas, what a framework transfers through, what is restored
DISK_COPIES = 2.5
NO_GPU = (
    "bench.gpu: {framework} sees no GPU, only {device}. Install a build of it for this GPU and "
    "look at `nvidia-smi`, or pass --allow-cpu for a rehearsal, whose figures mean nothing."
)


def run_size(options: argparse.Namespace) -> dict[str, Any]:
    """One framework and one size, in this process: floors, then each subject in its turn."""
    clock = Clock.of(options.budget_s - START_S)
    lab = importlib.import_module(f"bench.gpu.{options.framework}")
    if not (lab.has_accelerator() or options.allow_cpu):
        raise SystemExit(NO_GPU.format(framework=options.framework, device=lab.device_name()))
    size_bytes = round(options.size * 1e9)
    found: dict[str, Any] = {
        "device": lab.device_name(),
        "packages": {name: _version(name) for name in lab.PACKAGES},
        "device_memory_bytes": lab.memory_bytes(),
    }
    if reason := _does_not_fit(size_bytes, lab.memory_bytes(), options.directory):
        return {**found, "skipped": reason}
    flops = lab.matmul_flops(256 if options.quick else 8192)
    floor_bytes = min(size_bytes, FLOOR_BYTES)
    floors_s = lab.floors(floor_bytes, REPEATS)
    shape = Shape.of(size_bytes, quick=options.quick)
    tokens = shape.tokens(flops, 0.01 if options.quick else STEP_S)
    training = lab.Training(shape, tokens)
    for _ in range(2):  # compiled, and with buffers where they will be
        training.step()
    step_s = step_time_s(training)
    size_bytes = state_bytes(training.state)
    with tempfile.TemporaryDirectory(dir=options.directory) as where:
        ours_s = lab.host_bandwidth_s(Path(where, "ours"), training.state, REPEATS)
    found |= {
        "state_bytes": size_bytes,
        "arrays": sum(map(len, training.state.values())),
        "step_s": step_s,
        "model": f"{shape.count} blocks of width {shape.width}, {tokens} tokens a step",
        "matmul_flops": flops,
        "floors": _bandwidths(floors_s, floor_bytes, ours_s, size_bytes),
    }
    found["subjects"] = _subjects(lab, training, options, clock)
    return found


def _bandwidths(
    floors_s: dict[str, list[float]], floor_bytes: int, ours_s: list[float], size_bytes: int
) -> dict[str, Any]:
    """Bytes per second, the first of each left out; a copy on the device moves each byte twice."""
    times = {name: (values, floor_bytes) for name, values in floors_s.items() if values}
    times["ours"] = (ours_s, size_bytes)
    moved = {"device copy": 2}
    return {
        name: spread([moved.get(name, 1) * size / taken for taken in values[1:]])
        for name, (values, size) in times.items()
    }


def _subjects(
    lab: ModuleType, training: Any, options: argparse.Namespace, clock: Clock
) -> dict[str, Any]:
    """Each subject gets its share of the time that is left; an error of one ends only it."""
    found: dict[str, Any] = {}
    for number, subject in enumerate(lab.SUBJECTS):
        share_s = clock.left_s / (len(lab.SUBJECTS) - number)
        print(f"   {subject.label}: {share_s:.0f} s", flush=True)
        with tempfile.TemporaryDirectory(dir=options.directory) as where:
            try:
                found[subject.key] = measure(
                    training, subject, Path(where), Clock.of(share_s), options.rounds
                )
            except Exception as e:  # noqa: BLE001 - published as failed, with its error
                traceback.print_exc()
                found[subject.key] = {"label": subject.label, "failed": _first_line(e)}
    return found


def _first_line(error: Exception) -> str:
    """What an error says; without paths, which belong to one machine."""
    text = str(error).partition("\n")[0] or "no message"
    return f"{type(error).__name__}: {re.sub(r'(/[^/ ]+)+/', '', text)[:200]}"


def _does_not_fit(size_bytes: int, device_bytes: int | None, directory: Path | None) -> str:
    """Why a size cannot be measured here; empty if it can."""
    needed = [("host memory", _free_memory_bytes(), HOST_COPIES * size_bytes)]
    free_disk_bytes = shutil.disk_usage(directory or tempfile.gettempdir()).free
    needed.append(("disk", free_disk_bytes, DISK_COPIES * size_bytes))
    if device_bytes is not None:  # the state, its gradients, and a step's own memory
        needed.append(("device memory", device_bytes, 1.6 * size_bytes))
    return "; ".join(
        f"{need / 1e9:.1f} GB of {what} needed, {free / 1e9:.1f} GB free"
        for what, free, need in needed
        if need > free
    )


def _free_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo names no MemAvailable.")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_child(framework: str, size: float, budget_s: float, options: Any) -> dict[str, Any]:
    """Measures in a process of its own, which has the whole device."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", "bench.gpu", "--framework", framework, "--size", str(size)]
        command += ["--budget-s", str(budget_s), "--answer", str(answer)]
        command += ["--rounds", str(options.rounds)]
        command += ["--directory", str(options.directory)] if options.directory else []
        command += [flag for flag in ("--quick", "--allow-cpu") if flag in options.flags]
        env = {**os.environ, "PYTHONPATH": _python_path()}
        try:
            # Its parts watch their time; this is for one that hangs.
            ended = subprocess.run(command, check=False, env=env, timeout=2 * budget_s + 60)
        except subprocess.TimeoutExpired:
            return {"failed": f"hung: not done after {2 * budget_s + 60:.0f} s"}
        if ended.returncode == 0:
            found: dict[str, Any] = json.loads(answer.read_text())
            return found
        return {"failed": f"exit code {ended.returncode}; see the output"}


def _python_path() -> str:
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)


def run_framework(framework: str, budget_s: float, options: Any) -> dict[str, Any]:
    """All sizes of a framework; larger ones get more of the time."""
    weights = [size**0.5 for size in options.sizes]
    sizes: dict[str, Any] = {}
    for size, weight in zip(options.sizes, weights, strict=True):
        share_s = budget_s * weight / sum(weights)
        print(f"== {framework}, {size:g} GB: {share_s:.0f} s", flush=True)
        sizes[f"{size:g}"] = run_child(framework, size, share_s, options)
    return {
        "benchmark": "gpu",
        "framework": framework,
        "machine": machine.describe(Path(options.directory or tempfile.gettempdir())),
        "settings": {"budget_s": budget_s, "quick": options.quick, "rounds": options.rounds},
        "sizes": sizes,
    }


def _machine_name(result: dict[str, Any]) -> str:
    """A folder for results of machines with this device."""
    devices = [size["device"] for size in result["sizes"].values() if "device" in size]
    slug = re.sub(r"[^a-z0-9]+", "-", devices[0].lower()).strip("-")
    return f"{slug}-{len(os.sched_getaffinity(0))}cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=None)
    parser.add_argument("--sizes", nargs="+", type=float, default=None, help="GB of state")
    parser.add_argument("--directory", type=Path, default=None, help="where to save")
    parser.add_argument("--results", type=Path, default=None, help="folder of all machines")
    parser.add_argument("--budget-s", type=float, default=450, help="for everything")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of loops at most")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--allow-cpu", action="store_true", help="do without a GPU")
    for inner in ("--framework", "--answer"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=float, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.framework:
        Path(options.answer).write_text(json.dumps(run_size(options)))
        return
    options.flags = [
        flag
        for flag, given in (("--quick", options.quick), ("--allow-cpu", options.allow_cpu))
        if given
    ]
    options.sizes = options.sizes or ([0.002] if options.quick else SIZES_GB)
    chosen = options.frameworks or [name for name in FRAMEWORKS if importlib.util.find_spec(name)]
    if not chosen:
        raise SystemExit("bench.gpu: neither JAX nor PyTorch is installed. Install one.")
    root = options.results or (
        Path(tempfile.mkdtemp(prefix="bench-gpu-")) if options.quick else RESULTS
    )
    failed = False
    for framework in chosen:
        result = run_framework(framework, options.budget_s / len(chosen), options)
        sizes = result["sizes"].values()
        failed |= any("failed" in size for size in sizes)
        if any("device" in size for size in sizes):  # else nothing is known of the machine
            options.results = root / _machine_name(result)
            print(f"kept as {write(f'gpu-{framework}', options, result)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
