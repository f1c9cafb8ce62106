import shutil
import threading

import keras
import numpy as np
import pytest
from keras_support import (
    BACKEND,
    STEPS,
    X_INT,
    Child,
    Interrupt,
    Synchronous,
    assert_same_state,
    fit,
    fit_interrupted,
    leave,
    restored,
    rich_model,
    state_of,
    step_model,
    step_numbers,
    to_numpy,
)

import stepsave
from stepsave import BackupAndRestore
from stepsave.engine.shard_writing import Shards
from stepsave.threads import Crew

# The example in Keras's documentation of `BackupAndRestore`, without its `model.build`.

_EXAMPLE = """
class InterruptingCallback(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 4:
            raise RuntimeError('Interrupting!')

callback = stepsave.BackupAndRestore(backup_dir=backup_dir)
model = keras.models.Sequential([keras.layers.Dense(10)])
model.compile(keras.optimizers.SGD(), loss='mse')
data = np.arange(100).reshape(5, 20), np.zeros(5)
"""
_FIRST = """
try:
    model.fit(*data, epochs=10, batch_size=1, verbose=0,
              callbacks=[callback, InterruptingCallback()])
except Exception as e:
    raised = e
"""
_SECOND = """
history = model.fit(*data, epochs=10, batch_size=1, callbacks=[callback], verbose=0)
"""


def run_example(backup_dir, *parts):
    names = {"keras": keras, "np": np, "stepsave": stepsave, "backup_dir": str(backup_dir)}
    for part in parts:
        exec(part, names)
    return names


def test_the_example_of_keras_documentation_runs_with_an_unbuilt_model(backup_dir):
    names = run_example(backup_dir, _EXAMPLE, _FIRST)
    assert str(names["raised"]) == "Interrupting!"
    exec(_SECOND, names)
    assert len(names["history"].history["loss"]) == 6
    assert names["history"].epoch == [4, 5, 6, 7, 8, 9]
    assert not backup_dir.exists()


@pytest.mark.first
def test_the_example_goes_on_in_a_fresh_process_with_an_unbuilt_model(backup_dir, tmp_path):
    names = run_example(backup_dir, _EXAMPLE, _FIRST)
    leave(names["callback"])
    source = f"import keras, stepsave, numpy as np, sys\nbackup_dir = sys.argv[1]\n{_EXAMPLE}"
    check = """
assert not model.built
class Look(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        np.save(sys.argv[2], model.get_weights()[0])
history = model.fit(*data, epochs=10, batch_size=1, callbacks=[callback, Look()], verbose=0)
print("epochs:", history.epoch, len(history.history["loss"]))
"""
    out, _ = Child(source + check, backup_dir, tmp_path / "kernel.npy").wait()
    assert "epochs: [4, 5, 6, 7, 8, 9] 6" in out
    assert (
        np.load(tmp_path / "kernel.npy").tobytes() == to_numpy(names["model"].weights[0]).tobytes()
    )


# All variables, bit for bit.

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01),
    "adam": lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, 30)),
    "ema": lambda: keras.optimizers.AdamW(
        0.01, amsgrad=True, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3
    ),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), dynamic_growth_steps=2
    ),
    "accumulation": lambda: keras.optimizers.SGD(0.01, momentum=0.9, gradient_accumulation_steps=4),
}


@pytest.mark.filterwarnings("ignore:.*which was 7 and is 99")  # on TensorFlow
@pytest.mark.parametrize(
    ("optimizer", "names"), [("adam", True), *((optimizer, False) for optimizer in OPTIMIZERS)]
)
def test_a_new_model_gets_every_variable_back(optimizer, names, backup_dir):
    model = rich_model(OPTIMIZERS[optimizer](), names=names)
    # Interrupted right after the save, before another step: the live state is the saved one.
    callback, interrupt = BackupAndRestore(backup_dir, 15), Interrupt(step=15)
    fit_interrupted(model, callback, interrupt, x=X_INT, epochs=3)
    leave(callback)
    keras.utils.set_random_seed(99)  # or a layer's random initial values would be equal
    again = rich_model(OPTIMIZERS[optimizer](), names=names)
    probe = restored(again, backup_dir)
    assert_same_state(probe.state, interrupt.state)
    assert probe.initial_epoch == 2
    assert int(again.optimizer.iterations) > 0
    kinds = {entry[1].rsplit("/")[-1] for entry in probe.state}
    assert {"seed_generator_state", "moving_mean", "embeddings", "kernel"} <= kinds


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16", "mixed_float16"])
def test_other_dtype_policies_keep_every_bit(dtype, backup_dir):
    model = rich_model("adam", dtype=dtype)
    callback, interrupt = BackupAndRestore(backup_dir, 3), Interrupt(step=6)
    fit_interrupted(model, callback, interrupt, x=X_INT)
    leave(callback)
    again = rich_model("adam", dtype=dtype)
    assert_same_state(restored(again, backup_dir).state, interrupt.state)
    dtypes = {entry[2] for entry in interrupt.state if entry[0] == "trainable_variables"}
    assert dtypes == {"bfloat16" if dtype == "bfloat16" else "float32"}


def test_a_learning_rate_set_by_a_callback_comes_back(backup_dir):
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.5 / (epoch + 1))
    callback = BackupAndRestore(backup_dir)
    model = rich_model(keras.optimizers.SGD(0.01))
    fit_interrupted(model, schedule, callback, Interrupt(epoch_begin=3), x=X_INT, epochs=5)
    leave(callback)
    again = rich_model(keras.optimizers.SGD(0.01))
    restored(again, backup_dir)
    assert float(again.optimizer.learning_rate) == np.float32(0.5 / 3)


def test_synchronous_saves_hold_the_state_after_their_step(backup_dir):
    # As Keras's callback does, and its tests ask for, where an epoch is to be repeated.
    callback = BackupAndRestore(backup_dir, 4, resume="epoch")
    interrupt = Synchronous(step=8)
    fit_interrupted(rich_model("adam"), callback, interrupt, x=X_INT, epochs=2)
    leave(callback)
    again = rich_model("adam")
    assert_same_state(restored(again, backup_dir).state, interrupt.state)


def test_a_frozen_layer_and_a_model_without_optimizer_slots_round_trip(backup_dir):
    def make():
        model = rich_model("sgd")
        model.layers[1].trainable = False
        model.compile("sgd", "mse")
        return model

    callback, interrupt = BackupAndRestore(backup_dir, 4), Interrupt(step=4)
    fit_interrupted(make(), callback, interrupt, x=X_INT)
    leave(callback)
    assert_same_state(restored(make(), backup_dir).state, interrupt.state)


def test_layers_of_one_name_round_trip(backup_dir):
    class Twins(keras.Model):
        def __init__(self):
            super().__init__(name="twins")
            self.a = keras.layers.Dense(3, name="same")
            self.b = keras.layers.Dense(3, name="same")

        def build(self, shape):
            self.a.build(shape)
            self.b.build((None, 3))

        def call(self, x):
            return self.b(self.a(x))

    def make():
        model = Twins()
        model.compile("adam", "mse")
        model.build((None, 3))
        return model

    callback, interrupt = BackupAndRestore(backup_dir, 4), Interrupt(step=4)
    model = make()
    paths = [variable.path for variable in model.trainable_variables]
    assert len(set(paths)) < len(paths)
    fit_interrupted(model, callback, interrupt)
    leave(callback)
    assert_same_state(restored(make(), backup_dir).state, interrupt.state)


def test_a_model_without_metrics_round_trips_after_training_on(backup_dir):
    # The state is restored and then *trained*: the assigned values are what `fit` goes on with.
    model = step_model()
    callback = BackupAndRestore(backup_dir, 2)
    fit_interrupted(model, callback, Interrupt(step=5), epochs=2)
    leave(callback)
    again = step_model()
    fit(again, BackupAndRestore(backup_dir, 2), epochs=2)
    assert step_numbers(again) == {2 * STEPS}


# A snapshot is of one step.


@pytest.mark.parametrize("others", [[], [Synchronous]], ids=["asynchronous", "synchronous"])
def test_every_backup_is_of_exactly_one_step(others, backup_dir, monkeypatch):
    from stepsave.engine.commit import CommitProtocol
    from stepsave.engine.reader import read_backup

    backups = []
    crew = Crew(1, "test")
    publish = CommitProtocol.publish

    def publish_and_read(self, record):
        publish(self, record)
        backups.append(read_backup(self._store, record, crew))

    monkeypatch.setattr(CommitProtocol, "publish", publish_and_read)
    model = step_model(width=20_000)  # large enough for several copying threads
    fit(model, BackupAndRestore(backup_dir, 1), *(other() for other in others), epochs=4)
    assert step_numbers(model) == {4 * STEPS}
    assert [backup.step for backup in backups] == list(range(1, 4 * STEPS + 1))
    for backup in backups:
        layer = {
            **backup.state["trainable_variables"]["stepper"]["steps"],
            **backup.state["non_trainable_variables"]["stepper"]["steps"],
        }
        assert len(layer) == 6
        values = {float(n) for array in layer.values() for n in np.unique(array)}
        values.add(float(backup.state["optimizer_variables"]["sgd"]["iteration"]))
        assert values == {backup.step}


def test_training_may_run_ahead_of_a_slow_disk_without_mixing_steps(backup_dir, monkeypatch):
    slow = threading.Event()
    open_shards = Shards._open

    def open_slow_shards(*args):
        write = open_shards(*args)

        def write_slowly(*args):
            slow.wait(0.1)
            return write(*args)

        return write_slowly

    monkeypatch.setattr(Shards, "_open", open_slow_shards)
    callback = BackupAndRestore(backup_dir, 1)
    fit_interrupted(step_model(width=20_000), callback, Interrupt(step=STEPS), epochs=2)
    # While the writer still holds the last arenas, the model's memory is used by others.
    fit(step_model(width=20_000))
    leave(callback)
    model = step_model(width=20_000)
    restored(model, backup_dir)
    assert step_numbers(model) == {STEPS}


def test_a_copy_of_the_directory_restores_as_well(backup_dir, tmp_path):
    model = rich_model("adam")
    fit(model, BackupAndRestore(backup_dir, delete_checkpoint=False), x=X_INT)
    shutil.copytree(backup_dir, tmp_path / "copy")
    found = restored(rich_model("adam"), tmp_path / "copy")
    assert_same_state(found.state, state_of(model))


def test_the_metadata_tells_position_and_origin(backup_dir):
    fit(step_model(), BackupAndRestore(backup_dir, 5, delete_checkpoint=False))
    with stepsave.Checkpointer(backup_dir) as saver:
        backup = saver.restore()
    assert backup.metadata["position"] == {
        "global_step": 5,
        "epoch": 0,
        "batch": 5,
        "steps_per_epoch": STEPS,
    }
    assert backup.metadata["backend"] == BACKEND
    assert backup.metadata["keras_version"] == keras.version()


def stopping():
    return keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True)


@pytest.mark.parametrize(
    ("at", "others"),
    [({"step": 5}, []), ({"epoch_end": 1}, [stopping])],
    ids=["within an epoch", "between epochs, with best weights"],
)
@pytest.mark.usefixtures("small_shards")  # so that large arrays lie in several chunks
def test_a_resume_needs_no_memory_of_its_own(backup_dir, at, others):
    """The backup is restored into an arena of the saves that follow."""

    class Pages(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):  # noqa: ARG002
            self.restored = resumed._saver._capture._pool._arenas[0].pages

        def on_epoch_end(self, epoch, logs=None):  # noqa: ARG002
            self.used = [arena.pages for arena in resumed._saver._capture._pool._arenas]

    callback = BackupAndRestore(backup_dir, 1)
    interrupt = Interrupt(**at)
    fit_interrupted(
        step_model(width=20_000), callback, *(other() for other in others), interrupt, epochs=2
    )
    leave(callback)
    model, pages, resumed = step_model(width=20_000), Pages(), BackupAndRestore(backup_dir, 1)
    fit(model, resumed, pages, *(other() for other in others), epochs=4)
    assert step_numbers(model) == {4 * STEPS}
    assert len(pages.used) == 2
    assert pages.restored in pages.used
    assert pages.restored._lent is not None, "it was restored into"
