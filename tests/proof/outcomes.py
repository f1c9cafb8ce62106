"""A plugin of pytest: writes down how each test ended, for whoever started the process.

A process that a time limit ends (`os._exit`, from another thread) has then told in which test.
"""

import json
import os
from pathlib import Path

import pytest

import stepsave

RECORD = "STEPSAVE_OUTCOMES"
SOURCE = "STEPSAVE_SOURCE"


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group: of a plugin that is not loaded here")
    expected = Path(os.environ[SOURCE], "stepsave")
    found = Path(stepsave.__file__).parent
    if found != expected:  # an installed one, say: then nothing of it is mutated
        raise pytest.UsageError(f"expected stepsave of {expected}, imported it from {found}")


def pytest_runtest_logstart(nodeid):
    _tell(began=nodeid)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        error = "" if crash is None else crash.message.partition("\n")[0]
        _tell(test=report.nodeid, when=report.when, outcome=report.outcome, error=error)


def _tell(**facts):
    with open(os.environ[RECORD], "a") as file:
        file.write(json.dumps(facts) + "\n")
