"""How the tests run the command line, here or as a process, and what is in their backups."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from engine_support import check_python, flip_bit, random_array, read_marker

import stepsave
from stepsave.cli import app
from stepsave.format.layout import decode_layout
from stepsave.format.records import DTYPES

GOLDEN = Path(__file__).parent / "engine" / "golden"
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
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **more}


def run(*arguments, status=0, prefix=(), **options):
    """Runs a command in a process of its own, to end with a status, or any if that is None."""
    ended = subprocess.run(
        [*prefix, *COMMAND, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=120,
        env=options.pop("only", None) or environment(**options.pop("variables", {})), **options,
    )  # fmt: skip
    assert status in (None, ended.returncode), ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended


def ask(*arguments, **options):
    """What a command prints that says nothing on standard error."""
    ended = run(*arguments, **options)
    assert ended.stderr == ""
    return ended.stdout


def ask_json(*arguments, **options):
    def refuse(constant):
        raise AssertionError(f"JSON has no {constant}")

    return json.loads(ask(*arguments, "--json", **options), parse_constant=refuse)


def refusal(*arguments):
    """What a command says that cannot be done what it was asked for."""
    ended = run(*arguments, status=2)
    assert ended.stdout == ""
    return ended.stderr


WITHOUT = """
import sys, warnings
warnings.simplefilter("error")
from stepsave.cli import app
try:
    app.run()
except SystemExit as e:
    assert not e.code, e.code
found = {names} & set(sys.modules)
assert not found, found
"""


def check_imports(*arguments, more=()):
    """Runs a command that must import neither Keras, nor a backend, nor what else is named."""
    names = {"keras", "jax", "tensorflow", "torch", "safetensors", *more}
    check_python(WITHOUT.format(names=names), *arguments)


def start(*arguments):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


def in_terminal(*arguments, press=None, **variables):
    """The exit status of a command in a terminal of 80 columns, and all that it wrote there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=environment(TERM="xterm-256color", COLUMNS="80", **variables),
        # Or Ctrl-C would be no signal: the terminal is to be that of the session.
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # noqa: PLW1509
    )  # fmt: skip
    os.close(theirs)
    written, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # nobody has the other end any more
                break
            written += piece
            if press is not None and press[0] in written.decode(errors="ignore"):
                os.write(ours, press[1])
                press = None
    status = process.wait(timeout=30)
    os.close(ours)
    return status, written.decode()


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
