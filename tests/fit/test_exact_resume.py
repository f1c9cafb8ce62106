"""A resumed training is bit for bit the training that was not interrupted.

Each kind of data, interrupted in three places, one after the other in one training, in three
ways; `docs/exact-resume.md` is made from what these tests note.
"""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from exact_sources import BACKEND, NUMBERS, SOURCES
from exact_support import EPOCHS, Interrupt, StopError, backup_for, train
from keras_support import BACKENDS, child_environment, is_left
from rows import SAMPLES, STEPS

import stepsave

# Where, in the order of training; in which epoch; and that in which the training goes on there.
PLACES = {"middle": (1, 1), "validation": (1, 1), "epoch end": (2, 3)}
HOW = ("exception", "SIGKILL", "SIGTERM")

pytestmark = [
    # Keras's way to say that data of unknown length has ended.
    pytest.mark.filterwarnings("ignore:Your input ran out of data"),
    # torchdata looks at all attributes of torch.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]


@pytest.fixture(scope="module")
def uninterrupted():
    """The training without interruption and, where the data allows, without stepsave."""
    results = {}

    def get(source, directory):
        if source not in results:
            # Without the callback Keras does not show all data once to a model that it builds.
            needs = "threads" in source or "processes" in source
            backup = backup_for(directory / "reference", "exception", save_freq=1000)
            results[source] = train(source, backup if needs else None)
        return results[source]

    return get


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs a training in a process that is killed; returns its exit code and what it wrote."""
    directory = tmp_path_factory.mktemp("killed")
    errors = directory / "stderr.txt"
    compiled = {  # by the processes before; JAX compiles longer than it trains here
        "JAX_COMPILATION_CACHE_DIR": str(directory),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", "import exact_support; exact_support.serve()"],
            env=child_environment(**compiled),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        ) as server,
    ):

        def run(*arguments):
            before = len(errors.read_text())
            server.stdin.write(json.dumps(arguments) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            return code, errors.read_text()[before:]

        try:
            yield run
            server.stdin.close()
            server.wait(60)
        except BaseException:
            os.killpg(server.pid, signal.SIGKILL)
            raise


def interrupt(source, directory, where, how, killed, **epochs):
    """Runs a training until it is interrupted."""
    if how == "exception":
        backup = backup_for(directory, how, where)
        with pytest.raises(StopError):
            train(source, backup, Interrupt(where, how, backup, **epochs))
        backup._saver.close()
        return
    code, errors = killed(source, str(directory), where, how, epochs)
    expected = -signal.SIGKILL if how == "SIGKILL" else stepsave.Preempted.EXIT_CODE
    assert code == expected, errors[-4000:]


HERE = BACKENDS.index(BACKEND)


def marks_of(source, *, is_due=True):
    """Each kind of data is quick on one backend of three; what is of one kind runs together."""
    kind, number = divmod(NUMBERS[source], len(BACKENDS))
    is_slow = not is_due or number != HERE
    is_whole = BACKEND != "torch" and (not is_due or (is_slow and is_left(kind)))
    marks = [pytest.mark.slow] * is_slow + [pytest.mark.whole_matrix] * is_whole
    return [pytest.mark.xdist_group(source), *marks]


def chains():
    """Three for each kind of data, with all ways in all places.

    One of them is due on each backend, another one on each, so that all are; and on each backend
    all ways in all places, with one kind of data or another.
    """
    for source in SOURCES:
        kind = NUMBERS[source] // len(BACKENDS)
        for first in range(len(HOW)):
            ends = [(HOW[(first + i) % len(HOW)], where) for i, where in enumerate(PLACES)]
            name = ", ".join(f"{how} {where}" for how, where in ends)
            marks = marks_of(source, is_due=first == (kind + HERE) % len(HOW))
            yield pytest.param(ends, source, marks=marks, id=f"{name}-{source}")


@pytest.mark.parametrize(("ends", "source"), list(chains()))
def test_a_training_resumed_again_and_again_equals_the_uninterrupted_one(
    source, ends, uninterrupted, killed, tmp_path
):
    expected = uninterrupted(source, tmp_path)
    goes_on_in = 0
    for how, where in ends:
        epochs = {"interrupted_epoch": PLACES[where][0], "first_epoch": goes_on_in}
        interrupt(source, tmp_path / "backup", where, how, killed, **epochs)
        goes_on_in = PLACES[where][1]
    found = train(source, backup_for(tmp_path / "backup", "exception"))
    assert not found.differences(expected)
    assert list(found.logs) == list(range(goes_on_in, EPOCHS))
    np.testing.assert_array_equal(found.seen, expected.seen)


@pytest.mark.parametrize(
    "source", [pytest.param(source, marks=marks_of(source)) for source in SOURCES]
)
def test_each_epoch_sees_each_sample_once(source, uninterrupted, tmp_path):
    if "repeated" in source:
        pytest.skip("shuffled over the border of epochs, on purpose")
    # The length of tf.data with a filter is found by a step that fails, on TensorFlow: it is
    # counted by what does not depend on data. Samples are not.
    seen = uninterrupted(source, tmp_path).seen
    per_epoch = seen[seen.sum(axis=1) > 0].reshape(EPOCHS, STEPS, SAMPLES).sum(axis=1)
    assert (per_epoch == 1).all()
