"""slurm/stage.sbatch and the wrappers, with fake clients of Slurm; tests/test_slurm.py runs them on a real one."""

import os
import re
import shlex
import shutil
import signal
import subprocess

import pytest
from conftest import ROOT

from common import config, sections

SHELL_FILES = sorted(
    [
        *ROOT.glob("slurm/**/*.sbatch"),
        *ROOT.glob("slurm/**/*.sh"),
        ROOT / "slurm" / "sites" / "in_container" / "python",
        ROOT / ".ci" / "run",
    ]
)


@pytest.fixture
def wrapped(tmp_path):
    """Run stage.sbatch with a fake srun, which ends with `code`, and a fake scontrol, which notes its words."""

    def run(
        *arguments,
        code: int = 0,
        scontrol: str = "exit 0",
        sleep: str = "kill -KILL $PPID",
        env: str = "",
        **variables,
    ) -> subprocess.CompletedProcess:
        for name, text in {
            "srun": f'env | grep ^SLURM_; echo srun "$@"; exit {code}',
            "scontrol": f'echo "$@" >> {tmp_path}/requeued; {scontrol}',
            "sleep": sleep,  # the controller kills the script while it sleeps, once it is queued again
        }.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "9", **variables}
        # the .venv that env.sh would put before the fakes stays out
        (tmp_path / "slurm").mkdir(exist_ok=True)
        (tmp_path / "slurm" / "env.sh").write_text(env)
        command = ["bash", str(ROOT / "slurm" / "stage.sbatch"), str(tmp_path), "2", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)

    return run


def test_an_array_is_divided_among_the_tasks_of_its_jobs_and_nothing_else_is(wrapped, tmp_path):
    def step(*arguments, **variables):
        told = wrapped(*arguments, **{"SLURM_ARRAY_TASK_ID": "2", "SLURM_NTASKS": "4", **variables}).stdout
        return next(line for line in told.splitlines() if line.startswith("srun ")).split()[1:]

    task, script = str(tmp_path / "slurm" / "node" / "task.py"), str(tmp_path / "a" / "b.py")
    several = ["--export=ALL", "--ntasks=4", "--label", "--kill-on-bad-exit=0", "--wait=0", "python", task]
    assert step("a/b.py", "--num-shards", "9") == [*several, script, "--num-shards", "9"]
    assert step("a/b.py", "--num-shards=9") == [*several, script, "--num-shards=9"]
    assert step("train/optuna_worker.py") == [*several, str(tmp_path / "train" / "optuna_worker.py")]
    assert step("a/b.py") == ["--export=ALL", "--ntasks=1", "python", task, script]
    one = ["--export=ALL", "--ntasks=1", "python", task, script, "--num-shards=9"]
    assert step("a/b.py", "--num-shards=9", SLURM_NTASKS="1") == one
    assert step("a/b.py", "--num-shards=9", SLURM_ARRAY_TASK_ID="") == one  # joins the parts of the others


def test_the_wrapper_keeps_another_jobs_shape_from_srun(wrapped):
    """Of the interactive job that sbatch was called from: srun ends at once where it cannot have the same."""
    names = "MEM_PER_CPU MEM_PER_NODE CPU_BIND CPU_BIND_LIST GPUS GPUS_PER_TASK NTASKS_PER_NODE".split()
    names += ["TRES_PER_TASK", "TRES_BIND"]
    told = wrapped("a/b.py", **{f"SLURM_{name}": "8" for name in names}, SLURM_CPUS_PER_TASK="4").stdout
    assert set(re.findall(r"^SLURM_\w+", told, re.MULTILINE)) == {"SLURM_JOB_ID", "SLURM_CPUS_PER_TASK"}
    assert "SLURM_CPU_BIND=none" in wrapped("a/b.py", env="export SLURM_CPU_BIND=none").stdout  # the user's own


def test_a_stage_that_was_told_to_stop_is_queued_again_by_itself_up_to_the_limit(wrapped, tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    killed = -signal.SIGKILL  # by the requeueing: it must not end by itself
    assert wrapped("a/b.py", code=85).returncode == killed
    show = "echo ArrayJobId=9"
    assert wrapped("a/b.py", code=85, scontrol=show, SLURM_RESTART_COUNT="1", **array).returncode == killed
    last = wrapped("a/b.py", code=85, SLURM_RESTART_COUNT="2")
    assert last.returncode == 85
    assert "was queued again 2 times" in last.stdout
    assert wrapped("a/b.py", code=1).returncode == 1
    assert wrapped("a/b.py", code=143).returncode == killed  # preempted, in a stage that cannot stop half-way
    # "requeue 9" of an array's last task, whose own id is the array's, would requeue every task
    asked = (tmp_path / "requeued").read_text().splitlines()
    assert [words for words in asked if "show" not in words] == ["requeue 9", "requeue 9_3", "requeue 9"]


def test_an_array_that_submitted_the_job_is_not_taken_for_its_own(wrapped):
    """Slurm leaves the array's variables to the jobs that sbatch submits in it."""
    outer = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    told = wrapped("a/b.py", "--num-shards=9", scontrol="echo JobId=9 JobName=b", **outer).stdout
    assert "SLURM_ARRAY" not in told
    assert " job 9 starts on " in told
    for answer in ("echo JobId=9 ArrayJobId=7 ArrayTaskId=3", "exit 1"):  # 1: nobody can tell
        told = wrapped("a/b.py", "--num-shards=9", scontrol=answer, **outer).stdout
        assert "SLURM_ARRAY_TASK_ID=3" in told
        assert " job 7_3 starts on " in told


def test_requeueing_is_tried_again_while_the_controller_does_not_answer(wrapped, tmp_path):
    answers = f"[ $(wc -l < {tmp_path}/requeued) -ge 3 ]"  # the third time
    told = wrapped("a/b.py", code=85, scontrol=answers, sleep="[ $1 = 10 ] || kill -KILL $PPID")
    assert told.returncode == -signal.SIGKILL
    assert (tmp_path / "requeued").read_text().splitlines() == ["requeue 9"] * 3


@pytest.mark.parametrize(
    ("scontrol", "cause"),
    [
        ("echo 'Requested operation is presently disabled for job 9' >&2; exit 1", "presently disabled"),
        ("echo 'slurm_requeue error: Access/permission denied' >&2; exit 1", "Access/permission denied"),
        ("echo 'line 36: scontrol: Kommando nicht gefunden.' >&2; exit 127", "Kommando nicht gefunden"),
    ],
)
def test_a_refused_requeueing_ends_the_job_at_once_with_the_cause(wrapped, scontrol, cause):
    told = wrapped("a/b.py", code=85, scontrol=scontrol)
    assert told.returncode == 85  # it has not slept
    assert re.search(rf"^-- \d+ job 9 cannot be queued again \(.*{cause}", told.stdout, re.MULTILINE)


def test_what_goes_wrong_in_env_sh_is_in_the_log_after_its_start(wrapped):
    told = wrapped("a/b.py", env="no_such_module load x; exit 3")
    assert told.returncode == 3
    assert told.stdout.startswith("-- ")


def test_the_wrappers_ask_for_what_config_toml_says():
    cfg = config.load()
    stages = [name for name, value in cfg.slurm if isinstance(value, sections.SlurmStage)]
    like = dict.fromkeys(
        ["generate_embeddings_from_parquet", "generate_embeddings_from_hf"], "generate_embeddings"
    )
    assert {path.stem for path in ROOT.glob("slurm/stages/*.sbatch")} == {*stages, *like}
    for name in (*stages, *like):
        lines = (ROOT / "slurm" / "stages" / f"{name}.sbatch").read_text().splitlines()
        resources = getattr(cfg.slurm, like.get(name, name))
        assert len(lines) == 3
        flags = set(shlex.split(lines[1])[1:])
        assert flags >= {f"--time={resources.time}", f"--signal=USR2@{cfg.slurm.signal_before_s}", "--requeue"}
        # --ntasks=1 where arrays are divided: or sbatch hands on SLURM_NTASKS of the job that it is called in
        ours = re.compile("--(job-name|output|open-mode|requeue|signal|time|ntasks)")
        assert {flag for flag in flags if not ours.match(flag)} == {*cfg.slurm.sbatch, *resources.sbatch}
        assert ("--ntasks=1" in flags) == isinstance(resources, sections.SlurmArray)
        (script,) = [path.relative_to(ROOT) for path in ROOT.glob(f"*/{name}.py")]
        assert lines[2].endswith(f'"$root" {cfg.slurm.max_requeues} {script} "$@"')
        assert f"/slurm/stages/{name}[.]sbatch" in lines[2]


def test_shell_files_are_short_and_pass_shellcheck():
    files = [*SHELL_FILES, ROOT / ".ci" / "system-packages", ROOT / ".ci" / "newer-slurm"]
    assert max(len(path.read_text().splitlines()) for path in files) < 60
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "shellcheck is not installed"
        pytest.skip("shellcheck is not installed here: .ci/system-packages installs it")
    result = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
