"""The benchmarks run, and what is published is what they measured."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench import goodput
from bench.publish import details
from bench.publish.collected import Collected

ROOT = Path(__file__).parent.parent.parent
STARTED = ("none", "stepsave", "keras")
GPU = ("bench.gpu", "--quick", "--allow-cpu")
RUNS = {
    "engine": ["bench.saves.engine", "--quick"],
    "fits": [
        "bench.fits",
        "--quick",
        "--backend",
        "jax",
        "--subjects",
        "stepsave",
        "copy",
        "copy_write",
        "keras",
    ],
    "restore": ["bench.saves.restore", "--quick"],
    "buckets": ["bench.saves.buckets", "--quick"],
    "processes": ["bench.saves.processes", "--quick"],
    "planning": ["bench.saves.planning", "--quick"],
    "resume": [
        "bench.resume",
        "--quick",
        "--sources",
        "arrays, shuffled",
        "torch DataLoader, 2 workers",
        "grain MapDataset",
        "generator",
    ],
    "imports": ["bench.starts.imports", "--quick"],
    "starts": ["bench.starts", "--quick", "--backend", "jax", "--subjects", *STARTED],
    "changes": [
        *("bench.saves.changes", "--quick", "--frameworks", "numpy"),
        *("--cases", "all", "frozen", "zipf", "--against", "src"),
    ],
    "changes in fits": [
        *("bench.fits", "--quick", "--backend", "jax", "--trains", "adapters"),
        *("--subjects", "stepsave", "copy"),
    ],
    "gpu": [*GPU, "--budget-s", "290", "--parts", "correctness"],
    "gpu size": [*GPU, "--rounds", "1", "--parts", "size", "--frameworks", "torch"],
    "gpu resume": [*GPU, "--budget-s", "280", "--parts", "resume", "--frameworks", "jax"],
}


# Where what they measured is published.
SECTIONS = {
    "imports": "### Import\n",
    "buckets": "### Into a bucket and back\n",
    "starts": "### From `fit` to the first batch\n",
    "changes": "### States of which a part changes\n",
    "changes in fits": "### Fits in which a part changes\n",
}


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results_of(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


def test_the_published_tables_and_pictures_are_made_from_the_committed_results(tmp_path):
    shutil.copytree(ROOT / "bench/results", tmp_path / "bench/results")
    documents = "README.md", "bench/README.md", "docs/scale.md"
    (tmp_path / "docs").mkdir()
    for document in documents:
        shutil.copy(ROOT / document, tmp_path / document)
    run(
        "bench.publish",
        *("--results", str(tmp_path / "bench/results")),
        *("--readme", str(tmp_path / "README.md")),
        *("--details", str(tmp_path / "bench/README.md")),
        *("--scale", str(tmp_path / "docs/scale.md")),
    )
    pictures = [str(path.relative_to(ROOT)) for path in (ROOT / "bench/results").rglob("*.svg")]
    for name in (*documents, *pictures):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name}: run publish"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("engine", "restore", "imports") else [pytest.mark.slow])
        for n in RUNS
    ],
)
def test_a_benchmark_runs_checks_what_it_restored_and_keeps_its_samples(name, tmp_path):
    run(*RUNS[name], "--results", str(tmp_path), "--directory", str(tmp_path))
    found = results_of(tmp_path)
    assert found
    assert not any(result.get("failed") for result in found)
    if name == "fits":
        for key in ("stepsave", "copy", "copy_write"):
            held = found[0]["summary"]["subjects"][key]["blocked_s"]
            assert held["p50"] > 0, f"{key}: no save was timed"
    if name == "resume":
        assert list(found[0]["summary"]) == RUNS[name][3:]
    if name == "starts":
        (result,) = found
        assert list(result["summary"]) == list(STARTED)
        for key in STARTED[1:]:
            assert result["summary"][key]["resume warm"]["peak_over_training"]["median"] > 0
        assert result["cold"]["in_page_cache_at_most"] < 0.01
    if name == "changes":
        cases = found[0]["summary"]["numpy"]
        assert cases["all"]["this"]["disk_bytes"]["median"] >= 1
        assert "over_other" in cases["all"]["this"]
        assert "over_all" in cases["frozen"]["this"]
    if name in ("imports", "starts", "changes", "changes in fits"):
        assert SECTIONS[name] in details.of_machine(Collected.load(tmp_path))
    if name == "gpu":
        check_gpu(found)
    if name == "gpu size":
        check_gpu_sizes(found)
    if name == "gpu resume":
        (result,) = found
        assert set(result["frameworks"]) == {"jax"}
        for each in result["frameworks"].values():
            assert each["same bits"]
            assert 0 < each["resumed"]["batches"] < each["whole"]["batches"]


def check_gpu(found: list[dict]) -> None:
    (parts,) = found
    assert parts["benchmark"] == "gpu-correctness"
    assert set(parts["frameworks"]) == {"jax", "torch"}
    for each in parts["frameworks"].values():
        assert each["checks"]["every step, device"]["saves"] == 20
        assert each["checks"]["every step, device"]["snapshot"] == "device"


def check_gpu_sizes(found: list[dict]) -> None:
    (result,) = found
    assert (result["benchmark"], result["framework"]) == ("gpu", "torch")
    (size,) = result["sizes"].values()
    assert not {key: one["failed"] for key, one in size["subjects"].items() if "failed" in one}
    saved = [one for one in size["subjects"].values() if "restored_equal" in one]
    assert all(one["restored_equal"] == size["arrays"] for one in saved)
    assert size["subjects"]["stepsave"]["facts"]["snapshot"] == "device"


def test_a_resume_counts_only_with_the_state_that_was_saved_and_at_its_batch():
    from bench.starts.__main__ import check_resumed
    from bench.starts.plan import SUBJECTS

    state = dict.fromkeys(SUBJECTS["stepsave"].restores, "8 variables, bc176172fb2440e3")
    left = {"saved": state, "saved_at": 9}
    check_resumed("stepsave", left, {"restored": state, "began_at": 9})
    check_resumed("keras", left, {"restored": state, "began_at": 0})
    for name in state:
        other = state | {name: "8 variables, 0000000000000000"}
        with pytest.raises(AssertionError, match=name):
            check_resumed("stepsave", left, {"restored": other, "began_at": 9})
    with pytest.raises(AssertionError, match="went on at 0, not 9"):
        check_resumed("stepsave", left, {"restored": state, "began_at": 0})


def test_the_benchmark_for_gpus_says_what_is_missing_where_there_is_none(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--frameworks", "torch", "--results", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "sees no GPU" in done.stderr
    assert "--allow-cpu" in done.stderr
    assert not list(tmp_path.iterdir()), "nothing was measured, so nothing is kept"


def test_the_simulated_loss_is_what_theory_says_where_that_is_simple():
    inputs = goodput.Inputs(stall_s=0.2, durable_s=0.2, resume_s=60.0)
    failing_s = goodput.mean_time_between_failures_s(16_384)
    assert failing_s == pytest.approx(3.093 * 3600, rel=1e-3)
    best_s = goodput.best_interval_s(inputs, failing_s)
    lost = goodput.share_lost(inputs, best_s, failing_s)
    # A save per interval, half an interval per failure, and the resume.
    theory = inputs.stall_s / best_s + (best_s / 2 + inputs.resume_s) / failing_s
    assert lost == pytest.approx(theory, rel=0.05)
    for factor in (0.25, 4):
        assert goodput.share_lost(inputs, best_s * factor, failing_s) > lost
    never = goodput.share_lost(inputs, 100 * failing_s, failing_s)
    assert never > 0.999


def test_the_table_of_exact_resume_is_the_generated_one():
    import json

    from bench.publish import exact

    assert exact.TABLE.read_text() == exact.table(json.loads(exact.JSON.read_text()))


def test_every_cell_that_was_tested_is_exact():
    from bench.publish import exact

    assert "not exact" not in exact.TABLE.read_text()
