import errno
import os

import numpy as np
import pytest
from engine_support import check_python, in_own_mounts

from stepsave.errors import BackupDirectoryError, CorruptBackupError
from stepsave.store.local import LocalStore


@pytest.fixture
def store(tmp_path):
    store = LocalStore(tmp_path / "root")
    store.create()
    return store


@pytest.fixture
def synced(monkeypatch):
    """The paths that are synced, in order."""
    found = []
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)

        def record(fd, real=real):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
            real(fd)

        monkeypatch.setattr(os, name, record)
    return found


@pytest.fixture
def order(monkeypatch):
    """What a file or directory goes through until it is durable, in order."""
    found = []
    for name in ("pwrite", "fsync", "fdatasync", "rename", "replace"):
        real = getattr(os, name)

        def record(*args, name=name, real=real):
            done = real(*args)
            found.append(name)
            return done

        monkeypatch.setattr(os, name, record)
    return found


def aligned(size_bytes, value):
    import mmap

    memory = mmap.mmap(-1, size_bytes)
    array = np.frombuffer(memory, np.uint8)
    array[:] = value
    return memoryview(array)


def needs_direct(store):
    if not store.can_write_direct():
        pytest.skip("the file system of the temporary directory does not take O_DIRECT")


def test_missing_parents_are_made_and_each_is_synced(tmp_path, synced):
    LocalStore(tmp_path / "a" / "b" / "c").create()
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]


@pytest.mark.parametrize("below", ["", "/x/y"])
def test_a_file_where_the_directory_should_be_is_named(tmp_path, below):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BackupDirectoryError, match=str(tmp_path / "file")):
        LocalStore(str(tmp_path / "file") + below).create()
    assert (tmp_path / "file").read_text() == "precious"


def test_a_directory_on_a_read_only_file_system_is_refused(tmp_path):
    (tmp_path / "there").mkdir()
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}"
    printed = check_python(
        """
import sys
import stepsave
from stepsave import BackupDirectoryError
for name in ("there", "missing/too"):
    try:
        stepsave.Checkpointer(sys.argv[1] + "/" + name)
    except BackupDirectoryError as e:
        print(e)
""",
        tmp_path,
        prefix=in_own_mounts(mount),
    )
    lines = printed.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        str(tmp_path / "there"),
        str(tmp_path / "missing" / "too"),
    ]
    assert all("Read-only file system" in line for line in lines)


def test_a_relative_root_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = LocalStore("here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.create()
    assert (tmp_path / "here").is_dir()


def test_a_link_to_a_directory_is_followed_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert LocalStore(tmp_path / "link").root == (tmp_path / "real").resolve()


def test_a_replaced_file_is_synced_before_its_name_and_its_name_before_the_return(
    store, synced, order
):
    store.write("COMMIT", b"old")
    synced.clear()
    order.clear()
    store.replace("COMMIT", b"new")
    assert store.read("COMMIT", 10) == b"new"
    assert order == ["fsync", "replace", "fsync"]
    assert synced == [str(store.path("COMMIT.tmp")), str(store.root)]
    assert store.list() == ["COMMIT"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_replacement_that_fails_leaves_the_old_contents(store, monkeypatch, fails):
    store.write("COMMIT", b"old")

    def fail(*_):
        raise OSError(errno.EIO, "no disk")

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match="no disk"):
        store.replace("COMMIT", b"new")
    assert store.read("COMMIT", 10) == b"old"


def test_short_writes_are_continued(store, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:3])))
    store.write("file", b"0123456789")
    assert store.read("file", 10) == b"0123456789"


def test_short_direct_writes_are_continued(store, monkeypatch):
    needs_direct(store)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:4096], at))
    data = aligned(5 * 4096, 7)
    store.write_direct("file", data)
    assert store.read("file", 1 << 20) == bytes(data)


def test_a_direct_write_over_a_file_of_the_same_size_is_in_place(store):
    needs_direct(store)
    store.write_direct("file", aligned(8192, 1))
    before = os.stat(store.path("file")).st_ino
    store.write_direct("file", aligned(8192, 2))
    assert os.stat(store.path("file")).st_ino == before
    assert store.read("file", 8192) == b"\x02" * 8192


@pytest.mark.parametrize("size_bytes", [0, 5, 4096, 20_000])
def test_a_direct_write_over_a_file_of_another_size_replaces_all_of_it(store, size_bytes):
    needs_direct(store)
    store.write("file", b"x" * size_bytes)
    store.write_direct("file", aligned(8192, 3))
    assert store.read("file", 1 << 20) == b"\x03" * 8192


def test_a_direct_write_is_synced(store, synced, order):
    needs_direct(store)
    synced.clear()
    order.clear()
    store.write_direct("file", aligned(4096, 1))
    assert synced == [str(store.path("file"))]
    assert order == ["pwrite", "fdatasync"]


def test_a_probe_for_direct_writes_leaves_nothing(store):
    store.can_write_direct()
    assert store.list() == []


def test_a_file_system_that_says_no_to_direct_writes_is_believed(store, monkeypatch):
    real = os.open

    def refuse(path, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    assert not store.can_write_direct()
    assert store.list() == []


def test_a_link_is_never_followed_by_a_write(store, tmp_path):
    (tmp_path / "outside").write_bytes(b"precious")
    os.symlink(tmp_path / "outside", store.path("file"))
    with pytest.raises(OSError, match=r"[Ss]ymbolic"):
        store.write("file", b"x")
    if store.can_write_direct():
        with pytest.raises(OSError, match=r"[Ss]ymbolic"):
            store.write_direct("file", aligned(4096, 1))
    assert (tmp_path / "outside").read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "device"])
def test_only_regular_files_are_read(store, tmp_path, kind):
    path = store.path("file")
    if kind == "link":
        (tmp_path / "outside").write_bytes(b"x")
        path.symlink_to(tmp_path / "outside")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # a character device of zeros
            os.close(os.open(path, os.O_RDONLY))
        except PermissionError:
            pytest.skip("devices cannot be made or opened here")
    told = f"{path}: expected a regular file" + (
        ", found a symbolic link" if kind == "link" else ""
    )
    with pytest.raises(CorruptBackupError, match=told):
        store.read("file", 10)
    with pytest.raises(CorruptBackupError, match=told):
        store.read_into("file", 1, [(0, memoryview(bytearray(1)))])
    assert store.size_bytes("file") is None


def test_a_file_beyond_the_limit_is_refused_with_both_sizes(store):
    store.write("file", b"12345")
    assert store.read("file", 5) == b"12345"
    with pytest.raises(CorruptBackupError, match="expected at most 4 bytes, found 5"):
        store.read("file", 4)


@pytest.mark.parametrize("size_bytes", [0, 4, 6])
def test_a_file_of_another_size_is_refused_with_both_sizes(store, size_bytes):
    store.write("file", b"12345")
    with pytest.raises(CorruptBackupError, match=f"expected {size_bytes} bytes, found 5"):
        store.read_into("file", size_bytes, [(0, memoryview(bytearray(size_bytes)))])


def test_a_file_that_shrinks_while_it_is_read_is_refused(store, monkeypatch):
    store.write("file", b"12345")
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, views, at, *_: real(fd, views, at) if at < 0 else 0
    )
    with pytest.raises(CorruptBackupError, match="ended after 0"):
        store.read_into("file", 5, [(0, memoryview(bytearray(5)))])


def test_pieces_of_a_file_are_read_from_where_they_are(store):
    data = np.random.default_rng(1).bytes(8 << 12)
    store.write("file", data)
    places = (1, 3), (5, 6), (7, 8)
    pieces = [(first << 12, aligned((end - first) << 12, 0)) for first, end in places]
    store.read_into("file", len(data), pieces)
    for begin, buffer in pieces:
        assert bytes(buffer) == data[begin : begin + len(buffer)]


@pytest.mark.parametrize("cached_blocks", [0, 3, 8])
def test_what_the_page_cache_has_is_taken_from_there_and_the_rest_is_read(
    store, monkeypatch, cached_blocks
):
    data = np.random.default_rng(1).bytes(8 << 12)
    begin_bytes = cached_blocks << 12
    store.write("file", data)
    with open(store.path("file"), "rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
            problem = None
        except OSError as e:
            problem = e
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), begin_bytes, 0, os.POSIX_FADV_DONTNEED)
    waited_for, real = [], os.preadv

    def preadv(fd, views, at, *flags):
        got = real(fd, views, at, *flags)
        if not flags:
            waited_for.append((at, got))
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    buffer = aligned(len(data), 0)
    store.read_into("file", len(buffer), [(0, buffer)])
    assert bytes(buffer) == data
    if problem is not None:
        pytest.skip(f"the bits are right; this file system tells of no page cache: {problem}")
    # A file system may keep more in memory than it is asked to, and one in memory keeps all.
    assert all(at >= begin_bytes for at, _ in waited_for)
    if cached_blocks == 8:
        assert not waited_for


def test_a_missing_file_is_a_missing_file(store):
    assert store.size_bytes("none") is None
    assert store.list("none") == []
    assert not store.exists("none")
    store.remove("none")
    with pytest.raises(FileNotFoundError):
        store.read("none", 10)


def test_a_rename_never_replaces_anything(store):
    store.make_directory("a")
    store.make_directory("b")
    with pytest.raises(FileExistsError):
        store.rename("a", "b")
    assert store.list() == ["a", "b"]


def test_a_rename_is_synced(store, synced, order):
    store.make_directory("a")
    order.clear()
    synced.clear()
    store.rename("a", "b")
    assert store.list() == ["b"]
    assert synced == [str(store.root)]
    assert order == ["rename", "fsync"]


def test_a_directory_is_synced_itself(store, synced):
    store.make_directory("a/b")
    synced.clear()
    store.sync_directory("a/b")
    store.sync_directory()
    assert synced == [str(store.path("a/b")), str(store.root)]


def test_a_tree_is_synced_whole(store, synced):
    store.make_directory("a/b/c")
    store.make_directory("a/d")
    store.sync_tree("a")
    assert sorted(synced) == [str(store.path(name)) for name in ("a", "a/b", "a/b/c", "a/d")]


def test_only_an_empty_directory_is_removed(store):
    store.make_directory("a/b")
    assert not store.remove_empty_directory("a")
    assert store.remove_empty_directory("a/b")
    assert store.remove_empty_directory("a/b")
    assert store.list("a") == []


def test_a_directory_is_looked_for_without_making_it(tmp_path):
    LocalStore(tmp_path).check_directory()
    with pytest.raises(
        BackupDirectoryError,
        match=f"{tmp_path}/x: expected a backup directory to read, found: No such",
    ):
        LocalStore(tmp_path / "x").check_directory()
    assert os.listdir(tmp_path) == []


def test_a_probe_leaves_nothing_and_says_what_is_wrong(store, monkeypatch):
    store.probe()
    assert store.list() == []

    def fail(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        store.probe()
    assert store.list() == []
