import contextlib
import errno
import shutil
import threading
import warnings

import pytest
from bucket_support import memory
from engine_support import assert_is_state_of, restore_once, state_of

import stepsave
from stepsave import testing
from stepsave.store.bucket import NO_OBJECT
from stepsave.store.local import LocalStore
from stepsave.store.places import open_store
from stepsave.testing import BucketStoreContract, Died, FaultStore, LocalStoreContract
from stepsave.testing.checks import aligned, raises
from stepsave.testing.faults import CHANGES

__all__ = ("memory",)

OF_DIRECTORIES = {
    "make_directory": ("new/below",),
    "remove": ("a",),
    "remove_empty_directory": ("empty",),
    "rename": ("a", "b"),
    "replace": ("a", b"new contents"),
    "sync_directory": ("d",),
    "sync_tree": ("d",),
    "write": ("a", b"new contents"),
    "write_all": ({"a": b"new", "d/1": b"newer"},),
    "write_direct": ("direct", aligned(b"n" * 16384)),
}
OF_BUCKETS = {
    "remove": ("a",),
    "remove_below": ("d/",),
    "write_all": ({"a": b"new", "d/1": b"newer"},),
    "write_if": ("new", b"new", NO_OBJECT),
}
HALVES = {
    "make_directory": {"new": None},
    "replace": {"a.tmp": b"new contents"},
    "write": {"a": b"new co"},
    "write_all": {"a": b"new"},
    "write_direct": {"direct": b"n" * 8192 + b"o" * 8192},
    "remove_below": {"d/1": None},
}


@pytest.fixture(params=["directory", "bucket"])
def target(request, tmp_path):
    if request.param == "directory":
        return tmp_path / "backup"
    return request.getfixturevalue("memory").place


def filled(target):
    """A store with something in it, and what that is."""
    store = open_store(target)
    store.create()
    if isinstance(store, LocalStore):
        store.make_directory("d")
        store.make_directory("empty")
        if store.can_write_direct():
            store.write_direct("direct", aligned(b"o" * 16384))
    store.write_all({"a": b"old", "d/1": b"1", "d/2": b"2"})
    return FaultStore(target), contents(target)


def contents(target):
    """What lies in a place: files with what is in them, directories with None."""
    store = open_store(target)
    if not isinstance(store, LocalStore):
        return {path: store.read(path, 1 << 20) for path in store.list("")}
    paths = {str(path.relative_to(store.root)): path for path in store.root.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


def calls_of(target):
    operations = OF_DIRECTORIES if isinstance(open_store(target), LocalStore) else OF_BUCKETS
    for kind, args in operations.items():
        if kind == "write_direct" and not open_store(target).can_write_direct():
            continue
        yield kind, args


def test_what_fails_before_has_done_nothing_and_what_fails_after_all(target):
    for kind, args in calls_of(target):
        for when in ("before", "after"):
            remove_all(target)
            store, before = filled(target)
            store.fail(kind, when=when, error=OSError(errno.ENOSPC, "full"))
            with pytest.raises(OSError, match="full"):
                getattr(store, kind)(*args)
            found = contents(target)
            remove_all(target)
            getattr(filled(target)[0], kind)(*args)
            done = contents(target)
            assert found == (before if when == "before" else done), (kind, when)


def test_what_fails_in_the_middle_has_done_half(target):
    for kind, args in calls_of(target):
        remove_all(target)
        store, before = filled(target)
        store.fail(kind, when="middle")
        with pytest.raises((OSError, stepsave.BucketError), match="on purpose"):
            getattr(store, kind)(*args)
        half = HALVES.get(kind, {})
        if kind == "remove_below":
            assert contents(target) == {k: v for k, v in before.items() if k not in half}
        else:
            assert contents(target) == before | half, kind


def remove_all(target):
    store = open_store(target)
    if isinstance(store, LocalStore):
        shutil.rmtree(store.root, ignore_errors=True)
    else:
        store.remove_below("")


def test_all_changes_of_stores_are_tried_here():
    by_saves = {"write_array"}  # below
    assert {*OF_DIRECTORIES, *OF_BUCKETS} | by_saves == set(CHANGES)


def test_reading_fails_too_half_of_it_if_asked_for(target):
    store, _ = filled(target)
    store.fail("read", "read_into", times=None, when="middle")
    pieces = [(0, memoryview(bytearray(1))), (1, memoryview(bytearray(2)))]
    for _ in range(2):
        with pytest.raises((OSError, stepsave.BucketError), match="on purpose"):
            store.read("a", 10)
        with pytest.raises((OSError, stepsave.BucketError), match="on purpose"):
            store.read_into("a", 3, pieces)
    assert [bytes(piece) for _, piece in pieces] == [b"o", b"\0\0"]
    store.mend()
    store.read_into("a", 3, pieces)
    assert [bytes(piece) for _, piece in pieces] == [b"o", b"ld"]


def test_the_nth_call_there_fails_and_no_other(target):
    store, _ = filled(target)
    store.fail("write_all", path="d/*", nth=2, times=2)
    went_well = []
    for path in ("a", "d/1", "d/1", "a", "d/2", "d/2"):
        try:
            store.write_all({path: b"x"})
        except (OSError, stepsave.BucketError):
            went_well.append(False)
        else:
            went_well.append(True)
    assert went_well == [True, True, False, True, False, True]
    told = [call.path for call in store.calls if call.kind == "write_all"]
    assert told == ["a", "d/1", "d/1", "a", "d/2", "d/2"]


def test_two_faults_each_count_for_themselves(target):
    store, _ = filled(target)
    store.fail("remove", nth=2, error=OSError("second"))
    store.fail("remove", nth=3, error=OSError("third"))
    store.remove("a")
    for told in ("second", "third"):
        with pytest.raises(OSError, match=told):
            store.remove("a")
    store.remove("a")


def test_calls_of_many_threads_are_counted_once_each(target):
    store, _ = filled(target)
    store.fail("remove", nth=50)
    failed = []

    def work():
        for _ in range(25):
            try:
                store.remove("none")
            except (OSError, stepsave.BucketError) as e:
                failed.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 1
    assert sum(call.kind == "remove" for call in store.calls) == 100


def test_the_dead_do_nothing_any_more(target):
    store, before = filled(target)
    store.die("remove", nth=2)
    store.remove("none")
    with pytest.raises(Died):
        store.remove("a")
    assert store.is_dead
    store.mend()
    for kind, args in (*calls_of(target), ("read", ("a", 10)), ("list", ("",))):
        with pytest.raises(Died):
            getattr(store, kind)(*args)
    assert contents(target) == before


@pytest.mark.parametrize(
    ("kind", "options"), [("fly", {}), ("remove", {"nth": 0}), ("remove", {"when": "later"})]
)
def test_what_cannot_go_wrong_is_refused(target, kind, options):
    with pytest.raises(ValueError, match=r"Expected some of .*remove"):
        FaultStore(target).fail(kind, **options)
    other = "write_if" if isinstance(open_store(target), LocalStore) else "rename"
    with pytest.raises(ValueError, match=other):
        FaultStore(target).die(other)


def test_a_store_of_an_own_class_stays_what_it_is(tmp_path):
    class Shouting(LocalStore):
        def write(self, path, data):
            super().write(path, data.upper())

    store = FaultStore(Shouting(tmp_path))
    store.fail("write", nth=2)
    store.replace("a", b"text")
    assert store.read("a", 10) == b"TEXT"
    assert isinstance(store, Shouting)
    assert type(store).__name__ == "FaultyShouting"
    with pytest.raises(OSError, match="on purpose"):
        store.replace("a", b"text")
    with pytest.raises(ValueError, match="Received: a FaultStore of"):
        FaultStore(store)


def outcomes(target, plan, **options):
    """Saves three times; returns what is restored after each, by another process."""
    store, found = FaultStore(target), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saver = stepsave.Checkpointer(store, **options)
        assert saver.directory == str(store.root)
        saver.save(1, state_of(1)).wait()
        plan(store)
        for step in (2, 3):
            try:
                saver.save(step, state_of(step)).wait()
                found.append(step)
            except stepsave.SaveFailedError as e:
                found.append(type(e.__cause__))
            backup = stepsave.restore(target)
            assert_is_state_of(backup)
            assert found[-1] == backup.step or (isinstance(found[-1], type) and backup.step < step)
        with contextlib.suppress(*[stepsave.SaveFailedError] * store.is_dead):
            saver.close()
    assert_is_state_of(restore_once(target))
    return found


def test_a_save_fails_and_the_next_does_not(target):
    kind = OSError if isinstance(open_store(target), LocalStore) else stepsave.BucketError
    assert outcomes(target, lambda store: store.fail()) == [kind, 3]


def test_a_shard_fails_whoever_writes_it(target):
    options = {"writer": "tensorstore"}
    fault = ("write_array", "write_direct") if isinstance(open_store(target), LocalStore) else ()
    for when in ("before", "middle", "after"):
        remove_all(target)
        found = outcomes(
            target,
            lambda store, when=when: store.fail(
                *(fault or ("write_array",)), path="*/c/0", when=when, error=OSError("no shard")
            ),
            **options,
        )
        assert found == [OSError, 3]


def test_no_save_of_the_dead_becomes_durable(target):
    assert outcomes(target, lambda store: store.die(nth=3)) == [Died, Died]


def test_each_public_name_is_there_and_no_other():
    assert set(testing.__all__) <= set(dir(testing))
    for name in testing.__all__:
        assert getattr(testing, name).__doc__
    with pytest.raises(AttributeError, match="Faults"):
        testing.Faults  # noqa: B018


def test_an_error_that_is_expected_must_come_and_say_so():
    nothing = "expected OSError, and nothing was raised"
    with pytest.raises(AssertionError, match=nothing), raises(OSError):
        pass
    with pytest.raises(AssertionError, match=r"lacks \['b'\]: a"), raises(ValueError, "a", "b"):
        raise ValueError("a")
    with pytest.raises(KeyError), raises(ValueError):
        raise KeyError("other")


class TestDirectoryWithoutFaults(LocalStoreContract):
    def make_store(self, tmp_path):
        return FaultStore(tmp_path / "root")


class TestBucketWithoutFaults(BucketStoreContract):
    @pytest.fixture(autouse=True)
    def place(self, memory):
        self.target = memory.place

    def make_store(self, tmp_path):  # noqa: ARG002
        return FaultStore(self.target)
