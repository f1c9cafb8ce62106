"""Runs these tests on the backend that KERAS_BACKEND names; JAX if it names none."""

import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# For `keras_support`, here and in child processes; pytest's importlib mode adds no path.
sys.path.insert(0, str(Path(__file__).parent))

import gc

import pytest

pytest.register_assert_rewrite("keras_support")

import keras  # noqa: E402  after the environment was set

assert keras.backend.backend() == os.environ["KERAS_BACKEND"]

if keras.backend.backend() == "torch":
    import torch

    torch.set_num_threads(1)  # models of a hundred weights; more threads only wait


gc.freeze()  # what was imported is never garbage; collecting after each test is then cheap


@pytest.fixture(autouse=True)
def _repeatable():
    keras.utils.set_random_seed(7)
    keras.config.disable_interactive_logging()
    yield
    # Interrupted callbacks finish and unlock when collected: here, not in a later test.
    gc.collect()


@pytest.fixture
def backup_dir(tmp_path):
    return tmp_path / "backup"


@pytest.fixture
def saves(monkeypatch):
    """Notes every save: (global step, epoch, batch, the optimizer's iterations)."""
    from stepsave.engine.checkpointer import Checkpointer

    noted = []
    original = Checkpointer.save_leaves

    def save_leaves(self, step, paths, leaves, metadata=None, **kwargs):
        at = next(i for i, path in enumerate(paths) if path[-1] == "iteration")
        position = metadata["position"]
        assert position["global_step"] == step
        noted.append((step, position["epoch"], position["batch"], int(leaves[at])))
        return original(self, step, paths, leaves, metadata, **kwargs)

    monkeypatch.setattr(Checkpointer, "save_leaves", save_leaves)
    return noted
