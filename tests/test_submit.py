"""slurm/submit.py and what it calls: the graph, the command lines, what is left, the local run, a task's fate.
No Slurm is needed: tests/test_slurm.py submits to a real one.
"""

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from common import cli, config
from common.errors import ConfigError, PipelineError
from common.provenance import Provenance
from generate import weights
from slurm import artefacts, fates, jobs, local, runs, status, submit

SHELL_FILES = sorted([*ROOT.glob("slurm/*.sbatch"), ROOT / "slurm" / "env.sh", ROOT / ".ci" / "run"])


@pytest.fixture
def cfg(tmp_path):
    return config.load(None, [f"paths.root={tmp_path}", "slurm.num_shards=4", 'slurm.sbatch=["--account=abc"]'])


def everything(steps) -> dict[str, list[int]]:
    return {step.name: list(range(step.tasks)) for step in steps}


def sbatch_line(step, cfg, tasks=None, dependency="") -> list[str]:
    tasks = list(range(step.tasks)) if tasks is None else tasks
    return jobs.sbatch_command(step, tasks, cfg, cfg.paths.logs_dir, dependency)


# ------------------------------------------------------------------------------------------------ the graph


def test_every_step_needs_only_steps_before_it_and_has_resources_a_target_and_a_wrapper(cfg):
    for steps in (submit.chain(cfg), submit.chain(cfg, tune=3)):
        seen = set()
        for step in steps:
            assert set(step.needs) <= seen
            assert getattr(cfg.slurm, step.resources).time
            assert (ROOT / step.script).exists()
            assert (ROOT / "slurm" / f"{step.resources}.sbatch").exists()
            assert artefacts.target_of(step.name, cfg).is_relative_to(cfg.paths.root)
            seen.add(step.name)


def test_shard_i_waits_for_shard_i_only_where_that_is_enough(cfg):
    steps = submit.chain(cfg)
    ids = {step.name: str(number) for number, step in enumerate(steps, 1)}
    waits = {step.name: jobs.dependency_of(step, everything(steps), ids) for step in steps}
    assert waits["process_tar"] == ""
    assert waits["generate_embeddings"] == "aftercorr:1"
    assert waits["merge_and_split"] == "afterok:2:3"  # a merge waits for all shards of both
    assert waits["train"] == "afterok:6"


def test_arrays_of_different_shards_are_not_paired(cfg):
    embeddings = next(step for step in submit.chain(cfg) if step.name == "generate_embeddings")
    for theirs, ours, expected in [([1, 3], [1, 3], "aftercorr:7"), ([1], [1, 3], "afterok:7")]:
        todo = {"process_tar": theirs, "generate_embeddings": ours}
        assert jobs.dependency_of(embeddings, todo, {"process_tar": "7"}) == expected


def test_an_array_holds_the_shards_that_are_left_and_is_throttled(cfg):
    steps = {step.name: step for step in submit.chain(cfg, tune=3)}
    command = sbatch_line(steps["generate_embeddings"], cfg, [0, 1, 3], "aftercorr:7")
    assert "--array=0-1,3%4" in command
    assert "--dependency=aftercorr:7" in command
    assert command.index("--account=abc") < command.index(f"{ROOT}/slurm/stage.sbatch")
    settings = str(cfg.paths.logs_dir / "config.toml")
    assert command[-5:] == ["generate/generate_embeddings.py", "--num-shards", "4", "--config", settings]
    assert "--array=0-2" in sbatch_line(steps["optuna_worker"], cfg)
    assert not any(flag.startswith("--array") for flag in sbatch_line(steps["train"], cfg))


def test_a_neighbour_search_in_parts_is_gathered_by_one_task(tmp_path):
    cfg = config.load(None, [f"paths.root={tmp_path}", "slurm.difficulty_shards=5"])
    steps = {step.name: step for step in submit.chain(cfg)}
    assert steps["neighbor_parts"].tasks == 5
    assert steps["compute_visual_neighbors"].needs == ("neighbor_parts",)
    assert steps["compute_visual_neighbors"].arguments == ("--num-shards", "5", "--finish")


def test_select_takes_both_ends_and_refuses_what_is_not_there(cfg):
    steps = submit.chain(cfg)
    names = [step.name for step in submit.select(steps, "merge_and_split", "train")]
    assert names == ["merge_and_split", "summarize_ids", "compute_visual_neighbors", "train"]
    with pytest.raises(ConfigError, match="there is no stage trian; the stages are process_tar"):
        submit.select(steps, "trian", None)
    with pytest.raises(ConfigError, match="comes after"):
        submit.select(steps, "train", "process_tar")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tune", "-1"], "number of workers"),
        (["--jobs", "2"], "belongs to --local"),
        (["--dry-run", "--cancel", "20260101-000000"], "nothing else has one"),
        (["--only", "train", "--to", "train"], "leave out --from and --to"),
    ],
)
def test_unusable_arguments_say_so(arguments, message):
    with pytest.raises(ConfigError, match=message):
        submit.parse(arguments)


# ------------------------------------------------------------------------------------------------ what is left


def test_what_depends_on_something_left_is_left_too(cfg, monkeypatch):
    done = {("process_tar", 0), ("process_tar", 2), ("process_tar", 3), ("compute_fingerprints", 1)}
    done |= {("generate_embeddings", task) for task in range(4)}
    monkeypatch.setattr(artefacts, "is_done", lambda step, task, _: (step.name, task) in done)
    steps = submit.chain(cfg)
    left = artefacts.missing(steps, cfg)
    assert left["process_tar"] == [1]
    assert left["compute_fingerprints"] == [0, 1, 2, 3]  # 1 is there, but its input is made anew
    assert left["generate_embeddings"] == [1]
    assert left["merge_and_split"] == [0]
    assert artefacts.missing(steps[2:3], cfg) == {
        "generate_embeddings": []
    }  # --only: no step before it is looked at


def test_a_file_is_done_if_its_settings_and_inputs_are_the_same(cfg, tmp_path):
    """process_tar and compute_fingerprints on one tar; then a setting, the input and the file itself change."""
    from synthetic import write_dataset

    flags = ["--set", f"paths.root={tmp_path}"]
    write_dataset(cfg.paths.raw_dir, streets=1, cities=1, image_px=96)
    steps = submit.chain(cfg)[:2]
    assert artefacts.missing(steps, cfg)["process_tar"] == [0]  # shards 1 to 3 have no tar
    for step in steps:
        subprocess.run(local.local_command(step, flags), check=True, capture_output=True)
    assert artefacts.missing(steps, cfg) == {"process_tar": [], "compute_fingerprints": []}

    exact = config.load(None, [*flags[1:], "slurm.num_shards=4", "data.fingerprint=exact"])
    assert artefacts.missing(steps, exact) == {"process_tar": [], "compute_fingerprints": [0]}
    fingerprints = cfg.paths.fingerprints_dir / "0088.parquet"
    whole = fingerprints.read_bytes()
    fingerprints.write_bytes(whole[:100])
    assert artefacts.missing(steps, cfg)["compute_fingerprints"] == [0]
    fingerprints.write_bytes(whole)
    with (cfg.paths.raw_dir / "0088.tar").open("ab") as tar:
        tar.write(bytes(512))
    assert artefacts.missing(steps, cfg) == {"process_tar": [0], "compute_fingerprints": [0]}


def test_other_weights_in_a_folder_of_the_same_name_are_noticed_and_a_moved_folder_is_not(tmp_path):
    """What was embedded with the old ones would count as done, and no stage would be asked."""
    for folder, content in [("old", b"1"), ("moved", b"1"), ("swapped", b"2")]:
        (tmp_path / folder / "backbone").mkdir(parents=True)
        (tmp_path / folder / "backbone" / "model.safetensors").write_bytes(content)
    digest = weights.weights_digest(tmp_path / "old" / "backbone")
    record = {
        "embedding_model.name": "backbone",
        "embedding_model.weights": digest,
        "embedding_model.pooling": "cls",
    }
    there = Provenance("generate_embeddings", record, inputs={})
    for folder, same in [("old", True), ("moved", True), ("swapped", False)]:
        cfg = config.load(None, [f"embedding_model.name={tmp_path / folder / 'backbone'}"])
        assert artefacts._same_settings(there, cfg) == same


def test_without_tars_everything_is_left(cfg):
    assert all(artefacts.missing(submit.chain(cfg, tune=2), cfg).values())


def test_dry_run_needs_no_slurm_and_prints_every_command(run_script, tmp_path):
    result = run_script("slurm/submit.py", "--dry-run", "--set", f"paths.root={tmp_path}", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    scripts = re.findall(r"stage\.sbatch \S+ \d+ (\S+)", result.stdout)
    assert scripts == [step.script for step in submit.chain(config.load())]
    assert "process_tar                16 of 16 tasks to do (0-15)" in result.stdout
    assert "after compute_fingerprints, generate_embeddings" in result.stdout
    assert result.stdout.count(f"--config {tmp_path}/logs/runs/TIME/config.toml") == len(scripts)
    assert not (tmp_path / "logs").exists()


def test_without_slurm_it_says_so_and_offers_local(monkeypatch, cfg, tmp_path):
    monkeypatch.setattr(jobs.shutil, "which", lambda _: None)
    steps = submit.chain(cfg)
    with pytest.raises(PipelineError, match="--local"):
        jobs.submit(steps, everything(steps), cfg, submit.parse([]))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PipelineError, match="there is no squeue here"):
        runs.queue(0)


# ------------------------------------------------------------------------------------------------ here


def test_a_local_run_stops_at_the_stage_that_fails_with_its_exit_code(run_script, tmp_path):
    result = run_script("slurm/submit.py", "--local", "--set", f"paths.root={tmp_path}")
    assert result.returncode == 1
    assert "process_tar" in result.stdout
    assert "compute_fingerprints" not in result.stdout
    assert "Traceback" not in result.stderr
    assert "the chain stopped at process_tar (exit code 1)" in result.stderr


def test_jobs_cut_what_goes_by_tars_and_the_others_wait_for_all_of_it(cfg, tmp_path):
    steps = submit.chain(cfg, tune=3)
    commands = local.commands(steps, everything(steps), ["--set", "a.b=1"], jobs=2)
    names = [step.name for step, _ in commands]
    assert [names.count(name) for name in ("process_tar", "merge_and_split", "optuna_worker")] == [2, 1, 2]
    assert commands[1][1][-6:] == ["--set", "a.b=1", "--num-shards", "2", "--shard", "1"]
    one_by_one = local.commands(steps, everything(steps), [], jobs=1)
    assert [step.name for step, _ in one_by_one] == [step.name for step in steps]
    assert not any("--shard" in command for _, command in one_by_one)

    # the same order with commands that only say when they begin and end
    log = tmp_path / "log"
    told = [(s, ["sh", "-c", f"echo begin {s.name} >> {log}; echo end {s.name} >> {log}"]) for s, _ in commands]
    assert local.run(told, jobs=2) == 0
    lines = log.read_text().splitlines()
    for step in steps:
        begin = lines.index(f"begin {step.name}")
        for need in step.needs:
            assert max(i for i, line in enumerate(lines) if line == f"end {need}") < begin


def test_after_a_failure_nothing_new_is_started(cfg, tmp_path):
    steps = submit.chain(cfg)
    commands = [(step, ["sh", "-c", "exit 3" if step.name == "summarize_ids" else "true"]) for step in steps]
    commands[-1] = (steps[-1], ["touch", str(tmp_path / "started")])
    for at_once in (1, 3):
        assert local.run(commands, at_once) == 3
        assert not (tmp_path / "started").exists()


# ------------------------------------------------------------------------------------------------ status


def log_of(folder, text: str) -> fates.Log:
    (folder / "a.log").write_text(text)
    return fates.read_log(folder / "a.log")


def test_a_log_is_read_from_its_last_start_on(tmp_path):
    assert fates.read_log(tmp_path / "none.log").first_start_s is None
    first = "-- 100 job 7 starts on a\nstopped\n-- 200 job 7 ends with exit code 85\n"
    requeued = "slurmstepd: error: *** JOB 7 ON a CANCELLED AT 2026-01-01T00:00:00 DUE TO JOB REQUEUE ***\n"
    running = log_of(tmp_path, first + requeued + "-- 300 job 7 starts on b\nworking\n")
    assert (running.first_start_s, running.exit_code, running.killed) == (100, None, "")
    assert running.lines == ("working",)
    failed = log_of(tmp_path, first + "-- 300 job 7 starts on b\nerror: no\n-- 301 job 7 ends with exit code 1\n")
    assert (failed.exit_code, failed.lines) == (1, ("error: no",))
    limit = "slurmstepd: error: *** STEP 7.0 ON a CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\n"
    assert log_of(tmp_path, "-- 1 job 7 starts on a\n" + limit).killed == "time limit"


MEMORY = "out of memory: raise slurm.process_tar.sbatch (--mem)"


@pytest.mark.parametrize(
    ("job", "text", "expected"),
    [
        (("PENDING", "Dependency"), "", ("waiting", "Dependency")),
        (("RUNNING", "None"), "-- 1 job 7 starts on a\n", ("running", "")),
        (("CANCELLED", "DependencyNeverSatisfied"), "", ("cancelled", "what it needs has failed")),
        (
            ("TIMEOUT", "TimeLimit"),
            "-- 1 job 7 starts on a\n",
            ("failed", "time limit: raise slurm.process_tar.time"),
        ),
        (("SUSPENDED", "None"), "-- 1 job 7 starts on a\n", ("running", "suspended")),
        (("REQUEUE_HOLD", "None"), "-- 1 job 7 starts on a\n", ("waiting", "held (None): scontrol release 7")),
        (
            ("PENDING", "launch failed requeued held"),
            "",
            ("waiting", "held (launch failed requeued held): scontrol release 7"),
        ),
        (("PENDING", "QOSUsageThreshold"), "", ("waiting", "QOSUsageThreshold")),  # not held
        (("PENDING", "PartitionTimeLimit"), "", ("waiting", "for ever: its time is more than the partition's")),
        (("NODE_FAIL", "NodeDown"), "", ("failed", "its node failed")),
        (("BOOT_FAIL", "None"), "", ("failed", "its node did not boot")),
        (("PREEMPTED", "None"), "-- 1 job 7 starts on a\n", ("failed", "preempted")),
        (("OUT_OF_MEMORY", "OutOfMemory"), "-- 1 job 7 starts on a\n", ("failed", MEMORY)),
        (
            ("FAILED", "JobLaunchFailure"),
            "",
            ("failed", "before it could write its log (JobLaunchFailure): do compute nodes see the folder?"),
        ),
        (
            None,
            "-- 1 job 7 starts on a\nslurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n"
            "-- 2 job 7 ends with exit code 137\n",
            ("failed", MEMORY),
        ),
        (
            None,
            "-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code 85\n",
            ("failed", "stopped with all saved, and not queued again (slurm.max_requeues)"),
        ),
        (
            ("CANCELLED", "None"),
            "-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code 85\n"
            "slurmstepd: error: *** JOB 7 ON a CANCELLED AT 2026-01-01T00:00:00 DUE TO JOB REQUEUE ***\n",
            ("cancelled", "before it started again"),
        ),
        (None, "", ("cancelled", "before it started")),  # Slurm has forgotten the job: the log alone tells
        (None, "-- 1 job 7 starts on a\n", ("failed", "killed")),
        (None, "-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code 1\n", ("failed", "exit code 1")),
    ],
)
def test_what_became_of_a_task(cfg, tmp_path, job, text, expected):
    step = submit.chain(cfg)[0]
    job = job and runs.Job("7_0", "process_tar", *job)
    log = log_of(tmp_path, text) if text else fates.read_log(tmp_path / "none.log")
    assert fates.fate(step, 0, job, log, cfg) == expected


def test_a_reused_job_id_is_not_taken_for_the_runs_own(cfg, tmp_path):
    """A cluster that was set up anew counts from 1 again: --cancel must not end somebody else's job 7."""
    record = {"steps": {"train": {"job": "7"}, "evaluate": {"job": "8"}}}
    queue = {"7": runs.Job("7", "another", "RUNNING", ""), "8": runs.Job("8", "evaluate", "PENDING", "")}
    assert runs.live_steps(record, queue) == {"evaluate": "8"}
    entry = {"job": "7", "tasks": [0], "of": 1, "log": str(tmp_path / "none.log")}
    step = next(step for step in submit.chain(cfg) if step.name == "train")
    (task,) = fates.tasks_of(step, entry, queue, cfg)
    assert task.state == "cancelled"  # not running, as the other job 7 is


REPORT = {
    "run": "20260101-000000",
    "folder": "/logs/runs/20260101-000000",
    "live": True,
    "failed": True,
    "continue": "python slurm/submit.py --set training.epochs=5 --set paths.root=/scratch/a/long/path/to/where",
    "continue_submission": "",
    "cancel": "python slurm/submit.py --cancel 20260101-000000",
    "steps": [
        {
            "name": "process_tar",
            "job": "7",
            "state": "failed",
            "why": "exit code 1",
            "tasks": {"failed": 1, "running": 4, "done": 11},
            "progress": {"done": 412, "total": 1700, "unit": "files", "per_hour": 120.4, "seconds_left": 36000.0},
        },
        {"name": "compute_visual_neighbors", "job": "8", "state": "waiting", "why": "for merge_and_split"}
        | {"tasks": {"waiting": 1}, "progress": {}},
    ],
    "failures": [
        {"step": "process_tar", "task": 3, "job": "7_3", "why": "exit code 1", "log": "/logs/process_tar-3.log"}
        | {"last_lines": ["error: " + "x" * 200]}
    ],
}


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_narrow_terminal_the_table_keeps_what_matters(width):
    lines = status.as_text(REPORT, width).splitlines()
    table = lines[2:5]
    assert max(map(len, table)) <= width
    assert re.search(r"process_tar +failed +11 of 16 +412 of 1,700 files +10 h 00 min", table[1])
    assert table[2].startswith("compute_visual_neighbors  waiting")
    assert ("1 failed, 4 running; exit code 1" in table[1]) == (width == 120)
    assert lines[-1].endswith(REPORT["continue"])  # whole: it is to be copied
    assert "  | error: " + "x" * 200 in lines


def test_watch_shows_no_more_than_the_terminal_holds_while_something_lives():
    screen = status.on_screen(REPORT, 80, 8)
    assert screen.startswith("\033[H\033[J")
    assert len(screen.splitlines()) == 7
    assert max(map(len, status.on_screen(REPORT, 80, 50).splitlines()[1:])) == 80
    assert screen.endswith("... (more without --watch)")
    assert REPORT["continue"] in status.on_screen(REPORT | {"live": False}, 80, 8)  # the last one stays


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """Fake clients of Slurm: `clients(squeue="echo hello")` puts shell scripts before the PATH."""
    folder = tmp_path / "clients"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def write(**scripts) -> None:
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)

    return write


@pytest.fixture
def submitted(cfg, clients, tmp_path):
    """Submit the whole chain to a fake sbatch, which notes its environment; the folder of the run."""

    def submit_all(*arguments) -> Path:
        clients(
            sbatch=f"echo >> {tmp_path}/calls; env > {tmp_path}/environment; wc -l < {tmp_path}/calls",
            squeue="true",
            scontrol="echo 'MaxArraySize = 1001'",
        )
        steps = submit.chain(cfg)
        assert jobs.submit(steps, everything(steps), cfg, submit.parse(list(arguments))) == 0
        return runs.find(cfg.paths.logs_dir, None)

    return submit_all


def test_jobs_keep_the_settings_with_which_they_were_submitted(submitted, cfg):
    """A job that is queued again after days reads them again: the user's config.toml may be another by then."""
    folder = submitted()
    assert config.load(folder / "config.toml") == cfg
    commands = [entry["command"] for entry in runs.load(folder)["steps"].values()]
    assert len(commands) == 9
    assert {tuple(command[-2:]) for command in commands} == {("--config", str(folder / "config.toml"))}


def test_nothing_of_an_interactive_job_is_handed_on(submitted, tmp_path, monkeypatch):
    """srun takes its number of tasks and its memory per core for options; a task's number would become a shard."""
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert runs.environment()["SLURM_TIME_FORMAT"] == "relative"  # the user's own, outside of a job
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_MEM_PER_CPU", "SLURM_ARRAY_TASK_ID", "SRUN_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "5")
    submitted()
    lines = (tmp_path / "environment").read_text().splitlines()
    assert [line for line in lines if line.startswith(("SLURM", "SRUN"))] == ["SLURM_CONF=/etc/slurm.conf"]


def test_two_submits_at_once_do_not_submit_twice(submitted, cfg):
    with runs.lock(cfg.paths.logs_dir), pytest.raises(PipelineError, match=r"another slurm/submit\.py is at work"):
        submitted()
    submitted()


def test_what_a_live_job_reads_is_not_written(submitted, cfg, clients):
    folder = submitted()
    job = runs.load(folder)["steps"]["train"]["job"]
    clients(squeue=f"echo '{job}|train|RUNNING|None'")
    difficulty, published = str(cfg.paths.difficulty_dir), str(cfg.paths.published_dir)
    checkpoints = str(cfg.paths.checkpoints_dir / "default")
    for reads, writes in [(set(), {difficulty}), (set(), {checkpoints}), ({checkpoints}, set())]:
        with pytest.raises(PipelineError, match="train in the queue"):
            runs.refuse_busy(cfg.paths.logs_dir, reads, writes)
    runs.refuse_busy(cfg.paths.logs_dir, {difficulty}, {published})  # both may read it


def test_the_queue_is_asked_for_the_jobs_of_who_submitted_them(submitted, clients, tmp_path):
    """In a folder that several people share; their own jobs of the same name have other ids."""
    folder = submitted()
    runs.save(folder, runs.load(folder) | {"owner": 12345})
    clients(squeue=f'echo "$@" >> {tmp_path}/asked')
    status.report(folder)
    assert runs.cancel(folder) == 0
    runs.refuse_busy(folder.parents[1], set(), set())
    assert (tmp_path / "asked").read_text().count("--user=12345") == 4


@pytest.mark.parametrize("written_out", ["process_tar-%a.log", "process_tar-0.log"])
def test_a_job_is_known_by_its_log_where_submit_died_before_it_wrote_its_id(submitted, clients, written_out):
    """Slurm writes the task's number out in that name, or not."""
    folder = submitted()
    record = runs.load(folder)
    record["steps"]["process_tar"]["job"] = None
    ours, theirs = f"77 process_tar {folder}/{written_out}", f"78 process_tar /other/{written_out}"
    clients(squeue=f"printf '%-20s%-40s%s\\n' {theirs} {ours}")
    runs.adopt(folder, record)
    assert runs.load(folder)["steps"]["process_tar"]["job"] == "77"


@pytest.mark.parametrize(
    ("answer", "job"),
    [("12", "12"), ("12;cluster", "12"), ("Welcome to the cluster.\n12", "12"), ("quota: 5 left", None)],
)
def test_the_id_is_found_in_what_sbatch_answers(clients, capfd, answer, job):
    clients(sbatch=f"echo 'lua: use --qos=low' >&2; printf '{answer}\\n'")
    if job is None:
        with pytest.raises(PipelineError, match="sbatch names no job: quota"):
            jobs.sbatch(["sbatch"])
    else:
        assert jobs.sbatch(["sbatch"]) == job
    assert "use --qos=low" in capfd.readouterr().err  # of the site's rules: passed on


def test_users_flags_do_not_hide_jobs_and_logs_from_status(cfg):
    flags = ["--job-name=mine", "--output=/dev/null", "--array=0-99", "--time=1:00:00"]
    cfg = cfg.model_copy(update={"slurm": cfg.slurm.model_copy(update={"sbatch": flags})})
    line = sbatch_line(submit.chain(cfg)[0], cfg)
    last = {word.partition("=")[0]: word for word in line}
    assert last["--job-name"] == "--job-name=process_tar"
    assert last["--output"].endswith("process_tar-%a.log")
    assert last["--array"] == "--array=0-3"
    assert last["--time"] == "--time=1:00:00"  # that one is theirs


def test_what_sbatch_refused_is_mended_and_the_rest_submitted_with_the_same_settings(clients, tmp_path, capsys):
    """The account is no setting of a stage: --continue takes it from today's file, all else from the run's."""
    settings = tmp_path / "config.toml"
    written = config.to_toml(config.load(None, [f"paths.root={tmp_path}", "slurm.num_shards=4"]))
    settings.write_text(written.replace("sbatch = []", 'sbatch = ["--account=wrong"]'))
    clients(
        sbatch='case "$*" in *--account=wrong*) echo Invalid account >&2; exit 1;; esac; echo 5',
        squeue="true",
        scontrol="echo 'MaxArraySize = 1001'",
    )
    with pytest.raises(PipelineError, match=r"process_tar was not submitted: sbatch says: Invalid account"):
        submit.main(["--config", str(settings)])
    folder = runs.find(tmp_path / "logs", None)
    assert not runs.job_ids(runs.load(folder))
    right = written.replace("sbatch = []", 'sbatch = ["--account=right"]').replace(
        "num_shards = 4", "num_shards = 9"
    )
    settings.write_text(right.replace("epochs = 20", "epochs = 3"))
    assert submit.main(["--config", str(settings), "--continue", folder.name]) == 0
    record = runs.load(folder)
    assert len(runs.job_ids(record)) == 9
    command = record["steps"]["process_tar"]["command"]
    assert "--account=right" in command
    assert "--array=0-3" in command
    assert config.load(folder / "config.toml").training.epochs == 20


def test_watch_goes_on_while_the_controller_restarts_and_ends_with_the_last_job(monkeypatch, capsys, tmp_path):
    answers = [PipelineError("squeue says: Unable to contact slurm controller"), REPORT, REPORT | {"live": False}]

    def report(_):
        answer = answers.pop(0)
        if isinstance(answer, PipelineError):
            raise answer
        return answer

    monkeypatch.setattr(status, "report", report)
    monkeypatch.setattr(status, "WATCH_EVERY_S", 0)
    assert status.watch(tmp_path, as_json=True) == 1
    told = capsys.readouterr()
    assert [json.loads(line)["live"] for line in told.out.splitlines()] == [True, False]  # a line each time
    assert "Unable to contact slurm controller; trying again" in told.err


def test_ctrl_c_ends_watch_on_a_terminal_quietly(submitted, cfg, clients):
    folder = submitted()
    job = runs.load(folder)["steps"]["process_tar"]["job"]
    clients(squeue=f"echo '{job}_0|process_tar|RUNNING|None'")
    outside, inside = pty.openpty()
    command = [sys.executable, ROOT / "slurm" / "status.py", "--set", f"paths.root={cfg.paths.root}", "--watch"]
    watching = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True)
    os.close(inside)
    shown = b""
    while b"running" not in shown:
        shown += os.read(outside, 4096)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(timeout=30) == 130
    with contextlib.suppress(OSError):  # nobody writes there any more
        while more := os.read(outside, 4096):
            shown += more
    assert shown.count(b"\x1b[H\x1b[J") == 1
    assert not re.search(b"interrupted|Traceback", shown)


def test_status_names_a_run_that_is_not_there(run_script, tmp_path):
    for arguments, message in [((), "holds no run"), (("20260101-000000",), "there is no run 20260101-000000")]:
        result = run_script("slurm/status.py", *arguments, "--set", f"paths.root={tmp_path}")
        assert result.returncode == 1
        assert message in result.stderr


# ------------------------------------------------------------------------------------------------ shell


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
            "srun": f'env | grep ^SLURM_MEM; echo "$@"; exit {code}',
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


def test_the_wrapper_gives_an_array_task_its_shard(wrapped, tmp_path):
    """The shard is added to what works by shards and to nothing else."""

    def words(*arguments):
        return wrapped(*arguments, SLURM_ARRAY_TASK_ID="2").stdout.splitlines()[1].split()[1:]

    script = str(tmp_path / "a" / "b.py")
    assert words("a/b.py", "--num-shards", "4") == ["python", script, "--num-shards", "4", "--shard", "2"]
    assert words("a/b.py", "--num-shards=4") == ["python", script, "--num-shards=4", "--shard", "2"]
    assert words("a/b.py") == ["python", script]


def test_the_wrapper_keeps_another_jobs_memory_from_srun(wrapped):
    """Of the interactive job that sbatch was called from: srun ends at once where it finds two of them."""
    told = wrapped("a/b.py", SLURM_MEM_PER_CPU="100", SLURM_MEM_PER_NODE="8000").stdout
    assert "SLURM_MEM" not in told


def test_a_stage_that_was_told_to_stop_is_queued_again_by_itself_up_to_the_limit(wrapped, tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    killed = -signal.SIGKILL  # by the requeueing: it must not end by itself
    assert wrapped("a/b.py", code=85).returncode == killed
    assert wrapped("a/b.py", code=85, SLURM_RESTART_COUNT="1", **array).returncode == killed
    last = wrapped("a/b.py", code=85, SLURM_RESTART_COUNT="2")
    assert last.returncode == 85
    assert "was queued again 2 times" in last.stdout
    assert wrapped("a/b.py", code=1).returncode == 1
    assert wrapped("a/b.py", code=143).returncode == killed  # preempted, in a stage that cannot stop half-way
    # "requeue 9" of an array's last task, whose own id is the array's, would requeue every task
    assert (tmp_path / "requeued").read_text().splitlines() == ["requeue 9", "requeue 9_3", "requeue 9"]


def test_requeueing_is_tried_again_while_the_controller_does_not_answer(wrapped, tmp_path):
    answers = f"[ $(wc -l < {tmp_path}/requeued) -ge 3 ]"  # the third time
    told = wrapped("a/b.py", code=85, scontrol=answers, sleep="[ $1 = 10 ] || kill -KILL $PPID")
    assert told.returncode == -signal.SIGKILL
    assert (tmp_path / "requeued").read_text().splitlines() == ["requeue 9"] * 3


def test_what_goes_wrong_in_env_sh_is_in_the_log_after_its_start(wrapped):
    told = wrapped("a/b.py", env="no_such_module load x; exit 3")
    assert told.returncode == 3
    assert told.stdout.startswith("-- ")


def test_the_wrappers_ask_for_what_config_toml_says():
    cfg = config.load()
    stages = [name for name, field in config.Slurm.model_fields.items() if field.annotation is config.SlurmStage]
    assert {path.stem for path in ROOT.glob("slurm/*.sbatch")} == {*stages, "stage"}
    for name in stages:
        lines = (ROOT / "slurm" / f"{name}.sbatch").read_text().splitlines()
        resources = getattr(cfg.slurm, name)
        assert len(lines) == 3
        flags = set(shlex.split(lines[1])[1:])
        assert flags >= {f"--time={resources.time}", f"--signal=USR2@{cfg.slurm.signal_before_s}", "--requeue"}
        assert {
            flag for flag in flags if not re.match("--(job-name|output|open-mode|requeue|signal|time)", flag)
        } == {
            *cfg.slurm.sbatch,
            *resources.sbatch,
        }
        (script,) = [path.relative_to(ROOT) for path in ROOT.glob(f"*/{name}.py")]
        assert lines[2].endswith(f'"$root" {cfg.slurm.max_requeues} {script} "$@"')
        assert f"/slurm/{name}[.]sbatch" in lines[2]


def test_shell_files_are_short_and_pass_shellcheck():
    files = [*SHELL_FILES, ROOT / ".ci" / "system-packages"]
    assert max(len(path.read_text().splitlines()) for path in files) < 60
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "shellcheck is not installed"
        pytest.skip("shellcheck is not installed here: .ci/system-packages installs it")
    result = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("4:00:00", 14400),
        ("1-12", 129600),
        ("1-00:30", 88200),
        ("2-01:00:05", 176405),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text, seconds):
    assert config.load(None, [f'slurm.train.time="{text}"']).slurm.train.time_s == seconds


def test_a_time_limit_within_the_warning_before_it_is_refused():
    with pytest.raises(ConfigError, match=r"train\.time = 5:00 is not longer than signal_before_s = 300"):
        config.load(None, ["slurm.train.time=5:00"])


# ------------------------------------------------------------------------------------------------ prefetch


def test_prefetch_finds_whole_weights_and_names_what_is_missing(run_script, tmp_path):
    from local_backbone import write_local_backbone

    folder = write_local_backbone(tmp_path / "backbone")
    found = run_script("slurm/prefetch.py", "--set", f"embedding_model.name={folder}")
    assert found.returncode == 0, found.stderr
    assert "dinov2" in found.stdout
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])  # a download that broke off
    broken = run_script("slurm/prefetch.py", "--set", f"embedding_model.name={folder}")
    assert broken.returncode == 1
    assert "model.safetensors is missing or damaged" in broken.stderr


def test_a_record_is_found_by_name_by_path_and_as_the_newest(tmp_path):
    for name in ("20260101-000000", "20260102-000000"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps({"steps": {}}))
    assert runs.find(tmp_path, None).name == "20260102-000000"
    assert runs.find(tmp_path, "20260101-000000").name == "20260101-000000"
    assert runs.find(tmp_path, str(tmp_path / "runs" / "20260101-000000")).name == "20260101-000000"


# ------------------------------------------------------------------------------------- signals, doing it again


def test_sigterm_reaches_the_stage_that_runs_and_ends_the_chain_with_85(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from common import cli, config
from slurm import local, submit
steps = submit.chain(config.load())[:2]
says = "trap 'echo told > {tmp_path}/told; exit 85' TERM; touch {tmp_path}/runs; while :; do sleep 0.05; done"
commands = [(steps[0], ["bash", "-c", says]), (steps[1], ["touch", "{tmp_path}/next"])]
cli.run(lambda: local.run(commands, 1))
"""
    chain = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "runs").exists():
        assert chain.poll() is None
        time.sleep(0.02)
    chain.terminate()
    assert "stopped by a signal" in chain.communicate(timeout=30)[1]
    assert chain.returncode == cli.EXIT_STOPPED
    assert (tmp_path / "told").exists()
    assert not (tmp_path / "next").exists()


def test_overwrite_makes_everything_again_from_a_stage_on(run_script, tmp_path):
    flags = ("--set", f"paths.root={tmp_path}", "--dry-run", "--local", "--overwrite")
    told = run_script("slurm/submit.py", *flags, "--from", "evaluate")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("--overwrite") == 2  # evaluate and convert_to_hf
    assert "evaluate                   to do" in told.stdout
    alone = run_script("slurm/submit.py", *flags)
    assert alone.returncode == 2
    assert "--from" in alone.stderr
    on_slurm = run_script("slurm/submit.py", *[flag for flag in flags if flag != "--local"], "--from", "evaluate")
    assert on_slurm.returncode == 2
    assert f"{tmp_path}/data/evaluation {tmp_path}/data/published" in on_slurm.stderr  # what to remove by hand
