"""The chain on a real Slurm, which this file starts and stops: one node has two fake GPUs, another has four and is
handed out whole.

Oracle: the stages run here in order, without Slurm and undisturbed. Skipped, with the reason, where Slurm is not
installed; never in continuous integration.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path

import one_node_slurm
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import warm
from conftest import ROOT
from one_node_slurm import OneNodeSlurm
from same_artefacts import assert_same_artefacts
from slurm_place import Place, over, wait_for

from common import config, parquet
from common.imagery import tar_images
from slurm import chain
from train.tuning import shared_study

BACKBONE = "backbone-mean-1-0.5"  # the folders of all that depends on it


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A cluster, and what takes long under way on it: the tests that look at how it ended come last."""
    reason = one_node_slurm.why_not()
    if reason:
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    with OneNodeSlurm(folder / "cluster", cpus=6, whole_node=True) as cluster:
        place = Place(folder, cluster)
        for step in chain.steps_of(config.load(place.config)):
            if step.name != "neighbor_parts":  # one task finds them all, and joins them
                done = warm.run(step.script, "--config", place.config, "--set", f"paths.root={place.local}")
                assert done.returncode == 0, done.stderr
        place.whole = folder / "whole"
        place.submit(place.whole)
        place.limited = place.copy("limited", "data/*/embeddings", "checkpoints")
        place.frozen = [
            frozen_until_signalled(place, place.limited, "generate_embeddings", "data/*/embeddings/*.parquet"),
            frozen_until_signalled(place, place.limited, "train", "checkpoints/*/default/checkpoint_last.pt"),
        ]
        yield place
        over.set()
        for thread in place.frozen:
            thread.join()


def frozen_until_signalled(place, root: Path, stage: str, sign: str) -> threading.Thread:
    """Submit a stage with a limit of three minutes; freeze it at the first file that matches `sign`, until Slurm
    has signalled it: so it is not finished by then, and the cores are free for other tests.
    """
    flags = [f"slurm.{stage}.time=00:03:00", f'slurm.{stage}.sbatch=["--mem=1G"]', "slurm.num_shards=1"]
    settings = root / f"{stage}.toml"
    shutil.copy(place.config, settings)
    place.submit(
        root, "--config", settings, "--only", stage, *(word for flag in flags for word in ("--set", flag))
    )
    settings.write_text("edited for the next run, before this one is queued again")

    def freeze():
        wait_for(lambda: any(root.glob(sign)), sign)
        (process,) = place.python_of(f"{stage}.py", root)
        os.kill(process, signal.SIGSTOP)
        wait_for(lambda: has_arrived(signal.SIGUSR2, process), "signal from Slurm")
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)

    thread = threading.Thread(target=freeze, daemon=True)
    thread.start()
    return thread


def catches(number: int, process: int) -> bool:
    """Whether a process has a handler for a signal by now."""
    (mask,) = re.findall(r"^SigCgt:\t(\w+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def has_arrived(number: int, process: int) -> bool:
    """Whether a frozen process has a signal to attend to, or has gone (Slurm may thaw it itself)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return any(int(status[field], 16) >> (number - 1) & 1 for field in ("SigPnd", "ShdPnd"))


# ------------------------------------------------------------------------------------------------------- the tests


def test_a_run_that_is_under_way_is_told_and_not_submitted_again(place):
    report = place.told(place.whole)
    assert report["steps"]["merge_and_split"]["state"] == "waiting"
    assert report["steps"]["evaluate"]["why"] == "for merge_and_split, train"
    assert "convert_to_hf in the queue" in place.submit(place.whole, "--only", "convert_to_hf", code=1)
    refused = place.submit(place.whole, "--only", "evaluate", code=1)
    assert re.search(r"still running: (merge_and_split, )?train, evaluate", refused)  # the first may have ended


def test_a_failing_shard_cancels_what_depends_on_it_and_the_printed_command_finishes_the_chain(place):
    root = place.copy("failing", "data/**/0089.parquet", "data/**/0089-*.parquet")
    raw = root / "raw"
    shutil.copytree(place.folder / "raw", raw)
    (raw / "0089.tar").write_bytes(b"\xfd7zXZ\0" + bytes(600))  # xz's magic: refused
    kept = {path: path.stat().st_mtime_ns for path in root.glob("data/**/*") if path.is_file()}
    flags = ("--set", f"paths.raw_dir={raw}", "--to", "merge_and_split")
    assert "shards 1 of 2" in place.submit(root, *flags)
    place.wait(root)  # nothing waits for ever

    report = place.told(root, code=1)
    assert {name: step["state"] for name, step in report["steps"].items()} == {
        "process_tar": "failed",
        "compute_fingerprints": "cancelled",
        "generate_embeddings": "cancelled",
        "merge_and_split": "cancelled",
    }
    (failure,) = report["failures"]
    assert (failure["step"], failure["task"], failure["why"]) == ("process_tar", 1, "exit code 1")
    text = place.status(root, code=1)
    assert "process_tar, shard 1" in text
    assert "0089.tar is compressed" in text  # the log's last lines
    assert report["continue"] in text

    shutil.copy(place.folder / "raw" / "0089.tar", raw)
    place.run(*shlex.split(report["continue"]))
    place.wait(root)
    assert "4 of 4 stages done" in place.status(root)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing that was done was redone
    assert_same_artefacts(root, place.local)


def test_a_scancelled_array_is_told_as_cancelled_and_resubmitting_continues(place):
    root = place.copy("cancelled", "data/fingerprints")
    place.submit(root, "--only", "compute_fingerprints")
    job = place.jobs(root)["compute_fingerprints"]
    both = wait_for(lambda: len(p := place.python_of("compute_fingerprints.py", root)) == 2 and p, "both tasks")
    for process in both:
        os.kill(process, signal.SIGSTOP)  # it must not end before it is cancelled
    assert place.told(root)["steps"]["compute_fingerprints"]["state"] == "running"
    place.run("scancel", job)
    place.wait(root)  # Slurm thaws it and sends SIGTERM: the stage ends with 85, but must not queue itself again
    report = place.told(root, code=1)
    assert report["steps"]["compute_fingerprints"]["tasks"] == {"cancelled": 2}
    place.run(*shlex.split(report["continue"]))
    place.wait(root)
    place.status(root)
    assert_same_artefacts(root, place.local)


def test_a_shard_that_waits_for_nothing_of_its_own_runs_too(place):
    """Shard 1 of the tars is to be done again, and both shards of the fingerprints: the arrays differ."""
    root = place.copy("uneven", "data/intermediates/0089.parquet", "data/fingerprints/*")
    assert "shards 1 of 2" in place.submit(root, "--to", "compute_fingerprints")
    assert "2 of 2 stages done" in place.status(root, "--watch")  # until nothing is in the queue
    assert not set(place.jobs(root).values()) & place.live()
    assert_same_artefacts(root, place.local)


def test_a_submission_that_breaks_off_is_continued_and_a_run_is_cancelled(place, tmp_path):
    root = place.copy("half", "data/intermediates/0089.parquet")
    between = (
        tmp_path / "sbatch"
    )  # the real one, but for two calls: the third is refused, the fourth kills submit.py
    between.write_text(
        f"#!/bin/sh\necho >> {tmp_path}/calls; calls=$(wc -l < {tmp_path}/calls)\n"
        "[ $calls = 3 ] && echo no luck >&2 && exit 1\n"
        f'{shutil.which("sbatch", path=place.environment["PATH"])} "$@"\n'
        "[ $calls = 4 ] && kill -KILL $PPID; exit 0\n"  # the job is there, and nobody has written its id down
    )
    between.chmod(0o755)
    flags = ("--set", 'slurm.sbatch=["--hold"]', "--to", "merge_and_split")
    environment = {**place.environment, "PATH": f"{tmp_path}:{place.environment['PATH']}"}
    told = place.submit(root, *flags, code=1, env=environment)
    assert "generate_embeddings was not submitted: sbatch failed: no luck" in told
    (folder,) = (root / "logs" / "runs").iterdir()
    assert folder.name in told
    first = place.jobs(root)
    assert [name for name, job in first.items() if job] == ["process_tar", "compute_fingerprints"]
    assert f"--continue {folder}" in place.status(root, code=1)
    assert f"--continue {folder}" in place.submit(root, *flags, code=1)  # not twice into the same folders

    place.submit(root, "--continue", folder.name, code=-signal.SIGKILL, env=environment)
    assert not place.jobs(root)["generate_embeddings"]
    held = place.cluster.ask("squeue", "--noheader", "--states=PENDING", "--format=%F %j %r").splitlines()
    (killed,) = {line.split()[0] for line in held if line.endswith("generate_embeddings JobHeldUser")}
    place.submit(root, "--continue", folder.name)
    jobs = place.jobs(root)
    assert all(jobs.values())
    assert {name: jobs[name] for name in first if first[name]} == {name: job for name, job in first.items() if job}
    assert jobs["generate_embeddings"] == killed  # found in the queue, not submitted twice
    waiting = place.told(root)["steps"]
    assert waiting["process_tar"]["why"] == f"held (JobHeldUser): scontrol release {jobs['process_tar']}"

    assert "4 jobs cancelled" in place.submit(root, "--cancel", folder.name)
    assert not set(jobs.values()) & place.live()
    assert {step["state"] for step in place.told(root, code=1)["steps"].values()} == {"cancelled"}


def test_an_array_wider_than_the_cluster_takes_is_refused_before_anything_is_submitted(place):
    root = place.folder / "wide"
    told = place.submit(root, "--set", "slurm.num_shards=102", code=1)
    assert "an array of 102 tasks is too large: this cluster allows 101 (MaxArraySize)" in told
    assert not root.exists()


def test_a_stage_is_submitted_by_hand_from_another_directory(place, tmp_path):
    root = place.copy("by-hand", "checkpoints")
    shutil.copy(place.config, tmp_path)  # a relative path is one of the user's directory
    flags = ["--config", "config.toml", "--set", f"paths.root={root}", "--set", "training.epochs=2"]
    resources = ["--parsable", "--mem=1G", "--cpus-per-task=2"]  # the node is smaller than the wrapper asks for
    job = place.run("sbatch", *resources, ROOT / "slurm" / "stages" / "train.sbatch", *flags, cwd=tmp_path).strip()
    place.wait_for_jobs(job)
    (log,) = tmp_path.glob("train-*.log")
    assert "epoch 2: " in log.read_text()
    assert "epoch 3: " not in log.read_text()
    assert (root / "checkpoints" / BACKBONE / "default" / "checkpoint_best.pt").exists()


def test_an_array_is_submitted_by_hand_from_a_path_with_spaces_and_each_task_takes_its_shard(place, tmp_path):
    root, repository = place.copy("by hand", "data/fingerprints"), tmp_path / "my repository"
    others = (".*", "data", "demo", "logs", "checkpoints", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(*others))
    resources = ["--parsable", "--array=0-1", "--mem=1G", "--cpus-per-task=1"]
    flags = ["--num-shards=2", "--config", place.config, "--set", f"paths.root={root}"]
    wrapper = Path("slurm") / "stages" / "compute_fingerprints.sbatch"
    job = place.run("sbatch", *resources, wrapper, *flags, cwd=repository).strip()
    place.wait_for_jobs(job)
    logs = [path.read_text() for path in repository.glob("compute_fingerprints-*.log")]
    assert len(logs) == 2
    assert all("ends with exit code 0" in log for log in logs)
    assert_same_artefacts(root, place.local)


def test_a_chain_is_submitted_from_inside_an_interactive_job(place):
    """sbatch hands that job's variables on, where srun would find two kinds of memory and end at once."""
    root = place.copy("inside a job", "data/*/summary", "data/fingerprints")
    flags = ["--config", place.config, "--set", f"paths.root={root}", "--to", "summarize_ids"]
    script = shlex.join(map(str, [sys.executable, ROOT / "slurm" / "submit.py", *flags]))
    job = ["sbatch", "--parsable", "--wait", "--array=5", "--ntasks=2", "--mem-per-cpu=200", "--output=/dev/null"]
    place.run(*job, f"--wrap={script}")
    place.wait(root)
    assert "5 of 5 stages done" in place.status(root)
    assert_same_artefacts(root, place.local)


RECORD = """
import os, sys
words = sys.orig_argv
if len(words) > 1 and os.path.basename(words[1]) in os.environ["RECORDED"].split() and "--finish" not in words:
    start = os.environ["SLURM_JOB_ID"] + "-" + os.environ.get("SLURM_RESTART_COUNT", "0")
    line = " ".join([os.path.basename(words[1]), start, os.environ.get("CUDA_VISIBLE_DEVICES", "")])
    with open(os.path.dirname(__file__) + "/started", "a") as file:
        file.write(line + "\\n")
"""


def test_the_chain_keeps_a_whole_nodes_four_gpus_busy_though_one_task_stops_and_one_is_killed(place, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(RECORD)  # each Python reads it as it starts
    scripts = ("generate_embeddings.py", "compute_visual_neighbors.py", "optuna_worker.py")
    environment = {**place.environment, "PYTHONPATH": str(tmp_path), "RECORDED": " ".join(scripts)}
    environment["NODE_DISK"] = str(tmp_path / "disk")
    root = place.folder / "whole-node"
    bound, dealt = '["--mem=4G", "--ntasks=4", "--gpus-per-task=1"]', '["--mem=4G", "--ntasks=4", "--gres=gpu:4"]'
    settings = ['slurm.sbatch=["--partition=whole"]', "slurm.num_shards=4", "slurm.difficulty_shards=4"]
    settings += [f'slurm.{name}.sbatch=["--mem=4G", "-n4"]' for name in ("process_tar", "compute_fingerprints")]
    settings += [f"slurm.generate_embeddings.sbatch={bound}", f"slurm.optuna_worker.sbatch={dealt}"]
    settings += [f"slurm.compute_visual_neighbors.sbatch={dealt}", "slurm.stage_to=$NODE_DISK"]
    settings += ["training.epochs=3", "tuning.trial_epochs=1"]
    flags = [word for setting in settings for word in ("--set", setting)]
    assert "shards 0-3 of 4, 4 to a job" in place.submit(root, *flags, "--tune", "4", env=environment)

    for script, number in [(scripts[0], signal.SIGUSR2), (scripts[1], signal.SIGKILL)]:
        four = wait_for(lambda s=script: len(p := place.python_of(s, root)) == 4 and p, "one process for each GPU")
        wait_for(lambda p=four[2]: catches(signal.SIGUSR2, p), "handler")
        os.kill(four[2], number)  # as before the time limit, or for want of memory; the other three go on
    place.wait(root)
    (run,) = (root / "logs" / "runs").iterdir()
    log = (run / "generate_embeddings-0.log").read_text()
    assert re.findall(r"job \S+ ends with exit code ([0-9]+)", log) == ["85", "0"]  # queued again, and finished
    assert log.count("nothing to do") == 3
    assert log.count("1 of 1 tars copied") == 5  # four, and again the one of the task that was stopped
    assert not list((tmp_path / "disk").iterdir())
    report = place.told(root, code=1)
    (failure,) = report["failures"]  # of four shards
    assert (failure["step"], failure["job"], failure["why"]) == (
        "neighbor_parts",
        f"{place.jobs(root)['neighbor_parts']}_0",
        "exit code 137",
    )
    assert report["steps"]["neighbor_parts"]["tasks"] == {"failed": 1, "done": 3}
    states = {name: step["state"] for name, step in report["steps"].items()}
    assert {name for name, state in states.items() if state == "cancelled"} == {
        *("compute_visual_neighbors", "optuna_worker", "train", "evaluate", "convert_to_hf")
    }
    done = {path: path.stat().st_mtime_ns for path in root.glob("**/*.parquet")}

    place.run(*shlex.split(report["continue"]), env=environment)
    place.wait(root)
    report = place.told(root)
    assert {step["state"] for step in report["steps"].values()} == {"done"}
    assert report["steps"]["optuna_worker"]["progress"] == {"done": 4, "total": 4, "unit": "trials"}
    assert "nothing to do" in place.submit(root, *flags, "--tune", "4")
    assert {path: path.stat().st_mtime_ns for path in done} == done  # nothing that was done was redone
    cfg = config.load(place.config, [f"paths.root={root}", *settings])
    paths, tuning = cfg.paths, shared_study.open_study(cfg, shared_study.record(cfg), create=False)
    assert len(tuning.trials) == 4
    assert all("job " in trial.user_attrs["worker"] for trial in tuning.trials)
    chosen = config.load(paths.checkpoints_dir / "default" / "config.toml", [])
    best = shared_study.best_trial(tuning)
    assert {key: getattr(chosen.training, key) for key in best.params} == best.params
    before_training = (paths.intermediates_dir, paths.fingerprints_dir, paths.embeddings_dir, paths.merged_dir)
    for folder in (*before_training, paths.summary_dir, paths.difficulty_dir):
        assert_same_artefacts(root, place.local, (str(folder.relative_to(root)),))
    started = {}
    for line in (tmp_path / "started").read_text().splitlines():
        script, start, gpu = line.split(" ")
        started.setdefault((script, start), []).append(gpu)
    assert [script for script, _ in started] == [scripts[0], scripts[0], scripts[1], scripts[1], scripts[2]]
    assert {tuple(sorted(gpus)) for gpus in started.values()} == {("0", "1", "2", "3")}

    alone = ["sbatch", "--wait", "--partition=whole", "--mem=4G", "--cpus-per-task=2", f"--output={tmp_path}/log"]
    wrapper = ROOT / "slurm" / "stages" / "generate_embeddings.sbatch"  # asks for one GPU, and is given the node
    place.run(*alone, wrapper, "--config", place.config, "--set", f"paths.root={root}")
    assert "this job holds 4 GPUs and uses 1: " in (tmp_path / "log").read_text()


def test_one_submit_runs_the_whole_chain_and_leaves_what_a_local_run_leaves(place):
    place.wait(place.whole)
    assert "10 of 10 stages done" in place.status(place.whole)
    assert_same_artefacts(place.whole, place.local)
    assert "nothing to do" in place.submit(place.whole)
    without_tars = ("--set", f"paths.raw_dir={place.folder / 'removed'}")
    assert "complete: summarize_ids, neighbor_parts, " in place.submit(place.whole, *without_tars, code=1)
    assert "nothing to do" in place.submit(place.whole, *without_tars, "--from", "summarize_ids")
    assert len(list((place.whole / "logs" / "runs").iterdir())) == 1


def test_time_limits_in_training_and_generation_lead_to_the_same_results(place):
    root = place.limited
    for thread in place.frozen:
        thread.join()
    place.wait(root)
    for run, stage in zip(
        sorted((root / "logs" / "runs").iterdir()), ("generate_embeddings", "train"), strict=True
    ):
        log = (run / f"{stage}.log").read_text()
        assert "stopped by a signal" in log
        starts = log.count(" starts on ")  # the log is appended to; on a busy machine a limit may be hit again
        assert log.count("ends with exit code 85") == starts - 1 >= 1
        assert "1 of 1 stages done" in place.status(root, run.name)
    assert_same_artefacts(root, place.local)


def test_new_data_are_an_array_whose_stopped_shard_is_queued_again(place):
    """A row of photographs to a part: the first shard is frozen after its first parts, until it has the signal."""
    root, published = place.folder / "new data", place.local / "data" / BACKBONE / "published" / "default"
    cfg = config.load(place.config, [f"paths.root={place.local}"])
    rows = parquet.read(cfg.paths.intermediates_dir / "0088.parquet")
    columns = {"osm_id": rows["target_id"], "jpeg": tar_images.of_paths(cfg.paths).read(rows)}
    table = pa.table({**columns, "ok": [number % 5 > 0 for number in range(len(rows))]})
    root.mkdir()
    pq.write_table(table, root / "in.parquet", row_group_size=1)
    flags = ["--model", published, "--id", "osm_id", "--valid", "ok", "--set", "data.rows_per_part=1"]
    place.submit(root, "--embed", root / "in.parquet", root / "out", *flags)

    wait_for(lambda: any((root / "out").glob("*.parquet")), "vectors", every_s=0.01)
    process = place.python_of("generate_embeddings_from_parquet.py", root)[0]
    os.kill(process, signal.SIGSTOP)
    variables = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    (task,) = [name.partition("=")[2] for name in variables if name.startswith("SLURM_ARRAY_TASK_ID=")]
    place.run("scancel", "--signal=USR2", f"{place.jobs(root)['embed']}_{task}")
    wait_for(lambda: has_arrived(signal.SIGUSR2, process), "signal from Slurm")
    os.kill(process, signal.SIGCONT)
    place.wait(root)

    (run,) = (root / "logs" / "runs").iterdir()
    assert (run / f"embed-{task}.log").read_text().count("ends with exit code 85") == 1
    assert "1 of 1 stages done" in place.status(root)
    one = [root / "in.parquet", root / "one", "--config", place.config, *flags]
    assert warm.run("publish/generate_embeddings_from_parquet.py", *one).returncode == 0
    for folder in ("", "_rejects"):
        paths = {path.name: path for path in (root / f"one{folder}").iterdir()}
        assert paths.keys() == {path.name for path in (root / f"out{folder}").iterdir()}
        for name, path in paths.items():
            assert parquet.read(root / f"out{folder}" / name).equals(parquet.read(path))
    assert "nothing to do" in place.submit(root, "--embed", root / "in.parquet", root / "out", *flags)


def test_a_crashed_node_and_a_restarted_controller_are_told_and_the_job_starts_again(place):
    root = place.copy("crash", "data/*/summary", "data/*/summary_report")
    flags = ("--only", "summarize_ids")
    place.submit(root, *flags)
    (process,) = wait_for(lambda: place.python_of("summarize_ids.py", root), "running task")
    os.kill(process, signal.SIGSTOP)  # it must not end before the node does
    place.cluster.end("slurmctld")
    configuration = Path(place.environment["SLURM_CONF"]).read_text()
    assert "MessageTimeout=60" in configuration
    (root / "impatient.conf").write_text(configuration.replace("MessageTimeout=60", "MessageTimeout=3"))
    impatient = {**place.environment, "SLURM_CONF": root / "impatient.conf"}
    assert "slurm" in place.status(root, code=1, env=impatient)  # cannot be asked: neither done nor failed
    place.cluster.start_controller()
    assert place.told(root)["steps"]["summarize_ids"]["state"] == "running"

    place.cluster.crash_node()
    step = place.told(root)["steps"]["summarize_ids"]
    assert step["state"] == "waiting"  # Slurm has queued it again; nothing has failed
    place.cluster.boot_node()
    place.wait(root)
    assert place.told(root)["steps"]["summarize_ids"]["state"] == "done"
    assert_same_artefacts(root, place.local)
