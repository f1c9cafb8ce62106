"""Makes the support modules importable, also in child processes; what engine tests share."""

import os
import signal
import sys

import pytest
from hypothesis import settings

# No deadline, as other tests share the machine; no database, as nothing may be left behind.
settings.register_profile("engine", deadline=None, database=None, print_blob=True)
settings.load_profile("engine")

# A shell that starts the suite in the background, or `nohup`, has these ignored; child processes
# would inherit it.
for signum, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, handler)

sys.path.insert(0, os.path.dirname(__file__))

pytest.register_assert_rewrite("stepsave.testing")  # what a contract found is told like a test's


@pytest.fixture
def small_shards(monkeypatch):
    """Layouts compiled in the test get shards of 64 KiB instead of 64 MiB."""
    from stepsave.format import planning

    monkeypatch.setattr(planning, "SHARD_TARGET_BYTES", 64 << 10)
    monkeypatch.setattr(planning, "CHUNK_LIMIT_BYTES", 16 << 10)


@pytest.fixture
def no_sync(monkeypatch):
    """Makes syncs free: for tests of process death, which no sync matters to."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
