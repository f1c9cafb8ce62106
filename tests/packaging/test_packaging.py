"""What is published: the wheel, the sdist, what they need; and files for whoever hosts them."""

import ast
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import numpy as np
import pytest

import stepsave

ROOT = Path(__file__).parent.parent.parent
CONSUMER = Path(__file__).parent / "consumer.py"
LIMIT_S = 280  # for what comes from a package registry
# Without the way to the source, so that what is installed is found.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command, cwd=None):
    ended = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist; the wheel is made from the sdist, as by whoever packages it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of an environment that has the wheel, what it needs, and nothing else."""
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, with_pip=True)
    python = place / "bin/python"
    run(python, "-m", "pip", "install", "--quiet", built[0])
    return python


@pytest.mark.slow
def test_the_wheel_has_the_package_alone_and_says_that_it_is_typed(built):
    with zipfile.ZipFile(built[0]) as wheel:
        found = {Path(name) for name in wheel.namelist()}
    source = ROOT / "src"
    expected = {
        path.relative_to(source)
        for path in source.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert {path for path in found if ".dist-info" not in path.parts[0]} == expected
    assert Path("stepsave/py.typed") in found
    assert any(path.name == "LICENSE" for path in found)


@pytest.mark.slow
def test_the_sdist_has_what_is_needed_to_test_it(built):
    with tarfile.open(built[1]) as sdist:
        found = {Path(*Path(name).parts[1:]) for name in sdist.getnames()}
    needed = ("LICENSE", "README.md", "pyproject.toml", "tests/conftest.py", "docs/errors.md")
    for name in (*needed, "CITATION.cff", ".github/workflows/ci.yml"):
        assert Path(name) in found, name
    assert not [path for path in found if "__pycache__" in path.parts]


@pytest.mark.slow
def test_what_the_registry_shows_is_in_order(built, metadata):
    run(sys.executable, "-m", "twine", "check", "--strict", *built)
    assert metadata["Version"] == stepsave.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.slow
def test_all_extras_can_be_had_together(built, metadata, installed):
    extras = metadata.get_all("Provides-Extra")
    assert {"cli", "jax", "tensorflow", "torch"} <= set(extras)
    wanted = f"{built[0]}[{','.join(extras)}]"
    run(installed, "-m", "pip", "install", "--quiet", "--dry-run", wanted)


@pytest.mark.slow
def test_in_a_clean_environment_a_state_is_saved_and_restored(installed, tmp_path):
    code = """
import sys
import numpy as np
import stepsave
with stepsave.Checkpointer(sys.argv[1]) as saver:
    saver.save(3, {"a": np.arange(1000.0)}).wait()
for name in set(stepsave.__all__) - {"BackupAndRestore"}:
    getattr(stepsave, name)
print(stepsave.__file__)
"""
    place = run(installed, "-I", "-c", code, tmp_path / "backup", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(installed.parent.parent)
    backup = stepsave.restore(tmp_path / "backup")
    assert backup.step == 3
    assert backup.state["a"].tobytes() == np.arange(1000.0).tobytes()


@pytest.mark.slow
def test_the_command_says_what_to_install_and_works_with_its_extra(built, installed):
    command = installed.parent / "stepsave"
    without = subprocess.run(
        [command], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60
    )
    assert without.returncode == 1
    assert "pip install 'stepsave[cli]'" in without.stderr
    run(installed, "-m", "pip", "install", "--quiet", f"{built[0]}[cli]")
    assert "Usage: stepsave" in run(command, "--help")


@pytest.mark.slow
def test_a_strict_type_checker_has_nothing_to_say_to_a_user(installed, tmp_path):
    (tmp_path / "consumer.py").write_text(CONSUMER.read_text())
    settings = {"typeCheckingMode": "strict", "include": ["consumer.py"]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    run(sys.executable, "-m", "pyright", "--pythonpath", installed, cwd=tmp_path)


def test_the_user_of_the_type_checker_uses_every_public_name():
    used = {
        node.attr
        for node in ast.walk(ast.parse(CONSUMER.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "stepsave"
    }
    assert used == set(stepsave.__all__)


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("citation-file-format", "CITATION.cff"),
        ("github-workflows", ".github/workflows/ci.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        *(
            ("github-issue-forms", f".github/ISSUE_TEMPLATE/{name}.yml")
            for name in ("bug", "feature")
        ),
    ],
)
def test_a_file_for_others_is_what_they_read(schema, path):
    run(
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        f"vendor.{schema}",
        ROOT / path,
    )


def test_the_citation_is_of_this_version():
    assert f"\nversion: {stepsave.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_workflow_runs_what_must_pass_on_each_python_that_is_admitted():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "run: .ci/run" in workflow
    assert "permissions:\n  contents: read\n" in workflow
    project = (ROOT / "pyproject.toml").read_text()
    for minor in range(11, 14):
        assert f'"3.{minor}"' in workflow
        assert f'"Programming Language :: Python :: 3.{minor}"' in project
