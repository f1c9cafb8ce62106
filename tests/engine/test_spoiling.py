"""A sample of `python -m proof.spoiling`, which spoils every byte; and what `verify` says of it."""

import os
import random

import cli_support
import numpy as np
import pytest
from bucket_support import s3, s3_target
from engine_support import assert_same_bits
from proof import spoiling
from proof.places import (
    Directory,
    Setting,
    fault_of,
    golden,
    small_shards,
    spoiled,
    state_of,
    tiers,
    written,
)

import stepsave

pytestmark = [pytest.mark.once, pytest.mark.xdist_group("buckets")]
__all__ = ("s3", "s3_target")

SHARE = 0.01
SPOIL = {
    "flips": lambda setting, count, rng: spoiling.flip_files(setting, count, rng, SHARE),
    "lengths": lambda setting, count, rng: spoiling.cut_files(setting, count, rng, SHARE),
    "shards": lambda setting, count, rng: spoiling.spoil_shards(setting, count, rng, flips=3),
    "exchanged shards": lambda setting, count, _: spoiling.exchange_shards(setting, count),
    "exchanged files": lambda setting, count, _: spoiling.exchange_files(setting, count),
}
SETTINGS = {
    "direct writes": lambda path: written("direct", path, writer="direct"),
    "tensorstore's writes": lambda path: written("tensorstore", path, writer="tensorstore"),
    "three kept": lambda path: written("kept", path, keep=2),
    "golden, of processes": lambda path: golden("v1-processes", path),
    "bucket": lambda path: written("bucket", f"memory://spoiling{path}", keep=1),
    "disk before a bucket": lambda path: tiers("disk", path / "disk", f"memory://disk{path}"),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Makes backups in each setting once: every case leaves them as they were."""
    made = {}

    def make(name):
        if name not in made:
            with small_shards():
                made[name] = SETTINGS[name](tmp_path_factory.mktemp("spoiling") / "backups")
        return made[name]

    return make


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("how", SPOIL)
def test_a_spoiled_backup_is_restored_right_or_refused_by_name(settings, name, how):
    seed = random.SystemRandom().randrange(1 << 32)
    count = spoiling.Count()
    setting = settings(name)
    SPOIL[how](setting, count, random.Random(seed))
    assert count.faults == [], f"seed {seed}"
    assert count.cases > 0 or (how == "exchanged files" and len(setting.records) == 1)
    found, told = setting.restore()
    assert told == []
    assert_same_bits(found.state, next(iter(setting.states.values())))


def test_a_spoiled_backup_on_a_server_is_refused_by_name(s3):
    with small_shards():
        setting = written("s3", s3.place)
    count, rng = spoiling.Count(), random.Random(1)
    spoiling.flip_files(setting, count, rng, 0.0)
    spoiling.exchange_shards(setting, count)
    assert count.faults == []
    assert count.cases > 20


def test_the_judge_of_restores_sees_each_fault(tmp_path):
    """Or the tests above would pass whatever a restore did."""
    with small_shards():
        one, other = (written("one", tmp_path / n, keep=2) for n in ("one", "other"))
    path = "13/layout.json"
    data = one.place.read(path)
    wrong = state_of(13)
    wrong["a"] = wrong["a"].copy()
    wrong["a"].view(np.uint8)[5, 5] ^= 1

    def with_restore(restore, states=one.states):
        return Setting("one", one.place, restore, states)

    def change_disk():
        one.place.put("13/training.json", one.place.read("13/training.json"))
        return one.restore()

    def fail():
        raise KeyError(path)

    spoil = {path: data[:-1]}
    assert fault_of(one, spoil) == ""
    assert fault_of(one, {path: data}) == "was not noticed"
    assert fault_of(one, {path: data}, may_pass=True) == ""
    assert "without the name" in fault_of(one, spoil, blamed=["8/layout.json"])
    assert "KeyError" in fault_of(with_restore(fail), spoil)
    assert fault_of(with_restore(change_disk), spoil) == "something was changed on disk"
    assert "None" in fault_of(with_restore(lambda: (None, [])), spoil)
    assert "WRONG VALUES" in fault_of(with_restore(other.restore, {13: wrong}), {path: data})
    assert one.place.read(path) == data


@pytest.mark.parametrize("name", ["three kept", "golden, of processes"])
def test_verify_names_each_spoiled_file(settings, capsys, name):
    setting = settings(name)
    assert isinstance(setting.place, Directory)
    markers, files = spoiling.small_files(setting)
    shard = f"{setting.records[0].directory}/pytree/d/c/0"
    rng = random.Random(name)
    for path in (*markers, *files, shard):
        data = setting.place.read(path)
        at = 0 if path == shard else rng.randrange(len(data))
        if path in markers:  # not in the version: that may be a newer one, which is no damage
            at = rng.randrange(data.index(b"\n") + 1, len(data))
        for spoilt in (spoiling.flipped(data, at, rng.randrange(8)), data[:-1]):
            with spoiled(setting.place, **{path: spoilt}):
                cli_support.call("verify", setting.place.root, status=1)
            told = capsys.readouterr().out
            assert f"  {path}: " in told, told
    cli_support.call("verify", setting.place.root)


def test_a_checkpointer_that_may_write_refuses_what_one_that_reads_refuses(settings):
    setting = settings("direct writes")
    root, rng = setting.place.root, random.Random(7)
    markers, files = spoiling.small_files(setting)
    for path in (*markers, *files):
        data = setting.place.read(path)
        with spoiled(setting.place, **{path: spoiling.flipped(data, rng.randrange(len(data)), 3)}):
            before = setting.place.picture()
            for restore in (stepsave.restore, _restore_by_writer):
                with pytest.raises(stepsave.CorruptBackupError) as caught:
                    restore(root)
                assert os.path.join(root, path) in str(caught.value)
            with pytest.raises(stepsave.CorruptBackupError) as caught:
                stepsave.restore(root, step=13)
            assert os.path.join(root, path) in str(caught.value)
            assert setting.place.picture() == before


def _restore_by_writer(root):
    with stepsave.Checkpointer(root) as saver:
        return saver.restore()
