"""Runs the commands that docs/cli.md shows, and writes there what they print.

    python -m bench.publish.captures

Each capture stands between its own marks. What differs from run to run (times, the folder) is
replaced by … or by a folder that is always the same. A command of another page or section is one
more `Capture` in the list, and its two marks in the document.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import stepsave
from bench.publish.documents import replace

CLI = Path(__file__).parents[2] / "docs" / "cli.md"
HOME = "/home/me"
VARYING = [
    (re.compile(r"\S+ (s|min|h|days) ago, \S+ \S+ UTC"), "… ago, …"),
    (re.compile(r"in [\d.]+ m?s, [\d.]+ \w?B/s"), "in … s, … MB/s"),
    (re.compile(r"(LOCK +)\d+ B"), r"\1… B"),
    (re.compile(r"in [\d.]+ m?s \([\d.]+ \w?B/s\)"), "in … s (… MB/s)"),
    (re.compile(r"(160  |frees |Removed: )[\d.]+ MB"), r"\1… MB"),  # in blocks of the file system
]


@dataclasses.dataclass(frozen=True, slots=True)
class Capture:
    """What is shown of one command.

    Attributes:
        mark: Between which marks.
        command: What is typed.
        status: With what it must end.
        prepare: What is done before in the folder in which it runs; it is the same for all.
    """

    mark: str
    command: str
    status: int = 0
    prepare: Callable[[Path], object] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--document", type=Path, default=CLI)
    document = parser.parse_args().document
    with tempfile.TemporaryDirectory() as folder:
        make_backups(Path(folder))
        for capture in CAPTURES:
            replace(document, capture.mark, f"```console\n{take(capture, Path(folder))}```")


def make_backups(folder: Path) -> None:
    """Two trainings that differ in one value: `my_backup` with two backups, `other` with one."""
    for name, double, last in (("my_backup", True, 0.5), ("other", False, 0.25)):
        with stepsave.Checkpointer(folder / name, double_checkpoint=double) as saver:
            for step in (120, 140):
                position = stepsave.TrainingPosition(step, 1, step - 100, 100)
                state = example_state(step)
                state["trainable_variables"]["head"]["bias"][9] = last
                saver.save(step, state, {"position": position.to_json()}).wait()


def example_state(step: int) -> dict:
    kernel = np.linspace(-0.1, 0.1, 784 * 512, dtype=np.float32).reshape(784, 512)
    head = np.linspace(-0.1, 0.3, 512 * 10, dtype=np.float32).reshape(512, 10)
    layers = {
        "hidden": {"kernel": kernel + np.float32(step / 1e4), "bias": np.zeros(512, np.float32)},
        "head": {"kernel": head, "bias": np.full(10, 0.01, np.float32)},
    }
    slots = {"momentum": np.zeros((784, 512), np.float32), "iteration": np.int64(step)}
    return {"trainable_variables": layers, "optimizer_variables": {"sgd": slots}}


def leave_debris(folder: Path) -> None:
    """What a process leaves that is killed right before a save is committed."""
    shutil.copytree(folder / "my_backup" / "140", folder / "my_backup" / "160")


def spoil(folder: Path) -> None:
    """Flips a bit of two variables of the newest backup, and cuts a file of the one before."""
    for shape in ((512, 10), (512,)):
        shard, offset = place_of(folder / "my_backup" / "140", shape)
        with shard.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
    training = folder / "my_backup" / "120" / "training.json"
    training.write_bytes(training.read_bytes()[:-20])


def place_of(backup: Path, shape: tuple[int, ...]) -> tuple[Path, int]:
    """Where the first variable of a shape begins: a file, and the offset in it."""
    from stepsave.format.layout import decode_layout

    plan = decode_layout((backup / "layout.json").read_bytes(), str(backup))
    (leaf, *_) = [number for number, leaf in enumerate(plan.leaves) if leaf.shape == shape]
    (chunk, *_) = [chunk for chunk in plan.chunks if chunk.leaf == leaf]
    shard, offset = divmod(chunk.offset_bytes, plan.shard_bytes)
    return backup / "pytree" / "d" / "c" / str(shard), offset


CAPTURES = [
    Capture("inspect", "stepsave inspect my_backup"),
    Capture("inspect stats", "stepsave inspect my_backup --stats"),
    Capture("verify", "stepsave verify my_backup"),
    Capture("diff", "stepsave diff my_backup other", 1),
    Capture("diff alone", "stepsave diff my_backup", 1),
    Capture("export", "stepsave export my_backup model.safetensors"),
    Capture("cp", "stepsave cp my_backup copy"),
    Capture("cp again", "stepsave cp my_backup copy"),
    Capture("gc", "stepsave gc my_backup", 0, leave_debris),
    Capture("gc yes", "stepsave gc my_backup --yes"),
    # From here on it is damaged.
    Capture("verify damaged", "stepsave verify my_backup", 1, spoil),
    Capture("inspect damaged", "stepsave inspect my_backup", 1),
]


def take(capture: Capture, folder: Path) -> str:
    """Runs a command; returns what was typed and printed."""
    if capture.prepare is not None:
        capture.prepare(folder)
    program, *arguments = capture.command.split()
    assert program == "stepsave", capture.command
    ended = subprocess.run(
        [sys.executable, "-m", "stepsave.cli", *arguments],
        cwd=folder, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ended.returncode == capture.status, ended.stdout + ended.stderr
    printed = (ended.stdout + ended.stderr).replace(str(folder.resolve()), HOME)
    for pattern, text in VARYING:
        printed = pattern.sub(text, printed)
    return f"$ {capture.command}\n{printed}"


if __name__ == "__main__":
    main()
