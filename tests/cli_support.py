"""How the tests run the command line, and what is in the backups that they look at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from engine_support import flip_bit, random_array, read_marker

import stepsave
from stepsave.format.layout import decode_layout
from stepsave.format.records import DTYPES

GOLDEN = Path(__file__).parent / "engine" / "golden"
HEAVY = ("keras", "jax", "tensorflow", "torch")


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "stepsave.cli", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=120, **options,
    )  # fmt: skip


def run_script(script, *arguments):
    """What a script prints that runs in a process of its own and must succeed."""
    path = os.pathsep.join(sys.path)
    ended = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def ask(*arguments, status=0):
    """What a command prints that ends with a status and says nothing on standard error."""
    ended = run(*arguments)
    assert (ended.returncode, ended.stderr) == (status, "")
    return ended.stdout


def ask_json(*arguments, status=0):
    def refuse(constant):
        raise AssertionError(f"JSON has no {constant}")

    return json.loads(ask(*arguments, "--json", status=status), parse_constant=refuse)


def refusal(*arguments):
    """What a command says that cannot be done what it was asked for."""
    ended = run(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    return ended.stderr


def arrays_of_all_dtypes(shape=(50, 40), seed=0):
    return {name: random_array(shape, name, seed) for name in DTYPES}


def position(step):
    return stepsave.TrainingPosition(step, step // 100, step % 100, 100).to_json()


def save_two(directory, states, steps=(150, 160), **metadata):
    """Two valid backups in one directory."""
    with stepsave.Checkpointer(directory, double_checkpoint=True) as saver:
        for step, state in zip(steps, states, strict=True):
            saver.save(step, state, {"position": position(step), **metadata}).wait()


def plan_of(directory, step):
    return decode_layout(Path(directory, str(step), "layout.json").read_bytes(), "")


def chunks_of(directory, step, *names):
    """Where the chunks of variables are: file, and the offset in it."""
    plan = plan_of(directory, step)
    for chunk in plan.chunks:
        if "/".join(plan.leaves[chunk.leaf].path) in names:
            shard, offset = divmod(chunk.offset_bytes, plan.shard_bytes)
            yield Path(directory, str(step), "pytree/d/c", str(shard)), offset, chunk


def spoil(directory, step, *names):
    """Flips a bit in the first chunk of each variable."""
    seen = set()
    for path, offset, chunk in chunks_of(directory, step, *names):
        if chunk.leaf not in seen:
            flip_bit(path, offset)
        seen.add(chunk.leaf)
    assert len(seen) == len(names)


def newest_of(directory):
    return Path(directory, read_marker(directory)["directory"])


def close(found, expected):
    return np.isclose(found, expected, rtol=1e-6, atol=0).all()
