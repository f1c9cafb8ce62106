"""Records scenarios: in this process, or in one of their own that strace looks at."""

import contextlib
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import stepsave
from proof.crash_scenarios import ALL, Run
from stepsave.testing.recording import files_below, record
from stepsave.testing.strace_log import parse_strace, strace_command

LIMIT_S = 120


def record_here(name, writer, top):
    """Records a scenario in this process, whose syncs are free. Only what Python writes is seen."""
    scenario = ALL[name]
    run = _prepared(scenario, writer, top)
    with free_syncs(), record(top, syncs=True) as recorder:
        run.mark = recorder.mark
        scenario.act(run)
    return dataclasses.replace(recorder.log, acknowledged=scenario.acknowledged)


def record_traced(name, writer, top):
    """Records a scenario in a traced process: what C++ writes is seen too."""
    scenario = ALL[name]
    _prepared(scenario, writer, top)
    before = files_below(top)
    with tempfile.TemporaryDirectory(prefix="stepsave-trace-") as place:
        output = Path(place, "trace")
        command = [*strace_command(output), sys.executable, "-m", "proof.crash_scenarios"]
        source = Path(stepsave.__file__).parents[1]
        paths = source, *Path(__file__).parents[1:3]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        done = subprocess.run(
            [*command, str(top), name, writer],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        builder = parse_strace(output.read_text(), top, before)
    builder.check_complete(files_below(top))
    return dataclasses.replace(builder.log, acknowledged=scenario.acknowledged)


@functools.cache
def why_no_strace():
    """Why nothing can be traced here; empty if it can."""
    if shutil.which("strace") is None:
        return "there is no strace here"
    command = [*strace_command(os.devnull), "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    return f"strace cannot trace here: {done.stderr.strip()[:200]}" if done.returncode else ""


@contextlib.contextmanager
def free_syncs():
    """Syncs do nothing: processes die here, not machines."""
    real = os.fsync, os.fdatasync
    os.fsync = os.fdatasync = lambda _: None
    try:
        yield
    finally:
        os.fsync, os.fdatasync = real


@contextlib.contextmanager
def memory_directory():
    """A directory in memory, if one takes direct writes as disks do; else on the disk."""
    place = "/dev/shm" if _takes_direct("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="stepsave-states-", dir=place) as name:
        yield Path(os.path.realpath(name))


@functools.cache
def _takes_direct(place):
    if not os.path.isdir(place) or shutil.disk_usage(place).free < 256 << 20:
        return False
    with tempfile.TemporaryDirectory(prefix="stepsave-states-", dir=place) as name:
        return stepsave.store.local.LocalStore(name).can_write_direct()


def _prepared(scenario, writer, top):
    run = Run(top, writer, lambda *_: None)
    if scenario.prepare is not None:
        with free_syncs():
            scenario.prepare(run)
    return run
