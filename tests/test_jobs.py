"""slurm/jobs.py and slurm/runs.py: command lines, submission and records, with fake clients of Slurm.

tests/test_slurm.py submits to a real one.
"""

import argparse
import json
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT

from common import config
from common.errors import PipelineError
from slurm import chain, fates, jobs, runs, status, submit


def everything(steps) -> dict[str, list[int]]:
    return {step.name: list(range(step.tasks)) for step in steps}


def sbatch_line(step, cfg, todo=None, job_ids=None, per_job=1) -> list[str]:
    todo = todo or everything([step])
    return jobs.sbatch_command(step, todo, job_ids or {}, dict.fromkeys(todo, per_job), cfg, cfg.paths.logs_dir)


def writer(folder, *reads) -> dict:
    """A step that writes one folder and reads others, as a record has it."""
    return {"target": str(folder), "reads": list(map(str, reads))}


def test_shard_i_waits_for_shard_i_only_where_that_is_enough(cfg):
    steps = chain.steps_of(cfg)
    ids = {step.name: str(number) for number, step in enumerate(steps, 1)}
    todo = everything(steps)
    waits = {step.name: jobs.dependency_of(step, todo, ids, dict.fromkeys(todo, 1)) for step in steps}
    assert waits["process_tar"] == ""
    assert waits["generate_embeddings"] == "aftercorr:1"
    assert waits["merge_and_split"] == "afterok:1:2:3"  # a merge waits for all shards of both
    assert waits["train"] == "afterok:4:6"


def test_arrays_of_different_shards_are_not_paired(cfg):
    embeddings = next(step for step in chain.steps_of(cfg) if step.name == "generate_embeddings")
    for theirs, ours, expected in [([1, 3], [1, 3], "aftercorr:7"), ([1], [1, 3], "afterok:7")]:
        todo = {"process_tar": theirs, "generate_embeddings": ours}
        assert jobs.dependency_of(embeddings, todo, {"process_tar": "7"}, dict.fromkeys(todo, 1)) == expected


def test_arrays_are_paired_only_with_as_many_tasks_to_a_job(cfg):
    embeddings = next(step for step in chain.steps_of(cfg) if step.name == "generate_embeddings")
    todo = {name: [0, 1, 2, 3] for name in ("process_tar", "generate_embeddings")}
    for theirs, expected in [(4, "aftercorr:7"), (1, "afterok:7")]:
        per_job = {"process_tar": theirs, "generate_embeddings": 4}
        assert jobs.dependency_of(embeddings, todo, {"process_tar": "7"}, per_job) == expected


@pytest.mark.parametrize(
    ("of_all", "of_stage", "per_job"),
    [
        ([], ["--gres=gpu:1"], 1),
        ([], ["--gpus-per-task=1", "--ntasks=4"], 4),
        (["--nodes=1", "-n", "4"], [], 4),
        (["-n2"], ["--ntasks", "8"], 8),  # the stage's own flags come last
        (["--ntasks-per-node=4"], ["--nodes=1"], 4),
        (["--ntasks-per-node=4"], ["-N2"], 8),
        (["--nodes=2"], [], 1),
        ([], ["--ntasks=8", "--ntasks-per-node=4"], 8),
        ([], ["--ntasks=99"], 16),  # all of its tasks
        (["--account=abc-n4"], [], 1),
    ],
)
def test_a_job_runs_as_many_shards_as_its_flags_have_tasks(of_all, of_stage, per_job):
    flags = [f"slurm.sbatch={json.dumps(of_all)}", f"slurm.generate_embeddings.sbatch={json.dumps(of_stage)}"]
    flags += [f"slurm.train.sbatch={json.dumps(of_stage)}"]
    cfg = config.load(None, flags)
    steps = {step.name: step for step in chain.steps_of(cfg)}
    assert steps["generate_embeddings"].tasks_per_job(cfg) == per_job
    assert steps["train"].tasks_per_job(cfg) == 1  # not divided
    (line,) = jobs.planned([steps["generate_embeddings"]], everything(steps.values()), cfg)
    assert f"--array=0-{16 // per_job - 1}%4".replace("0-0", "0") in line
    assert [word for word in line if word.startswith("--ntasks=")][-1] == f"--ntasks={per_job}"


@pytest.mark.parametrize(
    ("flags", "used"),
    [
        (["--gres=gpu:1"], ""),
        (["--gres=gpu:3g.20gb:1"], ""),
        (["--gres=gpu:h100:4"], "1 of the 4"),
        (["--gres=nvme:1,gpu:4"], "1 of the 4"),
        (["--gpus-per-node=a100:4", "--ntasks=2"], "2 of the 4"),
        (["--gpus", "4", "--ntasks=4"], ""),
        (["--gpus-per-task=1", "--ntasks=4"], ""),
        (["--gres=gpu:8", "--ntasks=4"], ""),  # all shards that there are
    ],
)
def test_gpus_without_a_task_are_told(flags, used):
    name = "generate_embeddings"
    cfg = config.load(None, ["slurm.num_shards=4", f"slurm.{name}.sbatch={json.dumps(flags)}"])
    steps = {step.name: step for step in chain.steps_of(cfg)}
    advice = f"(uses {used} GPUs of each job: add --ntasks=4 to slurm.{name}.sbatch)" if used else ""
    assert chain.idle_gpus(steps[name], cfg) == advice
    alone = config.load(None, [f"slurm.train.sbatch={json.dumps(flags)}"])
    assert chain.idle_gpus(steps["train"], alone) == ""  # it cannot use more


def test_a_job_holds_the_shards_that_are_left_with_their_neighbours(cfg):
    step = next(step for step in chain.steps_of(cfg) if step.name == "compute_fingerprints")
    todo = {"compute_fingerprints": [1, 3, 4, 13]}
    assert "--array=0-1,3" in sbatch_line(step, cfg, todo, per_job=4)


def test_an_array_holds_the_shards_that_are_left_and_is_throttled(cfg):
    steps = {step.name: step for step in chain.steps_of(cfg, tune=3)}
    todo = {name: [0, 1, 3] for name in ("process_tar", "generate_embeddings")}
    command = sbatch_line(steps["generate_embeddings"], cfg, todo, {"process_tar": "7"})
    assert "--array=0-1,3%4" in command
    assert "--dependency=aftercorr:7" in command
    assert command.index("--account=abc") < command.index(f"{ROOT}/slurm/stage.sbatch")
    settings = str(cfg.paths.logs_dir / "config.toml")
    assert command[-5:] == ["generate/generate_embeddings.py", "--num-shards", "4", "--config", settings]
    assert "--array=0-2" in sbatch_line(steps["optuna_worker"], cfg)
    assert not any(flag.startswith("--array") for flag in sbatch_line(steps["train"], cfg))


def test_users_flags_do_not_hide_jobs_and_logs_from_status(cfg):
    flags = ["--job-name=mine", "--output=/dev/null", "--array=0-99", "--time=1:00:00"]
    cfg = cfg.model_copy(update={"slurm": cfg.slurm.model_copy(update={"sbatch": flags})})
    line = sbatch_line(chain.steps_of(cfg)[0], cfg)
    last = {word.partition("=")[0]: word for word in line}
    assert last["--job-name"] == "--job-name=process_tar"
    assert last["--output"].endswith("process_tar-%a.log")
    assert last["--array"] == "--array=0-3"
    assert last["--time"] == "--time=1:00:00"  # that one is theirs


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


def test_a_profiles_options_do_not_change_what_is_seen_and_submitted(monkeypatch):
    for name in ("SQUEUE_PARTITION", "SINFO_ALL", "SCANCEL_STATE", "SBATCH_WAIT", "SBATCH_MEM_PER_CPU"):
        monkeypatch.setenv(name, "1")
        assert name not in runs.environment()
    monkeypatch.setenv("SBATCH_ACCOUNT", "abc")  # where and on whose account: no stage's setting
    assert runs.environment()["SBATCH_ACCOUNT"] == "abc"


def test_two_submits_at_once_do_not_submit_twice(submitted, cfg):
    with runs.lock(cfg.paths.logs_dir), pytest.raises(PipelineError, match=r"another slurm/submit\.py is running"):
        submitted()
    submitted()


def test_what_a_live_job_reads_is_not_written(submitted, cfg, clients):
    folder = submitted()
    job = runs.load(folder)["steps"]["train"]["job"]
    clients(squeue=f"echo '{job}|train|RUNNING|None'")
    difficulty = str(cfg.paths.difficulty_dir)
    checkpoints = str(cfg.paths.checkpoints_dir / "default")
    for entry in [writer(difficulty), writer(checkpoints), writer("elsewhere", checkpoints)]:
        with pytest.raises(PipelineError, match="train in the queue"):
            runs.refuse_busy(cfg.paths.logs_dir, [entry])
    runs.refuse_busy(cfg.paths.logs_dir, [writer(cfg.paths.published_dir, difficulty)])  # both may read it
    runs.refuse_busy(cfg.paths.logs_dir, [writer(difficulty)], but=folder)


def test_a_live_job_is_found_through_a_link_to_what_it_writes(submitted, cfg, clients):
    """Checkpoints on another file system: a run's folder is a link."""
    elsewhere = cfg.paths.root / "elsewhere"
    elsewhere.mkdir(parents=True)
    cfg.paths.checkpoints_dir.mkdir(parents=True)
    (cfg.paths.checkpoints_dir / "default").symlink_to(elsewhere)
    job = runs.load(submitted())["steps"]["train"]["job"]
    clients(squeue=f"echo '{job}|train|RUNNING|None'")
    with pytest.raises(PipelineError, match="train in the queue"):
        runs.refuse_busy(cfg.paths.logs_dir, [writer("a", elsewhere)])


@pytest.mark.parametrize(
    ("live", "read"),
    [
        ("merge_and_split", "intermediates_dir"),
        ("train", "merged_dir"),
        ("evaluate", "merged_dir"),
        ("convert_to_hf", "merged_dir"),
        ("convert_to_hf", "checkpoints_dir"),
    ],
)
def test_a_live_job_reads_more_than_what_it_waits_for_last(submitted, cfg, clients, live, read):
    job = runs.load(submitted())["steps"][live]["job"]
    clients(squeue=f"echo '{job}|{live}|RUNNING|None'")
    folder = getattr(cfg.paths, read)
    with pytest.raises(PipelineError, match=f"{live} in the queue"):
        runs.refuse_busy(cfg.paths.logs_dir, [writer(folder / "default" if read == "checkpoints_dir" else folder)])


def test_the_queue_is_asked_for_the_jobs_of_who_submitted_them(submitted, clients, tmp_path):
    """In a folder that several people share; their own jobs of the same name have other ids."""
    folder = submitted()
    runs.save(folder, runs.load(folder) | {"owner": 12345})
    clients(squeue=f'echo "$@" >> {tmp_path}/asked')
    status.report(folder)
    assert runs.cancel(folder) == 0
    runs.refuse_busy(folder.parents[1], [])
    assert (tmp_path / "asked").read_text().count("--user=12345") == 5


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
        with pytest.raises(PipelineError, match="sbatch printed no job id: quota"):
            jobs.sbatch(["sbatch"])
    else:
        assert jobs.sbatch(["sbatch"]) == job
    assert "use --qos=low" in capfd.readouterr().err  # of the site's rules: passed on


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
    with pytest.raises(PipelineError, match=r"process_tar was not submitted: sbatch failed: Invalid account"):
        submit.main(["--config", str(settings)])
    folder = runs.find(tmp_path / "logs", None)
    assert not runs.job_ids(runs.load(folder))
    right = written.replace("sbatch = []", 'sbatch = ["--account=right", "--ntasks=2"]').replace(
        "num_shards = 4", "num_shards = 9"
    )
    settings.write_text(right.replace("epochs = 20", "epochs = 3"))
    assert submit.main(["--config", str(settings), "--continue", folder.name]) == 0
    record = runs.load(folder)
    assert len(runs.job_ids(record)) == 9
    command = record["steps"]["process_tar"]["command"]
    assert "--account=right" in command
    assert "--array=0-4" in command  # nine shards, two to a job: none was submitted, so both are today's
    assert record["steps"]["process_tar"]["tasks"] == list(range(9))
    assert status.report(folder)["steps"][0]["tasks"] == {"cancelled": 9}
    assert fates.tasks_per_job(record["steps"]["process_tar"]) == 2
    assert config.load(folder / "config.toml").training.epochs == 20


def test_what_is_submitted_keeps_its_number_of_shards(submitted, clients, cfg):
    folder = submitted()
    record = runs.load(folder)
    for name, entry in record["steps"].items():
        if name not in ("process_tar", "compute_fingerprints"):
            entry["job"] = None
    runs.save(folder, record)
    lines = "".join(
        f"echo '{n}_0|{name}|PENDING|None';" for n, name in [(1, "process_tar"), (2, "compute_fingerprints")]
    )
    clients(squeue=f"case $* in *--Format*) ;; *) {lines} esac")
    flags = ["--set", f"paths.root={cfg.paths.root}", "--set", "slurm.num_shards=2"]
    assert submit.main([*flags, "--set", "slurm.difficulty_shards=3", "--continue", folder.name]) == 0
    steps = runs.load(folder)["steps"]
    assert {name: len(entry["tasks"]) for name, entry in steps.items() if len(entry["tasks"]) > 1} == {
        "process_tar": 4,
        "compute_fingerprints": 4,
        "generate_embeddings": 2,
        "neighbor_parts": 3,
    }
    assert {"--array=0-2", "--num-shards", "3"} <= set(steps["neighbor_parts"]["command"])
    command = steps["generate_embeddings"]["command"]
    assert {"--array=0-1%4", "--num-shards", "2", "--dependency=afterok:1"} <= set(
        command
    )  # 2 shards of 4: unpaired
    told = {step["name"]: step for step in status.report(folder)["steps"]}
    assert told["process_tar"]["tasks"] == {"waiting": 1, "cancelled": 3}
    assert told["generate_embeddings"]["tasks"] == {"cancelled": 2}
    assert list(told) == list(steps)


def refused(folder: Path) -> Path:
    """A run, as if sbatch had refused all of its jobs."""
    record = runs.load(folder)
    for entry in record["steps"].values():
        entry["job"] = None
    runs.save(folder, record)
    return folder


def test_the_rest_of_a_run_is_no_wider_than_the_cluster_takes(submitted, clients, cfg):
    folder = refused(submitted())
    record = runs.load(folder)
    clients(scontrol="echo 'MaxArraySize = 8'", sbatch="echo 7")
    flags = ["--set", f"paths.root={cfg.paths.root}", "--continue", folder.name]
    with pytest.raises(PipelineError, match=r"an array of 9 tasks is too large: this cluster allows 8 "):
        submit.main([*flags, "--set", "slurm.num_shards=9"])
    assert runs.load(folder) == record
    assert submit.main([*flags, "--set", "slurm.num_shards=8"]) == 0
    assert "--array=0-7" in runs.load(folder)["steps"]["process_tar"]["command"]


def test_waiting_for_room_outlasts_a_controller_that_restarts_and_nothing_else(cfg, monkeypatch, capsys):
    running = {"1": runs.SlurmJob("1", "process_tar", "RUNNING", "None")}
    answers = iter(
        ["squeue failed: slurm_load_jobs error: Unable to contact slurm controller (connect failure)", None]
    )

    def continued(name, args, logs_dir):
        if (answer := next(answers)) is not None:
            raise PipelineError(answer)
        return 0

    def limited():
        raise jobs.LimitReached("process_tar was not submitted", "20260101-000000")

    monkeypatch.setattr(runs, "queue", lambda owner: running)
    monkeypatch.setattr(jobs, "continue_run", continued)
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    args = argparse.Namespace(wait=True)
    assert jobs.submit_all(limited, args, cfg.paths.logs_dir) == 0
    assert capsys.readouterr().err.count("trying again every") == 2
    answers = iter(["process_tar (job 1) of that run ended unfinished"])
    with pytest.raises(PipelineError, match="ended unfinished"):
        jobs.submit_all(limited, args, cfg.paths.logs_dir)
    away = PipelineError("sbatch failed: Unable to contact slurm controller")
    with pytest.raises(PipelineError, match="Unable to contact"):  # the first submission is not waited for
        jobs.submit_all(mock.Mock(side_effect=away), args, cfg.paths.logs_dir)


def test_the_rest_of_a_run_is_not_submitted_beside_another_that_writes_the_same(submitted, clients, cfg):
    broken = refused(submitted())
    other = submitted()
    job = runs.load(other)["steps"]["merge_and_split"]["job"]
    clients(squeue=f"case $* in *--Format*) ;; *) echo '{job}|merge_and_split|RUNNING|None';; esac")
    flags = ["--set", f"paths.root={cfg.paths.root}"]
    with pytest.raises(PipelineError, match=f"run {other.name} is still running: merge_and_split in the queue"):
        submit.main([*flags, "--continue", broken.name])


def test_jobs_that_cannot_be_seen_are_live_until_all_their_logs_have_an_end(tmp_path):
    entry = {"job": "7", "tasks": [1, 4, 5, 6], "tasks_per_job": 4, "log": str(tmp_path / "a-%a.log")}
    ends = "-- 1 job 7 starts on a\n-- 2 job 7 ends with exit code {}\n"
    (tmp_path / "a-0.log").write_text(ends.format(1))
    assert runs.live_steps({"steps": {"train": entry}}, None) == {"train": "7"}
    (tmp_path / "a-1.log").write_text(ends.format(85))  # and will start again
    assert runs.live_steps({"steps": {"train": entry}}, None) == {"train": "7"}
    (tmp_path / "a-1.log").write_text(ends.format(0))
    assert runs.live_steps({"steps": {"train": entry}}, None) == {}


def test_a_reused_job_id_is_not_taken_for_the_runs_own(cfg, tmp_path):
    """A cluster that was set up anew counts from 1 again: --cancel must not end somebody else's job 7."""
    record = {"steps": {"train": {"job": "7"}, "evaluate": {"job": "8"}}}
    queue = {"7": runs.SlurmJob("7", "another", "RUNNING", ""), "8": runs.SlurmJob("8", "evaluate", "PENDING", "")}
    assert runs.live_steps(record, queue) == {"evaluate": "8"}
    entry = {"job": "7", "tasks": [0], "log": str(tmp_path / "none.log")}
    step = next(step for step in chain.steps_of(cfg) if step.name == "train")
    (task,) = fates.tasks_of(step, entry, queue, cfg)
    assert task.state == "cancelled"  # not running, as the other job 7 is


def test_a_record_is_found_by_name_by_path_and_as_the_newest(tmp_path):
    for name in ("20260101-000000", "20260102-000000"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps({"steps": {}}))
    assert runs.find(tmp_path, None).name == "20260102-000000"
    assert runs.find(tmp_path, "20260101-000000").name == "20260101-000000"
    assert runs.find(tmp_path, str(tmp_path / "runs" / "20260101-000000")).name == "20260101-000000"


def test_clients_without_a_cluster_are_told_as_that_and_local_is_offered(cfg, clients):
    fatal = "echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1"
    clients(sbatch="true", scontrol=fatal)
    steps = chain.steps_of(cfg)
    with pytest.raises(PipelineError, match=r"^scontrol finds no cluster: .*\n.*--local$"):
        jobs.submit(steps, everything(steps), cfg, submit.parse([]))


def test_without_slurm_it_says_so_and_offers_local(monkeypatch, cfg, tmp_path):
    monkeypatch.setattr(jobs.shutil, "which", lambda _: None)
    steps = chain.steps_of(cfg)
    with pytest.raises(PipelineError, match="--local"):
        jobs.submit(steps, everything(steps), cfg, submit.parse([]))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PipelineError, match="there is no squeue here"):
        runs.queue(0)


@pytest.mark.parametrize("change", ["", "[]", "{}", '{"owner": 0, "steps": []}', "no owner", "no target"])
def test_a_record_that_is_damaged_or_of_another_version_is_named(submitted, change):
    folder = submitted()
    record = runs.load(folder)
    if change.startswith("no "):
        parts = [record, *record["steps"].values()]
        for part in parts:
            part.pop(change.removeprefix("no "), None)
        change = json.dumps(record)
    (folder / "run.json").write_text(change)
    with pytest.raises(
        PipelineError, match=r"run\.json (cannot be read|is not the record).*\n.* move that folder"
    ):
        runs.load(folder)
