import collections
import json
import re
from types import MappingProxyType

import numpy as np
import pytest
from engine_support import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from stepsave.errors import FormatVersionError, InvalidStateError
from stepsave.format.tree import (
    Fields,
    NotedLeaf,
    decode_structure,
    encode_structure,
    flatten,
    flatten_state,
    rebuild,
    unflatten,
)

Pair = collections.namedtuple("Pair", "first second")  # noqa: PYI024  as it comes from optax
Nothing = collections.namedtuple("Nothing", "")  # noqa: PYI024

arrays = st.builds(np.full, st.tuples(st.integers(0, 3)), st.integers(0, 9))
numbers = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.just(1 + 2j))
keys = st.one_of(st.text(), st.integers())
plain_trees = st.recursive(
    arrays, lambda inner: st.dictionaries(st.text(), inner, min_size=1, max_size=4), max_leaves=20
).filter(lambda tree: isinstance(tree, dict))


def without_twins(node):
    return {key: child for key, child in node.items() if type(key) is str or str(key) not in node}


trees = st.recursive(
    st.one_of(arrays, numbers, st.none()),
    lambda inner: st.one_of(
        st.dictionaries(keys, inner, max_size=4).map(without_twins),
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
    ),
    max_leaves=20,
).filter(lambda tree: isinstance(tree, (dict, list, tuple)))


def through_json(notes):
    text = encode_structure(notes)
    return decode_structure(json.loads(text) if text else None)


def read_back(flat):
    return unflatten(flat.paths, list(map(np.asarray, flat.leaves)), through_json(flat.notes))


@given(plain_trees)
def test_a_plain_dict_needs_no_notes_and_comes_back_in_order(tree):
    flat = flatten_state(tree)
    assert flat.notes == []
    assert encode_structure(flat.notes) == ""
    again = unflatten(flat.paths, flat.leaves)
    assert_same_bits(again, tree)
    assert flatten(again)[0] == flat.paths


@given(trees)
def test_any_tree_comes_back_with_its_containers_keys_and_numbers(tree):
    assert_same_bits(read_back(flatten_state(tree)), tree)


@given(trees)
def test_a_tree_is_rebuilt_with_other_leaves(tree):
    flat = flatten_state(tree)
    again = rebuild(tree, iter(flat.leaves), lambda _: None)
    assert_same_bits(again, tree)


def test_leaves_come_in_the_order_of_the_dict():
    assert flatten({"b": {"y": 1, "x": 2}, "a": 3}) == ([("b", "y"), ("b", "x"), ("a",)], [1, 2, 3])


def test_paths_are_the_names_that_orbax_gives():
    state = {"a": [1, (2, 3)], 7: {"b": 4}, "c": Pair(5, [6]), "d": [{}, None, ()]}
    expected = ["a/0", "a/1/0", "a/1/1", "7/b", "c/first", "c/second/0"]
    assert ["/".join(path) for path in flatten(state)[0]] == expected


def test_the_notes_are_these_very_ones():
    state = {"a": [np.zeros(1), None], "b": (2,), 3: {}, "c": True}
    flat = flatten_state(state)
    assert json.loads(encode_structure(flat.notes)) == {
        "version": 1,
        "notes": [
            [["a", "1"], "none"],
            [["a"], "list", 2],
            [["b", "0"], "int"],
            [["b"], "tuple", 1],
            [["3"], "dict", []],
            [["c"], "bool"],
            [[], "dict", ["a", "b", 3, "c"]],
        ],
    }
    assert_same_bits(read_back(flat), state)


def test_named_tuples_come_back_as_dicts_of_their_fields():
    state = {"a": Pair(np.zeros(2), Pair(None, 3)), "b": Nothing()}
    expected = {"a": {"first": np.zeros(2), "second": {"first": None, "second": 3}}, "b": {}}
    assert_same_bits(read_back(flatten_state(state)), expected)


def test_other_dicts_lists_and_tuples_are_rebuilt_as_they_are():
    class Texts(dict):
        pass

    class Wrapping(collections.abc.MutableMapping):  # as `flax.nnx.State` is one
        def __init__(self, items):
            self.items_ = items

        def __getitem__(self, key):
            return self.items_[key]

        def __setitem__(self, key, value):
            self.items_[key] = value

        def __delitem__(self, key):
            del self.items_[key]

        def __iter__(self):
            return iter(self.items_)

        def __len__(self):
            return len(self.items_)

    counts = collections.defaultdict(list, {"x": 1})
    state = {
        "wrapping": Wrapping({"w": 0}),
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": counts,
        "subclass": Texts(y=3),
        "frozen": MappingProxyType({"z": 4}),
        "pair": Pair(5, Nothing()),
    }
    again = rebuild(state, iter("abcdefg"), lambda _: None)
    assert again == {
        "wrapping": {"w": "a"},
        "ordered": collections.OrderedDict(b="b", a="c"),
        "default": {"x": "d"},
        "subclass": {"y": "e"},
        "frozen": {"z": "f"},
        "pair": Pair("g", Nothing()),
    }
    assert {key: type(value) for key, value in again.items()} == {
        key: type(value) for key, value in state.items()
    }
    assert again["default"]["missing"] == []
    assert counts == {"x": 1}
    assert state["wrapping"] == {"w": 0}


class Box:
    def __init__(self, inside, label):
        self.inside = inside
        self.label = label


class Secret:
    pass


def open_box(value):
    if isinstance(value, Box):
        return Fields({"inside": value.inside}, lambda children: Box(children[0], value.label))
    if isinstance(value, Secret):
        return NotedLeaf(np.arange(2), "prng_key", "one")
    return None


def test_what_is_opened_is_flattened_by_name_and_made_again():
    state = {"box": Box([np.zeros(1), Secret()], "mine"), "empty": Box({}, "x")}
    flat = flatten_state(state, open_box)
    assert flat.paths == [("box", "inside", "0"), ("box", "inside", "1")]
    assert flat.notes[:2] == [
        (("box", "inside", "1"), "prng_key", "one"),
        (("box", "inside"), "list", 2),
    ]
    expected = {"box": {"inside": [np.zeros(1), np.arange(2)]}, "empty": {"inside": {}}}
    assert_same_bits(read_back(flat), expected)
    again = rebuild(state, iter("ab"), open_box)
    assert (again["box"].inside, again["box"].label) == (["a", "b"], "mine")
    assert (again["empty"].inside, again["empty"].label) == ({}, "x")


def test_an_empty_state_has_no_leaves():
    assert flatten({}) == ([], [])
    assert unflatten([], []) == {}


@pytest.mark.parametrize("state", [None, 3, "text", np.zeros(3), True])
def test_what_is_no_container_is_refused(state):
    with pytest.raises(InvalidStateError, match="Expected a dict, list or tuple"):
        flatten(state)


@pytest.mark.parametrize("key", [1.5, (1, 2), None, True], ids=repr)
def test_a_key_that_is_neither_text_nor_integer_is_named_with_its_place(key):
    with pytest.raises(InvalidStateError, match=re.escape(f"Key {key!r} in state['a/b']")):
        flatten({"a": {"b": {key: 1}}})


@pytest.mark.parametrize("order", [1, -1])
def test_two_keys_that_are_the_same_as_texts_are_refused(order):
    twins = dict([(1, np.zeros(1)), ("1", np.zeros(1))][::order])
    with pytest.raises(InvalidStateError, match=re.escape("Keys 1 and '1' in state['a']")):
        flatten({"a": twins})


@pytest.mark.parametrize("value", ["text", b"bytes", {1, 2}])
def test_a_value_that_is_no_array_is_named_with_its_place(value):
    with pytest.raises(InvalidStateError, match=f"'a/0': expected .*found {type(value).__name__}"):
        flatten({"a": [value]})


@pytest.mark.parametrize("make", [dict, list])
def test_a_container_that_contains_itself_is_refused(make):
    state = make()
    state.append(state) if make is list else state.update(again=state)
    with pytest.raises(InvalidStateError, match="nested deeper"):
        flatten(state)


def test_a_structure_of_a_newer_stepsave_is_told_from_a_malformed_one():
    with pytest.raises(FormatVersionError, match=r"version 2.*reads version 1.*newer"):
        decode_structure({"version": 2, "notes": "whatever"})


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"version": 1},
        {"version": 1, "notes": 3},
        {"version": 1, "notes": [[]]},
        {"version": 1, "notes": [[["a"]]]},
        {"version": 1, "notes": [[[1], "none"]]},
        {"version": 1, "notes": [[["a"], "none", 1, 2]]},
        {"version": 1, "notes": [[["a"], "dict"]]},
        {"version": 1, "notes": [[["a"], "dict", [[]]]]},
        {"version": 1, "notes": [[["a"], "dict", [True]]]},
    ],
    ids=repr,
)
def test_a_malformed_structure_is_refused(document):
    with pytest.raises((ValueError, TypeError, LookupError)):
        decode_structure(document)


@pytest.mark.parametrize(
    "note",
    [
        (("a",), "none", None),
        (("a",), "list", 1),
        (("b",), "list", 2),
        (("b",), "list", 10**12),
        (("b",), "tuple", "1"),
        (("b",), "dict", [0, 1]),
        (("b",), "dict", [5]),
        (("b",), "unheard of", None),
        (("b",), "int", None),
        (("new",), "int", None),
        (("new",), "prng_key", "rbg"),
        (("a", "x"), "none", None),
        ((), "none", None),
    ],
    ids=repr,
)
def test_notes_that_do_not_fit_the_arrays_are_refused(note):
    paths, leaves = [("a",), ("b", "0")], [np.zeros(2), np.zeros(2)]
    with pytest.raises((ValueError, TypeError, LookupError)):
        unflatten(paths, leaves, [note])
