import importlib
import itertools

import numpy as np
import pytest
from engine_support import assert_same_bits, random_array

from stepsave.errors import InvalidStateError
from stepsave.format.records import DTYPES
from stepsave.format.tree import Fields, NotedLeaf, flatten_state
from stepsave.snapshot.arrays import ScatteredArray, bytes_of, view_on_host
from stepsave.snapshot.leaves import assign, describe, make_like, open_leaf, wrap_key


def of_torch(dtype):
    torch = pytest.importorskip("torch")
    if not hasattr(torch, dtype) or dtype in ("int2", "int4"):
        pytest.skip(f"torch has no {dtype} in NumPy's form")
    return torch.zeros((4, 6), dtype=getattr(torch, dtype))


def of_jax(dtype):
    jax = pytest.importorskip("jax")
    if jax.dtypes.canonicalize_dtype(DTYPES[dtype]) != DTYPES[dtype]:
        pytest.skip("needs 64 bits")
    return jax.numpy.zeros((4, 6), DTYPES[dtype])


def of_tensorflow(dtype):
    tf = pytest.importorskip("tensorflow")
    try:
        return tf.constant(np.zeros((4, 6), DTYPES[dtype]))
    except (TypeError, ValueError, tf.errors.OpError):
        pytest.skip(f"TensorFlow makes no {dtype} of NumPy's")


def of_numpy(dtype):
    return np.zeros((4, 6), DTYPES[dtype])


MAKERS = [of_numpy, of_jax, of_torch, of_tensorflow]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_of_any_dtype_is_made_like_another(maker, dtype):
    like = maker(dtype)
    before = view_on_host([("a",)], [like])[0].copy()
    array = random_array((4, 6), dtype)
    form = describe(like)
    assert (form.shape, form.dtype) == ((4, 6), array.dtype)
    made = make_like(array, like)
    assert isinstance(made, type(like))
    found = view_on_host([("a",)], [made])[0]
    if maker is of_jax and dtype in ("int2", "int4"):  # JAX itself clears the bits above
        found, array = found.astype("int8"), array.astype("int8")
    assert_same_bits(found, array)
    assert_same_bits(view_on_host([("a",)], [like])[0], before)


@pytest.mark.parametrize("maker", [of_jax, of_torch, of_tensorflow])
def test_what_was_made_shares_no_memory_with_the_array(maker):
    memory = np.zeros(4 * 6 + 16, "float32")
    start = -memory.ctypes.data % 64 // 4  # so aligned, JAX and TensorFlow like to share it
    array = memory[start : start + 24].reshape(4, 6)
    array[:] = random_array((4, 6), "float32")
    expected = array.copy()
    made = make_like(array, maker("float32"))
    view_on_host([("a",)], [made])  # waits until it is there
    array[:] = 0
    assert_same_bits(view_on_host([("a",)], [made])[0], expected)


def aligned(dtype):
    memory = np.zeros(4 * 6 * 8 + 64, "uint8")
    start = -memory.ctypes.data % 64
    size_bytes = 4 * 6 * DTYPES[dtype].itemsize
    array = memory[start : start + size_bytes].view(DTYPES[dtype]).reshape(4, 6)
    array[...] = random_array((4, 6), dtype)
    return array


def scattered(array, chunk_shape):
    grid = [range(-(-size // chunk)) for size, chunk in zip(array.shape, chunk_shape, strict=True)]
    chunks = {
        place: array[
            tuple(slice(at * n, (at + 1) * n) for at, n in zip(place, chunk_shape, strict=True))
        ].copy()
        for place in itertools.product(*grid)
    }
    return ScatteredArray(array.shape, array.dtype, chunk_shape, chunks)


def in_runs(array):
    return scattered(array, (1, 4))


def in_blocks(array):
    return scattered(array, (2, 3))


def test_an_array_in_pieces_gives_each_part_and_its_bytes():
    array = np.arange(24, dtype="float32").reshape(4, 6)
    for pieces in (in_runs(array), in_blocks(array)):
        assert_same_bits(np.asarray(pieces), array)
        assert b"".join(part.tobytes() for part in bytes_of(pieces)) == array.tobytes()
        for index in itertools.product(
            itertools.starmap(slice, itertools.combinations(range(5), 2)),
            itertools.starmap(slice, itertools.combinations(range(7), 2)),
        ):
            assert_same_bits(pieces[index], array[index])
    whole = in_blocks(array)
    assert whole[slice(2, 4), slice(3, 6)] is whole.chunks[1, 1], "a piece is not copied"


def test_a_part_that_was_not_read_is_refused():
    for pieces in (in_blocks(np.zeros((4, 6))), in_runs(np.zeros((4, 6)))):
        del pieces.chunks[1, 0]
        first = pieces.chunk_shape[0]
        assert pieces[slice(0, first), slice(0, 6)].shape == (first, 6)
        with pytest.raises(KeyError):
            pieces[slice(0, first + 1), slice(0, 6)]
        with pytest.raises(KeyError):
            bytes_of(pieces)


@pytest.mark.parametrize("cut", [lambda array: array, in_runs, in_blocks])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_jax_can_donate_what_it_is_given_to_own(dtype, cut):
    jax = pytest.importorskip("jax")
    module = importlib.import_module("stepsave.snapshot.jax")
    array = aligned(dtype)
    made = module.make_own(cut(array), of_jax(dtype))
    assert_same_bits(np.asarray(made), array)
    made = module.make_own(cut(array), of_jax(dtype))  # anew: what NumPy looks at is not donated
    before = made.unsafe_buffer_pointer()
    assert not array.ctypes.data <= before < array.ctypes.data + array.nbytes
    step = jax.jit(lambda old: old * 2, donate_argnums=0)
    assert step(made).unsafe_buffer_pointer() == before


class Variable:
    """As much of a Keras variable as it takes to be assigned to."""

    def __init__(self, value):
        self._value = value

    @property
    def value(self):
        return self._value

    def assign(self, value):
        self._value = value


@pytest.mark.parametrize("cut", [lambda array: array, in_runs, in_blocks])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "bool"])
def test_jax_writes_over_what_nobody_else_has(dtype, cut):
    jax = pytest.importorskip("jax")
    variable = Variable(jax.numpy.zeros((4, 6), DTYPES[dtype]))
    with jax.transfer_guard("disallow"):
        assert not assign(variable, cut(aligned(dtype)), may_compile=True)
    before = variable.value.unsafe_buffer_pointer()
    for array in (aligned(dtype), random_array((4, 6), dtype)):
        expected = array.copy()
        assert not assign(variable, cut(array), may_compile=True)
        assert variable.value.unsafe_buffer_pointer() == before
        array[...] = 0  # an arena, which the next save fills
        assert variable.value.sharding == jax.numpy.zeros(1).sharding
        assert not variable.value.committed
        assert_same_bits(np.array(jax.numpy.copy(variable.value)), expected)


@pytest.mark.parametrize("who", ["another variable", "numpy", "the array that it was made of"])
def test_jax_leaves_alone_what_somebody_else_has(who):
    jax = pytest.importorskip("jax")
    before, after = aligned("float32"), random_array((4, 6), "float32")
    expected = before.copy()
    variable = Variable(jax.device_put(before if who.startswith("the") else before + 0))
    theirs = {
        "another variable": lambda: variable.value,
        "numpy": lambda: np.asarray(variable.value),
        "the array that it was made of": lambda: before,
    }[who]()
    assign(variable, after, may_compile=True)
    assert_same_bits(np.asarray(theirs), expected)
    assert_same_bits(np.asarray(variable.value), after)


def test_jax_makes_anew_what_was_given_away():
    jax = pytest.importorskip("jax")
    variable = Variable(jax.numpy.zeros((4, 6), "float32"))
    variable.value.delete()  # an interrupt came right after it was
    array = random_array((4, 6), "float32")
    assert assign(variable, array, may_compile=True)
    assert_same_bits(np.asarray(variable.value), array)


@pytest.mark.parametrize("cut", [lambda array: array, in_runs, in_blocks])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_tensorflow_updates_in_place_what_it_is_given_to_own(dtype, cut):
    tf = pytest.importorskip("tensorflow")
    module = importlib.import_module("stepsave.snapshot.tensorflow")

    def address(variable):
        return view_on_host([("a",)], [variable])[0].ctypes.data

    array = aligned(dtype)
    variable = tf.Variable(tf.zeros((4, 6), dtype))
    variable.assign(module.make_own(cut(array), variable))
    assert_same_bits(view_on_host([("a",)], [variable])[0], array)
    before = address(variable)
    variable.assign_add(tf.ones((4, 6), dtype))
    assert address(variable) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorflow_owns_any_dtype(dtype):
    like = of_tensorflow(dtype)
    array = random_array((4, 6), dtype)
    made = importlib.import_module("stepsave.snapshot.tensorflow").make_own(array, like)
    assert_same_bits(view_on_host([("a",)], [made])[0], array)


def test_scalars_are_made_as_they_are():
    made = [
        make_like(np.array(1, dtype), like)
        for dtype, like in (("int64", 5), ("bool", False), ("float32", 0.5), ("complex64", 1j))
    ]
    assert [(type(value), value) for value in made] == [
        (int, 1),
        (bool, True),
        (float, 1.0),
        (complex, 1 + 0j),
    ]
    assert type(make_like(np.array(2.5), np.float64(0))) is np.float64


@pytest.mark.parametrize("asks", [True, False])
def test_tensors_require_gradients_as_asked_and_parameters_stay_parameters(asks):
    torch = pytest.importorskip("torch")
    array = random_array((3,), "float32")
    parameter = make_like(array, torch.nn.Parameter(torch.zeros(3), requires_grad=asks))
    assert isinstance(parameter, torch.nn.Parameter)
    plain = make_like(array, torch.zeros(3, requires_grad=asks))
    assert type(plain) is torch.Tensor
    for made in (parameter, plain):
        assert (made.requires_grad, made.is_leaf, made.grad_fn) == (asks, True, None)
        assert_same_bits(made.detach().numpy(), array)
    computed = torch.zeros(3, requires_grad=True) * 2
    assert not make_like(array, computed).requires_grad


def test_a_tensor_is_laid_out_alike():
    torch = pytest.importorskip("torch")
    array = random_array((2, 3, 4, 5), "float32")
    like = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    made = make_like(array, like)
    assert made.stride() == like.stride()
    assert_same_bits(made.numpy(), array)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_variable_of_tensorflow_is_made_of_one(trainable):
    tf = pytest.importorskip("tensorflow")
    array = random_array((3,), "float32")
    like = tf.Variable(np.zeros(3, np.float32), trainable=trainable)
    made = make_like(array, like)
    assert isinstance(made, tf.Variable)
    assert made is not like
    assert made.trainable == trainable
    assert_same_bits(made.numpy(), array)


def test_of_a_variable_of_keras_the_value_counts():
    keras = pytest.importorskip("keras")
    like = keras.Variable(np.zeros(3, np.float32))
    array = random_array((3,), "float32")
    assert describe(like).shape == (3,)
    made = make_like(array, like)
    assert isinstance(made, type(like.value))
    assert_same_bits(keras.ops.convert_to_numpy(made), array)


def test_what_jax_would_narrow_is_refused():
    jax = pytest.importorskip("jax")
    with pytest.raises(InvalidStateError, match=r"float64.*jax_enable_x64"):
        make_like(np.zeros(3), jax.numpy.zeros(3))


def test_keys_and_registered_containers_are_opened_and_arrays_are_not():
    jax = pytest.importorskip("jax")
    key = jax.random.key(3)
    opened = open_leaf(key)
    assert isinstance(opened, NotedLeaf)
    assert (opened.kind, opened.value) == ("prng_key", "threefry2x32")
    again = wrap_key(opened.array, opened.value)
    assert again.dtype == key.dtype
    assert_same_bits(*map(jax.random.key_data, (again, key)))
    parts = jax.tree_util.Partial(max, np.zeros(1), key=None)
    with pytest.raises(InvalidStateError, match="names its children, found Partial"):
        open_leaf(parts)
    for leaf in (jax.numpy.zeros(3), np.zeros(3), np.float32(1), 3):
        assert open_leaf(leaf) is None


def test_a_registered_container_is_made_again_with_what_jax_does_not_see():
    jax = pytest.importorskip("jax")

    class Box:
        def __init__(self, inside, none, label):
            self.inside, self.none, self.label = inside, none, label

    key = jax.tree_util.GetAttrKey
    jax.tree_util.register_pytree_with_keys(
        Box,
        lambda box: (((key("inside"), box.inside), (key("none"), box.none)), box.label),
        lambda label, children: Box(*children, label),
    )
    opened = open_leaf(Box([1, 2], None, "mine"))
    assert isinstance(opened, Fields)
    assert opened.items == {"inside": [1, 2], "none": None}
    again = opened.build([{"other": 3}, None])
    assert (again.inside, again.none, again.label) == ({"other": 3}, None, "mine")


def test_what_is_no_array_has_no_form():
    with pytest.raises(InvalidStateError, match="found object"):
        describe(object())


def test_what_nobody_knows_is_refused_until_it_is_registered():
    jax = pytest.importorskip("jax")

    class Late:
        pass

    with pytest.raises(InvalidStateError, match="found Late"):
        flatten_state({"a": Late()}, open_leaf)
    key = jax.tree_util.GetAttrKey("x")
    jax.tree_util.register_pytree_with_keys(Late, lambda _: (((key, 1),), None), lambda *_: Late())
    assert flatten_state({"a": Late()}, open_leaf).paths == [("a", "x")]


@pytest.mark.parametrize("name", ["torch", "tensorflow", "jax"])
def test_a_leaf_of_another_library_is_refused_by_the_one_that_is_asked(name):
    pytest.importorskip(name)
    module = importlib.import_module(f"stepsave.snapshot.{name}")
    told = {
        "torch": "expected a torch tensor, found ndarray. Convert",
        "tensorflow": "expected an eager tensor, found ndarray. Save outside",
        "jax": "expected a JAX array with values, found ndarray",
    }
    with pytest.raises(InvalidStateError, match=told[name]):
        module.view_on_host([np.zeros(3)])
