"""Keras's own tests of `BackupAndRestore`, as installed, with stepsave's class."""

import json

import pytest
from keras_support import Child

pytestmark = [pytest.mark.first, pytest.mark.xdist_group("Keras's own tests")]

_RUN = """
import collections, importlib, json, os, sys, unittest
import pytest
import keras.src.callbacks, stepsave

class Callback(stepsave.BackupAndRestore):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, resume="epoch", **kwargs)

keras.src.callbacks.BackupAndRestore = Callback
module = importlib.import_module("keras.src.callbacks.backup_and_restore_test")
assert module.callbacks.BackupAndRestore is Callback

calls = collections.defaultdict(collections.Counter)
outcomes = {}
current = []

def count(owner, name, only_raising=False):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        if not only_raising:
            calls[current[-1]][name] += 1
            return original(*args, **kwargs)
        try:
            return original(*args, **kwargs)
        except RuntimeError:
            calls[current[-1]]["interruptions"] += 1
            raise
    setattr(owner, name, wrapped)

for name in ("assertEqual", "assertTrue", "assertFalse", "assertRaisesRegex"):
    count(unittest.TestCase, name)
for name in ("on_epoch_end", "on_batch_end"):
    count(module.InterruptingCallback, name, only_raising=True)

class Watch:
    def pytest_runtest_setup(self, item):
        current.append(item.name)
    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            outcomes[report.nodeid.split("::")[-1]] = report.outcome

here = sys.argv[1]
os.chdir(here)
options = ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", here, "-q"]
code = pytest.main([module.__file__, *options], plugins=[Watch()])
with open("result.json", "w") as file:
    json.dump({"code": int(code), "calls": calls, "outcomes": outcomes}, file)
"""

# What each test calls at least, if its `except RuntimeError` is entered and left at its end.
_CALLS = {
    "test_save_freq_unknown_error": {"assertRaisesRegex": 2},
    "test_best_case_step": {"assertEqual": 6, "assertTrue": 1, "interruptions": 1},
    "test_best_case_epoch": {"assertEqual": 6, "assertTrue": 1, "interruptions": 1},
    "test_backup_corrupted": {"assertEqual": 6, "assertTrue": 5, "interruptions": 1},
    "test_model_deleted_case_epoch": {"assertFalse": 2},
    "test_backup_dir_empty_error": {"assertRaisesRegex": 1},
    "test_backup_dir_none_error": {"assertRaisesRegex": 1},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    directory = tmp_path_factory.mktemp("suite")
    Child(_RUN, directory).wait()
    return json.loads((directory / "result.json").read_text())


def test_keras_own_tests_pass(result):
    assert result["outcomes"] == dict.fromkeys(_CALLS, "passed")
    assert result["code"] == 0


@pytest.mark.parametrize("name", _CALLS)
def test_their_assertions_are_really_reached(name, result):
    calls = result["calls"].get(name, {})
    assert {
        key: calls.get(key, 0) >= least for key, least in _CALLS[name].items()
    } == dict.fromkeys(_CALLS[name], True)
