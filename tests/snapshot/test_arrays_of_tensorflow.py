"""TensorFlow lives in child processes: together with torch in one process it can crash."""

from engine_support import check_python

HEAD = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np, tensorflow as tf, stepsave
from engine_support import assert_same_bits, random_array, restore_once, save_once
from stepsave.errors import InvalidStateError
from stepsave.snapshot.arrays import view_on_host
from stepsave.format.records import DTYPES
directory = sys.argv[1]
"""


def test_what_is_on_the_cpu_is_computed_already():
    check_python(
        HEAD
        + """
from stepsave.snapshot.arrays import wait_computed
from stepsave.snapshot import tensorflow
waited = []
tf.test.experimental.sync_devices = lambda: waited.append(True)
wait_computed([tf.zeros(3), tf.Variable([1.0])])
assert not waited
tensorflow.is_on_accelerator = lambda leaves: True
wait_computed([tf.zeros(3)])
assert waited
""",
        "",
    )


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    printed = check_python(
        HEAD
        + """
state, expected = {}, {}
for name in DTYPES:
    kind = getattr(tf, name, None)
    if not isinstance(kind, tf.DType):
        continue
    array = random_array((3, 5), name)
    tensor = tf.constant(array)
    assert tensor.dtype == kind, name
    state[name] = {"a": tensor, "scalar": tf.constant(array[0, 0]), "empty": tensor[:0]}
    expected[name] = {"a": array, "scalar": array[0, 0], "empty": array[:0]}
save_once(directory, state)
assert_same_bits(restore_once(directory).state, expected)
print(*state)
""",
        tmp_path,
    )
    assert {"float32", "bfloat16", "bool", "complex128", "float16"} <= set(printed.split())


def test_a_variable_may_change_as_soon_as_save_returns(tmp_path):
    check_python(
        HEAD
        + """
state = {f"w{i}": tf.Variable(tf.zeros(50_000)) for i in range(4)}
with stepsave.Checkpointer(directory) as saver:
    for number in range(1, 20):
        for variable in state.values():
            variable.assign(tf.fill([50_000], float(number)))
        saver.save(number, state)
        for variable in state.values():
            variable.assign_add(tf.ones(50_000))
    backup = saver.restore()
assert backup.step == 19
for array in backup.state.values():
    assert (array == 19).all()
""",
        tmp_path,
    )


def test_what_is_no_eager_dense_tensor_is_refused_with_its_place(tmp_path):
    check_python(
        HEAD
        + """
sparse = tf.sparse.from_dense([1.0, 0.0])
for leaf in (sparse, tf.ragged.constant([[1], [2, 3]]), tf.constant("text")):
    try:
        save_once(directory, {"group": {"leaf": leaf}})
    except InvalidStateError as e:
        assert "group/leaf" in str(e), e
    else:
        raise AssertionError(leaf)

@tf.function
def traced(x):
    try:
        view_on_host([("a",)], [x])
    except InvalidStateError:
        return x
    raise AssertionError

traced(tf.zeros(3))
""",
        tmp_path,
    )
