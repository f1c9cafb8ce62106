"""Every released format restores for ever, and version 1 is written as it was."""

import json
import shutil
from pathlib import Path

import golden_state
import pytest
from bucket_support import s3, s3_target
from engine_support import assert_same_bits
from peers_support import Processes

import stepsave
from stepsave.format.blueprint import Blueprint
from stepsave.format.planning import compile_layout
from stepsave.format.records import FORMAT_VERSION, LeafSpec
from stepsave.format.tree import flatten
from stepsave.snapshot.arrays import dtype_name

__all__ = ("s3", "s3_target")

GOLDEN = Path(__file__).parent / "golden"
DISKS = GOLDEN.with_name("golden-disks")
VERSIONS = sorted(path.name for path in GOLDEN.iterdir())


def test_there_is_a_golden_backup_of_each_format():
    made = [f"v{n}" for n in range(1, FORMAT_VERSION + 1)]
    assert [*made, "v1-kept", "v1-processes"] == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_golden_backup_restores(version, tmp_path):
    shutil.copytree(GOLDEN / version, tmp_path / "backup")
    with stepsave.Checkpointer(tmp_path / "backup") as saver:
        backup = saver.restore()
    assert backup.step == golden_state.STEP
    assert backup.metadata == golden_state.METADATA
    assert_same_bits(backup.state, golden_state.state())


def test_the_golden_backups_before_the_newest_restore_by_their_step():
    for step in golden_state.KEPT:
        backup = stepsave.restore(GOLDEN / "v1-kept", step=step)
        assert (backup.step, backup.state) == (step, {"of": step})


def test_the_golden_backup_of_processes_is_in_blocks_and_has_what_each_of_them_knew():
    backup = GOLDEN / "v1-processes" / str(golden_state.STEP)
    assert json.loads((backup / "layout.json").read_text())["format"] == 2
    metadata = json.loads((backup / "training.1.json").read_text())["metadata"]
    assert metadata == {"rank": 1}


@pytest.mark.xdist_group("buckets")
def test_the_golden_backup_on_the_disks_of_processes_restores(s3, tmp_path):
    shutil.copytree(DISKS, tmp_path / "disks")
    options = json.dumps({"local_dir": str(tmp_path / "disks")})
    with Processes(golden_state.RESTORE_SPREAD, s3.place, options) as processes:
        assert [lines[-1] for lines in processes.results()] == ["exact", "exact"]


def test_the_constant_files_of_this_version_are_byte_for_byte_those_of_the_golden_backup():
    paths, arrays = flatten(golden_state.state())
    leaves = [LeafSpec(p, a.shape, dtype_name(p, a)) for p, a in zip(paths, arrays, strict=True)]
    files = Blueprint(compile_layout(leaves), {}).files
    directory = GOLDEN / f"v{FORMAT_VERSION}" / str(golden_state.STEP)
    for path, data in files.items():
        assert (directory / path).read_bytes() == data, path
