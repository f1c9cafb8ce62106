# ruff: noqa: ARG002  callbacks have Keras's signatures
import re

import keras
import numpy as np
import pytest
from keras_support import (
    BACKEND,
    X_INT,
    Interrupt,
    X,
    Y,
    assert_same_state,
    files_below,
    fit,
    leave,
    rich_model,
    small_model,
    state_of,
    variables_of,
)

import stepsave
from stepsave.fit import variables
from stepsave.fit.matching import COLLECTIONS, _partners
from stepsave.fit.model_config import model_config
from stepsave.fit.variables import (
    ModelVariables,
    _unique_paths,
    prepare_model,
    restore_variables,
)
from stepsave.format.tree import flatten, unflatten
from stepsave.snapshot.arrays import ScatteredArray


def built(model):
    model.optimizer.build(model.trainable_variables)
    return model


def snapshot(model):
    now = ModelVariables(model)
    values = [np.array(keras.ops.convert_to_numpy(value)) for value in now.values()]
    return unflatten(now.paths, values)


# Names.


def test_paths_are_those_of_keras_own_state_tree():
    model = rich_model("adam")
    fit(model, x=X_INT)
    now = ModelVariables(model)
    expected = model.get_state_tree("numpy_array")
    found = unflatten(now.paths, now.values())

    def names(tree):
        return {k: names(v) if isinstance(v, dict) else None for k, v in tree.items()}

    assert names(found) == {k: v for k, v in names(expected).items() if v}
    assert len(now.paths) == len(now.variables) == len(list(variables_of(model)))


@pytest.mark.parametrize(
    ("paths", "unique"),
    [
        (["a/w", "b/w"], [("a", "w"), ("b", "w")]),
        (["a/w", "a/w", "a/w"], [("a", "w"), ("a", "w~2"), ("a", "w~3")]),
        (["a/w", "a/w~2", "a/w"], [("a", "w"), ("a", "w~2"), ("a", "w~3")]),
        (["a", "a/w"], [("a~2",), ("a", "w")]),
        (["a/w/x", "a/w"], [("a", "w", "x"), ("a", "w~2")]),
        (["", "/", "a//w"], [("variable",), ("variable~2",), ("a", "w")]),
    ],
)
def test_paths_that_collide_get_a_suffix(paths, unique):
    assert _unique_paths(paths) == unique
    unflatten(unique, list(range(len(unique))))  # no leaf is where another's dict is


def split(*paths):
    return [tuple(path.split("/")) for path in paths]


def test_numbers_of_layers_may_differ_from_those_of_the_backup():
    mine = split("dense_9/kernel", "dense_10/kernel", "dense_9/bias", "norm_3/gamma")
    theirs = split("dense/kernel", "dense_1/kernel", "dense/bias", "norm/gamma")
    assert _partners(mine, theirs) == dict(zip(mine, theirs, strict=True))


def test_numbers_at_several_levels_are_matched_in_order():
    mine = split("block_4/dense_7/w", "block_4/dense_8/w", "block_5/dense_9/w")
    theirs = split("block/dense/w", "block/dense_1/w", "block_1/dense_2/w")
    assert _partners(mine, theirs) == dict(zip(mine, theirs, strict=True))


def test_numbers_inside_the_names_of_optimizer_slots_are_matched_in_order():
    mine = split(*[f"adam_2/dense_{i}_kernel_momentum" for i in (9, 10, 11)])
    theirs = split(*[f"adam/dense{i}_kernel_momentum" for i in ("", "_1", "_2")])
    assert _partners(mine, theirs) == dict(zip(mine, theirs, strict=True))


def test_equal_names_win_over_numbers():
    paths = split("dense_1/w", "dense_2/w")
    assert _partners(paths, paths[::-1]) == {path: path for path in paths}


def test_a_layer_too_many_has_no_partner():
    mine = split("dense/w", "dense_1/w", "other/w")
    theirs = split("dense/w", "other/w")
    assert _partners(mine, theirs) == {path: path for path in theirs}


# Values.


def test_values_in_the_middle_of_an_epoch_are_those_of_training():
    # On JAX a variable read then returns a fresh sample of its initializer.
    seen = []

    class Look(keras.callbacks.Callback):
        async_safe = True

        def on_train_batch_begin(self, batch, logs=None):
            if batch != 3:
                return
            model = self._model
            values = ModelVariables(model).values()
            before = [np.array(keras.ops.convert_to_numpy(value)) for value in values]
            synced = self.model  # syncs, on JAX
            seen.extend(zip(before, [entry[4] for entry in state_of(synced)], strict=True))

    model = rich_model("adam")
    fit(model, Look(), x=X_INT)
    assert seen
    assert all(before.tobytes() == after for before, after in seen)


@pytest.mark.skipif(BACKEND != "jax", reason="about JAX's private training state")
def test_another_layout_of_jax_state_makes_it_sync():
    model = built(small_model())
    now = ModelVariables(model)
    expected = [np.array(variable.value) for variable in now.variables]
    model._jax_state = {"trainable_variables": []}
    model._jax_state_synced = False
    model.jax_state_sync = lambda: setattr(model, "_jax_state_synced", True)
    np.testing.assert_equal([np.array(value) for value in now.values()], expected)
    assert model._jax_state_synced


def test_variables_made_later_are_noticed():
    model = small_model()
    now = ModelVariables(model)
    assert now.is_current()
    fit(model)
    assert not now.is_current()


# Restoring: all or nothing.


def assert_refused(model, state, *expected, backend=BACKEND):
    built(model)
    before = state_of(model)
    with pytest.raises(stepsave.BackupMismatchError) as caught:
        restore_variables(model, state, backend)
    text = str(caught.value)
    for part in expected:
        assert part in text
    assert "The model was not changed" in text
    assert "or use another `backup_dir`" in text
    assert state_of(model) == before
    return text


def test_missing_variables_are_listed_by_path():
    state = snapshot(built(small_model()))
    text = assert_refused(
        small_model(extra=True),
        state,
        "trainable_variables/small/extra/kernel: expected by the model, float32 (4, 4); not in "
        "the backup",
        "trainable_variables/small/extra/bias: expected by the model, float32 (4,)",
    )
    assert "small/first/kernel" not in text


def test_variables_too_many_are_listed_by_path():
    state = snapshot(built(small_model(extra=True)))
    assert_refused(
        small_model(),
        state,
        "trainable_variables/small/extra/kernel: in the backup, float32 (4, 4); the model has no "
        "such variable",
        "optimizer_variables/sgd/small_extra_kernel_momentum: in the backup",
    )


def test_other_shapes_are_listed_by_path():
    state = snapshot(built(small_model(width=5)))
    text = assert_refused(
        small_model(),
        state,
        "trainable_variables/small/first/kernel: expected float32 (3, 4), found float32 (3, 5)",
        "trainable_variables/small/last/kernel: expected float32 (4, 1), found float32 (5, 1)",
    )
    assert "small/last/bias" not in text  # (1,) in both


def test_other_dtypes_are_listed_by_path():
    state = snapshot(built(small_model(dtype="float16")))
    assert_refused(
        small_model(),
        state,
        "trainable_variables/small/last/bias: expected float32 (1,), found float16 (1,)",
    )


def test_another_optimizer_is_refused():
    state = snapshot(built(small_model()))
    model = small_model(optimizer=keras.optimizers.Adam(name="sgd"))
    assert_refused(model, state, "optimizer_variables/sgd/small_first_kernel_velocity: expected")


def test_arrays_of_no_keras_model_are_refused():
    state = snapshot(built(small_model())) | {"else": {"w": np.zeros(2)}}
    assert_refused(small_model(), state, "else/w: in the backup, but no variable of a Keras model")


def test_integers_of_another_width_fit_only_across_backends_and_only_in_range():
    model = built(small_model())
    state = snapshot(model)
    iteration = state["optimizer_variables"]["sgd"]["iteration"]
    other = np.dtype("int64" if iteration.dtype != "int64" else "int32")
    state["optimizer_variables"]["sgd"]["iteration"] = np.array(123, other)
    path = "optimizer_variables/sgd/iteration"
    assert_refused(small_model(), state, f"{path}: expected")
    restore_variables(model, state, "another")
    assert int(model.optimizer.iterations) == 123
    state["optimizer_variables"]["sgd"]["iteration"] = np.array(-1, other)
    restore_variables(model, state, "another")
    assert int(model.optimizer.iterations) == -1
    if other == "int64":
        state["optimizer_variables"]["sgd"]["iteration"] = np.array(2**40)
        assert_refused(small_model(), state, "values that do not fit", backend="another")


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_variable_holds_an_array_of_just_its_bits(in_pieces):
    array = np.array([[1.0, -0.0], [np.nan, 3.0]], "float32")
    variable = keras.Variable(np.zeros((2, 2), "float32"))

    def saved(array):
        rows = {(i, 0): array[i : i + 1] for i in range(2)}
        return ScatteredArray((2, 2), array.dtype, (1, 2), rows) if in_pieces else array

    assert not variables.holds(variable, saved(array))
    variables.assign(variable, saved(array))
    assert variables.holds(variable, saved(array))
    for place in range(array.nbytes):
        other = array.copy()
        other.reshape(-1).view(np.uint8)[place] ^= 1
        assert not variables.holds(variable, saved(other)), place
    assert not variables.holds(variable, saved(np.abs(array)))  # 0.0 is not -0.0


def assert_values(model, state):
    paths, arrays = flatten(snapshot(model))
    assert paths == flatten(state)[0]
    for one, other in zip(arrays, flatten(state)[1], strict=True):
        np.testing.assert_array_equal(one, other)


class Failing:
    """Stands in for `assign`: fails when it is called for the third time, or from then on."""

    def __init__(self, error, *, once):
        self.calls = 0
        self._error, self._once = error, once
        self._assign = variables.assign

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == 3 or (self.calls > 3 and not self._once):
            raise self._error
        return self._assign(*args, **options)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no room on the device")])
def test_an_assignment_that_is_cut_short_is_completed(monkeypatch, error):
    model = built(small_model())
    state = snapshot(model)
    state["trainable_variables"]["small"]["first"]["kernel"] += 1
    state["trainable_variables"]["small"]["last"]["bias"] += 1
    monkeypatch.setattr(variables, "assign", Failing(error, once=True))
    with pytest.raises(type(error)) as caught:
        restore_variables(model, state, BACKEND)
    assert not getattr(caught.value, "__notes__", [])
    assert_values(model, state)


@pytest.mark.skipif(BACKEND != "jax", reason="others give nothing away")
def test_an_interrupt_after_a_value_was_given_away_leaves_the_model_whole(monkeypatch):
    from stepsave.snapshot import jax as arrays

    model = built(small_model())
    state = snapshot(model)
    state["trainable_variables"]["small"]["first"]["kernel"] += 1
    calls = []

    def interrupted(array, value):
        made = write_over(array, value)
        calls.append(value.is_deleted())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made

    write_over = arrays.write_over
    monkeypatch.setattr(variables, "_COMPILING_BYTES", 0)
    monkeypatch.setattr(arrays, "write_over", interrupted)
    with pytest.raises(KeyboardInterrupt):
        restore_variables(model, state, BACKEND)
    assert calls == [True, True]
    assert_values(model, state)


@pytest.mark.skipif(BACKEND != "jax", reason="others compile nothing")
def test_large_values_are_written_over_those_of_the_model(monkeypatch):
    model = built(small_model())
    state = snapshot(model)
    state["trainable_variables"]["small"]["first"]["kernel"] += 1
    kept = model.layers[-1].kernel.value  # by the user
    kept_before = np.array(kept)
    before = [v.value.unsafe_buffer_pointer() for v in model.trainable_variables]
    monkeypatch.setattr(variables, "_COMPILING_BYTES", 0)
    restore_variables(model, state, BACKEND)
    after = [v.value.unsafe_buffer_pointer() for v in model.trainable_variables]
    others = [v.value is not kept for v in model.trainable_variables]
    assert [a == b for a, b in zip(after, before, strict=True)].count(False) == 1
    assert all(others)
    np.testing.assert_array_equal(kept, kept_before)
    assert_values(model, state)


def test_an_assignment_that_cannot_be_completed_says_what_the_model_is_now(monkeypatch):
    model = built(small_model())
    state = snapshot(model)
    failing = Failing(MemoryError("no room on the device"), once=False)
    monkeypatch.setattr(variables, "assign", failing)
    with pytest.raises(MemoryError, match="no room") as caught:
        restore_variables(model, state, BACKEND)
    assert failing.calls > 3
    assert "the rest has those from before" in "".join(caught.value.__notes__)


def test_a_long_list_is_cut_short():
    model = built(small_model())
    state = snapshot(model) | {"else": {f"w{i}": np.zeros(1) for i in range(50)}}
    text = assert_refused(model, state, "… and 30 more")
    assert len(re.findall(r"else/w\d+", text)) == 20


@pytest.mark.parametrize("change", [{"extra": True}, {"width": 5}, {"dtype": "float16"}])
def test_fit_with_another_model_is_refused_before_training(change, backup_dir):
    callback = stepsave.BackupAndRestore(backup_dir, 2, delete_checkpoint=False)
    fit(small_model(), callback)
    files = files_below(backup_dir)
    model = small_model(**change)
    weights = model.get_weights()
    probe = Interrupt()
    refused = stepsave.BackupAndRestore(backup_dir, 2)
    with pytest.raises(stepsave.BackupMismatchError, match="trainable_variables/small/"):
        fit(model, refused, probe)
    leave(refused)
    assert probe.begun == 0
    np.testing.assert_equal(model.get_weights(), weights)
    assert files_below(backup_dir) == files


def test_the_right_model_restores_after_a_wrong_one_was_refused(backup_dir):
    right = small_model()
    fit(right, stepsave.BackupAndRestore(backup_dir, 7, delete_checkpoint=False))
    with pytest.raises(stepsave.BackupMismatchError):
        fit(small_model(width=5), stepsave.BackupAndRestore(backup_dir))
    model, probe = small_model(), Interrupt(train_begin=True)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        fit(model, stepsave.BackupAndRestore(backup_dir), probe)
    assert_same_state(probe.state, state_of(right))


# Building.


def test_an_unbuilt_model_is_built_as_the_saved_one_was():
    source = keras.Sequential([keras.layers.Dense(3)])
    source.build((None, 20))
    target = keras.Sequential([keras.layers.Dense(3)])
    target.compile("adam", "mse")
    prepare_model(target, source.get_build_config())
    assert [tuple(v.shape) for v in target.weights] == [(20, 3), (3,)]
    assert target.optimizer.built


class Unbuildable(keras.Model):
    def build_from_config(self, config):
        raise ValueError("no idea how")


@pytest.mark.parametrize("build_config", [None, {}, {"input_shape": [None, 3]}])
def test_an_unbuilt_model_that_cannot_be_built_is_refused(build_config):
    model = Unbuildable()
    model.compile("adam", "mse")
    with pytest.raises(stepsave.BackupMismatchError, match="Call it on a batch of data"):
        prepare_model(model, build_config)


def test_a_model_that_can_be_serialised_brings_its_config():
    config = model_config(small_model())
    assert keras.models.model_from_json(config).count_params() == small_model().count_params()


def test_a_model_that_cannot_be_serialised_brings_none():
    class Custom(keras.Model):
        def __init__(self, width):
            super().__init__()
            self.dense = keras.layers.Dense(width)

        def call(self, x):
            return self.dense(x)

        def get_config(self):
            raise NotImplementedError

    assert model_config(Custom(3)) is None


def test_collections_are_in_the_order_of_keras():
    model = small_model()
    fit(model, x=X, y=Y)
    assert tuple(model.get_state_tree()) == COLLECTIONS


def test_memory_is_given_back_when_the_backend_has_taken_what_was_assigned(monkeypatch):
    """Else copies would queue up on the way, and the peak would be that of two states."""
    model = built(small_model())
    state = snapshot(model)
    state["trainable_variables"]["small"]["first"]["kernel"] += 1
    settled, trims = [], []
    settle = variables.settle

    def noted(variable):
        settle(variable)
        settled.append(variable)
        assert BACKEND != "jax" or variable.value.is_ready()

    monkeypatch.setattr(variables, "_TRIM_BYTES", 0)
    monkeypatch.setattr(variables, "settle", noted)
    monkeypatch.setattr(variables, "trim_heap", lambda: trims.append(len(settled)))
    restore_variables(model, state, BACKEND)
    assert trims == list(range(1, len(trims) + 1))
    assert bool(trims) == (BACKEND != "torch")
    assert_values(model, state)
