"""What people see: columns, and color where somebody looks at it."""

import re
import sys

import numpy as np
from cli_support import in_terminal, save_two, spoil
from engine_support import random_array, save_once

from stepsave.cli.screen import lay_out

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
