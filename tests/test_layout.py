"""Where files go: a folder for each backbone and each run, and what an older version left elsewhere.

Oracle: the files themselves, by inode and time of change; slurm/chain.py, which knows what is done by the records.
"""

import importlib
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from local_backbone import write_local_backbone
from synthetic import write_dataset
from test_changes import StageHere

from common import config, pages
from common.errors import ConfigError, PipelineError
from common.layout import former_layout
from slurm import chain, local, submit
from train import evaluate, list_runs
from train.evaluation import metrics_json
from train.fitting import history

SETTINGS = (
    *("embedding_model.pooling=mean", "data.split_by=building", "data.neighbors=20"),
    *("training_model.hidden_dim=16", "training_model.output_dim=16", "infrastructure.embedding_batch_size=16"),
    *("training.epochs=1", "training.batch_size=32", "training.steps_per_epoch=2", "training.warmup_steps=1"),
    *("training_model.init=random", "evaluation.bootstrap_samples=10"),
)
LABEL = "backbone-mean-1-0.5"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "PGPASSWORD")


def settings(root: Path, *more: str) -> list[str]:
    return [f"paths.root={root}", f"embedding_model.name={root / 'backbone'}", *SETTINGS, *more]


def flags(root: Path, *more: str) -> list[str]:
    return [word for setting in settings(root, *more) for word in ("--set", setting)]


def load(root: Path, *more: str):
    return config.load(None, settings(root, *more))


def run_chain(root: Path, *more: str, last: str | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:  # drawing takes longer than the rest
        patch.setattr(history, "draw", lambda path, table: path.touch())
        patch.setattr(pages, "svg", lambda figure, alt: alt)
        for name in SECRETS:
            patch.setenv(name, f"secret-{name}")
        for step in chain.select(chain.steps_of(load(root, *more)), None, last):
            assert importlib.import_module(step.module).main(flags(root, *more)) == 0


def is_done(cfg) -> bool:
    return not any(chain.missing(chain.steps_of(cfg), cfg).values())


def states(root: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The root of a finished chain."""
    root = tmp_path_factory.mktemp("finished")
    write_dataset(root / "data" / "raw", streets=6, cities=2, image_px=64, facades_per_street=4)
    write_local_backbone(root / "backbone")
    run_chain(root)
    assert is_done(load(root))
    return root


def test_no_token_or_password_is_written_anywhere(finished):
    for path in finished.rglob("*"):
        assert not path.is_file() or b"secret-" not in path.read_bytes(), path


@pytest.fixture
def root(finished, tmp_path) -> Path:
    """A copy of it, in a folder whose name must be quoted."""
    return shutil.copytree(finished, tmp_path / "a root")


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([], "dinov2-base-cls-1-0.5"),
        (["embedding_model.pooling=mean", "embedding_model.views=[0.5]"], "dinov2-base-mean-0.5"),
        (["embedding_model.dtype=float16"], "dinov2-base-cls-1-0.5-float16"),
        (["embedding_model.revision=refs/pr/1"], "dinov2-base-refs-pr-1-cls-1-0.5"),
        ([f"embedding_model.revision={'0123456789' * 4}"], "dinov2-base-01234567-cls-1-0.5"),
        (["embedding_model.label=mine", "embedding_model.pooling=mean"], "mine"),
    ],
)
def test_the_folders_are_named_by_the_model_or_by_its_label(overrides, label):
    cfg = config.load(None, ["paths.root=/scratch", "training.run=b", *overrides])
    assert str(cfg.paths.embeddings_dir) == f"/scratch/data/{label}/embeddings"
    assert str(cfg.paths.published_dir) == f"/scratch/data/{label}/published/b"
    assert str(cfg.paths.checkpoints_dir) == f"/scratch/checkpoints/{label}"
    assert str(cfg.paths.fingerprints_dir) == "/scratch/data/fingerprints"


def test_a_folder_is_named_by_its_last_component_whatever_the_revision(tmp_path):
    (tmp_path / "My model (v2)").mkdir()
    model = [f"embedding_model.name={tmp_path / 'My model (v2)'}", "embedding_model.revision=v1"]
    assert config.label_of(config.load(None, model).embedding_model) == "My-model--v2--cls-1-0.5"


def test_a_link_is_followed_wherever_it_is_in_a_path(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "embeddings").symlink_to(tmp_path / "disk")
    cfg = config.load(None, [f"paths.root={tmp_path}", "embedding_model.label=mine"])
    assert cfg.paths.embeddings_dir == tmp_path / "disk"  # what is beside it is on that disk, too


@pytest.mark.parametrize("label", ["a/b", "..", ""])
def test_a_label_that_is_no_name_of_a_folder_is_refused(label):
    with pytest.raises(ConfigError, match="label"):
        config.load(None, [f"embedding_model.label={label}"])


def test_an_unknown_placeholder_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"merged_dir: .* no placeholder \{backbon\}: \{backbone\} and \{run\}"):
        config.load(None, ["paths.merged_dir=data/{backbon}/merged"])


def test_a_written_configuration_serves_other_runs_and_backbones(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(config.load(None, ["paths.root=/scratch", "training.run=tuned"])))
    assert config.load(path).paths == config.load(None, ["paths.root=/scratch", "training.run=tuned"]).paths
    changed = config.load(path, ["training.run=b", "embedding_model.pooling=mean"])
    assert str(changed.paths.evaluation_dir) == "/scratch/data/dinov2-base-mean-1-0.5/evaluation/b"
    assert config.with_training(config.load(path), run="b").paths.evaluation_dir.name == "b"


# ------------------------------------------------------------------------------------------- beside one another


def test_another_pooling_has_folders_of_its_own_and_shares_what_does_not_depend_on_it(root):
    before = states(root)
    other = load(root, "embedding_model.pooling=cls_mean")
    left = chain.missing(chain.steps_of(other), other)
    assert not left["process_tar"] + left["compute_fingerprints"]
    assert left["generate_embeddings"]
    run_chain(root, "embedding_model.pooling=cls_mean", last="train")
    assert [name for name, tasks in chain.missing(chain.steps_of(other), other).items() if tasks] == [
        "evaluate",
        "convert_to_hf",
    ]
    assert before.items() <= states(root).items()  # nothing of the first is touched
    assert is_done(load(root))  # changed back
    new = {path.relative_to(root).parts[:2] for path in states(root).keys() - before.keys()}
    assert new == {("data", "backbone-cls_mean-1-0.5"), ("checkpoints", "backbone-cls_mean-1-0.5")}


@pytest.mark.usefixtures("no_figures")
def test_another_run_goes_through_to_the_end_and_is_compared_by_its_name(root, capsys, monkeypatch):
    before = states(root)
    chain = ["--local", "--from", "train", *flags(root)]  # as the documentation says
    chain += ["--set", "training.run=b", "--set", "training.loss=triplet"]
    chain += ["--set", "training.seed=1"]  # another head, whatever is learned in two steps
    monkeypatch.setattr(local, "subprocess", SimpleNamespace(Popen=StageHere))
    assert submit.main(chain) == 0
    done = capsys.readouterr().out
    assert before.items() <= states(root).items()
    b = load(root, "training.run=b", "training.loss=triplet", "training.seed=1")
    assert is_done(b)
    for name in ("evaluation", "published"):
        assert f"data/{LABEL}/{name}/b" in done
    metrics = metrics_json.read(b.paths.evaluation_dir / "metrics.json")
    assert (metrics["subject"]["run"], metrics["subject"]["config"]["training.loss"]) == ("b", "triplet")

    capsys.readouterr()
    assert list_runs.main(flags(root)) == 0
    listed = capsys.readouterr().out
    header, first, second = (re.split(r"  +", line) for line in listed.splitlines())  # by date
    assert header[:4] == ["run", "backbone", "date", "epoch"]
    assert header[-2:] == ["loss", "seed"]  # what differs, and nothing else
    assert (first[0], second[0]) == ("default", "b")
    assert (first[-3:], second[-3:]) == (["yes", "infonce", "0"], ["yes", "triplet", "1"])
    test = metrics["methods"]["trained"]
    assert second[-5:-3] == [metrics_json.percent(test[name]) for name in ("recall@1", "map@r")]

    assert evaluate.main([*flags(root), "--compare", "b"]) == 0
    found = metrics_json.read(load(root).paths.evaluation_dir / "compared" / "metrics.json")
    assert found["methods"]["b"] == metrics["methods"]["trained"]
    heads = [found["provenance"]["inputs"]["b"], metrics["provenance"]["inputs"]["checkpoint_best.pt"]]
    assert heads[0] == heads[1] != found["provenance"]["inputs"]["checkpoint_best.pt"]
    shutil.rmtree(b.paths.checkpoints_dir / "b")  # then the published one is taken
    assert evaluate.main([*flags(root), "--compare", "b", "--overwrite"]) == 0
    again = metrics_json.read(load(root).paths.evaluation_dir / "compared" / "metrics.json")
    assert again["methods"]["b"] == found["methods"]["b"]
    assert "the published model in" in again["descriptions"]["b"]
    with pytest.raises(PipelineError, match=r"--compare c: no such run in .* \(default\)"):
        evaluate.main([*flags(root), "--compare", "c"])


# ---------------------------------------------------------------------------------------------- former layout


def put_back(root: Path) -> None:
    """Everything where an older version has it."""
    data, label = root / "data", LABEL
    for name in ("evaluation", "published"):
        (data / label / name / "default").rename(data / name)
        (data / label / name).rmdir()
    for path in (data / label).iterdir():
        path.rename(data / path.name)
    (root / "checkpoints" / label / "default").rename(root / "checkpoints" / "default")
    (data / label).rmdir()
    (root / "checkpoints" / label).rmdir()


def test_the_former_layout_is_refused_until_the_commands_that_are_told_have_moved_it(root, run_script):
    before = states(root)
    put_back(root)
    for script in ("slurm/submit.py", "train/evaluate.py"):
        refused = run_script(script, *flags(root))
        assert refused.returncode == 2
    told = [line.strip() for line in refused.stderr.splitlines()]
    commands = [line for line in told if line.startswith(("cd ", "mkdir ", "mv "))]
    assert not (root / "data" / LABEL).exists()
    status = run_script("slurm/status.py", *flags(root))  # jobs can still be followed, and cancelled
    assert (status.returncode, "logs/runs" in status.stderr) == (1, True)
    cancel = run_script("slurm/submit.py", "--cancel", "1", *flags(root))
    assert (cancel.returncode, "logs/runs" in cancel.stderr) == (1, True)
    subprocess.run(["bash", "-euc", "\n".join(commands)], check=True)
    assert states(root) == before
    assert is_done(load(root))
    assert run_script("slurm/submit.py", "--local", *flags(root)).stdout.startswith("nothing to do")


def test_or_the_former_places_are_kept_by_the_lines_that_are_told(root, tmp_path):
    put_back(root)
    before = states(root)
    with pytest.raises(ConfigError) as refused:
        former_layout.refuse(load(root))
    lines = str(refused.value).split("replace these settings:\n")[1].splitlines()
    text, kept = config.DEFAULT_PATH.read_text(), dict(line.split(" = ") for line in lines)
    for line in config.DEFAULT_PATH.read_text().splitlines():
        if line.split(" = ")[0] in kept:
            text = text.replace(line, f"{line.split(' = ')[0]} = {kept[line.split(' = ')[0]]}")
    (tmp_path / "config.toml").write_text(text)
    cfg = config.load(tmp_path / "config.toml", settings(root))
    former_layout.refuse(cfg)
    assert is_done(cfg)
    assert states(root) == before


def test_files_of_another_model_are_moved_to_its_folders(root):
    put_back(root)
    with pytest.raises(ConfigError) as refused:
        former_layout.refuse(load(root, "embedding_model.views=[1.0]", "embedding_model.label=whole"))
    assert f"mv data/embeddings data/{LABEL}/embeddings\n" in str(refused.value)
    assert f"mv checkpoints/default checkpoints/{LABEL}/default\n" in str(refused.value)


def test_what_is_in_its_new_place_is_not_moved_over_and_no_setting_for_it_is_told(root):
    shutil.copytree(root / "data" / LABEL / "merged", root / "data" / "merged")
    former_layout.refuse(load(root))
    (root / "data" / LABEL / "study").mkdir()
    (root / "data" / "difficulty").mkdir()
    shutil.rmtree(root / "data" / LABEL / "difficulty")
    with pytest.raises(ConfigError) as refused:
        former_layout.refuse(load(root))
    assert re.findall("mv .*", str(refused.value)) == [f"mv data/difficulty data/{LABEL}/difficulty"]
    assert re.findall(".*_dir = .*", str(refused.value)) == ['difficulty_dir = "data/difficulty"']


def test_the_former_places_are_those_of_the_settings():
    here = config.load(None, [f"paths.{name}={place}" for name, place in former_layout.FORMER.items()])
    assert {name: str(getattr(here.paths, name).relative_to(ROOT)) for name in former_layout.FORMER} == (
        former_layout.FORMER
    )
    later = {"vectors_dir", "buildings_dir", "index_dir"}  # these had no former places
    of_backbone = [name for name, path in config.load().templates if "{backbone}" in str(path)]
    assert [name for name in of_backbone if name not in later] == list(former_layout.FORMER)
