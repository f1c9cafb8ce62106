"""What several test files share: states, comparisons by bits, and ways to spoil a backup."""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c

import stepsave
from stepsave.format.planning import compile_layout
from stepsave.format.records import DTYPES, LeafSpec
from stepsave.snapshot.arena import Arena
from stepsave.snapshot.arrays import dtype_name
from stepsave.snapshot.contents import Attention
from stepsave.snapshot.pages import Pages

SMALL_SHARDS = """
from stepsave.format import planning
planning.SHARD_TARGET_BYTES = 64 << 10
planning.CHUNK_LIMIT_BYTES = 16 << 10
"""
"""For scripts of child processes, like the fixture `small_shards`."""


def random_array(shape, dtype, seed=0):
    """An array of random bits that are legal values of the dtype."""
    rng = np.random.default_rng(seed)
    kind = DTYPES[dtype]
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    count = int(np.prod(shape, dtype=int))
    raw = rng.integers(0, 256, count * kind.itemsize, dtype=np.uint8)
    if dtype in ("int2", "int4"):  # ml_dtypes keeps the sign in the high bits
        low, high = (-2, 2) if dtype == "int2" else (-8, 8)
        raw = rng.integers(low, high, count).astype(np.int8).view(np.uint8)
    elif dtype == "float4_e2m1fn":
        raw &= 0x0F
    return raw.view(kind).reshape(shape)


def state_of(step, leaves=12, shape=(40, 50)):
    """A state of which any mixture of two shows.

    Weights change whole from step to step, rows in part, what is slow in every fifth, and what is
    frozen never.
    """
    weights = {f"w{i}": np.full(shape, step, np.float32) for i in range(leaves)}
    rows = np.zeros((130, 130), np.float32)
    rows[step % len(rows)] = step
    return {
        "weights": weights,
        "optimizer": {"step": np.int64(step), "slow": np.full((130, 130), step // 5, np.float32)},
        "frozen": np.arange(130 * 130, dtype=np.float32),
        "rows": rows,
    }


def assert_is_state_of(backup):
    for name, array in backup.state["weights"].items():
        assert (array == backup.step).all(), f"{name} is not of step {backup.step}"
    expected = state_of(backup.step, leaves=0)
    assert backup.state["optimizer"]["step"] == backup.step
    assert_same_bits(backup.state["optimizer"]["slow"], expected["optimizer"]["slow"])
    assert_same_bits(backup.state["frozen"], expected["frozen"])
    assert_same_bits(backup.state["rows"], expected["rows"])


def assert_same_bits(found, expected, at="state"):
    """Compares trees of arrays: containers, keys in order, dtypes, shapes, bytes."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), at
        assert list(map(type, found)) == list(map(type, expected)), at
        for key in expected:
            assert_same_bits(found[key], expected[key], f"{at}[{key!r}]")
        return
    if isinstance(expected, (list, tuple)):
        assert type(found) is type(expected), at
        assert len(found) == len(expected), at
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_bits(one, other, f"{at}[{number}]")
        return
    if expected is None or type(expected) in (bool, int, float, complex):
        assert type(found) is type(expected), at
    expected = np.asarray(expected)
    found = np.asarray(found)
    assert found.dtype == expected.dtype, at
    assert found.shape == expected.shape, at
    assert found.tobytes() == expected.tobytes(), at


def save_once(directory, state, step=1, metadata=None, **options):
    with stepsave.Checkpointer(directory, **options) as saver:
        saver.save(step, state, metadata).wait()


def needs_direct(saver):
    if saver.stats().writer != "direct":
        pytest.skip("the file system of the temporary directory does not take O_DIRECT")


def restore_once(directory, **options):
    with stepsave.Checkpointer(directory, **options) as saver:
        return saver.restore()


def flip_bit(path, offset, bit=0):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def tree_bytes(root):
    """Every file below a directory with its contents, links as their targets."""
    found = {}
    for directory, names, files in os.walk(root):
        for name in [*names, *files]:
            path = Path(directory, name)
            key = str(path.relative_to(root))
            if path.is_symlink():
                found[key] = os.readlink(path)
            elif path.is_file():
                found[key] = path.read_bytes()
            else:
                found[key] = None
    return found


def read_marker(directory, name="COMMIT"):
    """The JSON of a marker, read without stepsave."""
    return json.loads(Path(directory, name).read_bytes().partition(b"\n")[2])


def write_marker(directory, document, version=1, name="COMMIT"):
    """Writes a marker that proves itself, whatever it says."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    line = f"stepsave-commit {version} {crc32c(body):08x} {len(body)}\n"
    Path(directory, name).write_bytes(line.encode() + body)


def replace_proved(directory, path, data):
    """Replaces a file of the newest backup and makes the marker vouch for it."""
    document = read_marker(directory)
    Path(directory, document["directory"], path).write_bytes(data)
    for entry in document["files"]:
        if entry[0] == path:
            entry[1:] = [len(data), crc32c(data)]
    write_marker(directory, document)


def change_json(directory, path, change):
    """Edits a JSON file of the newest backup and makes the marker vouch for it."""
    file = Path(directory, read_marker(directory)["directory"], path)
    document = json.loads(file.read_bytes())
    document = change(document) or document
    replace_proved(directory, path, json.dumps(document).encode())


def child_environment(**more):
    """The environment of child processes: they find the tests' modules, and the same stepsave."""
    paths = filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def run_python(script, *args, timeout=90, prefix=(), **options):
    """Runs a script in a fresh interpreter with the warnings of the test run."""
    return subprocess.run(
        [*prefix, sys.executable, "-c", script, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=child_environment(),
        check=False,
        **options,
    )


def check_python(script, *args, **options):
    """Runs a script that must succeed; returns what it printed."""
    done = run_python(script, *args, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_own_mounts(commands):
    """The prefix that runs a command in a private mount namespace, after shell commands.

    Skips the test where such namespaces are not permitted.
    """
    for unshare in (["unshare", "-m"], ["unshare", "-Urm"]):
        if not shutil.which("unshare"):
            break
        if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0:
            return [*unshare, "sh", "-ec", f'{commands}\nexec "$@"', "sh"]
    pytest.skip("mounting needs `unshare -m`, which is not permitted here")


def plan_of(arrays):
    """The layout of a state `w0`, `w1`, …"""
    specs = [LeafSpec((f"w{i}",), a.shape, dtype_name((), a)) for i, a in enumerate(arrays)]
    return compile_layout(specs)


def filled(arrays, arena=None, threads=1):
    """Copies arrays into an arena as a save does; returns the plan and the arena."""
    plan = plan_of(arrays)
    arena = arena or Arena(Pages(-(-plan.arena_bytes // 4096) * 4096))
    arena.bind(plan)
    filling = arena.begin(list(arrays).__getitem__, Attention())
    with concurrent.futures.ThreadPoolExecutor(threads) as executor:
        works = filling.work, *[filling.help] * (threads - 1)
        for future in [executor.submit(work) for work in works]:
            future.result()
    assert filling.is_complete
    return plan, arena
