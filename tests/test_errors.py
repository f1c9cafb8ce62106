import inspect
import pickle
import re

import pytest
from engine_support import check_python

import stepsave
from stepsave import errors

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value)]


def test_every_error_is_public_and_documented():
    assert {cls.__name__ for cls in CLASSES} == set(errors.__all__)
    for cls in CLASSES:
        assert getattr(stepsave, cls.__name__) is cls
        assert cls.__name__ in stepsave.__all__
        assert cls.__doc__


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = re.findall(r"── (\w+)\s+(?:\((\w+)\))?", errors.__doc__)
    in_tree = {cls.__name__ for cls in CLASSES if issubclass(cls, errors.StepsaveError)}
    assert {name for name, _ in drawn} == in_tree - {"StepsaveError"}
    beside = re.findall(r"^    (\w+)\s+\((\w+)\)", errors.__doc__, re.MULTILINE)
    assert {name for name, _ in beside} == set(errors.__all__) - in_tree
    for name, builtin in beside:
        assert issubclass(getattr(errors, name), getattr(__import__("builtins"), builtin))
    for name, builtin in drawn:
        cls = getattr(errors, name)
        assert issubclass(cls, errors.StepsaveError)
        if builtin:
            assert issubclass(cls, getattr(__import__("builtins"), builtin))


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_a_trip_between_processes(cls):
    error = cls(15, 3, 0.5) if cls is errors.Preempted else cls("what happened")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error) != ""


def test_the_engine_works_where_keras_cannot_be_imported(tmp_path):
    check_python(
        """
import sys
for name in ("keras", "jax", "torch", "tensorflow", "orbax"):
    sys.modules[name] = None
import numpy as np, stepsave
with stepsave.Checkpointer(sys.argv[1]) as saver:
    saver.save(1, {"a": np.arange(5)}).wait()
    assert (saver.restore().state["a"] == np.arange(5)).all()
try:
    stepsave.BackupAndRestore
except ImportError:
    pass
else:
    raise AssertionError("the callback came without Keras")
""",
        tmp_path / "backup",
    )


def test_importing_stepsave_imports_nothing_that_takes_time():
    check_python(
        """
import sys, stepsave
assert {name for name in sys.modules if name.startswith("stepsave")} == {"stepsave"}
heavy = {"numpy", "awscrt", "ml_dtypes"} & set(sys.modules)
assert not heavy, heavy
stepsave.Checkpointer
heavy = {"keras", "jax", "torch", "tensorflow", "orbax", "tensorstore"} & set(sys.modules)
assert not heavy, heavy
"""
    )


def test_every_public_name_is_found_and_found_once():
    assert set(stepsave.__all__) <= set(dir(stepsave))
    for name in stepsave.__all__:
        assert getattr(stepsave, name) is getattr(stepsave, name)
        assert name in (getattr(stepsave, name).__name__, "rng")


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Chekpointer'"):
        _ = stepsave.Chekpointer
