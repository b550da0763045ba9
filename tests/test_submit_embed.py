"""slurm/submit.py --embed and status.py: new data as a job array, with fake clients of Slurm.

Oracle: the files that the script leaves in one process. tests/test_slurm.py submits to a real Slurm.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_generate_embeddings_from_hf import image_folder, model  # noqa: F401 - a fixture
from test_vector_stage import EMBED, write_photographs, written

from common import cli, config
from common.errors import ConfigError, PipelineError
from slurm import chain, local, runs, status, submit

COLUMNS = ["--id", "osm_id", "--valid", "is_valid"]


@pytest.fixture
def settings(tmp_path) -> list[str]:
    values = [f"paths.root={tmp_path}", "data.rows_per_part=3", "infrastructure.embedding_batch_size=2"]
    return [word for value in [*values, "slurm.num_shards=8"] for word in ("--set", value)]


@pytest.fixture
def arguments(model, settings, tmp_path, clients) -> list[str]:  # noqa: F811
    """Of a submission of five parts in eight shards, to a fake Slurm in whose queue is nothing."""
    write_photographs(tmp_path / "in")
    clients(
        sbatch=f"echo >> {tmp_path}/calls; wc -l < {tmp_path}/calls",
        squeue="true",
        scontrol="echo 'MaxArraySize = 1001'",
    )
    return ["--embed", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(model), *COLUMNS, *settings]


def entry(root: Path) -> dict:
    """The one step of the newest run."""
    (step,) = runs.load(runs.find(root / "logs", None))["steps"].items()
    assert step[0] == "embed"
    return step[1]


def run_task(command: list[str], task: int, folder: Path) -> int:
    """What stage.sbatch runs for a task of an array, with a log as it writes it."""
    script, *words = command[command.index(f"{ROOT}/slurm/stage.sbatch") + 3 :]
    assert script == "publish/generate_embeddings_from_parquet.py"
    code = cli.exit_code_of(lambda: EMBED["parquet"]([*words, "--shard", str(task)]))
    with (folder / f"embed-{task}.log").open("a") as log:
        log.write(f"-- 1 job 1_{task} starts on a\n-- 2 job 1_{task} ends with exit code {code}\n")
    return code


def test_vectors_of_changed_data_are_redone_by_the_printed_command(arguments, tmp_path, capsys):
    with pytest.raises(ConfigError, match="takes --remake instead of --overwrite"):
        submit.main([*arguments, "--overwrite"])
    assert submit.main([*arguments, "--local"]) == 0
    first, *_, last = sorted((tmp_path / "in").glob("*.parquet"))
    shutil.copy2(last, first)
    assert cli.exit_code_of(lambda: submit.main(arguments)) == 1
    told = capsys.readouterr().err
    assert f"embed is stale (made on {time.strftime('%Y')}" in told
    command = re.search("^ *to redo what is stale: python .*/submit.py (.*)", told, re.MULTILINE)[1]
    assert submit.main(shlex.split(command)) == 0
    assert "--remake" in entry(tmp_path)["command"]
    assert cli.exit_code_of(lambda: submit.main([*shlex.split(command), "--local"])) == 0
    assert submit.main([*arguments, "--dry-run"]) == 0
    assert "embed                      8 tasks done" in capsys.readouterr().out


def test_new_data_are_an_array_that_stops_resumes_and_is_followed(arguments, tmp_path, monkeypatch, clients):
    assert submit.main(arguments) == 0
    folder, command = runs.find(tmp_path / "logs", None), entry(tmp_path)["command"]
    assert "--array=0-4%4" in command  # three of the eight shards have no part
    assert "--gres=gpu:1" in command
    monkeypatch.chdir("/")
    clients(squeue="echo '1_0|embed|RUNNING|None'; echo '1_1|embed|PENDING|Resources'")
    assert status.report(folder)["steps"][0]["progress"] == {"done": 0, "total": 5, "unit": "files"}
    assert [run_task(command, task, folder) for task in (0, 2, 4)] == [0, 0, 0]
    clients(squeue="echo '1_1|embed|PENDING|Resources'")
    (step,) = status.report(folder)["steps"]
    assert (step["state"], step["progress"]["done"]) == ("waiting", 3)
    assert (step["tasks"], step["job"]) == ({"waiting": 1, "cancelled": 1, "done": 6}, "1")

    clients(squeue="true")
    assert run_task(command, 3, folder) == 0
    report = status.report(folder)
    assert (report["failed"], report["steps"][0]["tasks"]) == (True, {"cancelled": 1, "done": 7})
    assert submit.main(shlex.split(report["continue"])[2:]) == 0  # the missing shard alone
    command = entry(tmp_path)["command"]
    assert "--array=1%4" in command
    assert run_task(command, 1, runs.find(tmp_path / "logs", None)) == 0
    assert not status.report(runs.find(tmp_path / "logs", None))["failed"]

    one = [str(tmp_path / "in"), str(tmp_path / "one" / "out"), *arguments[3:]]
    assert EMBED["parquet"](one) == 0
    assert written(tmp_path / "out") == written(tmp_path / "one" / "out")


def test_a_shard_that_stops_says_so_with_85_and_its_next_start_makes_the_rest(arguments, tmp_path, monkeypatch):
    assert submit.main([*arguments, "--set", "slurm.num_shards=2"]) == 0
    folder, command = runs.find(tmp_path / "logs", None), entry(tmp_path)["command"]
    monkeypatch.setattr(cli, "_stop_signal", 12)
    assert run_task(command, 0, folder) == cli.EXIT_STOPPED
    assert len(list((tmp_path / "out").iterdir())) == 1
    (step,) = status.report(folder)["steps"]
    assert step["why"] == "stopped with everything saved, and not requeued (slurm.max_requeues)"
    monkeypatch.setattr(cli, "_stop_signal", None)
    assert [run_task(command, task, folder) for task in (0, 1)] == [0, 0]  # stage.sbatch has queued it again
    assert status.report(folder)["steps"][0]["state"] == "done"


def test_what_is_done_is_not_submitted_again(arguments, tmp_path, capsys):
    one = [arguments[1], arguments[2], *arguments[3:]]
    assert EMBED["parquet"](one) == 0
    capsys.readouterr()
    assert submit.main(arguments) == 0
    assert "nothing to do: embed done" in capsys.readouterr().out
    assert not (tmp_path / "logs" / "runs").exists()
    (tmp_path / "out" / "c-0.parquet").unlink()
    assert submit.main([*arguments, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert plan.startswith(
        "embed                      1 of 8 tasks to do (4)             (3 of the tasks have no work)"
    )


def test_a_plan_is_made_without_torch_and_paths_are_those_of_the_user(arguments, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.removeprefix(f"{tmp_path}/") for word in arguments[1:3]]
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from slurm import submit
assert submit.main({["--embed", *words, *arguments[3:], "--dry-run"]!r}) == 0
print("torch" in sys.modules)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    line, is_loaded = told.splitlines()[-2:]
    assert is_loaded == "False"
    words = shlex.split(line)
    assert words[words.index("publish/generate_embeddings_from_parquet.py") + 1 : -2] == [
        *arguments[1 : 5 + len(COLUMNS)],
        *("--num-shards", "8"),
    ]


def test_the_script_is_chosen_by_what_the_input_holds(settings, model, tmp_path):  # noqa: F811
    image_folder(tmp_path / "photos")
    cfg = config.load(None, settings[1::2])
    module = chain.embedding_module(tmp_path / "photos")
    (step,) = chain.steps_of(cfg, embed=[module, str(tmp_path / "photos"), "out", "--model", str(model)])
    assert step.script == "publish/generate_embeddings_from_hf.py"
    assert len([task for task in range(8) if step.stage.outputs_of(cfg, task, 8)]) == 3
    commands = local.commands([step], {"embed": [0, 1, 2]}, settings, jobs=2)
    script = str(ROOT / "publish" / "generate_embeddings_from_hf.py")
    whole = [sys.executable, script, str(tmp_path / "photos"), str(Path("out").absolute()), "--model", str(model)]
    ends = [["--num-shards", "2", "--shard", shard] for shard in "01"]
    assert [command for _, command in commands] == [[*whole, *settings, *end] for end in ends]
    write_photographs(tmp_path / "in")
    shutil.copy(tmp_path / "in" / "a.parquet", tmp_path / "t.parquet")
    for tables in (tmp_path / "in", tmp_path / "t.parquet"):
        assert chain.embedding_module(tables).endswith("from_parquet")


def test_two_runs_do_not_write_one_folder_nor_is_a_model_replaced_that_is_being_used(arguments, tmp_path, clients):
    assert submit.main(arguments) == 0
    model = arguments[4]  # noqa: F811
    clients(squeue="echo '1_0|embed|RUNNING|None'")
    with pytest.raises(PipelineError, match="embed in the queue"):
        submit.main(arguments)
    for target in (model, tmp_path / "in"):
        with pytest.raises(PipelineError, match="embed in the queue"):
            runs.refuse_busy(tmp_path / "logs", [{"target": str(target), "reads": []}])
    assert submit.main([*arguments[:2], str(tmp_path / "other"), *arguments[3:]]) == 0


def test_an_interrupted_submission_is_continued(arguments, tmp_path, clients):
    clients(sbatch="echo no luck >&2; exit 1")
    with pytest.raises(PipelineError, match="embed was not submitted: sbatch failed: no luck"):
        submit.main(arguments)
    clients(sbatch="echo 5")
    folder = runs.find(tmp_path / "logs", None)
    today = ["--set", "slurm.num_shards=3"]
    assert submit.main(["--continue", folder.name, *arguments[-8:], *today]) == 0
    assert entry(tmp_path)["job"] == "5"
    assert {"--array=0-2%4", "--num-shards", "3"} <= set(entry(tmp_path)["command"])


def test_what_cannot_be_embedded_is_told_before_anything_is_submitted(arguments, tmp_path):
    wrong = [
        ([str(tmp_path / "nothing")], "nothing does not exist"),
        ([arguments[1], arguments[1]], "is the folder of the input"),
        ([*arguments[1:3], "--column", "osm_id"], "no column osm_id of embeddings"),
        ([*arguments[1:3], "--model", str(tmp_path)], "holds no published model"),
    ]
    for words, message in wrong:
        given = [*words, str(tmp_path / "out")] if len(words) == 1 else words
        more = arguments[3:] if "--model" not in words else arguments[5:]
        with pytest.raises(PipelineError, match=message):
            submit.main(["--embed", *given, *more])
    for more in (["--only", "train"], ["--cancel", "x"], ["--tune", "2"], ["--shard", "2"], ["--num-shards", "4"]):
        with pytest.raises(ConfigError, match="--embed"):
            submit.main([*arguments, *more])
    for words in (arguments[3:], [*arguments, "--nonsense"]):  # --model without --embed
        with pytest.raises(SystemExit):
            submit.main(words)
    assert not (tmp_path / "logs" / "runs").exists()
