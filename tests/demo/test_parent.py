"""What the demo checks."""

import dataclasses

import pytest

from stepsave.demo import parent
from stepsave.demo.facts import EPOCHS, InFlight, Outcome

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
