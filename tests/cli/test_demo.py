"""`stepsave demo` is `python -m stepsave.demo`."""

import subprocess
import sys

from cli_support import environment, run


def test_arguments_and_status_are_those_of_the_demo():
    assert "digits classifier" in run("demo", "--help").stdout
    ended = run("demo", status=1, variables={"KERAS_BACKEND": "abacus"})
    assert "'abacus'" in ended.stderr
    assert "--nonsense" in run("demo", "--nonsense", status=2).stderr


def test_the_module_by_itself_takes_the_same():
    ended = subprocess.run(
        [sys.executable, "-m", "stepsave.demo", "--help"],
        capture_output=True, text=True, check=False, env=environment(), timeout=60,
    )  # fmt: skip
    assert ended.stdout == run("demo", "--help").stdout
