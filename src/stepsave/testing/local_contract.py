"""What a store of files must do."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import unittest
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from stepsave.errors import BackupDirectoryError, CorruptBackupError
from stepsave.format import orbax
from stepsave.store.local import LocalStore
from stepsave.store.lock import LOCK_NAME
from stepsave.store.shard_array import ShardArray
from stepsave.testing.checks import aligned, raises, random_bytes
from stepsave.testing.contract import StoreContract

__all__ = ("LocalStoreContract",)

_BLOCK = 4096


class LocalStoreContract(StoreContract):
    """What saves into a directory rely on: what is durable when, and that nothing leads outside."""

    def created(self, tmp_path: Path) -> LocalStore:
        store = super().created(tmp_path)
        assert isinstance(store, LocalStore)
        return store

    def make_parents(self, store: LocalStore, directory: str) -> None:
        store.make_directory(directory)

    def created_for_direct_writes(self, tmp_path: Path) -> LocalStore:
        """Returns one, or skips the test."""
        store = self.created(tmp_path)
        if not store.can_write_direct():
            raise unittest.SkipTest("the file system of the test does not take O_DIRECT")
        return store

    def test_missing_parents_are_made_and_each_is_synced(self, tmp_path: Path) -> None:
        root = Path(str(self.make_store(tmp_path).root))
        missing = [path for path in (root, *root.parents) if not path.exists()]
        with _syncs() as synced:
            self.created(tmp_path)
        assert root.is_dir()
        assert synced == [str(path.parent) for path in reversed(missing)]

    def test_a_file_where_the_directory_should_be_is_named_and_stays(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.remove_empty_root()
        store.root.write_text("precious")
        with raises(BackupDirectoryError, str(store.root)):
            store.create()
        with raises(BackupDirectoryError, str(store.root), "found: a file"):
            store.check_directory()
        assert store.root.read_text() == "precious"
        store.root.unlink()

    def test_a_directory_is_looked_for_without_making_it(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.remove_empty_root()
        with raises(BackupDirectoryError, f"{store.root}: expected a backup directory", "No such"):
            store.check_directory()
        assert not store.root.exists()

    def test_a_root_that_is_not_empty_stays(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write("a", b"1")
        assert not store.remove_empty_root()
        store.remove("a")
        assert store.remove_empty_root()
        assert not store.root.exists()

    def test_a_directory_is_made_below_a_root_that_is_there_only(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.make_directory("a/b")
        store.make_directory("a/b/c")
        assert store.is_directory("a/b/c")
        store.remove_empty_directory("a/b/c")
        store.remove_empty_directory("a/b")
        store.remove_empty_directory("a")
        store.remove_empty_root()
        with raises(FileNotFoundError):
            store.make_directory("a")

    def test_a_write_is_synced_and_its_name_is_not_yet(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        with _syncs() as synced:
            store.write_all({"a": b"1", "b": b"2"})
        assert synced == [str(store.path("a")), str(store.path("b"))]
        with _syncs() as synced:
            store.sync_directory()
        assert synced == [str(store.root)]

    def test_a_replaced_file_is_synced_before_its_name_and_that_before_the_return(
        self, tmp_path: Path
    ) -> None:
        store = self.created(tmp_path)
        store.make_directory("d")
        for path in ("a", "d/a"):
            store.write(path, b"old")
            before = os.stat(store.path(path)).st_ino
            with _syncs(Path(store.path(path)).read_bytes) as synced:
                store.replace(path, b"new")
            assert store.read(path, 10) == b"new"
            assert os.stat(store.path(path)).st_ino != before, "not atomic: it is the same file"
            named = (str(store.path(path).parent), b"new")
            assert synced == [(f"{store.path(path)}.tmp", b"old"), named]
        assert store.list() == ["a", "d"]
        assert store.list("d") == ["a"]

    def test_a_replacement_that_fails_leaves_the_old_contents(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write("a", b"old")
        for step in ("fsync", "replace"):
            with (
                mock.patch.object(os, step, side_effect=OSError(errno.EIO, "no disk")),
                raises(OSError, "no disk"),
            ):
                store.replace("a", b"new")
            assert store.read("a", 10) == b"old"

    def test_a_rename_is_synced_and_never_replaces_anything(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.make_directory("a")
        store.write("a/in", b"a")
        for taken in ("directory", "file", "link"):
            if taken == "directory":
                store.make_directory("b")
            elif taken == "file":
                store.write("b", b"precious")
            else:
                store.path("b").symlink_to("nowhere")
            with raises(FileExistsError, str(store.path("b"))):
                store.rename("a", "b")
            assert store.list() == ["a", "b"]
            if taken == "directory":
                store.remove_empty_directory("b")
            store.remove("b")
        with _syncs(store.list) as synced:
            store.rename("a", "b")
        assert synced == [(str(store.root), ["b"])]
        assert store.list() == ["b"]
        assert store.read("b/in", 10) == b"a"
        with raises(FileNotFoundError):
            store.rename("a", "c")

    def test_a_tree_is_synced_whole(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.make_directory("a/b/c")
        store.make_directory("a/d")
        with _syncs() as synced:
            store.sync_tree("a")
        assert sorted(synced) == [str(store.path(name)) for name in ("a", "a/b", "a/b/c", "a/d")]

    def test_files_are_found_below_a_directory(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.make_directory("d/e")
        store.make_directory("d/none")
        store.write_all({"d/a": b"1", "d/e/b": b"22", "c": b"3"})
        store.path("link").symlink_to("d")
        assert store.list() == ["c", "d", "link"]
        assert store.list("d") == ["a", "e", "none"]
        assert sorted(store.walk("d")) == ["a", "e/b"]
        assert store.list("none") == []
        directories = [name for name in store.list() if store.is_directory(name)]
        assert directories == ["d"]
        assert store.exists("link")
        assert not store.exists("none")
        assert not store.is_directory("none")
        found = [store.size_bytes(path) for path in ("d/e/b", "d", "link", "none")]
        assert found == [2, None, None, None]

    def test_only_an_empty_directory_is_removed(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.make_directory("a/b")
        assert not store.remove_empty_directory("a")
        assert store.remove_empty_directory("a/b")
        assert store.remove_empty_directory("a/b")
        assert store.list("a") == []

    def test_the_space_that_files_take_is_told(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.make_directory("d")
        empty = store.used_bytes("d")
        store.write_all({"d/a": random_bytes(100_000), "d/b": random_bytes(50_000)})
        assert store.used_bytes("d/a") >= 100_000
        assert store.used_bytes("d") >= empty + 150_000
        assert store.used_bytes("none") == 0

    def test_a_link_is_never_followed_by_a_write(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        outside = tmp_path / "precious"
        outside.write_bytes(b"precious")
        store.path("a").symlink_to(outside)
        writes: list[Callable[[], object]] = [
            lambda: store.write("a", b"x"),
            lambda: store.write_all({"a": b"x"}),
        ]
        if store.can_write_direct():
            writes.append(lambda: store.write_direct("a", aligned(bytes(_BLOCK))))
        for write in writes:
            with raises(OSError, "ymbolic"):
                write()
        store.replace("a", b"x")  # which replaces the link
        assert store.read("a", 10) == b"x"
        assert outside.read_bytes() == b"precious"

    def test_only_regular_files_are_read(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        outside = tmp_path / "outside"
        outside.write_bytes(b"x")
        store.path("link").symlink_to(outside)
        os.mkfifo(store.path("pipe"))
        store.make_directory("directory")
        others = ["link", "pipe", "directory"]
        with contextlib.suppress(PermissionError):  # not everybody may make or open one
            os.mknod(store.path("zeros"), 0o600 | stat.S_IFCHR, os.makedev(1, 5))
            os.close(os.open(store.path("zeros"), os.O_RDONLY))
            others.append("zeros")
        for path in others:
            told = f"{store.path(path)}: expected a regular file"
            with raises(CorruptBackupError, told, "symbolic link" if path == "link" else ""):
                store.read(path, 10)
            with raises(CorruptBackupError, told):
                store.read_into(path, 1, [(0, memoryview(bytearray(1)))])
            with raises(CorruptBackupError, str(store.path(path)), "no such file"):
                store.check_sizes({path: 1})
            assert store.size_bytes(path) is None

    def test_another_size_is_refused_with_both(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.write("a", b"12345")
        for size in (0, 4, 6):
            told = f"expected {size} bytes, found 5"
            with raises(CorruptBackupError, str(store.path("a")), told):
                store.read_into("a", size, [(0, memoryview(bytearray(size)))])
            with raises(CorruptBackupError, str(store.path("a")), told):
                store.check_sizes({"a": size})

    def test_whole_blocks_are_read_into_aligned_memory(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        data = random_bytes(8 * _BLOCK)
        store.write("a", data)
        places = (1, 3), (5, 6), (7, 8)
        pieces = [(b * _BLOCK, aligned(bytes((e - b) * _BLOCK))) for b, e in places]
        store.read_into("a", len(data), pieces)
        for begin, buffer in pieces:
            assert buffer == data[begin : begin + len(buffer)]

    def test_a_probe_leaves_nothing_and_says_what_is_wrong(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        store.probe()
        store.can_write_direct()
        assert store.list() == []
        full = OSError(errno.ENOSPC, "full")
        with mock.patch.object(os, "fsync", side_effect=full), raises(OSError, "full"):
            store.probe()
        assert store.list() == []

    def test_a_direct_write_of_a_new_file_is_whole_and_synced(self, tmp_path: Path) -> None:
        store = self.created_for_direct_writes(tmp_path)
        data = random_bytes(3 * _BLOCK)
        with _syncs(Path(store.path("a")).read_bytes) as synced:
            written_bytes = store.write_direct("a", aligned(data))
        assert written_bytes == len(data)
        assert synced == [(str(store.path("a")), data)]
        assert store.read("a", len(data)) == data

    def test_a_direct_write_over_a_file_of_the_same_size_is_in_place(self, tmp_path: Path) -> None:
        store = self.created_for_direct_writes(tmp_path)
        old, new = random_bytes(5 * _BLOCK, 1), random_bytes(5 * _BLOCK, 2)
        store.write_direct("a", aligned(old))
        before = os.stat(store.path("a")).st_ino
        ranges = iter([(_BLOCK + 5, _BLOCK + 6), (3 * _BLOCK, 4 * _BLOCK)])
        with _syncs() as synced:
            written_bytes = store.write_direct("a", aligned(new), ranges)
        assert written_bytes == 2 * _BLOCK
        assert synced == [str(store.path("a"))]
        assert os.stat(store.path("a")).st_ino == before
        blocks = [new if number in (1, 3) else old for number in range(5)]
        expected = b"".join(
            source[number * _BLOCK : (number + 1) * _BLOCK] for number, source in enumerate(blocks)
        )
        assert store.read("a", len(expected)) == expected

    def test_a_direct_write_over_a_file_of_another_size_replaces_all_of_it(
        self, tmp_path: Path
    ) -> None:
        store = self.created_for_direct_writes(tmp_path)
        data = random_bytes(2 * _BLOCK)
        for size in (0, 5, _BLOCK, 5 * _BLOCK):
            store.write("a", b"x" * size)
            store.write_direct("a", aligned(data))
            assert store.read("a", 1 << 20) == data

    def test_a_shard_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        plan = self.begin_array(store, "d")
        path = f"d/{orbax.shard_path(0)}"
        store.make_directory(path)
        with raises(Exception, path):
            ShardArray(store, "d", plan).write(0, np.zeros(plan.shard_bytes, np.uint8))

    def test_the_lock_is_a_file_that_goes_when_asked(self, tmp_path: Path) -> None:
        store = self.created(tmp_path)
        for removes in (False, True):
            hold = store.make_hold()
            hold.reserve()
            hold.acquire()
            assert store.list() == [LOCK_NAME]
            hold.release(remove=removes)
        assert store.list() == []


@contextlib.contextmanager
def _syncs(look: Callable[[], object] | None = None) -> Generator[list[Any]]:
    """Notes the paths of what is synced, in order; with what `look` finds before each, if given."""
    found: list[Any] = []
    with contextlib.ExitStack() as patches:
        for name in ("fsync", "fdatasync"):
            real = getattr(os, name)

            def sync(fd: int, real: Any = real) -> None:
                path = os.readlink(f"/proc/self/fd/{fd}")
                found.append(path if look is None else (path, look()))
                real(fd)

            patches.enter_context(mock.patch.object(os, name, sync))
        yield found
