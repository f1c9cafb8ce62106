"""Faults of the machine around the engine, each in a child process that suffers it."""

import os
import re
import signal
import subprocess
import sys

import pytest
from engine_support import (
    SMALL_SHARDS,
    assert_is_state_of,
    check_python,
    child_environment,
    in_own_mounts,
    restore_once,
    run_python,
    save_once,
    state_of,
)

import stepsave

HEAD = (
    SMALL_SHARDS
    + """
import os, sys, time
import numpy as np, stepsave
from engine_support import assert_is_state_of, restore_once, state_of
directory = sys.argv[1]
"""
)


@pytest.mark.parametrize("kind", ["ramfs", "tmpfs"])
def test_other_file_systems_get_the_writer_that_they_can_take(tmp_path, kind):
    prefix = in_own_mounts(f"mount -t {kind} none {tmp_path}")
    printed = check_python(
        HEAD
        + """
with stepsave.Checkpointer(directory + "/b") as saver:
    for step in range(1, 6):
        saver.save(step, state_of(step))
    assert saver.restore().step == 5
    assert_is_state_of(saver.restore())
    print(saver.stats().writer)
assert_is_state_of(restore_once(directory + "/b"))
if saver.stats().writer == "tensorstore":
    try:
        stepsave.Checkpointer(directory + "/b", writer="direct")
        raise AssertionError
    except stepsave.BackupDirectoryError as e:
        assert directory + "/b" in str(e) and "O_DIRECT" in str(e)
    restore_once(directory + "/b")  # the refusal left no lock
""",
        tmp_path,
        prefix=prefix,
    )
    assert printed.split()[-1] in (
        ["tensorstore"] if kind == "ramfs" else ["direct", "tensorstore"]
    )


SAVE_ON = (
    HEAD
    + """
saver = stepsave.Checkpointer(directory)
saver.save(1, state_of(1)).wait()
print("saved", flush=True)
sys.stdin.read()
"""
)


def test_a_second_process_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", SAVE_ON, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment(),
        text=True,
    ) as first:
        assert first.stdout.readline() == "saved\n"
        with pytest.raises(stepsave.DirectoryBusyError, match=f"{tmp_path}.*pid {first.pid}"):
            stepsave.Checkpointer(tmp_path)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert_is_state_of(restore_once(tmp_path))
    save_once(tmp_path, state_of(2), step=2)
    assert_is_state_of(restore_once(tmp_path))


def test_one_that_was_refused_in_a_process_leaves_its_lock_in_place(tmp_path):
    """The kernel drops a lock as soon as its process closes any descriptor of the file."""
    script = """
import sys, stepsave
try:
    stepsave.Checkpointer(sys.argv[1]).close()
except stepsave.DirectoryBusyError as e:
    print(e)
"""
    with stepsave.Checkpointer(tmp_path) as saver:
        with pytest.raises(stepsave.DirectoryBusyError, match="of this process"):
            stepsave.Checkpointer(tmp_path)
        assert f"pid {os.getpid()}" in check_python(script, tmp_path)
        saver.save(1, state_of(1)).wait()
    assert check_python(script, tmp_path) == ""
    assert_is_state_of(restore_once(tmp_path))


def test_a_forked_child_is_refused_and_the_parent_unharmed(tmp_path):
    check_python(
        HEAD
        + """
with stepsave.Checkpointer(directory) as saver:
    saver.save(1, state_of(1)).wait()
    saver.save(2, state_of(2))  # in flight
    child = os.fork()
    if child == 0:
        refused = belongs = 0
        for use in (lambda: saver.save(3, state_of(3)), saver.restore,
                    lambda: saver.prepare(state_of(3)), lambda: stepsave.Checkpointer(directory)):
            try:
                use()
            except stepsave.DirectoryBusyError as e:
                refused += directory in str(e)
                belongs += "this checkpointer belongs to the parent of this forked" in str(e)
        saver.close()  # nothing of the child's to close
        saver.close(delete_backup=True)
        os._exit(0 if (refused, belongs) == (4, 3) else 1)
    assert os.waitpid(child, 0)[1] == 0
    saver.save(3, state_of(3)).wait()
    assert saver.restore().step == 3
assert_is_state_of(restore_once(directory))
""",
        tmp_path,
    )


END = "import signal; signal.raise_signal(signal.{})"
# What a script does at its end, its exit code, what it says, and whether saves are finished.
ENDINGS = {
    "return": ("pass", 0, "", True),
    "sys.exit": ("sys.exit(3)", 3, "", True),
    "error": ("raise KeyError('boom')", 1, r".*KeyError: 'boom'\n", True),
    "Ctrl-C": (END.format("SIGINT"), -signal.SIGINT, r".*KeyboardInterrupt\n", True),
    "SIGTERM": (END.format("SIGTERM"), -signal.SIGTERM, "", False),
    "SIGTERM, handled": (
        f"import signal; signal.signal(15, lambda *_: sys.exit(5)); {END.format('SIGTERM')}",
        5,
        "",
        True,
    ),
    "os._exit": ("os._exit(4)", 4, "", False),
}


@pytest.mark.parametrize("writer", ["auto", "tensorstore"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_save_in_flight_is_finished_when_the_interpreter_exits(tmp_path, ending, writer):
    code, status, told, finishes = ENDINGS[ending]
    done = run_python(
        HEAD
        + f"""
from stepsave.store.local import LocalStore
real = LocalStore.write
def write(self, path, data):
    time.sleep(0.05)  # so that the save is still in flight at the end
    real(self, path, data)
saver = stepsave.Checkpointer(directory, writer={writer!r})
saver.save(1, state_of(1)).wait()
LocalStore.write = write
saver.save(2, state_of(2))
saver.save(3, state_of(3))
assert saver.in_flight == 2
{code}
""",
        tmp_path / "backup",
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    # Of a thread, or of what was cleaned up too late, nothing is said.
    assert re.fullmatch(told, done.stderr, re.DOTALL), done.stderr
    assert not re.search("Exception in thread|ignored in|RuntimeError", done.stderr)
    backup = restore_once(tmp_path / "backup")
    assert backup.step == 3 if finishes else backup.step in (1, 2, 3)
    assert_is_state_of(backup)
    save_once(tmp_path / "backup", state_of(4), step=4)
    assert_is_state_of(restore_once(tmp_path / "backup"))


def test_a_limit_on_threads_is_an_error_at_the_start_and_not_a_hang(tmp_path):
    done = run_python(
        HEAD
        + """
import threading
real, count = threading.Thread.start, [0]
def start(self):
    count[0] += 1
    if count[0] == 2:
        raise RuntimeError("can't start new thread")
    real(self)
threading.Thread.start = start
try:
    stepsave.Checkpointer(directory)
except Exception as e:
    print("refused", e)
threading.Thread.start = real
with stepsave.Checkpointer(directory) as saver:
    saver.save(1, state_of(1)).wait()
""",
        tmp_path,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert "refused" in done.stdout
    assert_is_state_of(restore_once(tmp_path))


def test_a_kill_of_the_tensorstore_writer_leaves_no_litter_for_ever(tmp_path):
    """tensorstore writes under another name first; a kill leaves that file in the spare."""
    with stepsave.Checkpointer(tmp_path, writer="tensorstore") as saver:
        for step in (1, 2):
            saver.save(step, state_of(step)).wait()
    (tmp_path / "spare/pytree/d/c/0_c86fdf7317293cc.__lock").write_bytes(bytes(100))
    with stepsave.Checkpointer(tmp_path, writer="tensorstore") as saver:
        for step in (3, 4):
            saver.save(step, state_of(step)).wait()
        assert list(tmp_path.rglob("*.__lock")) == []
        assert_is_state_of(saver.restore())
        saver.close(delete_backup=True)
    assert not tmp_path.exists()
