"""slurm/submit.py, chain.py and local.py: the graph, what is left of it, and the chain run here."""

import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import short_training
from conftest import ROOT, paths_below

from common import cli, config, files, parquet, schemas, stages
from common.errors import ConfigError, PipelineError, StaleArtefact
from common.stages import Output
from generate import generate_embeddings
from slurm import chain, local, prefetch, submit
from train import run_record, train
from train.fitting import history


def everything(steps) -> dict[str, list[int]]:
    return {step.name: list(range(step.tasks)) for step in steps}


# ------------------------------------------------------------------------------------------------ the graph


def test_every_step_needs_only_steps_before_it_and_has_resources_a_target_and_a_wrapper(cfg):
    for steps in (chain.steps_of(cfg), chain.steps_of(cfg, tune=3)):
        seen = set()
        for step in steps:
            assert set(step.needs) <= seen
            assert step.resources_in(cfg).time
            assert (ROOT / step.script).exists()
            assert (ROOT / "slurm" / "stages" / f"{step.resources}.sbatch").exists()
            assert step.stage.folder(cfg).is_relative_to(cfg.paths.root)
            seen.add(step.name)


def test_a_neighbour_search_in_parts_is_gathered_by_one_task(tmp_path):
    cfg = config.load(None, [f"paths.root={tmp_path}", "slurm.difficulty_shards=5"])
    steps = {step.name: step for step in chain.steps_of(cfg)}
    assert steps["neighbor_parts"].tasks == 5
    assert steps["compute_visual_neighbors"].needs == ("merge_and_split", "neighbor_parts")
    assert steps["compute_visual_neighbors"].arguments == ("--num-shards", "5", "--finish")
    only = chain.select(list(steps.values()), "compute_visual_neighbors", "compute_visual_neighbors")
    assert [step.name for step in only] == ["neighbor_parts", "compute_visual_neighbors"]


def test_a_stage_that_is_half_added_is_an_error_that_says_what_is_missing(cfg):
    with pytest.raises(PipelineError, match=r"preprocess/mine\.py does not exist, but slurm/chain\.py lists it"):
        chain.Step("mine", "preprocess.mine").is_done(cfg, 0)
    with pytest.raises(PipelineError, match=r"preprocess/process_tar\.py has no MINE: see CONTRIBUTING\.md"):
        chain.Step("mine", "preprocess.process_tar", declaration="MINE").is_done(cfg, 0)
    with pytest.raises(ConfigError, match=r"there is no \[slurm\.mine\], with the resources of preproc"):
        chain.Step("mine", "preprocess.mine").resources_in(cfg)


def test_select_takes_both_ends_and_refuses_what_is_not_there(cfg):
    steps = chain.steps_of(cfg)
    names = [step.name for step in chain.select(steps, "merge_and_split", "train")]
    assert names == ["merge_and_split", "summarize_ids", "compute_visual_neighbors", "train"]
    with pytest.raises(ConfigError, match=r"no stage trian; did you mean train\?; the stages are process_tar"):
        chain.select(steps, "trian", None)
    with pytest.raises(ConfigError, match="comes after"):
        chain.select(steps, "train", "process_tar")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tune", "-1"], "--tune must be 1"),
        (["--jobs", "2"], "belongs to --local"),
        (["--dry-run", "--cancel", "20260101-000000"], "--dry-run do not apply to"),
        (["--only", "train", "--to", "train"], "cannot be combined with --from"),
        (["--cancel", "20260101-000000", "--only", "train"], "do not apply to"),
        (["--continue", "20260101-000000", "--to", "evaluate"], "do not apply to"),
        (["--prefetch", "--tune", "3"], "do not apply to"),
        (["--local", "--wait"], "--wait does not apply to"),
        (["--remake"], "--remake needs the name of a stage"),
        (["--embed", "in", "out", "--remake", "train"], "but none with --embed"),
        (["--continue", "20260101-000000", "--remake", "train"], "do not apply to"),
    ],
)
def test_unusable_arguments_say_so(arguments, message):
    with pytest.raises(ConfigError, match=message):
        submit.parse(arguments)


# ------------------------------------------------------------------------------------------------ what is left


def test_what_depends_on_something_left_is_left_too(cfg, monkeypatch):
    done = {("process_tar", 0), ("process_tar", 2), ("process_tar", 3), ("compute_fingerprints", 1)}
    done |= {("generate_embeddings", task) for task in range(4)}
    monkeypatch.setattr(chain.Step, "is_done", lambda step, _, task: (step.name, task) in done)
    steps = chain.steps_of(cfg)
    left = chain.missing(steps, cfg)
    assert left["process_tar"] == [1]
    assert left["compute_fingerprints"] == [0, 1, 2, 3]  # 1 is there, but its input is made anew
    assert left["generate_embeddings"] == [1]
    assert left["merge_and_split"] == [0]
    assert chain.missing(steps[2:3], cfg) == {"generate_embeddings": []}  # --only: no step before it is looked at


def test_without_tars_the_plan_tells_what_is_complete_and_nothing_is_redone(cfg, monkeypatch, capsys):
    """Of a finished chain whose raw data have been removed to make room."""
    needs_tars = {"process_tar", "compute_fingerprints", "generate_embeddings", "merge_and_split"}
    monkeypatch.setattr(chain.Step, "is_done", lambda step, *_: step.name not in needs_tars)
    flags = ["--set", f"paths.root={cfg.paths.root}"]
    assert submit.main([*flags, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert re.search("^merge_and_split +to do +after", plan, re.MULTILINE)
    assert re.search("^summarize_ids +complete, would be redone +after merge_and_split$", plan, re.MULTILINE)
    for local_flag in ([], ["--local"]):
        with pytest.raises(PipelineError, match=r"has no tars .*: summarize_ids, .*\n.*--from summarize_ids$"):
            submit.main([*flags, *local_flag])
    assert not (cfg.paths.root / "logs").exists()
    assert submit.main([*flags, "--local", "--from", "summarize_ids"]) == 0


def test_a_file_is_done_if_its_settings_and_inputs_are_the_same(cfg, tmp_path):
    """process_tar and compute_fingerprints on one tar; then a setting, the input and the file itself change."""
    from synthetic import write_dataset

    flags = ["--set", f"paths.root={tmp_path}"]
    write_dataset(cfg.paths.raw_dir, streets=1, cities=1, image_px=96)
    steps = chain.steps_of(cfg)[:2]
    assert chain.missing(steps, cfg)["process_tar"] == [0]  # shards 1 to 3 have no tar
    for step in steps:
        ((_, command),) = local.commands([step], everything([step]), flags, jobs=1)
        subprocess.run(command, check=True, capture_output=True)
    assert chain.missing(steps, cfg) == {"process_tar": [], "compute_fingerprints": []}

    exact = config.load(None, [*flags[1:], "slurm.num_shards=4", "data.fingerprint=exact"])
    assert chain.missing(steps, exact) == {"process_tar": [], "compute_fingerprints": [0]}
    fingerprints = cfg.paths.fingerprints_dir / "0088-0.parquet"
    whole = fingerprints.read_bytes()
    fingerprints.write_bytes(whole[:100])
    assert chain.missing(steps, cfg)["compute_fingerprints"] == [0]
    fingerprints.write_bytes(whole)
    with (cfg.paths.raw_dir / "0088.tar").open("ab") as tar:
        tar.write(bytes(512))
    # the other three have no work now; how many parts the new tar has is known when it has been processed
    assert chain.missing(steps, cfg) == {"process_tar": [0], "compute_fingerprints": [0, 1, 2, 3]}


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_is_done_when_its_history_says_so_and_is_judged_without_torch(tmp_path, finished):
    short_training.write_merge(tmp_path)
    settings = short_training.settings(tmp_path)
    run_dir = paths_below(tmp_path).checkpoints_dir / "default"
    run_dir.mkdir(parents=True)
    (run_dir / "curves.png").touch()
    for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
        zipfile.ZipFile(run_dir / name, "w").close()
    (output,) = train.outputs(config.load(None, settings), 0, 1)
    epoch = pd.DataFrame({name: [0.0] for name in schemas.history(5).names})
    history.write(output.path, epoch, output.record, {"finished": finished, "best_checkpoint": "abc"})
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from common import config
from train.train import STAGE
print(STAGE.is_done(config.load(None, {settings!r})), "torch" in sys.modules, "matplotlib" in sys.modules)
"""
    judged = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert judged.split() == [str(finished), "False", "False"]
    assert not train.STAGE.is_done(config.load(None, [*settings, "training.margin=0.3"]))
    history.write(output.path, epoch, output.record, output.facts)
    assert train.STAGE.is_done(config.load(None, settings))
    for spoil in (Path.unlink, Path.touch):  # gone, or empty
        spoil(run_dir / "checkpoint_best.pt")
        assert not train.STAGE.is_done(config.load(None, settings))
    zipfile.ZipFile(run_dir / "checkpoint_best.pt", "w").close()
    history.write(output.path, epoch, output.record)  # as older versions did, of finished runs and of others
    assert not train.STAGE.is_done(config.load(None, settings))


def test_a_finished_run_of_other_settings_is_explained_with_all_ways_out(tmp_path):
    short_training.write_merge(tmp_path)
    settings = short_training.settings(tmp_path)
    cfg = config.load(None, settings)
    for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
        files.write_bytes(run_record.run_dir(cfg) / name, b"")
    (output,) = train.outputs(cfg, 0, 1)
    epoch = pd.DataFrame({name: [0.0] for name in schemas.history(5).names})
    history.write(output.path, epoch, output.record.timed(7500), {"finished": True, "best_checkpoint": "abc"})
    flags = short_training.flags(tmp_path, "training.margin=0.3")
    with pytest.raises(StaleArtefact) as refused:
        submit.main([*flags, "--local", "--only", "train"])
    told = str(refused.value).splitlines()
    assert told[0].endswith("it was made with training.margin = 0.1 (now 0.3)")
    assert told[1:3] == [
        "  redoing it, at the rate of the last time: train (2 h 05 min)",
        f"  to keep it: {told[-1].partition(': ')[2].removesuffix(' --remake train')} --set training.margin=0.1",
    ]
    assert told[3].endswith(" --local --only train --set training.run=NAME")
    assert told[4].endswith(" --local --only train --remake train")


def test_a_damaged_json_file_among_the_inputs_is_not_a_traceback(tmp_path):
    for content in ('{"a":', "[]", '{"provenance": {"maker": "somebody"}}'):
        (tmp_path / "metrics.json").write_text(content)
        with pytest.raises(PipelineError, match=r"metrics\.json is damaged or not ours"):
            stages.identity(tmp_path / "metrics.json")


def test_other_weights_in_a_folder_of_the_same_name_are_noticed_and_a_moved_folder_is_not(tmp_path):
    """What was embedded with the old ones would count as done, and no stage would be asked."""
    for folder, content in [("old", b"1"), ("moved", b"1"), ("swapped", b"2")]:
        (tmp_path / folder / "backbone").mkdir(parents=True)
        (tmp_path / folder / "backbone" / "config.json").write_text("{}")
        (tmp_path / folder / "backbone" / "model.safetensors").write_bytes(content)
    path, stage = tmp_path / "0088-0.parquet", generate_embeddings.STAGE

    def output(folder: str, dtype: str = "auto") -> Output:
        settings = [f"embedding_model.name={tmp_path / folder / 'backbone'}", f"embedding_model.dtype={dtype}"]
        return Output(path, stage.record(config.load(None, settings), {"0088.tar": "1 byte"}))

    with parquet.writer(path, schemas.FINGERPRINTS, output("old", "bfloat16").record):
        pass
    for folder, same in [("old", True), ("moved", True), ("swapped", False)]:
        assert stage.is_current(output(folder)) == same  # "auto": the compute node decided
    assert not stage.is_current(output("old", "float32"))


def test_more_dimensions_than_the_backbone_has_are_refused_before_anything_runs(tmp_path):
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "config.json").write_text('{"hidden_size": 192}')
    flags = ["--set", f"paths.root={tmp_path}", "--set", f"embedding_model.name={tmp_path / 'backbone'}"]
    for more in (["--local"], ["--dry-run"]):  # the default, 256
        with pytest.raises(
            ConfigError, match=r"= 256 exceeds the 192 dim.*\n.*--set training_model\.output_dim=192$"
        ):
            submit.main([*flags, *more])
    cls_mean = config.load(None, [*flags[1::2], "embedding_model.pooling=cls_mean"])
    chain.refuse_output_dim(chain.steps_of(cls_mean), cls_mean)  # 2 x 192
    cfg = config.load(None, flags[1::2])
    chain.refuse_output_dim(chain.select(chain.steps_of(cfg), None, "merge_and_split"), cfg)
    pq.write_table(pa.table({"embedding": [[1.0] * 32]}), tmp_path / "theirs.parquet")
    table = config.load(None, [f"embedding_model.name={tmp_path / 'theirs.parquet'}"])
    with pytest.raises(
        ConfigError, match=r"= 256 exceeds the 32 dimensions of the embeddings of \S*theirs.parquet\n"
    ):
        chain.refuse_output_dim(chain.steps_of(table), table)
    hub = config.load(None, ["embedding_model.name=nobody/knows", "training_model.output_dim=9999"])
    chain.refuse_output_dim(chain.steps_of(hub), hub)  # not in the cache


def test_without_tars_everything_is_left(cfg):
    assert all(chain.missing(chain.steps_of(cfg, tune=2), cfg).values())


def test_dry_run_needs_no_slurm_and_prints_every_command(run_script, tmp_path):
    result = run_script("slurm/submit.py", "--dry-run", "--set", f"paths.root={tmp_path}", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    scripts = re.findall(r"stage\.sbatch \S+ \d+ (\S+)", result.stdout)
    assert scripts == [step.script for step in chain.steps_of(config.load())]
    assert "process_tar                16 of 16 tasks to do (0-15)" in result.stdout
    assert "after process_tar, compute_fingerprints, generate_embeddings" in result.stdout
    assert result.stdout.count(f"--config {tmp_path}/logs/runs/TIME/config.toml") == len(scripts)
    assert not (tmp_path / "logs").exists()


def test_more_tasks_than_tars_share_their_parts_and_the_plan_tells_who_has_work(run_script, cfg, tmp_path):
    from synthetic import write_dataset

    flags = ["--set", f"paths.root={tmp_path}"]
    flags += ["--set", "slurm.num_shards=5", "--set", "data.rows_per_part=9", "--to", "compute_fingerprints"]
    truth = write_dataset(
        cfg.paths.raw_dir, streets=3, cities=2, image_px=64, facades_per_street=2, targets_per_facade=(1, 1)
    )
    plan = run_script("slurm/submit.py", "--dry-run", *flags).stdout.splitlines()
    assert plan[0] == "process_tar                2 of 5 tasks to do (0-1)           (3 of the tasks have no work)"
    assert plan[1].startswith(
        "compute_fingerprints       5 of 5 tasks to do (0-4)           after process_tar (some tasks"
    )
    assert "--dependency=afterok:" in plan[-1]  # task 2 reads what task 0 of process_tar makes
    for task in range(5):
        task_flags = ["--shard", task, "--num-shards", 5, *flags[:2]]
        assert run_script("preprocess/process_tar.py", *task_flags).returncode == 0
    counts = truth.images.groupby("dataset_id").size().tolist()
    num_parts = [-(-count // 9) for count in counts]
    busy = sum(min(parts, tasks) for parts, tasks in zip(num_parts, (3, 2), strict=True))
    plan = run_script("slurm/submit.py", "--dry-run", *flags).stdout.splitlines()
    assert plan[0].startswith("process_tar                5 tasks done")
    assert plan[1].startswith(f"compute_fingerprints       {busy} of 5 tasks to do")
    assert ("no work" in plan[1]) == (busy < 5)
    assert busy > 2  # or a tar had one task


# ------------------------------------------------------------------------------------------------ here


def test_a_local_run_stops_at_the_stage_that_fails_with_its_exit_code(run_script, tmp_path):
    result = run_script("slurm/submit.py", "--local", "--set", f"paths.root={tmp_path}")
    assert result.returncode == 1
    assert "process_tar" in result.stdout
    assert "compute_fingerprints" not in result.stdout
    assert "Traceback" not in result.stderr
    assert "the chain stopped at process_tar (exit code 1)" in result.stderr


def test_jobs_cut_what_goes_by_tars_and_the_others_wait_for_all_of_it(cfg, tmp_path):
    steps = chain.steps_of(cfg, tune=3)
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


def test_commands_at_once_take_a_gpu_each_and_one_alone_sees_all(cfg, tmp_path, monkeypatch):
    """Each waits until all have begun, so that none takes the place of one that has ended."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    steps = [step for step in chain.steps_of(cfg) if step.name == "process_tar"]
    says = f"touch {tmp_path}/$CUDA_VISIBLE_DEVICES; until [ $(ls {tmp_path} | wc -l) = 4 ]; do sleep 0.02; done"
    assert local.run([(steps[0], ["sh", "-c", says])] * 4, jobs=4) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]
    alone = ["sh", "-c", f"touch {tmp_path}/$CUDA_VISIBLE_DEVICES"]
    assert local.run([(steps[0], alone)], jobs=1) == 0
    assert (tmp_path / "0,1,2,3").exists()


def test_after_a_failure_nothing_new_is_started(cfg, tmp_path):
    steps = chain.steps_of(cfg)
    commands = [(step, ["sh", "-c", "exit 3" if step.name == "summarize_ids" else "true"]) for step in steps]
    commands[-1] = (steps[-1], ["touch", str(tmp_path / "started")])
    for at_once in (1, 3):
        assert local.run(commands, at_once) == 3
        assert not (tmp_path / "started").exists()


# ------------------------------------------------------------------------------------------------ time limits


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


def test_prefetch_finds_whole_weights_and_names_what_is_missing(tmp_path, capsys):
    from local_backbone import write_local_backbone

    folder = write_local_backbone(tmp_path / "backbone")
    flags = ["--set", f"embedding_model.name={folder}"]
    assert prefetch.main(flags) == 0
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    assert f"(dinov2, images of 56 x 56), {megabytes:,.0f} MB of weights in {folder}" in capsys.readouterr().out
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])  # a download that broke off
    with pytest.raises(PipelineError, match=r"model\.safetensors is missing or damaged"):
        prefetch.main(flags)


def test_for_a_table_of_vectors_there_is_nothing_to_fetch(tmp_path, capsys):
    pq.write_table(pa.table({"embedding": [[1.0]]}), tmp_path / "theirs.parquet")
    flags = [f"paths.root={tmp_path}", f"embedding_model.name={tmp_path / 'theirs.parquet'}"]
    assert submit.main(["--prefetch", *(word for flag in flags for word in ("--set", flag))]) == 0
    assert capsys.readouterr().out.startswith("nothing to fetch: ")


def test_an_interrupted_prefetch_leaves_no_job_in_the_queue(cfg, monkeypatch, clients, tmp_path):
    clients(scancel=f'echo "$@" > {tmp_path}/cancelled')
    names, real = [], subprocess.run

    def run(command, **options):
        if command[0] == "sbatch":  # Ctrl-C while it waits for the job
            names.extend(word.partition("=")[2] for word in command if word.startswith("--job-name="))
            raise KeyboardInterrupt
        return real(["true"] if command[0] == "bash" else command, **options)

    clients(sbatch="true")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        local.prefetch(cfg, [])
    assert (tmp_path / "cancelled").read_text() == f"--name={names[0]}\n"


# ------------------------------------------------------------------------------------------------ signals


def test_sigterm_reaches_the_stage_that_runs_and_ends_the_chain_with_85(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from common import cli, config
from slurm import chain, local
steps = chain.steps_of(config.load())[:2]
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
