"""A child that saves all the time is killed at random moments; nothing acknowledged is lost."""

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_support import SMALL_SHARDS, assert_is_state_of

import stepsave

KILLS = 50
SECONDS = 25.0

# Imports once, then forks a saving child for each line it is sent: so most of the time of
# the test goes into saving.
NURSERY = (
    SMALL_SHARDS
    + """
import os, random, sys
import numpy as np, stepsave
from engine_support import state_of

def tell(text):
    os.write(1, text.encode() + b"\\n")  # one write: the parent never sees half a line

def live(directory, double, writer, seed):
    rng = random.Random(seed)
    tell("start")
    with stepsave.Checkpointer(directory, double_checkpoint=double, writer=writer) as saver:
        backup = saver.restore()
        step = backup.step if backup else 0
        while True:
            step += 1
            # Two layouts take turns, so that spares are made anew as well as reused.
            handle = saver.save(step, state_of(step, leaves=8 + step // 7 % 2), {"step": step})
            if rng.random() < 0.6:
                handle.wait()
                tell(f"durable {step}")

for line in sys.stdin:
    directory, double, writer, seed = line.rsplit(None, 3)
    child = os.fork()
    if child == 0:
        live(directory, double == "True", writer, int(seed))
    tell(f"child {child}")
    os.waitpid(child, 0)
    tell("gone")
"""
)


class Lines:
    """The lines of a pipe, with a timeout."""

    def __init__(self, pipe):
        self.pipe, self.rest = pipe, b""

    def next(self, timeout_s):
        while b"\n" not in self.rest:
            if not select.select([self.pipe], [], [], timeout_s)[0]:
                return None
            data = os.read(self.pipe.fileno(), 1 << 16)
            assert data, "the children ended by themselves"
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        return line.decode().split()


@pytest.mark.parametrize("writer", ["auto", "tensorstore"])
@pytest.mark.parametrize("double", [False, True])
def test_a_process_killed_at_any_moment_leaves_its_last_durable_step(tmp_path, writer, double):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201  shown if the test fails
    rng = random.Random(seed)
    directory = tmp_path / "backup"
    command = [sys.executable, "-W", "error", "-c", NURSERY]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    durable = restored = 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as nursery:
        lines = Lines(nursery.stdout)
        for _ in range(KILLS // 4 + 1):
            order = f"{directory} {double} {writer} {rng.randrange(1 << 32)}\n"
            nursery.stdin.write(order.encode())
            nursery.stdin.flush()
            child = None
            deadline = None
            while True:
                left_s = 30 if deadline is None else deadline - time.monotonic()
                line = lines.next(max(0, left_s)) if left_s > 0 else None
                if line is None:
                    assert deadline is not None, "the child did not start"
                    if child is not None:
                        break
                    continue
                if line[0] == "child":
                    child = int(line[1])
                elif line[0] == "start":
                    deadline = time.monotonic() + rng.uniform(0, 2 * SECONDS / KILLS)
                elif line[0] == "durable":
                    durable = int(line[1])
            os.kill(child, signal.SIGKILL)
            while (line := lines.next(30)) != ["gone"]:
                durable = int(line[1])  # what it said before it died counts
            with stepsave.Checkpointer(directory, double_checkpoint=double) as saver:
                backup = saver.restore()
            restored = backup.step if backup else 0
            assert restored >= durable, f"step {durable} was acknowledged, {restored} restored"
            if backup:
                assert_is_state_of(backup)
                assert backup.metadata == {"step": restored}
            durable = restored
        nursery.stdin.close()
    assert restored > KILLS // 4, "hardly anything was saved: the test tests nothing"
    with stepsave.Checkpointer(directory, double_checkpoint=double) as saver:
        saver.save(restored + 1, {"last": 1}).wait()
        saver.close(delete_backup=True)
    assert not directory.exists(), f"litter: {list(directory.rglob('*'))}"
