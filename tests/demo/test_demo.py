"""The demo, as a user starts it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from stepsave.demo import __main__ as demo

BACKEND = os.environ.get("KERAS_BACKEND", "jax")


@pytest.fixture(scope="module")
def temporary_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def completed(temporary_directory):
    pytest.importorskip("sklearn")
    environment = os.environ | {"KERAS_BACKEND": BACKEND, "TMPDIR": str(temporary_directory)}
    return subprocess.run(
        [sys.executable, "-m", "stepsave.demo"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def _row(completed, name):
    match = re.search(rf"^  {re.escape(name)} +(.+)$", completed.stdout, re.MULTILINE)
    assert match, completed.stdout + completed.stderr
    return match[1]


def _step(completed, name):
    return int(re.match(r"step (\d+)", _row(completed, name))[1])


def test_the_demo_ends_with_status_0_and_says_that_all_checks_hold(completed):
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "All checks hold" in completed.stdout
    assert f"Keras on {BACKEND}" in completed.stdout


def test_the_demo_prints_nothing_but_its_own_text(completed):
    assert completed.stderr == ""
    assert "\r" not in completed.stdout
    assert max(map(len, completed.stdout.splitlines())) <= 100


def test_the_kill_hits_a_save_in_flight_in_the_middle_of_an_epoch(completed):
    batch, batches = map(
        int, re.search(r"batch (\d+) of (\d+)", _row(completed, "killed by SIGKILL at")).groups()
    )
    assert 1 < batch < batches
    assert _step(completed, "save in flight") == _step(completed, "killed by SIGKILL at")
    assert _step(completed, "last committed step") < _step(completed, "save in flight")


def test_training_resumes_at_the_last_committed_step(completed):
    assert _step(completed, "resumed at") == _step(completed, "last committed step")


def test_both_runs_reach_the_same_range_of_accuracy(completed):
    uninterrupted = float(_row(completed, "uninterrupted run"))
    resumed = float(_row(completed, "killed and resumed run"))
    assert min(uninterrupted, resumed) > 0.95
    assert abs(uninterrupted - resumed) <= 0.03


def test_the_table_shows_the_cost_next_to_the_callback_of_keras(completed):
    assert re.fullmatch(r"[\d.]+ ms +[\d.]+ ms", _row(completed, "stall per save"))
    assert re.fullmatch(
        r"[\d.]+ ms +not durable: it calls no fsync", _row(completed, "durable after")
    )


def test_the_demo_leaves_nothing_behind(completed, temporary_directory):
    # Only its own: libraries may leave caches of theirs there.
    assert completed.returncode == 0
    assert not list(temporary_directory.glob("stepsave-demo-*"))


@pytest.mark.parametrize("module", ["sklearn", "torch"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys, module):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find_spec(name)
    )
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setattr(sys, "argv", ["stepsave.demo"])
    assert demo.main() == 1
    error = capsys.readouterr().err
    assert module in error
    assert "pip install 'stepsave[demo,torch]'" in error


def test_an_unknown_backend_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setenv("KERAS_BACKEND", "abacus")
    monkeypatch.setattr(sys, "argv", ["stepsave.demo"])
    assert demo.main() == 1
    error = capsys.readouterr().err
    assert "'abacus'" in error
    assert "jax, tensorflow, torch" in error
