import errno
import os
import tempfile
from pathlib import Path

import pytest
from engine_support import check_python, in_own_mounts

from stepsave.errors import BackupDirectoryError, CorruptBackupError
from stepsave.store.local import LocalStore
from stepsave.testing import LocalStoreContract
from stepsave.testing.checks import aligned, random_bytes


class TestDirectory(LocalStoreContract):
    def make_store(self, tmp_path):
        return LocalStore(tmp_path / "some/root")


class TestDirectoryInMemory(LocalStoreContract):
    """A file system without a disk; others than those of disks differ in what they take."""

    @pytest.fixture(autouse=True)
    def place(self):
        if not in_memory("/dev/shm"):
            pytest.skip("there is no tmpfs at /dev/shm")
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="stepsave-") as self.place:
            yield

    def make_store(self, tmp_path):  # noqa: ARG002
        return LocalStore(f"{self.place}/root")


def in_memory(path):
    """Whether a file system in memory is mounted there, which we may write to."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return any(at == path and kind == "tmpfs" for _, at, kind, *_ in mounts) and os.access(
        path, os.W_OK
    )


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


def needs_direct(store):
    if not store.can_write_direct():
        pytest.skip("the file system of the temporary directory does not take O_DIRECT")


def test_a_file_in_place_of_a_parent_is_named_and_stays(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BackupDirectoryError, match=str(tmp_path / "file")):
        LocalStore(tmp_path / "file/x/y").create()
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


def test_short_writes_are_continued(store, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:3])))
    store.write("file", b"0123456789")
    assert store.read("file", 10) == b"0123456789"


def test_short_direct_writes_are_continued(store, monkeypatch):
    needs_direct(store)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:4096], at))
    data = aligned(random_bytes(5 * 4096))
    store.write_direct("file", data)
    assert store.read("file", 1 << 20) == bytes(data)


def test_a_file_system_that_says_no_to_direct_writes_is_believed(store, monkeypatch):
    real = os.open

    def refuse(path, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    assert not store.can_write_direct()
    assert store.list() == []


def test_a_file_that_shrinks_while_it_is_read_is_refused(store, monkeypatch):
    store.write("file", b"12345")
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, views, at, *_: real(fd, views, at) if at < 0 else 0
    )
    with pytest.raises(CorruptBackupError, match="ended after 0"):
        store.read_into("file", 5, [(0, memoryview(bytearray(5)))])


@pytest.mark.parametrize("cached_blocks", [0, 3, 8])
def test_what_the_page_cache_has_is_taken_from_there_and_the_rest_is_read(
    store, monkeypatch, cached_blocks
):
    data = random_bytes(8 << 12)
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
    buffer = aligned(bytes(len(data)))
    store.read_into("file", len(buffer), [(0, buffer)])
    assert bytes(buffer) == data
    if problem is not None:
        pytest.skip(f"the bits are right; this file system tells of no page cache: {problem}")
    # A file system may keep more in memory than it is asked to, and one in memory keeps all.
    assert all(at >= begin_bytes for at, _ in waited_for)
    if cached_blocks == 8:
        assert not waited_for


def test_a_directory_is_synced_itself(store, synced):
    store.make_directory("a/b")
    synced.clear()
    store.sync_directory("a/b")
    store.sync_directory()
    assert synced == [str(store.path("a/b")), str(store.root)]


def test_links_of_both_kinds_are_seen_below_a_directory(tmp_path):
    store = LocalStore(tmp_path)
    store.make_directory("a/b")
    store.write("a/b/file", b"1")
    assert not store.has_links("a")
    assert not store.has_links("not there")
    for link, name in ((os.symlink, "b/soft"), (os.symlink, "directory"), (os.link, "b/hard")):
        target = tmp_path / "a/b" if name == "directory" else tmp_path / "a/b/file"
        link(target, tmp_path / "a" / name)
        assert store.has_links("a"), name
        os.unlink(tmp_path / "a" / name)
    assert not store.has_links("a")
