import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepsave.errors import InvalidStateError
from stepsave.format.tree import flatten, unflatten

trees = st.recursive(
    st.integers(),
    lambda inner: st.dictionaries(st.text(), inner, min_size=1, max_size=4),
    max_leaves=20,
).filter(lambda tree: isinstance(tree, dict))


@given(trees)
def test_unflatten_undoes_flatten_in_the_same_order(tree):
    paths, leaves = flatten(tree)
    again = unflatten(paths, leaves)
    assert again == tree
    assert flatten(again)[0] == paths


def test_leaves_come_in_the_order_of_the_dict():
    assert flatten({"b": {"y": 1, "x": 2}, "a": 3}) == ([("b", "y"), ("b", "x"), ("a",)], [1, 2, 3])


def test_an_empty_state_has_no_leaves():
    assert flatten({}) == ([], [])
    assert unflatten([], []) == {}


@pytest.mark.parametrize("state", [None, [1], 3, "text"])
def test_what_is_no_dict_is_refused(state):
    with pytest.raises(InvalidStateError, match="Expected a nested dict"):
        flatten(state)


def test_a_key_that_is_no_string_is_named_with_its_place():
    with pytest.raises(InvalidStateError, match=re.escape("Key 7 in state['a/b']")):
        flatten({"a": {"b": {7: 1}}})


@pytest.mark.parametrize("value", [[1, 2], (1, 2)])
def test_a_list_is_named_with_its_place(value):
    with pytest.raises(InvalidStateError, match="'a/b': expected an array or a dict"):
        flatten({"a": {"b": value}})


def test_a_dict_that_contains_itself_is_refused():
    state = {}
    state["again"] = state
    with pytest.raises(InvalidStateError, match="nested deeper"):
        flatten(state)
