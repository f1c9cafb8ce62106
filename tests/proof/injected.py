"""Errors that the kernel tells a real process: `strace` is attached to it for one save."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

LIMIT_S = 60

SUFFER = """
import os, socket, sys
from engine_support import assert_is_state_of, restore_once, state_of
import stepsave
from proof.faults import Held
from proof.power_lives import set_small_shards

mouth = socket.socket(fileno=1)  # other calls of the kernel than those that files are written by

def told(what):
    mouth.sendall(what.encode() + b"\\n")
    assert sys.stdin.readline() == "go on\\n"

set_small_shards()
directory, writer = sys.argv[1:]
saver = stepsave.Checkpointer(directory, writer=writer)
for step in range(1, 5):
    saver.save(step, state_of(step)).wait()
held = Held.by(saver)
told(f"ready {saver.stats().writer}")
try:
    saver.save(5, state_of(5)).wait()
    told("saved")
except stepsave.SaveFailedError as e:
    told(f"failed {e}")
backup = saver.restore()
assert backup.step == 4, backup.step
assert_is_state_of(backup)
for step in range(6, 10):
    saver.save(step, state_of(step)).wait()
backup = saver.restore()
assert backup.step == 9
assert_is_state_of(backup)
assert Held.by(saver) == held, (Held.by(saver), held)
saver.close()
assert_is_state_of(restore_once(directory))
told("well")
"""


def reason_not_to():
    """Says why that cannot be done here; an empty text if it can."""
    if not shutil.which("strace"):
        return "needs strace"
    tried = subprocess.run(
        ["strace", "-qq", "-e", "inject=getppid:error=EIO", sys.executable, "-c", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    return "" if tried.returncode == 0 else f"strace does not work here: {tried.stderr[-200:]}"


class Sufferer:
    """A process that saves, and waits to be told to go on."""

    def __init__(self, directory, writer):
        command = [sys.executable, "-W", "error", "-c", SUFFER, str(directory), writer]
        ours, theirs = socket.socketpair()
        ours.settimeout(LIMIT_S)
        self._said = ours.makefile()
        pipe = subprocess.PIPE
        # SUFFER imports what this process does, however it came by it.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=theirs, stderr=pipe, text=True, env=environment
        )
        ours.close()
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.communicate(timeout=LIMIT_S)
        self._said.close()

    @property
    def pid(self):
        return self._process.pid

    def hear(self):
        line = self._said.readline()
        if not line:
            raise AssertionError(f"it ended: {self._process.communicate()[1][-2000:]}")
        return line.rstrip("\n")

    def go_on(self):
        self._process.stdin.write("go on\n")
        self._process.stdin.flush()


def fail_a_save(directory, writer, calls, error, folder):
    """Has calls of the kernel fail for one save of a process, all of them.

    Args:
        directory: For the backup.
        writer: Of the checkpointer.
        calls: Of the kernel, as `strace` names them, with commas.
        error: What they say.
        folder: For what `strace` tells.

    Returns:
        What the save said of itself, and the paths of the calls that failed, in order.
    """
    told = folder / "strace"
    with Sufferer(directory, writer) as process:
        ready = process.hear()
        assert ready.split()[0] == "ready", ready
        inject = f"inject={calls}:error={error}"
        command = ["strace", "-f", "-y", "-p", str(process.pid), "-o", str(told)]
        with subprocess.Popen(
            [*command, "-e", f"trace={calls}", "-e", inject], stderr=subprocess.PIPE, text=True
        ) as tracer:
            threads = len(os.listdir(f"/proc/{process.pid}/task"))
            while not _is_traced(process.pid, threads):
                assert tracer.poll() is None, tracer.stderr.read()
                time.sleep(0.01)
            process.go_on()
            outcome = process.hear()
            tracer.send_signal(signal.SIGINT)  # lets go of it
            tracer.communicate(timeout=LIMIT_S)
        process.go_on()
        ended = process.hear()
        assert ended == "well", ended
        process.go_on()
    failed = [line for line in told.read_text().splitlines() if "(INJECTED)" in line]
    return outcome, [path for line in failed for path in re.findall(r'[<"](/[^>"]*)[>"]', line)[:1]]


def _is_traced(pid, threads):
    """Whether all threads of a process have a tracer."""
    found = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/status") as file:
            found += "TracerPid:\t0\n" not in file.read()
    return found >= threads
