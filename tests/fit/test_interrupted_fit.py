"""A `fit` interrupted at any instant: the next one in the same process goes on, exactly."""

import copy
import gc
import json
import os
import pickle
import random
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from interrupting import Interrupted, interrupted_at_line
from keras_support import child_environment

from stepsave import BackupAndRestore

POINTS = 24
ROWS = np.arange(48, dtype="float32").reshape(12, 4)


def make_model():
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.layers.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(3)]
    )
    model.compile("adam", "mse")
    return model


def train(model, *callbacks):
    return model.fit(
        ROWS, ROWS[:, :3], batch_size=3, epochs=2, verbose=0, callbacks=list(callbacks),
        validation_data=(ROWS[:3], ROWS[:3, :3]),
    )  # fmt: skip


def weights_of(model):
    return [np.array(weight).tobytes() for weight in model.get_weights()]


def backup(backup_dir, **options):
    return BackupAndRestore(backup_dir, 1, save_before_preemption=True, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights, and how many lines of stepsave such a training runs."""
    lines = 0
    model = make_model()
    with interrupted_at_line(10**9) as countdown:
        train(model, backup(tmp_path_factory.mktemp("whole")))
        lines = 10**9 - countdown.left
    return weights_of(model), lines


def goes_on(model, callback, expected):
    """Trains on in the same process, and looks at what is left of both fits."""
    train(model, callback)
    assert weights_of(model) == expected
    assert model._initial_epoch is None
    assert not hasattr(model.train_function, "stepsave_stands_for")


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(n, marks=[pytest.mark.slow, pytest.mark.once] if n % 6 else [])
        for n in range(POINTS)
    ],
)
@pytest.mark.parametrize("again", ["new objects", "the same objects"])
def test_a_fit_interrupted_at_any_line_of_ours_goes_on(backup_dir, uninterrupted, point, again):
    expected, lines = uninterrupted
    chance = random.Random(f"{point} {again}")
    first, last = lines * point // POINTS, lines * (point + 1) // POINTS
    model, callback = make_model(), backup(backup_dir)
    try:
        with interrupted_at_line(chance.randrange(first, last) + 1):
            train(model, callback)
    except Interrupted:
        if again == "new objects":
            model, callback = make_model(), backup(backup_dir)
        elif not backup_dir.exists() or not list(backup_dir.glob("[0-9]*")):
            model = make_model()  # nothing was saved: the weights are those of a part of an epoch
        goes_on(model, callback, expected)
    else:
        assert weights_of(model) == expected
    # Not before: the traceback kept the interrupted callback alive, and with it its handler.
    gc.collect()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def still_trains(expected):
    """Whether the backend still works in this process, without stepsave.

    An interrupt within `__enter__` or `__exit__` of TensorFlow's context managers leaves the thread
    in the graph of some function for good, and one within its caches leaves a wrong answer there.
    One within those of PyTorch's `no_grad` leaves the thread without gradients.
    """
    try:
        model = make_model()
        train(model)
        return weights_of(model) == expected
    except Exception:
        if keras.backend.backend() == "tensorflow" or not may_have_gradients():
            return False
        raise


def may_have_gradients():
    return keras.backend.backend() != "torch" or sys.modules["torch"].is_grad_enabled()


_AGAIN_AND_AGAIN = """
import json, random, sys
from interrupting import InterruptedAfter
from stepsave import StepsaveError
from test_interrupted_fit import *

backup_dir, seed = sys.argv[1:]
expected = [bytes.fromhex(weights) for weights in json.load(sys.stdin)]
chance = random.Random(seed)
interrupted = 0
for attempt in range(20):
    model, callback = make_model(), backup(backup_dir, delete_checkpoint=False)
    try:
        with InterruptedAfter(chance.uniform(0.01, 0.3) if attempt > 4 else 0.002) as timer:
            train(model, callback)
        if attempt > 4:
            break
    except StepsaveError:
        raise
    except BaseException:  # Keras and the backends make other errors of some, and swallow some
        if not timer.raised:
            raise
    finally:
        interrupted += timer.raised
        print("interrupted" if timer.raised else "", flush=True)
        if timer.raised and not still_trains(expected):
            sys.exit(BROKEN)
assert interrupted
model = make_model()
goes_on(model, backup(backup_dir), expected)
"""
BROKEN = 3


def test_a_fit_interrupted_by_a_timer_again_and_again_ends_like_the_uninterrupted(
    backup_dir, uninterrupted
):
    """Wherever the interrupt comes, in Keras and its backend too: hence in a process of its own."""
    expected, _ = uninterrupted
    given = json.dumps([weights.hex() for weights in expected])
    environment = child_environment(PYTHONPATH=os.pathsep.join(sys.path))
    for seed in range(8):
        ended = subprocess.run(
            [sys.executable, "-c", _AGAIN_AND_AGAIN, backup_dir, str(seed)],
            env=environment, input=given, text=True, capture_output=True, timeout=150, check=False,
        )  # fmt: skip
        if ended.returncode == 0:
            return
        # Nor does every process of TensorFlow survive it: one of some hundreds of such interrupts
        # corrupts its heap, without stepsave too.
        crashed = ended.returncode in (-signal.SIGSEGV, -signal.SIGABRT)
        may_crash = keras.backend.backend() == "tensorflow" and "interrupted" in ended.stdout
        assert ended.returncode == BROKEN or (crashed and may_crash), ended.stdout + ended.stderr
    raise AssertionError("the backend broke in every process")


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_is_a_fresh_callback_with_the_same_arguments(
    backup_dir, tmp_path, how, uninterrupted
):
    expected, _ = uninterrupted
    original = backup(backup_dir, verbose=0, when_busy="skip", delete_checkpoint=False)
    for used in (False, True):
        if used:
            model = make_model()
            train(model, original)
        copied = how(original)
        assert type(copied) is BackupAndRestore
        assert (copied.backup_dir, copied.save_freq) == (str(backup_dir), 1)
        assert copied._options == original._options
        assert copied._options["when_busy"] == "skip"
        assert copied._saver is None
        assert copied.stats() is None
        assert copied.model is None
    copied.backup_dir = str(tmp_path / "of the copy")
    model = make_model()
    train(model, copied)
    assert weights_of(model) == expected


class Named(BackupAndRestore):
    def __init__(self, name, *arguments):
        super().__init__(*arguments)
        self._name = name


def test_a_copy_of_a_subclass_keeps_what_that_has_added(backup_dir):
    copied = copy.deepcopy(Named("mine", backup_dir, 2))
    assert (copied._name, copied.save_freq) == ("mine", 2)
