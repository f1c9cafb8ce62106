"""What the pages about schedulers show, run as far as it can be without one."""

import http.server
import io
import os
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from bucket_support import HOST, put, s3, s3_environment, s3_target
from document_support import ROOT, Script, blocks

import stepsave

__all__ = ("s3", "s3_target")

AGAIN = stepsave.Preempted.EXIT_CODE
(TRAIN,) = blocks("operations/README.md", "python")
(LOOP,) = blocks("operations/README.md", "bash")
(SLURM,) = blocks("operations/slurm.md", "bash")
(WATCH,) = blocks("operations/spot.md", "bash")
(JOB,) = map(yaml.safe_load, blocks("operations/kubernetes.md", "yaml"))
(TASK,) = map(yaml.safe_load, blocks("operations/spot.md", "yaml"))
PYTHON_FIRST = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def folder_with(path, train=TRAIN, **scripts):
    """Makes a folder with `train.py` and scripts beside it."""
    path.mkdir()
    (path / "train.py").write_text(train)
    for name, text in scripts.items():
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    return path


def start(folder, *command, **environment):
    return Script(*command, cwd=folder, environment=PYTHON_FIRST | environment)


def trained(folder):
    """The arrays of the model that `train.py` saves when it has come to its end."""
    with zipfile.ZipFile(folder / "trained.keras") as archive:
        stored = io.BytesIO(archive.read("model.weights.h5"))
    arrays = {}
    with h5py.File(stored) as file:
        file.visititems(lambda name, node: arrays.update({name: node}))
        return {
            name: (str(node.dtype), np.asarray(node).tobytes())
            for name, node in arrays.items()
            if isinstance(node, h5py.Dataset)
        }


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What an uninterrupted training ends with."""
    folder = folder_with(tmp_path_factory.mktemp("whole") / "run")
    assert start(folder, "python", "train.py").end() == 0
    arrays = trained(folder)
    assert len(arrays) > 5
    return arrays


def epochs(script):
    """Numbers of the epochs that it has begun, or gone on with."""
    return [int(line[6:].split("/")[0]) for line in script.lines if line.startswith("Epoch ")]


def check_goes_on(script, again):
    """Whether a run has begun where the one before was told to end, not far from its begin."""
    last, first = epochs(script)[-1], epochs(again)[0]
    assert 2 < last < 8
    assert first in (last, last + 1)  # if it was the last batch


def wait_until(holds):
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("this took more than a minute")


@pytest.mark.slow
def test_the_loop_runs_a_training_again_that_was_told_to_end(tmp_path, expected):
    folder = folder_with(tmp_path / "run", loop=LOOP)
    script = start(folder, "./loop")
    for epoch in (3, 5):
        script.read_to(f"Epoch {epoch}/")
        (training,) = script.children()
        os.kill(training, signal.SIGTERM)
    assert script.end() == 0, script.told()
    assert epochs(script) == sorted(epochs(script))
    assert epochs(script).count(1) == 1
    assert trained(folder) == expected


@pytest.mark.parametrize("code", [1, 3, 137])
def test_the_loop_ends_with_an_error(code, tmp_path):
    train = f"""
from pathlib import Path
runs = Path("runs")
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
raise SystemExit({AGAIN} if len(runs.read_text()) < 3 else {code})
"""
    folder = folder_with(tmp_path / "run", train=train, loop=LOOP)
    assert start(folder, "./loop").end() == code
    assert (folder / "runs").read_text() == "xxx"


# Stand-ins: the task has a number of its own, and who puts the job back is told so.
SRUN = '#!/bin/bash\necho $$ > task\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "$@" >> requeued\n'


def start_job(folder):
    path = f"{folder}:{PYTHON_FIRST['PATH']}"
    return start(folder, "bash", "train.slurm", PATH=path, SLURM_JOB_ID="17")


def test_a_job_of_slurm_is_put_back_and_goes_on(tmp_path, expected):
    scripts = {"train.slurm": SLURM, "srun": SRUN, "scontrol": SCONTROL}
    folder = folder_with(tmp_path / "run", **scripts)
    script = start_job(folder)
    script.read_to("Epoch 3/")
    os.kill(int((folder / "task").read_text()), signal.SIGTERM)
    script.send(signal.SIGTERM)  # a preemption may tell the shell too
    assert script.end() == AGAIN, script.told()
    assert (folder / "requeued").read_text() == "requeue 17\n"
    assert not (folder / "trained.keras").exists()
    again = start_job(folder)
    assert again.end() == 0, again.told()
    check_goes_on(script, again)
    assert trained(folder) == expected
    assert (folder / "requeued").read_text() == "requeue 17\n"


def test_a_job_of_slurm_that_fails_is_not_put_back(tmp_path):
    scripts = {"train.slurm": SLURM, "srun": SRUN, "scontrol": SCONTROL}
    folder = folder_with(tmp_path / "run", train="raise ValueError('wrong')", **scripts)
    assert start_job(folder).end() == 1
    assert not (folder / "requeued").exists()


def test_the_options_of_slurm_are_read_before_the_first_command():
    lines = SLURM.splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert lines[1 : 1 + len(options)] == [f"#SBATCH --{option}" for option in options]
    assert "signal=TERM@180" in options
    assert "requeue" in options


def counts_as_failure(job, container, exit_code):
    """What a `podFailurePolicy` says of a pod that ended so."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"values": [], "containerName": ""})
        if exit_code in codes["values"] and codes["containerName"] == container:
            return (codes["operator"], rule["action"]) != ("In", "Ignore")
    return True


def test_no_page_shows_code_that_is_not_run():
    pages = [*(ROOT / "docs/recipes").glob("*.md"), *(ROOT / "docs/operations").glob("*.md")]
    shown = {page.stem: re.findall(r"^```(\w+)", page.read_text(), re.MULTILINE) for page in pages}
    assert shown.pop("slurm") == ["bash"]
    assert shown.pop("kubernetes") == ["yaml"]
    assert shown.pop("spot") == ["yaml", "bash"]
    assert (ROOT / "docs/operations/README.md").read_text().count("```") == 4
    assert (ROOT / "docs/recipes/README.md").read_text().count("```") == 0
    del shown["README"]
    assert set(map(tuple, shown.values())) == {("python",)}


def test_a_job_of_kubernetes_says_what_the_page_promises():
    assert (JOB["apiVersion"], JOB["kind"]) == ("batch/v1", "Job")
    pod = JOB["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # as a `podFailurePolicy` demands
    (container,) = pod["containers"]
    assert not counts_as_failure(JOB, container["name"], AGAIN)
    assert counts_as_failure(JOB, container["name"], 1)
    assert counts_as_failure(JOB, "another", AGAIN)
    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert disrupted in JOB["spec"]["podFailurePolicy"]["rules"]
    grace_period_s = float(TRAIN.partition("grace_period_s=")[2].partition(",")[0])
    assert pod["terminationGracePeriodSeconds"] > grace_period_s
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    (variable,) = container["env"]
    assert f'"{variable["name"]}"' in TRAIN
    assert variable["value"].startswith(mount["mountPath"] + "/")


@pytest.mark.slow
def test_the_container_of_kubernetes_is_told_to_end_and_another_one_goes_on(tmp_path, expected):
    (container,) = JOB["spec"]["template"]["spec"]["containers"]
    folder = folder_with(tmp_path / "run")
    environment = {container["env"][0]["name"]: str(tmp_path / "run-7")}
    pod = start(folder, *container["command"], **environment)
    pod.read_to("Epoch 4/")
    pod.send(signal.SIGTERM)
    assert not counts_as_failure(JOB, container["name"], pod.end()), pod.told()
    another = start(folder, *container["command"], **environment)
    assert another.end() == 0, another.told()
    check_goes_on(pod, another)
    assert trained(folder) == expected


def test_a_task_of_skypilot_says_what_the_page_promises():
    assert TASK["resources"]["use_spot"] is True
    assert TASK["resources"]["job_recovery"]["recover_on_exit_codes"] == [AGAIN]
    assert TASK["envs"]["BACKUP_DIR"].startswith("s3://")
    assert {name for name in TASK["envs"] if f'"{name}"' in TRAIN} == {"BACKUP_DIR", "LOCAL_DIR"}


@pytest.mark.slow
@pytest.mark.xdist_group("buckets")
def test_a_training_goes_on_from_the_bucket_when_its_machine_is_lost(s3, tmp_path, expected):
    put(f"{s3.url}/my-bucket", b"")
    machines = [folder_with(tmp_path / name) for name in ("first", "second", "third")]

    def start_on(machine):
        environment = s3_environment(s3.url) | TASK["envs"] | {"LOCAL_DIR": str(machine / "disk")}
        return start(machine, "bash", "-c", TASK["run"], **environment)

    def uploaded_step():
        backup = stepsave.restore(TASK["envs"]["BACKUP_DIR"])
        return -1 if backup is None else backup.step

    script = start_on(machines[0])
    script.read_to("Epoch 2/")
    wait_until(lambda: uploaded_step() > 0)
    script.read_to("Epoch 5/")  # an upload begins at a save, if none is under way
    wait_until(lambda: uploaded_step() > 16)
    script.kill()
    shutil.rmtree(machines[0])
    script = start_on(machines[1])
    script.read_to("Epoch 6/")
    assert epochs(script)[0] > 1
    script.send(signal.SIGTERM)
    assert script.end() == AGAIN, script.told()
    shutil.rmtree(machines[1])
    again = start_on(machines[2])
    assert again.end() == 0, again.told()
    check_goes_on(script, again)
    assert trained(machines[2]) == expected


class Metadata(http.server.BaseHTTPRequestHandler):
    """As EC2's metadata service: nothing without a token, and 404 until there is a notice."""

    def do_PUT(self):
        is_asked = self.path == "/latest/api/token" and self.headers.get(
            "X-aws-ec2-metadata-token-ttl-seconds"
        )
        self.answer(200 if is_asked else 400, b"a token")

    def do_GET(self):
        if self.headers.get("X-aws-ec2-metadata-token") != "a token":
            self.answer(401, b"")
        elif self.path == "/latest/meta-data/spot/instance-action":
            self.server.asked.set()
            self.answer(200 if self.server.has_notice else 404, b'{"action": "terminate"}')
        else:
            self.answer(404, b"")

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata():
    with http.server.ThreadingHTTPServer((HOST, 0), Metadata) as server:
        server.has_notice, server.asked = False, threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.slow  # it asks every five seconds
def test_a_notice_of_amazon_ends_the_training_with_a_save(metadata, tmp_path, expected):
    folder = folder_with(tmp_path / "run", watch=WATCH)
    url = f"http://{HOST}:{metadata.server_address[1]}/latest"
    script = start(folder, "./watch", METADATA_URL=url)
    script.read_to("Epoch 3/")
    assert metadata.asked.wait(60)
    metadata.has_notice = True
    wait_until(lambda: "told to end" in script.told())
    assert script.end() == AGAIN, script.told()
    metadata.has_notice = False
    again = start(folder, "./watch", METADATA_URL=url)
    assert again.end() == 0, again.told()
    check_goes_on(script, again)
    assert trained(folder) == expected
