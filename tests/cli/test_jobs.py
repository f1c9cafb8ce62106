"""Work that takes long: how far it is, and signals that end it."""

import signal
import threading
import time

import pytest
import typer
from cli_support import in_terminal
from engine_support import random_array, save_once

from stepsave.cli import jobs


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_work_at_its_next_note_with_a_status_that_tells_of_it(signum, capsys):
    noted = []

    def work(job, _):
        job.begin("working", 10)
        job.note(3)
        noted.append(job.done_bytes)
        signal.pthread_kill(threading.main_thread().ident, signum)  # as the system does
        end_s = time.monotonic() + 60
        while time.monotonic() < end_s:
            job.note(0)
        noted.append("never told")

    before = signal.getsignal(signum)
    with pytest.raises(typer.Exit) as e:
        jobs.do(work, 1)
    assert e.value.exit_code == 128 + signum
    assert noted == [3]
    assert capsys.readouterr().err == "stepsave: stopped.\n"
    assert signal.getsignal(signum) is before


def test_ctrl_c_ends_at_once_with_130_and_gives_the_cursor_back(tmp_path):
    save_once(tmp_path, {f"a{i}": random_array((1500, 5000), "float32", i) for i in range(20)})
    status, written = in_terminal("verify", tmp_path, press=("verifying", b"\x03"))
    assert status == 130
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is shown again"
    assert "valid" not in written
    assert "stopped" in written


def test_a_signal_that_whoever_started_it_has_ignored_is_ignored():
    """As by `nohup`, for a command that is to outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def work(job, _):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGHUP)
        time.sleep(0.1)  # for a handler, if there were one
        job.check()
        return "done"

    try:
        assert jobs.do(work, 1) == "done"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_pieces_of_several_threads_add_up_until_something_else_begins():
    job = jobs.Job()
    job.begin("reading", 12_000)
    threads = [
        threading.Thread(target=lambda: [job.note(3) for _ in range(1000)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert job.done_bytes == 12_000
    job.begin("reading again", 12_000)
    assert job.done_bytes == 0
