"""A `fit` whose backup is in a bucket: killed, cut off from it, and resumed bit for bit."""

import gc
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from bucket_support import BUCKET, gcs, gcs_target, memory, s3, s3_environment, s3_target
from keras_support import child_environment

import stepsave
from stepsave import BackupAndRestore

pytestmark = pytest.mark.xdist_group("buckets")
__all__ = ("gcs", "gcs_target", "memory", "s3", "s3_target")

ROWS = np.arange(96, dtype="float32").reshape(24, 4)


def make_model():
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.layers.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(3)]
    )
    model.compile("adam", "mse")
    return model


def train(place, *callbacks, **options):
    model = make_model()
    backup = [BackupAndRestore(place, 1, **options)] if place else []
    model.fit(ROWS, ROWS[:, :3], batch_size=3, epochs=3, verbose=0, callbacks=[*backup, *callbacks])
    return [np.array(weight).tobytes() for weight in model.get_weights()]


class At(keras.callbacks.Callback):
    """Does something before a batch, counted from the beginning of this `fit`."""

    def __init__(self, batch, action):
        super().__init__()
        self.left, self.action = batch, action

    def on_train_batch_begin(self, batch, logs=None):  # noqa: ARG002
        self.left -= 1
        if self.left == 0:
            self.action()


def stop():
    raise RuntimeError("interrupted")


@pytest.fixture(scope="module")
def uninterrupted():
    return train(None)


@pytest.mark.parametrize("store", ["memory", "s3", "gcs"])
def test_a_fit_goes_on_from_a_bucket_as_if_it_had_not_been_interrupted(
    request, store, uninterrupted
):
    place = request.getfixturevalue(store).place
    for batch in (5, 9):  # the second time within what was resumed
        with pytest.raises(RuntimeError, match="interrupted"):
            train(place, At(batch, stop))
        assert stepsave.restore(place) is not None
    assert train(place) == uninterrupted
    assert stepsave.restore(place) is None  # it has ended


SCRIPT = """
import os, sys
sys.path[:0] = sys.argv[2:]
from test_buckets import At, train
train(sys.argv[1], At(14, lambda: os.kill(os.getpid(), 9)))
"""


def test_a_fit_that_is_killed_goes_on_from_a_bucket(s3, uninterrupted):
    here = Path(__file__).parent
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, s3.place, str(here), str(here.parent)],
        env=child_environment() | s3_environment(s3.url),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert stepsave.restore(s3.place).step >= 10
    assert train(s3.place) == uninterrupted


def test_a_bucket_that_stays_away_costs_saves_and_not_the_training(s3, uninterrupted, monkeypatch):
    from stepsave.store import bucket

    monkeypatch.setattr(bucket, "_RETRIES", {"max_retries": 1, "initial_delay": "10ms"})

    def go_away():
        s3.fault = lambda *_: 503

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", stepsave.SaveFailedWarning)
        assert train(s3.place, At(6, go_away)) == uninterrupted
    texts = [str(one.message) for one in told if one.category is stepsave.SaveFailedWarning]
    assert any("is lost, and training goes on" in text for text in texts)
    s3.fault = None
    kept = stepsave.restore(s3.place)
    assert 1 <= kept.step <= 6
    assert train(s3.place) == uninterrupted


def test_what_is_wrong_with_a_bucket_is_said_before_the_first_step(s3):
    trained = []
    note = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda *_: trained.append(1))
    with pytest.raises(stepsave.BucketError, match="There is no such bucket"):
        train(s3.place.replace(BUCKET, "no-such-bucket"), note)
    with pytest.raises(stepsave.BackupDirectoryError, match="`Path` makes one of two"):
        train(Path(s3.place), note)
    s3.fault = lambda *_: 403
    with pytest.raises(stepsave.BucketError, match="Access was denied"):
        train(s3.place, note)
    assert not trained


def test_a_spec_of_tensorstore_names_a_bucket_too(s3, uninterrupted):
    _, _, _, path = s3.place.split("/", 3)
    spec = {
        "driver": "s3",
        "bucket": BUCKET,
        "path": path,
        "endpoint": s3.url,
        "aws_region": "us-east-1",
        "aws_credentials": {"type": "environment"},
    }
    with pytest.raises(RuntimeError, match="interrupted"):
        train(spec, At(5, stop))
    assert train(s3.place, delete_checkpoint=False) == uninterrupted
    assert stepsave.restore(spec).ended


def test_a_fit_whose_machine_is_lost_goes_on_from_the_bucket(memory, tmp_path, uninterrupted):
    tiers = {"local_dir": tmp_path / "local", "upload_every": 2}
    with pytest.raises(RuntimeError, match="interrupted"):
        train(memory.place, At(6, stop), **tiers)
    with pytest.raises(RuntimeError, match="interrupted"):
        train(memory.place, At(5, stop), **tiers)  # from the disk
    assert stepsave.restore(tmp_path / "local").step >= 8
    gc.collect()  # the callback, which finishes its uploads then
    shutil.rmtree(tmp_path / "local")
    assert train(memory.place, **tiers) == uninterrupted
    assert stepsave.restore(memory.place) is None
    assert not (tmp_path / "local").exists()


def test_a_fit_that_is_told_to_stop_brings_its_last_save_into_the_bucket(
    memory, tmp_path, uninterrupted
):
    options = {"save_before_preemption": True, "upload_every": "1h"}
    with pytest.raises(stepsave.Preempted) as ended:
        train(
            memory.place,
            At(7, lambda: signal.raise_signal(signal.SIGTERM)),
            local_dir=tmp_path / "one",
            **options,
        )
    assert stepsave.restore(memory.place).step == ended.value.step == 7
    assert train(memory.place, local_dir=tmp_path / "other", **options) == uninterrupted


@pytest.mark.parametrize("delete", [True, False])
def test_a_bucket_that_is_away_at_the_end_fails_no_training(
    s3, tmp_path, uninterrupted, monkeypatch, delete
):
    from stepsave.store import bucket

    monkeypatch.setattr(bucket, "_RETRIES", {"max_retries": 1, "initial_delay": "10ms"})

    def go_away():
        s3.fault = lambda *_: 503

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", stepsave.SaveFailedWarning)
        options = {"local_dir": tmp_path / "local", "delete_checkpoint": delete}
        assert train(s3.place, At(20, go_away), **options) == uninterrupted
    assert any("ended, but the bucket was out of reach" in str(one.message) for one in told)
    s3.fault = None
    if not delete:
        assert stepsave.restore(tmp_path / "local").step == 24
