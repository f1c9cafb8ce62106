"""The command line as a whole."""

import subprocess
import sys

from cli_support import run


def test_help_says_what_it_is_for_and_imports_neither_keras_nor_a_backend():
    code = (
        "import sys; from stepsave.cli import app\n"
        "heavy = {'keras', 'jax', 'tensorflow', 'torch', 'tensorstore'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.argv = ['stepsave', '--help']; app.run()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert "backups of stepsave" in ended.stdout


def test_a_missing_package_is_named_with_how_to_install_it():
    code = "import sys; sys.modules['typer'] = None\nfrom stepsave.cli.__main__ import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 1
    assert "typer not found" in ended.stderr
    assert "stepsave[cli]" in ended.stderr


def test_wrong_usage_ends_with_2():
    assert "no-such-command" in run("no-such-command", status=2).stderr
