"""slurm/submit.py: the graph, the command lines and the local run. No Slurm is needed for these."""

import json
import os
import re

import pytest
from conftest import ROOT

from common import config
from common.errors import ConfigError
from slurm import submit


@pytest.fixture
def cfg(tmp_path):
    return config.load(None, [f"paths.root={tmp_path}", "slurm.num_shards=4", 'slurm.sbatch=["--account=abc"]'])


def test_every_step_needs_only_steps_before_it_and_has_resources(cfg):
    for steps in (submit.chain(cfg), submit.chain(cfg, tune=3)):
        seen = set()
        for step in steps:
            assert set(step.needs) <= seen
            assert getattr(cfg.slurm, step.resources).time
            assert (ROOT / (step.module.replace(".", "/") + ".py")).exists()
            seen.add(step.name)


def test_shard_i_waits_for_shard_i_only_where_that_is_enough(cfg):
    ids = {step.name: str(number) for number, step in enumerate(submit.chain(cfg), 1)}
    waits = {step.name: submit.dependency_of(step, ids) for step in submit.chain(cfg)}
    assert waits["process_tar"] == ""
    assert waits["generate_embeddings"] == "aftercorr:1"
    assert waits["merge_and_split"] == "afterok:2:3"  # a merge waits for all shards of both
    assert waits["train"] == "afterok:6"


def test_an_array_is_as_wide_as_the_shards_and_throttled(cfg, tmp_path):
    steps = {step.name: step for step in submit.chain(cfg, tune=3)}
    command = submit.sbatch_command(steps["generate_embeddings"], cfg, ["--set", "a.b=1"], tmp_path, "aftercorr:7")
    assert "--array=0-3%4" in command
    assert command.index("--account=abc") < command.index("slurm/stage.sbatch")
    assert command[-4:] == ["--num-shards", "4", "--set", "a.b=1"]
    assert "--array=0-2" in submit.sbatch_command(steps["optuna_worker"], cfg, [], tmp_path, "")
    assert not any(
        flag.startswith("--array") for flag in submit.sbatch_command(steps["train"], cfg, [], tmp_path, "")
    )


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


def test_dry_run_needs_no_slurm_and_prints_every_command(run_script, tmp_path):
    result = run_script("slurm/submit.py", "--dry-run", "--set", f"paths.root={tmp_path}", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    modules = re.findall(r"stage\.sbatch \d+ (\S+)", result.stdout)
    assert modules == [step.module for step in submit.chain(config.load())]
    assert not (tmp_path / "logs").exists()


def test_without_slurm_it_says_so_and_offers_local(monkeypatch, cfg):
    monkeypatch.setattr(submit.shutil, "which", lambda _: None)
    with pytest.raises(submit.PipelineError, match="--local"):
        submit.submit(submit.chain(cfg), cfg, [])


@pytest.fixture
def fake_sbatch(tmp_path, monkeypatch):
    """An sbatch that answers job ids 101, 102, ... and refuses the third job."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "sbatch"
    script.write_text(
        f"#!/bin/sh\nn=$(cat {tmp_path}/n 2>/dev/null || echo 0); n=$((n+1)); echo $n > {tmp_path}/n\n"
        'if [ $n -eq 3 ]; then echo "invalid partition" >&2; exit 1; fi; echo "$((100+n));cluster"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_the_record_holds_what_was_submitted_before_a_refusal(fake_sbatch, cfg):
    with pytest.raises(submit.PipelineError, match=r"(?s)invalid partition.*101 102"):
        submit.submit(submit.chain(cfg), cfg, [])
    (record,) = cfg.paths.logs_dir.glob("runs/*/run.json")
    jobs = json.loads(record.read_text())["jobs"]
    assert {name: job["id"] for name, job in jobs.items()} == {"process_tar": "101", "compute_fingerprints": "102"}
    assert "--dependency=aftercorr:101" in jobs["compute_fingerprints"]["command"]


def test_a_local_run_stops_at_the_stage_that_fails_with_its_exit_code(run_script, tmp_path):
    result = run_script("slurm/submit.py", "--local", "--set", f"paths.root={tmp_path}")
    assert result.returncode == 1
    assert "process_tar" in result.stdout
    assert "compute_fingerprints" not in result.stdout
    assert "Traceback" not in result.stderr
    assert "the chain stopped at process_tar (exit code 1)" in result.stderr


def test_the_wrapper_gives_an_array_task_its_shard(tmp_path):
    """stage.sbatch with a fake srun: the shard is added to what works by shards and to nothing else."""
    import subprocess

    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}

    def wrapped(*arguments):
        command = ["bash", "slurm/stage.sbatch", "20", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout.split()

    assert wrapped("a.b", "--num-shards", "4") == ["python", "-m", "a.b", "--num-shards", "4", "--shard", "2"]
    assert wrapped("train.optuna_worker") == ["python", "-m", "train.optuna_worker"]
