"""Which backups stay, and the way back to one that is not the newest."""

import itertools
import os

import numpy as np
import orbax.checkpoint as ocp
import pytest
from engine_support import assert_is_state_of, assert_same_bits, flip_bit, read_marker, state_of
from hypothesis import given
from hypothesis import strategies as st

import stepsave
from stepsave.engine.retention import Retention
from stepsave.format.records import BackupRecord
from stepsave.store.local import LocalStore


def record_of(step):
    return BackupRecord(step, str(step), "ab", (), 4096, ())


def keep_all(retention, steps):
    """What is there after each save, newest first."""
    records = ()
    for step in steps:
        records = (record_of(step), *retention.choose(records))
        yield [record.step for record in records]


growing_steps = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(
    lambda gaps: [int(step) for step in np.cumsum(gaps)]
)


@given(growing_steps, st.integers(0, 5))
def test_the_last_ones_stay_and_never_more(steps, keep):
    for number, found in enumerate(keep_all(Retention(keep), steps), 1):
        assert found == steps[:number][::-1][: keep + 1]


@given(growing_steps, st.integers(0, 3), st.integers(1, 50))
def test_of_older_ones_the_first_of_each_interval_stays_for_good(steps, keep, every):
    for number, found in enumerate(keep_all(Retention(keep, every), steps), 1):
        recent, older = steps[:number][::-1][: keep + 1], steps[: max(0, number - keep - 1)]
        firsts = {}
        for step in older:
            firsts.setdefault(step // every, step)
        firsts.pop(0, None)
        assert found == [*recent, *sorted(firsts.values(), reverse=True)]


@pytest.mark.parametrize("bad", [-1, 1.0, True, "3", None])
def test_what_is_no_number_of_backups_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=r"`keep`.*0 or more"):
        stepsave.Checkpointer(tmp_path, keep=bad)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("bad", [0, -5, 2.5, False, "10"])
def test_what_is_no_number_of_steps_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=r"`keep_every`.*positive number of steps"):
        stepsave.Checkpointer(tmp_path, keep_every=bad)


@pytest.fixture(params=["directory", "bucket"])
def place(request, tmp_path):
    return tmp_path / "b" if request.param == "directory" else f"memory://keep/{tmp_path.name}"


def save_all(saver, steps):
    for step in steps:
        saver.save(step, state_of(step), {"of": step}).wait()


def steps_of(saver):
    return [record.step for record in (saver.committed, *saver.kept)]


def test_each_kept_backup_is_restored_by_its_step_bit_for_bit(place):
    with stepsave.Checkpointer(place, keep=2, keep_every=4) as saver:
        save_all(saver, range(1, 14))
        assert steps_of(saver) == [13, 12, 11, 8, 4]
        for step in (4, 8, 11, 12, 13):
            backup = saver.restore(step=step)
            assert (backup.step, backup.metadata) == (step, {"of": step})
            assert_is_state_of(backup)
    assert_is_state_of(stepsave.restore(place, step=8))
    assert stepsave.restore(place).step == 13
    with stepsave.Checkpointer(place, read_only=True) as reader:
        assert steps_of(reader) == [13, 12, 11, 8, 4]
        assert_same_bits(reader.restore(like=state_of(0), step=4).state, state_of(4))


def test_a_step_that_is_not_kept_is_refused_with_those_that_are(place):
    with stepsave.Checkpointer(place, keep=1) as saver:
        with pytest.raises(ValueError, match=r"step=3.*there are: none"):
            saver.restore(step=3)
        save_all(saver, (1, 2, 3))
        with pytest.raises(ValueError, match=r"step=1.*there are: 3, 2\."):
            saver.restore(step=1)


def test_looking_at_an_old_one_does_not_go_back_to_it(place):
    with stepsave.Checkpointer(place, keep=2) as saver:
        save_all(saver, (1, 2, 3))
        assert saver.restore(step=1).step == 1
        with pytest.raises(ValueError, match="greater than 3"):
            saver.save(2, state_of(2))
        save_all(saver, (4,))
        assert steps_of(saver) == [4, 3, 2]
        assert_is_state_of(saver.restore())


def test_a_directory_holds_no_more_than_it_is_to(tmp_path):
    with stepsave.Checkpointer(tmp_path, keep=3) as saver:
        for step in range(1, 12):
            save_all(saver, (step,))
            names = {str(s) for s in range(max(1, step - 3), step + 1)}
            markers = {"COMMIT", "LOCK"} | ({"PREVIOUS"} if step > 1 else set())
            assert set(os.listdir(tmp_path)) - {"spare"} == names | markers
    assert [one["step"] for one in read_marker(tmp_path, "PREVIOUS")["older"]] == [9, 8]


def test_one_that_retires_is_written_over_in_place(tmp_path):
    with stepsave.Checkpointer(tmp_path, keep=2) as saver:
        if saver.stats().writer != "direct":
            pytest.skip("the file system of the temporary directory does not take O_DIRECT")
        inodes = []
        for step in range(1, 13):
            save_all(saver, (step,))
            inodes.append(os.stat(tmp_path / str(step) / "pytree/d/c/0").st_ino)
    assert len(set(inodes)) == 4
    assert inodes[4:] == inodes[:8]


def test_what_has_not_changed_is_known_of_each_directory(tmp_path):
    """Each backup is whole, whatever the directory that it was written over held before."""
    rng = np.random.default_rng(1)
    frozen = rng.standard_normal(300_000)
    with stepsave.Checkpointer(tmp_path, keep=2) as saver:
        states = {}
        for step in range(1, 14):
            table = np.full((50, 1000), step // 3)
            states[step] = {"frozen": frozen, "table": table, "step": np.int64(step)}
            saver.save(step, states[step]).wait()
            for kept in steps_of(saver):
                assert_same_bits(saver.restore(step=kept).state, states[kept])
        assert saver.stats().written_bytes < saver.stats().state_bytes


def test_with_fewer_to_keep_the_next_save_removes_the_others(place):
    with stepsave.Checkpointer(place, keep=4, keep_every=2) as saver:
        save_all(saver, range(1, 9))
    with stepsave.Checkpointer(place, keep=1) as saver:
        assert len(steps_of(saver)) > 2
        assert_is_state_of(saver.restore())
        save_all(saver, (9,))
        assert steps_of(saver) == [9, 8]
        assert_is_state_of(saver.restore(step=8))
    if not isinstance(place, str):
        assert set(os.listdir(place)) == {"9", "8", "COMMIT", "PREVIOUS", "LOCK", "spare"}


def test_a_restore_falls_back_as_far_as_it_must(tmp_path):
    with stepsave.Checkpointer(tmp_path, keep=3) as saver:
        save_all(saver, range(1, 6))
    for step in (5, 4, 3):
        flip_bit(tmp_path / f"{step}/pytree/d/c/0", 50)
    with stepsave.Checkpointer(tmp_path, keep=3) as saver:
        with pytest.warns(UserWarning, match=r"step 5.*the newest that can, of step 2\. 3 steps"):
            backup = saver.restore()
        assert_is_state_of(backup)
        save_all(saver, (3, 4))
        assert steps_of(saver) == [4, 3, 2]
        assert_is_state_of(saver.restore())
    assert set(os.listdir(tmp_path)) == {"4", "3", "2", "COMMIT", "PREVIOUS", "LOCK"}


def test_if_none_can_be_read_each_is_named(tmp_path):
    with stepsave.Checkpointer(tmp_path, keep=2) as saver:
        save_all(saver, (1, 2, 3))
    for step in (1, 2, 3):
        flip_bit(tmp_path / f"{step}/pytree/d/c/0", 50)
    with pytest.raises(stepsave.CorruptBackupError) as raised:
        stepsave.restore(tmp_path)
    (second, third) = raised.value.__notes__
    assert "step 2 cannot be read either" in second
    assert "step 1 cannot be read either" in third


def test_stock_orbax_reads_each_of_them(tmp_path):
    with stepsave.Checkpointer(tmp_path, keep=2) as saver:
        for step in (1, 2, 3, 4):
            saver.save(step, {"weights": np.full(1000, step, np.float32)}).wait()
    for step in (2, 3, 4):
        tree = ocp.PyTreeCheckpointer().restore(tmp_path / f"{step}/pytree")
        assert (np.asarray(tree["weights"]) == step).all()


def test_deleting_the_backup_removes_all_of_them(place):
    saver = stepsave.Checkpointer(place, keep=3)
    save_all(saver, range(1, 6))
    saver.close(delete_backup=True)
    if not isinstance(place, str):
        assert not place.exists()
        return
    with stepsave.Checkpointer(place, keep=3) as saver:
        assert saver.restore() is None
        assert saver.kept == ()


def test_a_fall_back_that_was_cut_short_has_no_backup_counted_twice(tmp_path, monkeypatch):
    """COMMIT names the one that was fallen back to, and PREVIOUS names it too."""
    with stepsave.Checkpointer(tmp_path, keep=3) as saver:
        for step in (1, 2, 3, 4):
            saver.save(step, state_of(step)).wait()
    for step in (3, 4):
        flip_bit(tmp_path / f"{step}/pytree/d/c/0", 50)
    real = LocalStore.replace

    def replace(self, path, data):
        if path == "PREVIOUS":
            raise OSError(5, "no more")
        real(self, path, data)

    with stepsave.Checkpointer(tmp_path, keep=3) as saver, monkeypatch.context() as patch:
        patch.setattr(LocalStore, "replace", replace)
        with pytest.warns(UserWarning, match="step 4 .* cannot be read"):
            assert saver.restore().step == 2
        with pytest.raises(stepsave.SaveFailedError, match="no more"):
            saver.save(5, state_of(5)).wait()
    assert read_marker(tmp_path)["step"] == 2
    assert read_marker(tmp_path, "PREVIOUS")["step"] == 3
    with stepsave.Checkpointer(tmp_path, keep=3) as saver:
        assert saver.restore().step == 2
        assert [record.step for record in saver.kept] == [1]
        saver.save(5, state_of(5)).wait()
    with stepsave.Checkpointer(tmp_path, keep=3) as saver:
        assert [record.step for record in saver.kept] == [2, 1]
        for step in (1, 2, 5):
            assert_is_state_of(saver.restore(step=step))


@pytest.mark.parametrize("cut", range(5))
def test_a_deletion_that_is_cut_short_leaves_the_newest_or_none(tmp_path, monkeypatch, cut):
    """And never an older one, which a training that is started again would go back to."""
    saver = stepsave.Checkpointer(tmp_path / "b", keep=2)
    for step in (1, 2, 3):
        saver.save(step, state_of(step)).wait()
    real, calls = LocalStore.remove, itertools.count()

    def remove(self, path):
        if next(calls) == cut:
            raise OSError(5, "no more")
        real(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "remove", remove)
        with pytest.raises(OSError, match="no more"):
            saver.close(delete_backup=True)
    backup = stepsave.restore(tmp_path / "b")
    assert (backup and backup.step) == (3 if cut < 2 else None)
    if backup is not None:
        assert_is_state_of(backup)
    with stepsave.Checkpointer(tmp_path / "b", keep=2) as saver:
        saver.save(4, state_of(4)).wait()
        saver.close(delete_backup=True)
    assert not (tmp_path / "b").exists()
