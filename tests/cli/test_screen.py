"""What people see: units, columns, and progress where somebody looks at it."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from cli_support import save_two, spoil
from engine_support import random_array, save_once

from stepsave.cli import screen
from stepsave.cli.screen import age_text, lay_out, reading, size_text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9995, "10.0 kB"), (99_949, "99.9 kB"),
        (99_950, "100 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"), (812_345_678, "812 MB"),
        (1.5e18, "1500 PB"),
    ],
)  # fmt: skip
def test_sizes_have_three_digits_and_a_unit(size_bytes, text):
    assert size_text(size_bytes) == text


@pytest.mark.parametrize(
    ("age_s", "text"),
    [
        (-3, "0 s"), (0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"),
        (7200, "2 h"), (172_799, "47 h"), (172_800, "2 days"),
    ],
)  # fmt: skip
def test_ages_have_one_unit(age_s, text):
    assert age_text(age_s) == text


ROWS = [["a/short/path", "1", "22"], ["a/path/that/is/far/too/long/for/one/line", "333", "4"]]


def test_in_a_pipe_each_row_is_one_line():
    assert [*lay_out(["variable", "x", "y"], ROWS)] == [
        "variable                                    x   y",
        "a/short/path                                1  22",
        "a/path/that/is/far/too/long/for/one/line  333   4",
    ]


def test_on_a_narrow_terminal_a_long_path_has_a_line_of_its_own(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "35")
    assert [*lay_out(["variable", "x", "y"], ROWS)] == [
        "variable                      x   y",
        "a/short/path                  1  22",
        "a/path/that/is/far/too/long/for/one/line",
        "                            333   4",
    ]


def test_after_ctrl_c_nothing_is_read_any_more():
    with contextlib.suppress(KeyboardInterrupt), reading("reading", 10) as on_read:
        on_read(3)
        raise KeyboardInterrupt
    assert on_read.done_bytes == 3
    with pytest.raises(InterruptedError):
        on_read(1)


def in_terminal(*arguments, press=None, **environment):
    """The exit status of a command in a terminal of 80 columns, and all that it wrote there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "stepsave.cli", *map(str, arguments)],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment},
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


def test_on_a_terminal_verify_shows_how_far_it_is_and_how_fast_and_then_what_was_found(tmp_path):
    save_two(tmp_path, [{"a": random_array((3000, 5000), "float32", n)} for n in range(2)])
    status, written = in_terminal("verify", tmp_path)
    assert status == 0
    assert "verifying" in written
    assert re.search(r"120\.\d/120\.\d MB|0\.0/120\.\d MB", re.sub(r"\x1b\[[\d;?]*\w", "", written))
    assert written.rstrip().endswith("\x1b[0m")
    assert "\x1b[32mvalid: step 160, 150" in written
    spoil(tmp_path, 160, "a")
    status, written = in_terminal("verify", tmp_path)
    assert status == 1
    assert "\x1b[31mdamaged: 1 file, 1 variable" in written


def test_who_wants_no_color_gets_none(tmp_path):
    save_once(tmp_path, {"a": np.arange(3)})
    _, written = in_terminal("verify", tmp_path, NO_COLOR="1")
    assert "\x1b[32m" not in written
    assert "valid: step 1;" in written


def test_ctrl_c_ends_at_once_with_130_and_gives_the_cursor_back(tmp_path):
    save_once(tmp_path, {f"a{i}": random_array((1500, 5000), "float32", i) for i in range(20)})
    status, written = in_terminal("verify", tmp_path, press=("verifying", b"\x03"))
    assert status == 130
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is shown again"
    assert "valid" not in written


def test_pieces_of_several_threads_add_up():
    shown = []
    progress = screen.Reading(shown.append)
    threads = [
        threading.Thread(target=lambda: [progress(3) for _ in range(1000)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert progress.done_bytes == sum(shown) == 12_000
