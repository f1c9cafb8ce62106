"""The demo, as a user starts it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys

import pytest

from stepsave.demo import __main__ as demo
from stepsave.demo import parent
from stepsave.demo.facts import EPOCHS, InFlight, Outcome

BACKEND = os.environ.get("KERAS_BACKEND", "jax")
STEPS = 22
KILLED = InFlight(epoch=4, batches=12, steps_per_epoch=STEPS, step=100)
UNINTERRUPTED = Outcome(
    first_epoch=0,
    first_batch=0,
    first_step=0,
    last_step=EPOCHS * STEPS,
    accuracy=0.98,
    digest="5afe",
)
RESUMED = dataclasses.replace(UNINTERRUPTED, first_epoch=4, first_batch=7, first_step=95)


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


def test_all_checks_hold_for_an_exact_resume():
    parent._check(KILLED, 95, UNINTERRUPTED, RESUMED)


def test_all_checks_hold_when_the_last_commit_was_at_the_end_of_an_epoch():
    killed = dataclasses.replace(KILLED, epoch=5, batches=5, step=115)
    resumed = dataclasses.replace(RESUMED, first_epoch=5, first_batch=0, first_step=110)
    parent._check(killed, 110, UNINTERRUPTED, resumed)


@pytest.mark.parametrize(
    ("what_differs", "text"),
    [
        ({"digest": "0ff"}, "bit for bit, found digests 0ff and 5afe"),
        ({"last_step": EPOCHS * STEPS + 7}, r"expected 176 optimizer steps .* \(176, 183\)"),
        ({"accuracy": 0.97}, "expected equal accuracies above 0.95"),
        ({"first_step": 88}, "at the last committed step 95, but resumed at 88"),
        ({"first_batch": 0}, "in epoch 5 with batch 8, but went on in epoch 5 with batch 1"),
    ],
)
def test_what_does_not_hold_is_told(what_differs, text):
    with pytest.raises(parent.DemoError, match=text):
        parent._check(KILLED, 95, UNINTERRUPTED, dataclasses.replace(RESUMED, **what_differs))


def test_equal_accuracies_must_be_high_enough():
    low = [dataclasses.replace(run, accuracy=0.9) for run in (UNINTERRUPTED, RESUMED)]
    with pytest.raises(parent.DemoError, match=r"above 0\.95"):
        parent._check(KILLED, 95, *low)


def test_the_table_shows_the_cost_next_to_the_callback_of_keras(completed):
    assert re.fullmatch(r"[\d.]+ ms +[\d.]+ ms", _row(completed, "stall per save"))
    assert re.fullmatch(
        r"[\d.]+ ms +not durable: it calls no fsync", _row(completed, "durable after")
    )


def test_the_demo_leaves_nothing_behind(completed, temporary_directory):
    # Only its own: libraries may leave caches of theirs there.
    assert completed.returncode == 0
    assert not list(temporary_directory.glob("stepsave-demo-*"))


@pytest.mark.parametrize("module", ["sklearn", "rich", "torch"])
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
