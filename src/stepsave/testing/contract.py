"""What every store must do, as tests to inherit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from stepsave.errors import CorruptBackupError, DirectoryBusyError
from stepsave.format import orbax
from stepsave.format.planning import compile_layout
from stepsave.format.records import LayoutPlan, LeafSpec
from stepsave.store.places import Store
from stepsave.store.shard_array import ShardArray
from stepsave.testing.checks import raises, random_bytes

__all__ = ("StoreContract",)


class StoreContract:
    """What saves and restores rely on, wherever backups lie.

    Of a store of your own, inherit `LocalStoreContract` or `BucketStoreContract`:

        ```python
        class TestMyStore(LocalStoreContract):
            def make_store(self, tmp_path):
                return MyStore(tmp_path / "backups")
        ```
    """

    def make_store(self, tmp_path: Path) -> Store:
        """Returns a store of a place that is empty or not there yet when a test begins.

        Args:
            tmp_path: A directory of the test's own. With the same one it is a store of the same
                place, as a second process would have it.
        """
        raise NotImplementedError("say which store is to be tested, by `make_store`")

    def created(self, tmp_path: Path) -> Any:
        """Returns a store of a place that is there."""
        store = self.make_store(tmp_path)
        store.create()
        return store

    def make_parents(self, store: Any, directory: str) -> None:
        """Makes what must be there before files can lie in a directory: in a bucket, nothing."""

    def test_a_place_is_made_and_nothing_is_left_by_looking_whether_one_may_write(
        self, tmp_path: Path
    ) -> None:
        store = self.created(tmp_path)
        assert store.list("") == []
        store.create()  # as the next process does
        store.check_directory()
        assert store.list("") == []

    def test_to_make_a_place_that_is_in_use_changes_nothing_in_it(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write_all({"a": b"precious"})
        self.created(tmp_path).check_directory()
        assert store.list("") == ["a"]
        assert store.read("a", 100) == b"precious"

    def test_a_store_says_how_it_wants_to_be_used(self, tmp_path: Path) -> None:
        store = self.make_store(tmp_path)
        assert store.lanes >= 1
        assert isinstance(store.is_remote, bool)
        assert isinstance(store.keeps_data, bool)
        assert str(store.path("a/b")) == f"{store.root}/a/b"
        assert str(self.make_store(tmp_path).root) == str(store.root)

    def test_what_is_written_another_process_reads(self, tmp_path: Path) -> None:
        files = {f"file-{size}": random_bytes(size) for size in (0, 1, 4095, 4096, 200_001)}
        self.created(tmp_path).write_all(files)
        other = self.make_store(tmp_path)
        assert sorted(other.list("")) == sorted(files)
        for path, data in files.items():
            assert other.read(path, len(data)) == data

    def test_what_is_written_again_is_as_it_was_written_last(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        for data in (b"a long text", b"short", b""):
            store.write_all({"a": data})
            assert store.read("a", 100) == data
        assert store.list("") == ["a"]

    def test_nothing_is_written_if_nothing_is_to_be(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write_all({})
        assert store.list("") == []

    def test_what_is_not_there_is_missing(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        with raises(FileNotFoundError, str(store.path("none"))):
            store.read("none", 10)
        with raises(FileNotFoundError, str(store.path("none"))):
            store.read_into("none", 1, [(0, memoryview(bytearray(1)))])
        with raises(CorruptBackupError, str(store.path("none")), "expected 5 bytes, found no such"):
            store.check_sizes({"none": 5})

    def test_more_than_the_limit_is_refused_with_the_limit(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write_all({"a": b"12345"})
        assert store.read("a", 5) == b"12345"
        with raises(CorruptBackupError, str(store.path("a")), "at most 4 bytes, found"):
            store.read("a", 4)

    def test_pieces_are_read_from_where_they_are_and_told_of(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        data = random_bytes(100_000)
        store.write_all({"a": data})
        places = (0, 1), (4096, 8192), (50_000, 50_001), (8192, 40_000), (99_999, 100_000)
        pieces = [(begin, memoryview(bytearray(end - begin))) for begin, end in places]
        told: list[int] = []
        store.read_into("a", len(data), pieces, told.append)
        for begin, buffer in pieces:
            assert buffer == data[begin : begin + len(buffer)]
        assert sum(told) == sum(len(buffer) for _, buffer in pieces)

    def test_what_ends_too_early_is_corrupt(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write_all({"a": b"12345"})
        for begin, size in ((0, 6), (4, 2), (7, 1)):
            with raises(CorruptBackupError, str(store.path("a"))):
                store.read_into("a", begin + size, [(begin, memoryview(bytearray(size)))])

    def test_sizes_are_checked(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write_all({"a": b"12345", "b": bytes(10_000)})
        store.check_sizes({})
        store.check_sizes({"a": 5, "b": 10_000})
        with raises(CorruptBackupError, str(store.path("b")), "10001 bytes"):
            store.check_sizes({"a": 5, "b": 10_001})

    def test_what_is_removed_is_gone_and_may_be_removed_again(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write_all({"a": b"1", "b": b"2"})
        for _ in range(2):
            store.remove("a")
            assert self.make_store(tmp_path).list("") == ["b"]
        with raises(FileNotFoundError):
            store.read("a", 10)

    def test_tensorstore_has_the_same_place(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        self.make_parents(store, "d")
        store.write_all({"d/ours": b"1"})
        keys = self.open_with_tensorstore(store, "d")
        assert keys.read("ours").result().value == b"1"
        keys.write("theirs", b"22").result()
        assert store.read("d/theirs", 10) == b"22"
        assert store.wait(keys.read("theirs"), "read theirs", 2).value == b"22"

    def open_with_tensorstore(self, store: Any, directory: str) -> Any:
        """Opens a directory past the store."""
        ts: Any = importlib.import_module("tensorstore")
        return ts.KvStore.open(store.kvstore(directory), context=store.context).result()

    def test_shards_are_written_as_they_are_those_of_zeros_too(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        plan = self.begin_array(store, "d")
        shards = ShardArray(store, "d", plan)
        for value in (7, 0):
            data = np.full(plan.shard_bytes, value, np.uint8)
            shards.write(0, data)
            data[:] = 9  # the memory is the next save's
            path = f"d/{orbax.shard_path(0)}"
            found = self.make_store(tmp_path).read(path, plan.shard_bytes)
            assert found == bytes([value]) * plan.shard_bytes

    def begin_array(self, store: Any, directory: str) -> LayoutPlan:
        """Writes all but the shards of a backup."""
        plan = compile_layout([LeafSpec(("a",), (60_000,), "uint8")])
        files = {f"{directory}/{path}": data for path, data in orbax.constant_files(plan).items()}
        for path in files:
            self.make_parents(store, path.rpartition("/")[0])
        store.write_all(files)
        return plan

    def test_one_place_is_held_once_in_a_process(self, tmp_path: Path) -> None:
        first, second = self.created(tmp_path).make_hold(), self.make_store(tmp_path).make_hold()
        assert not first.is_held
        first.reserve()
        first.acquire()
        try:
            assert first.is_held
            with raises(DirectoryBusyError, str(self.make_store(tmp_path).root)):
                second.reserve()
            second.release()  # of what it never had
            assert first.is_held
        finally:
            first.release()
        assert first.is_released
        assert not first.is_held
        third = self.make_store(tmp_path).make_hold()
        third.reserve()
        third.acquire()
        third.release(remove=True)
        assert self.make_store(tmp_path).list("") == []

    def test_an_empty_place_can_be_removed_and_made_again(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        assert store.remove_empty_root()
        store.create()
        store.write_all({"a": b"1"})
        store.remove_empty_root()  # which is not empty now
        assert store.read("a", 10) == b"1"

    def test_much_is_written_and_read_at_once(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        self.make_parents(store, "d")
        files = {f"d/{number}": random_bytes(1000 + number, number) for number in range(40)}
        store.write_all(files)
        store.check_sizes({path: len(data) for path, data in files.items()})
        pieces = {path: memoryview(bytearray(len(data))) for path, data in files.items()}
        for path, buffer in pieces.items():
            store.read_into(path, len(buffer), [(0, buffer)])
        assert pieces == files
