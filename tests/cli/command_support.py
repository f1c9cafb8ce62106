"""What tests of the commands share: running them, here or as a process, and states."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from engine_support import random_array

from stepsave.cli import app
from stepsave.format.records import DTYPES

# Of Keras 3.15 and NumPy 2 for each other, as in pyproject.toml.
OF_KERAS = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
COMMAND = [sys.executable, "-W", "error", "-W", OF_KERAS, "-m", "stepsave.cli"]


def call(*arguments, status=0):
    """Runs a command in this process, as `stepsave` does; it must end with this status."""
    before, sys.argv = sys.argv, ["stepsave", *map(str, arguments)]
    found = 0
    try:
        app.run()
    except SystemExit as e:
        found = e.code or 0
    finally:
        sys.argv = before
    assert found == status, f"{arguments}: {found}"


def environment(**more):
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **more}


def run(*arguments, status=0, prefix=(), **options):
    """Runs a command in a process of its own; returns how it ended."""
    ended = subprocess.run(
        [*prefix, *COMMAND, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=120,
        env=options.pop("only", None) or environment(**options.pop("variables", {})), **options,
    )  # fmt: skip
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended


def run_script(script, *arguments, prefix=()):
    """Runs a script that must succeed."""
    ended = subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=120, env=environment(),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr


IMPORTS_NOTHING_HEAVY = """
import sys
from stepsave.cli import app
try:
    app.run()
except SystemExit as e:
    assert not e.code
heavy = {"keras", "jax", "tensorflow", "torch", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""


def start(*arguments):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


def wait_until(condition, limit_s=60.0):
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it does not happen"
        time.sleep(0.001)


def rich_state():
    """Every dtype, shapes with and without elements, and arrays of several chunks if these are
    small (`small_shards`)."""
    state = {name: random_array((3, 5), name, seed) for seed, name in enumerate(sorted(DTYPES))}
    return {
        **state,
        "scalar": np.float32(1.5),
        "empty": np.empty((0, 4), np.float32),
        "none": np.empty((3, 0), "int16"),
        "large": random_array((130, 257), "float32", 99),
        "deep": {"list": [np.arange(3), np.arange(4.0)], "flag": np.True_},
        "wide": random_array((70, 300), "bfloat16", 98),
        "number": 7,
    }


def leaves(tree, path=()):
    """Names and arrays of a state, by themselves."""
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, str(key)))
    else:
        yield ".".join(path), np.asarray(tree)


def shard_files(directory, step):
    return sorted(Path(directory, str(step), "pytree", "d", "c").iterdir())
