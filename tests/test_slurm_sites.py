"""What sites and users' profiles change: a real Slurm with their rules, and one short stage of one small tar.

Skipped, with the reason, where Slurm is not installed; never in continuous integration.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import one_node_slurm
import pytest
from conftest import ROOT
from local_backbone import write_local_backbone
from one_node_slurm import OneNodeSlurm
from synthetic import write_dataset

from common.errors import PipelineError
from slurm import jobs, runs, status, submit

pytestmark = pytest.mark.timeout(300)
PATIENCE_S = 120  # for what should take seconds on an idle machine
RULES = """\
PrivateData=jobs
PartitionName=short Nodes=ALL MaxTime=00:10:00
"""


class Site:
    """A cluster with a site's rules, a checkout, and what a user calls there."""

    def __init__(self, folder: Path, cluster: OneNodeSlurm):
        self.folder, self.cluster = folder, cluster
        self.environment = dict(cluster.environment)
        self.checkout = folder / "checkout"
        others = (".*", "data", "demo", "logs", "checkpoints", "__pycache__", "*.egg-info", "tests", "docs")
        shutil.copytree(ROOT, self.checkout, ignore=shutil.ignore_patterns(*others))
        write_dataset(folder / "raw", streets=2, cities=2, image_px=64, facades_per_street=2)
        (folder / "bin").mkdir()
        self.python = folder / "bin" / "python"  # the jobs' Python, which a test may replace
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        self.python.chmod(0o755)
        with open(self.checkout / "slurm" / "env.sh", "a") as file:
            file.write(f"export PATH={self.python.parent}:$PATH  # as a module does\n")

    def call(self, program: str, root: Path, *arguments, code: int = 0, **variables) -> str:
        """What slurm/submit.py or slurm/status.py prints; it must end with `code`."""
        settings = [f"paths.root={root}", f"paths.raw_dir={self.folder / 'raw'}", "slurm.num_shards=1"]
        settings += ['slurm.process_tar.sbatch=["--mem=500M"]']
        flags = [word for setting in settings for word in ("--set", setting)]
        return self.run(
            sys.executable, self.checkout / "slurm" / program, *flags, *arguments, code=code, **variables
        )

    def submit(self, root: Path, *arguments, **options) -> str:
        return self.call("submit.py", root, "--only", "process_tar", *arguments, **options)

    def run(self, *command, code: int = 0, **variables) -> str:
        command = [str(word) for word in command]
        told = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S,
            cwd=self.folder, env={**self.environment, **variables},
        )  # fmt: skip
        assert told.returncode == code, f"{shlex.join(command)}\n{told.stdout}"
        assert "Traceback" not in told.stdout, told.stdout
        return told.stdout

    def step(self, root: Path, code: int = 0) -> dict:
        """What status.py tells of the one step."""
        return json.loads(self.call("status.py", root, "--json", code=code))["steps"][0]

    def wait(self, root: Path) -> str:
        """Until the newest run's jobs have ended; its log."""
        (log,) = wait_for(lambda: list(root.glob("logs/runs/*/*.log")), "log")
        self.wait_for_jobs()
        return log.read_text()

    @contextlib.contextmanager
    def limit(self, jobs: int) -> Iterator[None]:
        """Allow this user so many jobs in the queue."""

        def allow(number: int) -> None:
            self.run("sacctmgr", "--immediate", "modify", "user", "root", "set", f"MaxSubmitJobs={number}")

        allow(jobs)
        try:
            yield
        finally:
            allow(-1)

    def wait_for_jobs(self) -> None:
        wait_for(lambda: not self.cluster.ask("squeue", "--noheader"), "end of all jobs", every_s=0.2)


def wait_for(condition, what: str, every_s: float = 0.1):
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} after {PATIENCE_S} s"
        time.sleep(every_s)
    return value


@pytest.fixture(scope="module")
def site():
    reason = one_node_slurm.why_not()
    if reason:
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as name:  # not pytest's, which other users may not enter
        folder = Path(name)
        folder.chmod(0o755)
        with OneNodeSlurm(folder / "cluster", limits=True, more=RULES) as cluster:
            yield Site(folder, cluster)


# ------------------------------------------------------------------------------------------- the environment


def test_jobs_without_the_submitting_shells_environment_find_what_env_sh_sets(site, tmp_path):
    site.submit(tmp_path, SBATCH_EXPORT="NONE")
    assert "ends with exit code 0" in site.wait(tmp_path)
    assert site.step(tmp_path)["state"] == "done"


def test_prefetch_looks_for_the_backbone_in_a_job_with_the_flags_of_jobs(site, tmp_path):
    """Also those that only sbatch has."""
    write_local_backbone(tmp_path / "backbone")
    flags = ["--no-requeue", "--export=NONE", "--mem=500M"]
    told = site.call(
        "submit.py", tmp_path, "--prefetch", "--set", f"embedding_model.name={tmp_path / 'backbone'}",
        "--set", f"slurm.sbatch={json.dumps(flags)}", "--set", "slurm.generate_embeddings.sbatch=[]",
    )  # fmt: skip
    *_, in_job = told.split("checking from a compute node")
    assert f"MB of weights in {tmp_path / 'backbone'}" in in_job
    assert "ends with exit code 0" in in_job


def test_a_wrapper_is_submitted_by_hand_from_inside_another_job(site, tmp_path):
    """A job array with GPUs: srun would ask for them, and the stage would take its index for a shard."""
    inner = ["sbatch", "--mem=500M", "--cpus-per-task=1", "--output=inner.log"]
    inner += [
        site.checkout / "slurm" / "stages" / "process_tar.sbatch",
        "--num-shards=1",
        "--set",
        f"paths.root={tmp_path}",
    ]
    inner += ["--set", f"paths.raw_dir={site.folder / 'raw'}"]
    outer = ["sbatch", "--array=1", "--gpus=1", "--mem=500M", "--cpus-per-task=2", "--output=outer.log"]
    wrap = f"srun -n1 -c2 {shlex.join(map(str, inner))}"
    site.run(*outer, f"--chdir={tmp_path}", f"--wrap={wrap}")
    site.wait_for_jobs()
    assert "ends with exit code 0" in (tmp_path / "inner.log").read_text()
    assert list(tmp_path.glob("**/*.parquet"))


def test_options_of_a_profile_hide_no_job(site, tmp_path):
    site.submit(tmp_path, "--set", 'slurm.sbatch=["--hold"]')
    profile = {"SQUEUE_PARTITION": "short", "SQUEUE_STATES": "RUNNING", "SCANCEL_STATE": "RUNNING"}
    assert "held (JobHeldUser)" in site.call("status.py", tmp_path, **profile)
    assert "still running: process_tar in the queue" in site.submit(tmp_path, code=1, **profile)
    (run,) = tmp_path.glob("logs/runs/*")
    site.call("submit.py", tmp_path, "--cancel", run.name, **profile)
    assert site.step(tmp_path, code=1)["state"] == "cancelled"


# --------------------------------------------------------------------------------------------- what is refused


def test_a_job_that_cannot_be_queued_again_ends_at_once_and_status_names_the_cause(site, tmp_path):
    python = site.python.read_text()
    site.python.write_text("#!/bin/sh\nexit 85\n")  # as a stage that was told to stop
    try:
        site.submit(tmp_path, "--set", 'slurm.sbatch=["--no-requeue"]')
        began = time.monotonic()
        site.wait(tmp_path)
    finally:
        site.python.write_text(python)
    assert time.monotonic() - began < 10
    why = site.step(tmp_path, code=1)["why"]
    assert why.startswith("stopped with everything saved, and could not be requeued: Requested operation is")


def test_watching_ends_where_a_job_will_never_start(site, tmp_path):
    flags = ["--set", 'slurm.sbatch=["--partition=short"]', "--to", "compute_fingerprints"]
    site.call("submit.py", tmp_path, *flags)
    wait_for(lambda: "PartitionTimeLimit" in site.cluster.ask("squeue", "--format=%r"), "reason")
    told = site.call("status.py", tmp_path, "--watch", code=1)
    assert "forever: its time limit exceeds the partition's" in told
    assert "waiting" in told  # compute_fingerprints, for what will never run
    cancel, proceed = re.findall("(?:after|with:)  python (.*)", told)
    site.run(sys.executable, *shlex.split(cancel))
    shorter = ["--set", "slurm.process_tar.time=00:10:00", "--to", "process_tar"]
    site.run(sys.executable, *shlex.split(proceed), *shorter)
    site.wait_for_jobs()
    assert site.step(tmp_path)["state"] == "done"


def test_a_job_with_a_start_time_is_not_told_as_queued_again(site, tmp_path):
    site.submit(tmp_path, "--set", 'slurm.sbatch=["--begin=now+1hour"]')
    wait_for(lambda: site.step(tmp_path)["why"] == "for its start time (--begin)", "start time")
    site.call("submit.py", tmp_path, "--cancel", max(tmp_path.glob("logs/runs/*")).name)


def test_a_limit_on_submitted_jobs_is_named_and_fewer_shards_are_submitted_instead(site, tmp_path):
    with site.limit(1):
        told = site.submit(tmp_path, "--wait", "--set", "slurm.num_shards=2", code=1)  # nothing of ours will end
        assert "AssocMaxSubmitJobLimit: no more jobs of yours" in told
        assert "lower slurm.num_shards" in told
        (run,) = tmp_path.glob("logs/runs/*")
        site.call("submit.py", tmp_path, "--continue", run.name, "--set", "slurm.num_shards=1")
    site.wait(tmp_path)
    assert site.step(tmp_path)["tasks"] == {"done": 1}


def test_the_rest_is_submitted_when_there_is_room(site, tmp_path, monkeypatch, capsys):
    settings = [f"paths.root={tmp_path}", f"paths.raw_dir={site.folder / 'raw'}", "slurm.num_shards=1"]
    flags = [word for setting in settings for word in ("--set", setting)]
    with site.limit(1), monkeypatch.context() as patched:
        patched.setenv("SLURM_CONF", site.environment["SLURM_CONF"])
        patched.setenv("PATH", f"{site.python.parent}:{site.environment['PATH']}")
        patched.setattr(jobs, "WAIT_S", 1)
        assert submit.main([*flags, "--to", "compute_fingerprints", "--wait"]) == 0
    assert "compute_fingerprints was not submitted: " in capsys.readouterr().err
    site.wait_for_jobs()
    report = json.loads(site.call("status.py", tmp_path, "--json"))
    assert [step["state"] for step in report["steps"]] == ["done", "done"]


# ---------------------------------------------------------------------------------------------- another user


def test_jobs_that_a_cluster_hides_are_told_as_that_and_not_submitted_again(site, tmp_path, monkeypatch):
    """PrivateData=jobs; a folder of two users. The second one is this process, whose clients ask as nobody."""
    site.submit(tmp_path, "--set", 'slurm.sbatch=["--hold"]')
    (folder,) = tmp_path.glob("logs/runs/*")
    for name in ("squeue", "scontrol", "sbatch", "scancel"):
        real = shutil.which(name, path=site.environment["PATH"])
        (tmp_path / name).write_text(f'#!/bin/sh\nexec setpriv --reuid=65534 --clear-groups {real} "$@"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("SLURM_CONF", site.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(os, "getuid", lambda: 65534)
    entry = runs.load(folder)["steps"]["process_tar"]
    try:
        report = status.report(folder)
        assert (report["steps"][0]["state"], report["live"], report["failed"]) == ("unknown", True, False)
        assert "(PrivateData)" in report["steps"][0]["why"]
        with pytest.raises(PipelineError, match=r"may still be running: process_tar\. .* hides the jobs of root"):
            runs.refuse_busy(tmp_path / "logs", [entry])
        with pytest.raises(PipelineError, match="only they can continue or cancel"):
            runs.cancel(folder)
        log = Path(entry["log"])
        log.write_text("-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code 1\n")
        runs.refuse_busy(tmp_path / "logs", [entry])  # its log says that it has ended
        assert status.report(folder)["steps"][0]["state"] == "failed"
        log.write_text("-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code 85\n")  # and is queued again
        with pytest.raises(PipelineError, match="may still be running"):
            runs.refuse_busy(tmp_path / "logs", [entry])
    finally:
        monkeypatch.undo()
        site.call("submit.py", tmp_path, "--cancel", folder.name)
