"""What a store of objects must do."""

from __future__ import annotations

import concurrent.futures
import threading
from pathlib import Path

from stepsave.errors import CorruptBackupError
from stepsave.store.bucket import NO_OBJECT, BucketStore
from stepsave.testing.checks import raises, random_bytes
from stepsave.testing.contract import StoreContract

__all__ = ("BucketStoreContract",)

_RACERS = 8


class BucketStoreContract(StoreContract):
    """What saves into a bucket rely on: above all, that of all who replace an object one wins."""

    def created(self, tmp_path: Path) -> BucketStore:
        store = super().created(tmp_path)
        assert isinstance(store, BucketStore)
        return store

    def test_what_begins_alike_is_listed_and_removed_and_nothing_else(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write_all(dict.fromkeys(("a", "a/1", "a/2/3", "a0", "ab/1", "b"), b"x"))
        assert sorted(store.list("a/")) == ["a/1", "a/2/3"]
        assert sorted(store.list("a")) == ["a", "a/1", "a/2/3", "a0", "ab/1"]
        assert store.list("c") == []
        for _ in range(2):  # the second time there is nothing any more
            store.remove_below("a/")
            assert sorted(store.list("")) == ["a", "a0", "ab/1", "b"]

    def test_a_store_sees_nothing_beside_its_prefix(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write_all({"in/a": b"1", "in2": b"2"})
        keys = self.open_with_tensorstore(store, "in")
        assert keys.list().result() == [b"a"]

    def test_other_contents_are_another_generation(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        assert store.read_versioned("a") == (None, NO_OBJECT)
        generations = {NO_OBJECT}
        for data in (b"1", b"22", b""):
            store.write_all({"a": data})
            found, generation = store.read_versioned("a")
            assert found == data
            assert self.make_store(tmp_path).read("a", 2) == data
            assert store.read_versioned("a") == (found, generation)
            assert generation not in generations
            generations.add(generation)

    def test_only_who_knows_the_generation_replaces(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        first = store.write_if("a", b"1", NO_OBJECT)
        assert first is not None
        assert store.read_versioned("a") == (b"1", first)
        assert store.write_if("a", b"late", NO_OBJECT) is None
        assert store.read_versioned("a") == (b"1", first)
        second = store.write_if("a", b"2", first)
        assert second not in (None, first)
        assert store.write_if("a", b"late", first) is None
        assert store.read_versioned("a") == (b"2", second)

    def test_only_who_knows_the_generation_removes(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        first = store.write_if("a", b"1", NO_OBJECT)
        assert first is not None
        second = store.write_if("a", b"2", first)
        assert second is not None
        assert store.write_if("a", None, first) is None
        assert store.read("a", 10) == b"2"
        assert store.write_if("a", None, second) is not None
        assert store.read_versioned("a") == (None, NO_OBJECT)
        assert store.write_if("a", b"3", second) is None
        assert store.write_if("a", b"3", NO_OBJECT) is not None

    def test_of_all_who_race_exactly_one_wins(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        generation = NO_OBJECT
        for turn in range(5):
            begin = threading.Barrier(_RACERS)

            def race(number: int, known: bytes = generation, turn: int = turn) -> bytes | None:
                racer = self.make_store(tmp_path)
                assert isinstance(racer, BucketStore)
                begin.wait(30)  # noqa: B023  they have all ended when the next one is made
                return racer.write_if("a", f"{turn} {number}".encode(), known)

            with concurrent.futures.ThreadPoolExecutor(_RACERS) as racers:
                answers = list(racers.map(race, range(_RACERS)))
            winners = [number for number, answer in enumerate(answers) if answer is not None]
            assert len(winners) == 1, f"{winners} have all won"
            data, generation = store.read_versioned("a")
            assert data == f"{turn} {winners[0]}".encode()
            assert generation == answers[winners[0]]

    def test_who_has_lost_the_answer_finds_out_by_reading(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        written = store.write_if("a", b"mine", NO_OBJECT)
        assert store.write_if("a", b"mine", NO_OBJECT) is None  # tried again
        assert store.read_versioned("a") == (b"mine", written)

    def test_what_a_dead_process_had_looked_with_is_removed(self, tmp_path: Path) -> None:
        store = self.make_store(tmp_path)
        store.write_all({"stepsave-probe-0123456789abcdef": b"", "stepsave-probe-notes": b"mine"})
        store.create()
        assert store.list("") == ["stepsave-probe-notes"]

    def test_what_is_larger_than_the_limit_is_not_read(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write_all({"a": b"12345", "none": b""})
        for path, limit_bytes in (("a", 5), ("none", 0), ("missing", 1)):
            store.check_at_most(path, limit_bytes)
        with raises(CorruptBackupError, str(store.path("a")), "at most 4 bytes, found more"):
            store.check_at_most("a", 4)

    def test_an_object_may_be_larger_than_it_must(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write_all({"a": b"12345", "none": b""})
        store.check_sizes({"a": 4, "none": 0})
        buffer = memoryview(bytearray(2))
        store.read_into("a", 4, [(1, buffer)])
        assert buffer == b"23"

    def test_a_large_piece_is_read_in_several_requests(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        data = random_bytes((16 << 20) + 5)
        store.write_all({"a": data})
        buffer, told = memoryview(bytearray(len(data) - 1)), list[int]()
        store.read_into("a", len(data), [(1, buffer)], told.append)
        assert buffer == data[1:]
        assert len(told) > 1
        assert sum(told) == len(buffer)
        with raises(CorruptBackupError, "expected at least"):
            store.read_into("a", len(data), [(6, buffer)])
