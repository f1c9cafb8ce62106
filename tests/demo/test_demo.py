"""The demo, as a user starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from stepsave.demo.facts import EPOCHS

pytestmark = pytest.mark.slow  # `make demo` shows it

BACKEND = os.environ.get("KERAS_BACKEND", "jax")
STEPS = 22


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
    return match[1].rstrip()


def _step(completed, name):
    return int(re.match(r"step (\d+)", _row(completed, name))[1])


def test_the_demo_ends_with_status_0_and_says_that_all_checks_hold(completed):
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "All checks hold" in completed.stdout
    assert f"Keras on {BACKEND}" in completed.stdout


def test_the_demo_prints_nothing_but_its_own_text(completed):
    assert completed.stderr == ""
    assert "\r" not in completed.stdout
    assert "\x1b" not in completed.stdout
    assert max(map(len, completed.stdout.splitlines())) <= 100


def test_the_kill_hits_a_save_in_flight_in_the_middle_of_an_epoch(completed):
    batch, batches = map(
        int, re.search(r"batch (\d+) of (\d+)", _row(completed, "killed by SIGKILL at")).groups()
    )
    assert 1 < batch < batches
    assert _step(completed, "save in flight") == _step(completed, "killed by SIGKILL at")
    assert _step(completed, "last committed step") < _step(completed, "save in flight")


def test_training_resumes_at_the_batch_after_the_last_committed_step(completed):
    step = _step(completed, "resumed at")
    assert step == _step(completed, "last committed step")
    place = re.search(r"epoch (\d+) of \d+, with batch (\d+) of (\d+)", completed.stdout)
    epoch, batch, steps = map(int, place.groups())
    assert (steps, (epoch - 1) * steps + batch - 1) == (STEPS, step)


def test_no_batch_is_trained_twice_and_none_is_left_out(completed):
    uninterrupted, resumed = map(int, _row(completed, "optimizer steps").split())
    assert uninterrupted == resumed == EPOCHS * STEPS


def test_the_resumed_model_equals_the_uninterrupted_one_bit_for_bit(completed):
    uninterrupted, resumed = _row(completed, "SHA-256 of its bits").split()
    assert uninterrupted == resumed
    assert re.fullmatch("[0-9a-f]{16}", resumed)
    uninterrupted, resumed = map(float, _row(completed, "test accuracy").split())
    assert uninterrupted == resumed > 0.95
    assert "equals the uninterrupted one bit for bit" in " ".join(completed.stdout.split())


def test_the_table_shows_the_cost_next_to_the_callback_of_keras(completed):
    assert re.fullmatch(r"[\d.]+ ms +[\d.]+ ms", _row(completed, "stall per save"))
    assert re.fullmatch(
        r"[\d.]+ ms +not durable: it calls no fsync", _row(completed, "durable after")
    )


def test_the_demo_leaves_nothing_behind(completed, temporary_directory):
    # Only its own: libraries may leave caches of theirs there.
    assert completed.returncode == 0
    assert not list(temporary_directory.glob("stepsave-demo-*"))
