import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c
from engine_support import (
    assert_is_state_of,
    flip_bit,
    plan_of,
    read_marker,
    restore_once,
    save_once,
    state_of,
    tree_bytes,
)
from hypothesis import given
from hypothesis import strategies as st

import stepsave
from stepsave.engine.commit import COMMIT, PREVIOUS, SPARE, CommitProtocol
from stepsave.engine.known_files import is_spare
from stepsave.engine.retention import Retention
from stepsave.errors import (
    BackupDirectoryError,
    CorruptBackupError,
    FormatVersionError,
    InvalidStateError,
)
from stepsave.format.blueprint import Blueprint
from stepsave.format.marker import (
    FILE_LIMIT_BYTES,
    decode_marker,
    encode_claim,
    encode_marker,
)
from stepsave.format.records import BackupRecord, Claim, FileRecord, Owner
from stepsave.store import places
from stepsave.store.local import LocalStore
from stepsave.testing import Died, FaultStore

sizes = st.integers(0, 2**63 - 1)
checksums = st.integers(0, 2**32 - 1)
names = st.from_regex(r"[a-z_.]+(/[a-z0-9_]+)*", fullmatch=True).filter(
    lambda path: ".." not in path.split("/")
)
records = st.builds(
    lambda step, **rest: BackupRecord(step=step, directory=str(step), **rest),
    step=sizes,
    nonce=st.text("0123456789abcdef", min_size=32, max_size=32),
    files=st.lists(
        st.builds(FileRecord, names, st.integers(0, FILE_LIMIT_BYTES), checksums), max_size=5
    ).map(tuple),
    shard_bytes=sizes,
    shard_digests=st.lists(checksums, max_size=5).map(tuple),
)


class LoggingStore(LocalStore):
    """Tells every change it makes, in order."""

    log: list[str] = []  # noqa: RUF012  shared on purpose: the engine makes the instance

    def write(self, path, data):
        super().write(path, data)
        if not path.endswith(".tmp"):  # a part of `replace`
            self.log.append(f"write {path}")

    def write_direct(self, path, data, final=None):
        written_bytes = super().write_direct(path, data, final)
        self.log.append(f"write {path}")
        return written_bytes

    def replace(self, path, data):
        super().replace(path, data)
        self.log.append(f"replace {path}")

    def rename(self, source, target):
        super().rename(source, target)
        self.log.append(f"rename {source} {target}")

    def remove(self, path):
        super().remove(path)
        self.log.append(f"remove {path}")

    def sync_directory(self, path=""):
        super().sync_directory(path)
        self.log.append(f"sync {path}")

    def sync_tree(self, path):
        super().sync_tree(path)
        self.log.append(f"sync all of {path}")


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(places, "LocalStore", LoggingStore)
    LoggingStore.log = []
    return lambda: LoggingStore.log


@given(records)
def test_a_marker_survives_encoding(record):
    assert decode_marker(encode_marker(record), "here") == (record,)


def test_a_marker_is_these_very_bytes():
    record = BackupRecord(7, "7", "ab", (FileRecord("x/y", 3, 4),), 4096, (5, 6))
    body = (
        b'{"format":1,"step":7,"directory":"7","nonce":"ab","files":[["x/y",3,4]],'
        b'"shard_bytes":4096,"shard_digests":[5,6]}'
    )
    line = f"stepsave-commit 1 {crc32c(body):08x} {len(body)}\n".encode()
    assert encode_marker(record) == line + body


def test_a_file_that_no_restore_would_read_is_not_committed():
    files = (FileRecord("training.json", FILE_LIMIT_BYTES + 1, 7),)
    record = BackupRecord(12, "12", "ab", files, 4096, (1,))
    with pytest.raises(InvalidStateError, match="bytes beside the arrays, found 1073741825"):
        encode_marker(record)
    files = (FileRecord("training.json", FILE_LIMIT_BYTES, 7),)
    (found,) = decode_marker(encode_marker(dataclasses.replace(record, files=files)), "the/path")
    assert found.files == files


def test_a_marker_from_the_future_is_told_from_a_corrupt_one():
    record = BackupRecord(7, "7", "ab", (), 4096, ())
    encoded = encode_marker(record).replace(b"stepsave-commit 1", b"stepsave-commit 3")
    with pytest.raises(FormatVersionError, match=r"format 3.*up to format 2"):
        decode_marker(encoded, "here")


RUN = "20261129T213246Z-6a6cea1f9883d018"


def claim_of(*steps):
    records = [BackupRecord(step, f"{RUN}/{step}", "ab", (), 4096, (5,)) for step in steps]
    return Claim(Owner(RUN, "node-3", 4711), tuple(records))


@pytest.mark.parametrize("steps", [(), (120,), (120, 110), (120, 110, 9)])
def test_a_claim_comes_back_as_it_was(steps):
    encoded = encode_claim(claim_of(*steps))
    assert encoded.startswith(b"stepsave-commit 2 ")
    assert decode_marker(encoded, "here") == claim_of(*steps)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["backups"][0].update(directory="120"),
        lambda d: d["backups"][0].update(directory=f"{RUN}/121"),
        lambda d: d["backups"][0].update(directory=f"../{RUN}/120"),
        lambda d: d["backups"][0].update(directory=f"{RUN}/../120"),
        lambda d: d["backups"][0].update(directory=f"{RUN.lower()}/120"),
        lambda d: d["backups"].extend(d["backups"] * 2),
        lambda d: d["owner"].pop("run"),
        lambda d: d["owner"].update(pid="many"),
        lambda d: d.pop("backups"),
        lambda d: d.update(backups={"0": 1}),
    ],
)
def test_a_claim_that_cannot_be_is_refused(change):
    line, _, body = encode_claim(claim_of(120)).partition(b"\n")
    document = json.loads(body)
    change(document)
    body = json.dumps(document).encode()
    line = f"stepsave-commit 2 {crc32c(body):08x} {len(body)}\n".encode()
    with pytest.raises(CorruptBackupError, match="here: malformed"):
        decode_marker(line + body, "here")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "", "a\\b", "a\0b"])
def test_a_marker_that_leads_outside_is_refused(path):
    record = BackupRecord(7, "7", "ab", (FileRecord(path, 3, 4),), 4096, ())
    with pytest.raises(CorruptBackupError, match="here: malformed"):
        decode_marker(encode_marker(record), "here")


@pytest.mark.parametrize(
    "directory", ["..", "spare", "", "8", "07", "\N{ARABIC-INDIC DIGIT SEVEN}", "7/../8", "-7"]
)
def test_a_marker_that_names_another_directory_is_refused(directory):
    record = BackupRecord(7, directory, "ab", (), 4096, ())
    with pytest.raises(CorruptBackupError, match="here: malformed"):
        decode_marker(encode_marker(record), "here")


def test_a_save_seals_then_publishes_then_retires(tmp_path, log):
    with stepsave.Checkpointer(tmp_path) as saver:
        for step in (1, 2, 3):
            log().clear()
            saver.save(step, state_of(step)).wait()
    shards = [entry for entry in log() if "/d/c/" in entry]  # none, if tensorstore wrote them
    assert [entry for entry in log() if entry not in shards] == [
        "write spare/training.json",
        "write spare/_CHECKPOINT_METADATA",
        "sync spare/pytree/d/c",
        "sync spare",
        "rename spare 3",
        "replace COMMIT",
        "rename 2 spare",
    ]
    assert log()[: len(shards)] == shards


def test_the_first_save_syncs_the_directories_that_it_makes(tmp_path, log):
    with stepsave.Checkpointer(tmp_path) as saver:
        log().clear()
        saver.save(1, state_of(1)).wait()
    entries = log()
    made = entries.index("sync all of spare")
    assert "sync spare/pytree/d/c" in entries[made + 1 :]
    assert "write spare/layout.json" in entries[:made]
    assert entries[-3:] == ["sync spare", "rename spare 1", "replace COMMIT"]
    assert_is_state_of(restore_once(tmp_path))


def test_markers_are_gone_for_good_before_their_backups_go(tmp_path, log):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (1, 2):
            saver.save(step, state_of(step)).wait()
        assert_is_state_of(saver.restore())
        log().clear()
        saver.close(delete_backup=True)
    markers = log()[:4]
    assert {markers[0], markers[2]} == {"remove COMMIT", "remove PREVIOUS"}
    assert markers[1] == markers[3] == "sync "
    assert "remove 2/layout.json" in log()[4:]
    assert not tmp_path.exists()


def test_an_unreferenced_backup_is_renamed_before_anything_of_it_goes(tmp_path, log):
    save_once(tmp_path, state_of(1), step=1)
    shutil.copytree(tmp_path / "1", tmp_path / "2")  # sealed, and not published
    log().clear()
    save_once(tmp_path, state_of(3), step=3)
    assert [entry for entry in log() if re.search(r" 2(/|\b)", entry)] == ["rename 2 spare"]
    assert_is_state_of(restore_once(tmp_path))


def test_what_somebody_put_into_an_unreferenced_backup_goes_along(tmp_path):
    save_once(tmp_path, state_of(1), step=1)
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    (tmp_path / "2" / "mine.txt").write_text("mine")
    for step in (3, 4):  # nor has it the directory refused the next time
        save_once(tmp_path, state_of(step), step=step)
        assert [path.read_text() for path in tmp_path.glob("*/mine.txt")] == ["mine"]
    assert_is_state_of(restore_once(tmp_path))


def test_nothing_of_a_save_whose_sync_failed_is_used_again(tmp_path, monkeypatch):
    """The kernel may call a page clean that never reached the disk: no later sync writes it."""
    with stepsave.Checkpointer(tmp_path) as saver, contextlib.ExitStack() as opened:
        for step in (1, 2):
            saver.save(step, state_of(step)).wait()
        files = [path for path in (tmp_path / SPARE).rglob("*") if path.is_file()]
        held = [opened.enter_context(path.open("rb")) for path in files]
        assert len(held) > 5
        with monkeypatch.context() as patch:

            def fail(_):
                raise OSError(errno.EIO, "no disk")

            patch.setattr(os, "fsync", fail)
            with pytest.raises(stepsave.SaveFailedError, match="no disk"):
                saver.save(3, state_of(3)).wait()
        for step in (4, 5):
            saver.save(step, state_of(step)).wait()
            assert_is_state_of(saver.restore())
        names = [file.name for file in held if os.fstat(file.fileno()).st_nlink]
        assert not names, "files of the failed save are in a later one"


def test_what_a_failed_save_has_written_goes_at_once(tmp_path):
    store = FaultStore(tmp_path)
    with stepsave.Checkpointer(store) as saver:
        saver.save(1, state_of(1)).wait()
        store.fail("rename")
        with pytest.raises(stepsave.SaveFailedError):
            saver.save(2, state_of(2)).wait()
        saver.drain()
        assert sorted(os.listdir(tmp_path)) == ["1", COMMIT, "LOCK"]
        assert_is_state_of(saver.restore())


def test_the_one_before_is_published_before_the_oldest_goes(tmp_path, log):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (1, 2, 3):
            log().clear()
            saver.save(step, state_of(step)).wait()
    assert log()[-4:] == ["rename spare 3", "replace COMMIT", "replace PREVIOUS", "rename 1 spare"]
    assert sorted(os.listdir(tmp_path)) == ["2", "3", COMMIT, "LOCK", PREVIOUS, SPARE]


def test_the_shards_of_the_retired_backup_are_written_in_place(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        if saver.stats().writer != "direct":
            pytest.skip("the file system of the temporary directory does not take O_DIRECT")
        inodes = []
        for step in range(1, 7):
            saver.save(step, state_of(step)).wait()
            inodes.append(os.stat(tmp_path / str(step) / "pytree/d/c/0").st_ino)
    assert inodes[0::2] == inodes[:1] * 3
    assert inodes[1::2] == inodes[1:2] * 3
    assert_is_state_of(restore_once(tmp_path))


def test_the_directory_holds_one_backup_and_the_spare(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        for step in (3, 5, 9):
            saver.save(step, state_of(step)).wait()
    assert sorted(os.listdir(tmp_path)) == ["9", COMMIT, "LOCK", SPARE]


@pytest.mark.parametrize("marker", [True, False])
def test_what_a_crash_left_is_taken_in(tmp_path, marker):
    save_once(tmp_path, state_of(1), step=1)
    crashed = tmp_path / "crashed"
    save_once(crashed, state_of(2), step=2)
    os.rename(crashed / "2", tmp_path / "2")  # sealed, and not published
    for name in ("COMMIT.tmp", "PREVIOUS.tmp"):
        (tmp_path / name).write_bytes(b"torn")
    for path in (crashed / "COMMIT", crashed / "LOCK"):
        path.unlink()
    crashed.rmdir()
    if not marker:
        (tmp_path / "COMMIT").unlink()
    with stepsave.Checkpointer(tmp_path) as saver:
        backup = saver.restore()
        assert (backup.step if backup else None) == (1 if marker else None)
        saver.save(3, state_of(3)).wait()
    assert set(os.listdir(tmp_path)) - {SPARE} == {"3", COMMIT, "LOCK"}
    assert_is_state_of(restore_once(tmp_path))


def test_where_several_write_no_name_is_used_twice_and_nothing_is_taken_in(tmp_path):
    store = LocalStore(tmp_path)
    blueprint = Blueprint(plan_of([np.zeros(10)]), {})
    left = tmp_path / "spare-0123abcd/pytree/d/c"
    left.mkdir(parents=True)
    (left / "0").write_bytes(b"somebody halted may still write here")
    protocol = CommitProtocol(store, Retention(0), is_shared=True)
    names = []
    for step in range(1, 5):
        names.append(protocol.begin(blueprint, step))
        for number in range(blueprint.plan.shard_count):
            (tmp_path / f"{names[-1]}/pytree/d/c/{number}").write_bytes(b"shard")
        protocol.publish(protocol.seal(blueprint, step, b"{}", (0,) * blueprint.plan.shard_count))
    names.append(protocol.begin(blueprint, 5))
    protocol.abandon()
    names.append(protocol.begin(blueprint, 6))
    assert len(set(names)) == len(names)
    assert all(is_spare(name) for name in names)
    assert "spare-0123abcd" not in os.listdir(tmp_path)
    # A new run takes nothing in either, and one process alone cleans up after several.
    for is_shared in (True, False):
        again = CommitProtocol(store, Retention(0), is_shared=is_shared)
        name = again.begin(blueprint, 7)
        assert name not in names
        assert not os.listdir(tmp_path / f"{name}/pytree/d/c")
        assert sorted(os.listdir(tmp_path)) == sorted(["4", COMMIT, name])


def test_switching_double_checkpoint_off_leaves_one_backup(tmp_path):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (1, 2):
            saver.save(step, state_of(step)).wait()
    with stepsave.Checkpointer(tmp_path) as saver:
        assert saver.restore().step == 2
        saver.save(3, state_of(3)).wait()
    assert sorted(os.listdir(tmp_path)) == ["3", COMMIT, "LOCK", SPARE]
    assert_is_state_of(restore_once(tmp_path))


FOREIGN = {
    "file": lambda d: (d / "notes.txt").write_text("precious"),
    "hidden file": lambda d: (d / ".git").mkdir(),
    "directory": lambda d: (d / "photos").mkdir(),
    "directory named by a number": lambda d: (
        (d / "2024").mkdir(),
        (d / "2024" / "photo.jpg").write_text("precious"),
    ),
    "file named by a number": lambda d: (d / "120").write_text("precious"),
    "file named spare": lambda d: (d / "spare").write_text("precious"),
    "directory named spare": lambda d: (
        (d / "spare").mkdir(),
        (d / "spare" / "part.stl").write_text("precious"),
    ),
    "link to a directory": lambda d: (d / "7").symlink_to(d.parent),
    "file named COMMIT": lambda d: (d / "COMMIT").write_text("precious"),
    "file named LOCK": lambda d: (d / "LOCK").write_text("precious"),
    "file named as the probe": lambda d: (d / "probe.tmp").write_text("precious"),
    "text and a lock": lambda d: (
        (d / "LOCK").write_text("precious"),
        (d / "CURRENT").write_text("precious"),
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_nothing_foreign_is_ever_changed(tmp_path, kind):
    directory = tmp_path / "directory"
    directory.mkdir()
    FOREIGN[kind](directory)
    before = tree_bytes(directory)
    with pytest.raises(stepsave.StepsaveError) as caught:
        save_once(directory, state_of(1))
    assert str(directory) in str(caught.value)
    after = tree_bytes(directory)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize("kind", ["file", "directory", "directory named by a number"])
def test_a_refused_directory_is_left_exactly_as_it_was(tmp_path, kind):
    directory = tmp_path / "directory"
    directory.mkdir()
    FOREIGN[kind](directory)
    before = tree_bytes(directory)
    with pytest.raises(BackupDirectoryError, match="Nothing was changed"):
        stepsave.Checkpointer(directory)
    assert tree_bytes(directory) == before


def test_a_directory_of_foreign_orbax_checkpoints_is_refused(tmp_path):
    """The files are named as Orbax v1 names them; Keras's own callback makes such."""
    data = {
        "120/_CHECKPOINT_METADATA": b"{}",
        "120/commit_success.txt": b"",
        "120/pytree/_METADATA": b"{}",
        "120/pytree/_sharding": b"{}",
        "120/pytree/commit_success.txt": b"",
        "120/pytree/manifest.ocdbt": b"precious",
        "120/pytree/array_metadatas/process_0": b"precious",
        "120/pytree/d/4fdf15688d0a73fd9145e772b309ee99": b"precious",
    }
    for path, contents in data.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(contents)
    before = tree_bytes(tmp_path)
    with pytest.raises(BackupDirectoryError, match="120"):
        save_once(tmp_path, state_of(1), step=200)
    after = tree_bytes(tmp_path)
    assert {name: after.get(name) for name in before} == before


def test_deleting_removes_everything_of_ours_and_the_directory(tmp_path):
    directory = tmp_path / "made" / "here"
    with stepsave.Checkpointer(directory, double_checkpoint=True) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step)).wait()
        saver.close(delete_backup=True)
    assert not directory.exists()
    assert directory.parent.exists()


@pytest.mark.parametrize("place", ["", "3", "spare", "3/pytree/d/c", "3/pytree/d", "2/model"])
def test_deleting_keeps_a_foreign_file_put_inside(tmp_path, place):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step)).wait()
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "notes.txt").write_text("precious")
        saver.close(delete_backup=True)
    files = {name: data for name, data in tree_bytes(tmp_path).items() if data is not None}
    assert files == {str(Path(place, "notes.txt")): b"precious"}


def test_a_foreign_file_put_inside_survives_saves_and_changes_of_layout(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(1, state_of(1)).wait()
        (tmp_path / "1" / "notes.txt").write_text("precious")
        for step in range(2, 6):
            saver.save(step, state_of(step, leaves=step)).wait()
    kept = [path for path in tmp_path.rglob("notes.txt") if path.read_text() == "precious"]
    assert len(kept) == 1
    assert_is_state_of(restore_once(tmp_path))


JUNK = {
    "lost+found": None,
    ".snapshot": None,
    ".DS_Store": b"Finder",
    "Thumbs.db": b"Explorer",
    "desktop.ini": b"Explorer",
    ".ipynb_checkpoints/layout.json": b"Jupyter",
    ".Trash-1000/files/index": b"a desktop",
    ".nfs00000000deadbeef00000001": b"removed while open",
}


def put_junk(directory):
    for name, data in JUNK.items():
        path = directory / name
        (path if data is None else path.parent).mkdir(parents=True, exist_ok=True)
        if data is not None:
            path.write_bytes(data)


def junk_in(directory):
    """The junk that is there, with its contents."""
    return {
        name: (directory / name).read_bytes() if data is not None else None
        for name, data in JUNK.items()
        if (directory / name).exists()
    }


def test_junk_beside_a_backup_neither_refuses_the_directory_nor_is_it_removed(tmp_path):
    put_junk(tmp_path)
    for step in (1, 2, 3):
        save_once(tmp_path, state_of(step), step=step)
    assert_is_state_of(restore_once(tmp_path))
    assert junk_in(tmp_path) == JUNK
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.close(delete_backup=True)
    assert sorted(os.listdir(tmp_path)) == sorted({name.split("/")[0] for name in JUNK})
    assert junk_in(tmp_path) == JUNK
    save_once(tmp_path, state_of(4), step=4)
    assert_is_state_of(restore_once(tmp_path))


@pytest.mark.parametrize("places", [["3"], [SPARE], ["3", SPARE], ["2", "3"], ["3/pytree/d/c"]])
def test_junk_within_a_backup_stays_and_the_next_training_saves_all_the_same(tmp_path, places):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step)).wait()
        for place in places:
            put_junk(tmp_path / place)
        saver.close(delete_backup=True)
    for place in places:
        assert junk_in(tmp_path / place) == JUNK
    for step in (4, 5, 6):  # opened anew each time
        save_once(tmp_path, state_of(step, leaves=step), step=step)
        assert_is_state_of(restore_once(tmp_path))
    found = [path for path in tmp_path.rglob(".DS_Store") if path.read_bytes() == b"Finder"]
    assert len(found) == len(places)


@pytest.mark.usefixtures("no_sync")
def test_a_directory_that_may_not_be_removed_is_left_empty(tmp_path, monkeypatch):
    """A volume that was mounted for the training, below a directory of root's."""
    for code in (errno.EACCES, errno.EPERM, errno.EROFS):
        saver = stepsave.Checkpointer(tmp_path)
        saver.save(1, state_of(1)).wait()
        assert_is_state_of(saver.restore())
        real = os.rmdir

        def rmdir(path, code=code, real=real):
            if Path(path) == tmp_path:
                raise OSError(code, os.strerror(code), str(path))
            real(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rmdir", rmdir)
            saver.close(delete_backup=True)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("operation", ["replace", "rename"])
@pytest.mark.usefixtures("no_sync")
def test_an_error_after_the_work_was_done_loses_nothing(tmp_path, operation, number, double):
    store = FaultStore(tmp_path)
    store.fail(operation, nth=number, when="after")
    acknowledged = []
    for _ in range(3):
        with stepsave.Checkpointer(store, double_checkpoint=double) as saver:
            backup = saver.restore()
            step = backup.step if backup else 0
            assert step in acknowledged[-1:] or step >= max(acknowledged, default=0)
            if backup:
                assert_is_state_of(backup)
            for later in range(step + 1, step + 4):
                try:
                    saver.save(later, state_of(later)).wait()
                    acknowledged.append(later)
                except stepsave.SaveFailedError:
                    found = saver.restore()
                    assert (found.step if found else 0) >= max(acknowledged, default=0)
    assert restore_once(tmp_path).step == acknowledged[-1]
    kept = {str(acknowledged[-1]), COMMIT, "LOCK", SPARE}
    if double:
        kept |= {str(acknowledged[-2]), PREVIOUS}
    assert set(os.listdir(tmp_path)) == kept


@pytest.mark.usefixtures("no_sync")
def test_what_cannot_be_put_away_fails_no_save_and_the_next_one_takes_it_in(
    tmp_path, monkeypatch, caplog
):
    class RefusingStore(LocalStore):
        refuses = True

        def rename(self, source, target):
            if self.refuses and target == SPARE:
                raise OSError(errno.EBUSY, "somebody is in there")
            super().rename(source, target)

    monkeypatch.setattr(places, "LocalStore", RefusingStore)
    with stepsave.Checkpointer(tmp_path) as saver:
        for step in (1, 2):
            saver.save(step, state_of(step)).wait()
        assert "could not retire an old backup" in caplog.text
        assert_is_state_of(saver.restore())
        assert sorted(os.listdir(tmp_path)) == ["1", "2", COMMIT, "LOCK"]
        monkeypatch.setattr(RefusingStore, "refuses", False)
        saver.save(3, state_of(3)).wait()
        assert sorted(os.listdir(tmp_path)) == ["3", COMMIT, "LOCK", SPARE]
        assert_is_state_of(saver.restore())


def spoil_newest(directory, path):
    flip_bit(directory / read_marker(directory)["directory"] / path, 50)


@pytest.mark.parametrize(
    "path", ["layout.json", "pytree/d/index", "pytree/manifest.ocdbt", "pytree/d/c/0"]
)
def test_a_spoiled_backup_is_not_the_mould_of_the_next(tmp_path, path):
    """The spare of a save after a fall-back is the spoiled backup: nothing of it may stay."""
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step)).wait()
        spoil_newest(tmp_path, path)
        with pytest.warns(UserWarning, match="cannot be read"):
            assert saver.restore().step == 2
        for step in (3, 4, 5):
            saver.save(step, state_of(step)).wait()
            assert_is_state_of(saver.restore())
        assert saver.committed.step == 5
    assert_is_state_of(restore_once(tmp_path))


@pytest.mark.usefixtures("no_sync")
def test_the_removal_of_a_backup_that_dies_is_gone_on_with(tmp_path):
    """At each file: whatever is left is still known as stepsave's."""
    for number in range(1, 100):
        store = FaultStore(tmp_path)
        saver = stepsave.Checkpointer(store)
        saver.save(1, state_of(1)).wait()
        store.die("remove", nth=number)
        try:
            saver.close(delete_backup=True)
            break
        except Died:
            pass
        if (tmp_path / COMMIT).exists():
            assert_is_state_of(restore_once(tmp_path))
        save_once(tmp_path, state_of(2), step=2)
        with stepsave.Checkpointer(tmp_path) as saver:
            assert_is_state_of(saver.restore())
            saver.close(delete_backup=True)
    assert number > 10
    assert not tmp_path.exists()


@pytest.mark.parametrize("number", range(1, 16))
@pytest.mark.parametrize("spoiled", ["data", "marker"])
@pytest.mark.usefixtures("no_sync")
def test_dying_at_any_operation_after_a_fall_back_loses_nothing(tmp_path, number, spoiled):
    with stepsave.Checkpointer(tmp_path, double_checkpoint=True) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step)).wait()
    if spoiled == "data":
        spoil_newest(tmp_path, "pytree/d/c/0")
    else:
        (tmp_path / COMMIT).write_bytes(b"")
    store = FaultStore(tmp_path)
    saver = stepsave.Checkpointer(store, double_checkpoint=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert saver.restore().step == 2
    store.die(nth=number)
    with contextlib.suppress(stepsave.SaveFailedError):
        saver.save(3, state_of(3)).wait()
    with contextlib.suppress(stepsave.SaveFailedError):
        saver.close()
    assert store.is_dead
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the spoiled one may still be the newest
        backup = restore_once(tmp_path, double_checkpoint=True)
    assert backup.step in (2, 3)
    assert_is_state_of(backup)


def test_the_metadata_of_a_save_is_proved_with_its_weights(tmp_path):
    save_once(tmp_path, state_of(4), step=4, metadata={"epoch": 2})
    marker = read_marker(tmp_path)
    proved = {path: (size, crc) for path, size, crc in marker["files"]}
    on_disk = {
        str(path.relative_to(tmp_path / "4")): path
        for path in (tmp_path / "4").rglob("*")
        if path.is_file()
    }
    shards = {path for path in on_disk if "/d/c/" in path}
    assert set(proved) == set(on_disk) - shards
    for path, (size, crc) in proved.items():
        data = on_disk[path].read_bytes()
        assert (size, crc) == (len(data), crc32c(data))
    assert json.loads(on_disk["training.json"].read_text())["metadata"] == {"epoch": 2}
    assert len(marker["shard_digests"]) == len(shards)
    assert np.array_equal(restore_once(tmp_path).state["optimizer"]["step"], 4)


@pytest.mark.parametrize("left", [b"", bytes(45), b"pid 7\n" + b"0" * 32 + b"\n1f\n"])
def test_what_a_power_cut_makes_of_the_lock_file_is_no_reason_to_refuse(tmp_path, left):
    save_once(tmp_path, state_of(1))
    (tmp_path / "LOCK").write_bytes(left)
    assert_is_state_of(restore_once(tmp_path))


@pytest.mark.parametrize("writer", ["auto", "tensorstore"])
def test_a_spare_that_lost_its_directory_of_shards_in_a_power_cut_is_made_anew(tmp_path, writer):
    """btrfs can keep the files of a directory that was being made, and lose an empty one."""
    for step in (1, 2):
        save_once(tmp_path, state_of(step), step, writer=writer)
    shutil.rmtree(tmp_path / "spare/pytree/d/c")
    save_once(tmp_path, state_of(3), 3, writer=writer)
    assert restore_once(tmp_path).step == 3
    assert_is_state_of(restore_once(tmp_path))
