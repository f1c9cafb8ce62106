"""The benchmarks run, and what is published is what they measured."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
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
    "resume": [
        "bench.resume",
        "--quick",
        "--sources",
        "arrays, shuffled",
        "torch DataLoader, 2 workers",
        "grain MapDataset",
        "generator",
    ],
    "gpu": [*GPU, "--rounds", "1", "--budget-s", "290", "--parts", "correctness", "size"],
    "gpu resume": [*GPU, "--budget-s", "280", "--parts", "resume"],
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
    documents = "README.md", "bench/README.md"
    for document in documents:
        shutil.copy(ROOT / document, tmp_path / document)
    run(
        "bench.publish",
        *("--results", str(tmp_path / "bench/results")),
        *("--readme", str(tmp_path / "README.md")),
        *("--details", str(tmp_path / "bench/README.md")),
    )
    pictures = [str(path.relative_to(ROOT)) for path in (ROOT / "bench/results").rglob("*.svg")]
    for name in (*documents, *pictures):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name}: run publish"


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in ("engine", "restore") else [pytest.mark.slow]) for n in RUNS],
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
    if name == "gpu":
        check_gpu(found)
    if name == "gpu resume":
        (result,) = found
        assert set(result["frameworks"]) == {"jax", "torch"}
        for each in result["frameworks"].values():
            assert each["same bits"]
            assert 0 < each["resumed"]["batches"] < each["whole"]["batches"]


def check_gpu(found: list[dict]) -> None:
    parts = {result["benchmark"]: result for result in found if result["benchmark"] != "gpu"}
    checks = parts["gpu-correctness"]["frameworks"]
    assert set(checks) == {"jax", "torch"}
    for each in checks.values():
        assert each["checks"]["every step, device"]["saves"] == 20
        assert each["checks"]["every step, device"]["snapshot"] == "device"
    sizes = [result for result in found if result["benchmark"] == "gpu"]
    assert {result["framework"] for result in sizes} == {"jax", "torch"}
    for result in sizes:
        (size,) = result["sizes"].values()
        failed = {key: one["failed"] for key, one in size["subjects"].items() if "failed" in one}
        assert not failed
        saved = [one for one in size["subjects"].values() if "restored_equal" in one]
        assert all(one["restored_equal"] == size["arrays"] for one in saved)
        assert size["subjects"]["stepsave"]["facts"]["snapshot"] == "device"


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


def test_the_table_of_exact_resume_is_the_generated_one():
    import json

    from bench.publish import exact

    assert exact.TABLE.read_text() == exact.table(json.loads(exact.JSON.read_text()))


def test_every_cell_that_was_tested_is_exact():
    from bench.publish import exact

    assert "not exact" not in exact.TABLE.read_text()
