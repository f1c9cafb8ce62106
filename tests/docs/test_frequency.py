"""What docs/frequency.md shows runs as written, and says what is so."""

import re
import subprocess
import sys

from document_support import ROOT, blocks

from stepsave.engine.interval import best_interval_s

PAGE = (ROOT / "docs" / "frequency.md").read_text()
FIT, FAILURES, LOOP = blocks("frequency.md", "python")
SHOWN = blocks("frequency.md", "text")[0].strip()


def run(code, directory):
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_numbers(text):
    text = re.sub(r"(?<==)0\.01", "SHARE", text)
    return re.sub(r"[\d.e+-]+ (ms|s|min|h)\b|\b\d+\b", "N", text)


def test_the_example_of_a_fit_runs_as_written_and_says_what_it_has_chosen(tmp_path):
    out = run(FIT, tmp_path).strip().splitlines()
    assert "saving backup of step 3" in "\n".join(out)
    bounds = r"the budget \(max_overhead=SHARE\) allows no more|saves take so long to be durable"
    shown = re.escape(without_numbers(SHOWN))
    shown = shown.replace(
        re.escape("the budget (max_overhead=SHARE) allows no more"), f"({bounds})"
    )
    assert re.fullmatch(shown, without_numbers(out[-1])), out[-1]


def test_the_example_with_failures_makes_a_callback(tmp_path):
    run(f"import stepsave\n{FAILURES}\nassert backup.mtbf_s == 14400", tmp_path)


def test_the_example_of_a_loop_runs_as_written_and_again_after_it(tmp_path):
    for _ in range(2):
        assert "save_freq='auto'" in run(LOOP, tmp_path)


def test_the_interval_that_the_page_names_is_the_best_one():
    (seconds,) = re.findall(r"A save of 20 ms and a failure every four hours make (\d+) s", PAGE)
    assert round(best_interval_s(0.020, 4 * 3600)) == int(seconds)
    assert 0.020 / int(seconds) < 1e-3
