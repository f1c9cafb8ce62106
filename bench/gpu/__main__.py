"""Whether saving is right on a GPU, and what it costs a training there: under eight minutes.

    python -m bench.gpu                          # needs JAX or PyTorch that see a GPU
    python -m bench.gpu --parts size --frameworks torch --sizes 4 --budget-s 120
    python -m bench.gpu --allow-cpu --quick      # a rehearsal, tiny: does it run?

First, whether what is saved comes back (`correctness`) and a Keras `fit` that is killed goes on
(`resume`); then what it costs, by size of the state. Needs this repository's `bench` and `src`,
NumPy, tensorstore, ml_dtypes and awscrt, and for `resume` Keras, all of which may come from a
folder on PYTHONPATH that `bench.gpu.wheels` fills. Each part of each framework runs in a process
of its own, and what it has found is in its JSON at once, so that a run that is cut short keeps
it; what does not fit, fails or is absent is reported as that.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bench import machine
from bench.common import RESULTS, write
from bench.gpu import correctness, resume
from bench.gpu.loop import Clock, measure, state_bytes, step_time_s
from bench.gpu.shape import Shape
from bench.stats import spread

Report = Callable[[dict[str, Any]], None]
FRAMEWORKS = ("jax", "torch")
PARTS = ("correctness", "resume", "size")
SIZES_GB = (1.0, 4.0)
SHARES = {"correctness": 0.15, "resume": 0.25}  # of the time; the sizes get what is left
STEP_S = 0.06
FLOOR_BYTES = 10**9
REPEATS, ROUNDS = 7, 7
START_S = 8.0  # of a process: imports, the device
REHEARSAL_S = 45.0  # of the sizes of a framework
OVERTIME_S = 20.0  # until a process that does not watch its time is ended
HOST_COPIES = 3.5  # arenas, what a framework transfers through, what is restored
DISK_COPIES = 2.5
NO_GPU = (
    "bench.gpu: {framework} sees no GPU, only {device}. Install a build of it for this GPU and "
    "look at `nvidia-smi`, or pass --allow-cpu for a rehearsal, whose figures mean nothing."
)


def run_size(options: argparse.Namespace, report: Report) -> dict[str, Any]:
    """One framework and one size, in this process: floors, then each subject in its turn."""
    clock = Clock.of(options.budget_s - START_S)
    lab = importlib.import_module(f"bench.gpu.{options.framework}")
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
    found["subjects"] = {}
    report(found)
    for key, subject in _subjects(lab, training, options, clock):
        found["subjects"][key] = subject
        report(found)
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
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each subject gets its share of the time that is left; an error of one ends only it."""
    for number, subject in enumerate(lab.SUBJECTS):
        share_s = clock.left_s / (len(lab.SUBJECTS) - number)
        print(f"   {subject.label}: {share_s:.0f} s", flush=True)
        with tempfile.TemporaryDirectory(dir=options.directory) as where:
            try:
                found = measure(training, subject, Path(where), Clock.of(share_s), options.rounds)
            except Exception as e:  # noqa: BLE001 - published as failed, with its error
                traceback.print_exc()
                found = {"label": subject.label, "failed": _first_line(e)}
        yield subject.key, found


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


def run_child(
    part: str, framework: str, budget_s: float, options: Any, root: Path, size: float = 0.0
) -> dict[str, Any]:
    """Has a process of its own, which has the whole device, do one part.

    What it has found so far is in a file among the results, in case that this process is killed.
    """
    answer = root / f"part-{part}-{framework}-{size:g}.json"
    with _directory(options) as where:
        command = [sys.executable, "-m", "bench.gpu", "--part", part, "--framework", framework]
        command += ["--size", str(size), "--budget-s", str(budget_s), "--answer", str(answer)]
        command += ["--rounds", str(options.rounds), "--directory", where]
        command += [flag for flag in ("--quick", "--allow-cpu") if flag in options.flags]
        env = {**os.environ, "PYTHONPATH": _python_path()}
        if part == "resume":  # whose trainings are processes of their own, on the same device
            env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        limit_s = budget_s + OVERTIME_S
        failed = ""
        try:
            # Its parts watch their time; this is for one that hangs.
            code = subprocess.run(command, check=False, env=env, timeout=limit_s).returncode
            failed = f"exit code {code}; see the output" if code else ""
        except subprocess.TimeoutExpired:
            failed = f"hung: not done after {limit_s:.0f} s"
    found: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    answer.unlink(missing_ok=True)
    return {**found, "failed": failed} if failed else found


def _directory(options: Any) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir=options.directory)


def _python_path() -> str:
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)


class Results:
    """The JSON files, written as soon as there is something new in them."""

    def __init__(self, options: Any) -> None:
        self._options = options
        quick = options.quick and options.results is None
        fresh = Path(tempfile.mkdtemp(prefix="bench-gpu-")) if quick else None
        self.root: Path = fresh or options.results or RESULTS
        self.root.mkdir(parents=True, exist_ok=True)
        self.failed = False

    def keep(self, name: str, result: dict[str, Any], found: dict[str, Any]) -> None:
        """Writes a result, to which something was found; not if nothing is known of the machine."""
        self.failed |= "failed" in found
        device = found.get("device") or result.get("device")
        if device is None:
            return
        result["device"] = device
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        self._options.results = self.root / f"{slug}-{len(os.sched_getaffinity(0))}cpu"
        print(f"kept as {write(name, self._options, result)}", flush=True)


def run_parts(chosen: Sequence[str], options: Any) -> bool:
    """All parts, what matters most first; tells whether one failed."""
    clock, results = Clock.of(options.budget_s), Results(options)
    for part in ("correctness", "resume"):
        if part not in options.parts:
            continue
        result = _result(f"gpu-{part}", options, frameworks={})
        for framework in chosen:
            share_s = options.budget_s * SHARES[part] / len(chosen)
            if options.quick:  # little work, but maybe a slow machine
                share_s = clock.left_s
            print(f"== {part}, {framework}: {share_s:.0f} s", flush=True)
            found = run_child(part, framework, share_s, options, results.root)
            result["frameworks"][framework] = found
            results.keep(f"gpu-{part}", result, found)
    if "size" in options.parts:
        for number, framework in enumerate(chosen):
            share_s = clock.left_s / (len(chosen) - number)
            if options.quick:
                share_s = min(share_s, REHEARSAL_S)
            run_sizes(framework, share_s, options, results)
    return results.failed


def run_sizes(framework: str, budget_s: float, options: Any, results: Results) -> None:
    """All sizes of a framework; larger ones get more of the time."""
    weights = [size**0.5 for size in options.sizes]
    result = _result("gpu", options, framework=framework, sizes={})
    for size, weight in zip(options.sizes, weights, strict=True):
        share_s = budget_s * weight / sum(weights) - OVERTIME_S / 2
        print(f"== {framework}, {size:g} GB: {share_s:.0f} s", flush=True)
        found: dict[str, Any] = {"skipped": f"no time: {share_s:.0f} s left"}
        if share_s > START_S:
            found = run_child("size", framework, share_s, options, results.root, size)
        result["sizes"][f"{size:g}"] = found
        results.keep(f"gpu-{framework}", result, found)


def _result(benchmark: str, options: Any, **more: Any) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "machine": machine.describe(Path(options.directory or tempfile.gettempdir())),
        "settings": {
            "budget_s": options.budget_s,
            "quick": options.quick,
            "rounds": options.rounds,
        },
        **more,
    }


def run_part(options: Any) -> None:
    """One part of one framework, in this process; its answer is written as it grows."""

    def report(found: dict[str, Any]) -> None:
        partial = Path(f"{options.answer}.partial")
        partial.write_text(json.dumps(found))
        partial.rename(options.answer)

    lab = importlib.import_module(f"bench.gpu.{options.framework}")
    if not (lab.has_accelerator() or options.allow_cpu):
        raise SystemExit(NO_GPU.format(framework=options.framework, device=lab.device_name()))
    if options.part == "size":
        report(run_size(options, report))
    elif options.part == "correctness":
        found = correctness.run(options, report)
        if failed := correctness.failures(found):
            report({**found, "failed": ", ".join(failed)})
    else:
        device = lab.device_name()
        report({"device": device})
        found = resume.run(options.framework, options.directory, options.budget_s)
        report({"device": device, **found})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=None)
    parser.add_argument("--sizes", nargs="+", type=float, default=None, help="GB of state")
    parser.add_argument("--directory", type=Path, default=None, help="where to save")
    parser.add_argument("--results", type=Path, default=None, help="folder of all machines")
    parser.add_argument("--budget-s", type=float, default=450, help="for everything")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of loops at most")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--allow-cpu", action="store_true", help="do without a GPU")
    for inner in ("--framework", "--answer", "--part"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=float, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.part:
        run_part(options)
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
    sys.exit(1 if run_parts(chosen, options) else 0)


if __name__ == "__main__":
    main()
