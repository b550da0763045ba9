"""slurm/node/task.py: the shard and the GPU of each task of a job, with Slurm's variables made up."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from common import errors
from slurm.node import task


@pytest.fixture
def step(tmp_path):
    """What each task of a step of `num_tasks` is started with: its arguments and its CUDA_VISIBLE_DEVICES."""
    script = tmp_path / "stage.py"
    script.write_text("import os, sys; print(sys.argv[1:], os.environ.get('CUDA_VISIBLE_DEVICES'))")

    def run(num_tasks: int, *arguments, **variables) -> list[str]:
        told = []
        for place in range(num_tasks):
            places = {"SLURM_STEP_NUM_TASKS": num_tasks, "SLURM_PROCID": place, "SLURM_LOCALID": place}
            environment = os.environ | {name: str(value) for name, value in (places | variables).items()}
            command = [sys.executable, ROOT / "slurm" / "node" / "task.py", script, *arguments]
            lines = subprocess.check_output(command, env=environment, text=True).splitlines()
            told += [line for line in lines if not line.startswith("-- ")]
        return told

    return run


def test_task_p_of_array_index_i_takes_shard_i_n_plus_p_and_a_gpu(step):
    told = step(2, "--num-shards", "4", SLURM_ARRAY_TASK_ID=1, CUDA_VISIBLE_DEVICES="4,7")
    assert told == [f"['--num-shards', '4', '--shard', '{shard}'] {gpu}" for shard, gpu in [(2, 4), (3, 7)]]


def test_a_job_with_more_tasks_than_shards_are_left_leaves_the_rest_idle(step):
    told = step(2, "--num-shards=3", SLURM_ARRAY_TASK_ID=1, CUDA_VISIBLE_DEVICES="0,1")
    assert told == ["['--num-shards=3', '--shard', '2'] 0", "there is no shard 3 of 3"]


def test_one_task_alone_keeps_all_gpus(step):
    assert step(1, SLURM_ARRAY_TASK_ID=5, CUDA_VISIBLE_DEVICES="0,1") == ["[] 0,1"]
    told = step(1, "--num-shards=9", SLURM_ARRAY_TASK_ID=5, CUDA_VISIBLE_DEVICES="3")
    assert told == ["['--num-shards=9', '--shard', '5'] 3"]


@pytest.mark.parametrize(
    ("script", "num_tasks", "held", "told"),
    [
        ("generate_embeddings.py", 1, "0,1,2,3", "this job holds 4 GPUs and uses 1: "),
        ("compute_visual_neighbors.py", 2, "0,1,2,3", "this job holds 4 GPUs and uses 2: "),
        ("optuna_worker.py", 4, "0,1,2,3", ""),
        ("generate_embeddings.py", 1, "2", ""),
        ("generate_embeddings.py", 1, "", ""),  # none
        ("train.py", 1, "0,1,2,3", ""),  # has no use for more
    ],
)
def test_gpus_that_no_task_uses_are_told_once(tmp_path, script, num_tasks, held, told):
    """Also where a site hands out whole nodes, whatever is asked: each step then sees one GPU."""
    (tmp_path / script).touch()
    variables = {"SLURM_STEP_NUM_TASKS": num_tasks, "SLURM_JOB_GPUS": held, "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, ROOT / "slurm" / "node" / "task.py", tmp_path / script, "--num-shards=8"]
    lines = []
    for place in range(num_tasks):
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        lines += subprocess.check_output(
            command, env=environment | {"SLURM_PROCID": str(place)}, text=True
        ).splitlines()
    notes = [line for line in lines if "GPUs" in line]
    assert len(notes) == bool(told)
    assert "".join(notes).startswith(told)


def test_gathering_the_parts_of_the_neighbours_needs_no_more_gpus(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1,2,3")
    script = "difficulty/compute_visual_neighbors.py"
    assert task.note_on_gpus(script, ["--num-shards", "4"], 1)
    assert not task.note_on_gpus(script, ["--num-shards", "4", "--finish"], 1)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("0,1,2,3", ["0", "1", "2", "3", "0"]),
        ("MIG-a,MIG-b", ["MIG-a", "MIG-b", "MIG-a", "MIG-b", "MIG-a"]),
        ("6", [None] * 5),  # bound by Slurm, or the only one
        ("", [None] * 5),  # hidden
    ],
)
def test_gpus_are_dealt_out_in_turn(monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [task.gpu_of(place).get("CUDA_VISIBLE_DEVICES") for place in range(5)] == gpus


def test_without_a_list_the_gpus_of_the_machine_are_counted(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(task, "DEVICES", tmp_path)
    for name in ("nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert task.gpu_of(1) == {}
    (tmp_path / "nvidia5").touch()  # a container may have two of eight: CUDA counts from 0
    assert [task.gpu_of(place)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["0", "1", "0"]


@pytest.mark.parametrize(
    ("own", "srun_sees"), [(0, 0), (1, 1), (2, 1), (85, 85), (-signal.SIGTERM, 85), (-signal.SIGKILL, 1)]
)
def test_a_task_that_was_stopped_outranks_one_that_failed(tmp_path, own, srun_sees):
    script = tmp_path / "stage.py"
    script.write_text(f"import os, sys\nif {own} < 0: os.kill(os.getpid(), {-own})\nsys.exit({own})")
    command = [sys.executable, ROOT / "slurm" / "node" / "task.py", script]
    done = subprocess.run(command, env=os.environ | {"SLURM_STEP_NUM_TASKS": "2"}, capture_output=True, text=True)
    assert done.returncode == srun_sees
    assert done.stdout == f"-- task ends with exit code {own if own >= 0 else 128 - own}\n"


def test_a_stage_knows_the_settings_of_its_job_for_the_commands_that_it_prints(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(f"import os; print(os.environ.get({errors.JOB_SETTINGS!r}))")
    words = [script, "--config", tmp_path / "a b.toml", "--num-shards", "2", "--set", "data.neighbors=15"]
    told = subprocess.check_output([sys.executable, ROOT / "slurm" / "node" / "task.py", *words], text=True)
    assert told == f"--config '{tmp_path / 'a b.toml'}' --set data.neighbors=15\n"
