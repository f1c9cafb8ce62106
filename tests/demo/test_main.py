"""What the demo refuses."""

import importlib.util
import sys

import pytest

from stepsave.demo import __main__ as demo


@pytest.mark.parametrize("module", ["sklearn", "rich", "torch"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys, module):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find_spec(name)
    )
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setattr(sys, "argv", ["stepsave.demo"])
    assert demo.main() == 1
    error = capsys.readouterr().err
    assert module in error
    assert "pip install 'stepsave[demo,torch]'" in error


def test_an_unknown_backend_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setenv("KERAS_BACKEND", "abacus")
    monkeypatch.setattr(sys, "argv", ["stepsave.demo"])
    assert demo.main() == 1
    error = capsys.readouterr().err
    assert "'abacus'" in error
    assert "jax, tensorflow, torch" in error
