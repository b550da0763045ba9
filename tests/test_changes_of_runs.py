"""What follows the merge in a finished chain is changed (a file, a setting, a killed training), and the chain is
run again: as in test_changes.py, whose stages in this process it shares.
"""

import re
import shutil
from pathlib import Path

import pytest
from local_backbone import write_local_backbone
from synthetic import write_dataset
from test_changes import Place

from common import cli, config
from common.errors import PipelineError
from publish import convert_to_hf
from publish.hub import parity
from train import evaluate, list_runs
from train.fitting import checkpoints, fit

TRAINING = (
    *("training.epochs=2", "training.batch_size=32", "training.steps_per_epoch=2", "training.warmup_steps=1"),
    *("training_model.hidden_dim=16", "training_model.output_dim=16", "training_model.init=random"),
    *("evaluation.bootstrap_samples=10", "data.split_by=building"),
)
SPLIT = ("--set", "data.train_ratio=0.6", "--set", "data.val_ratio=0.15")  # another
pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("no_figures")]


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it, and nothing is cleaned up."""


def place_of(folder: Path, backbone: Path, monkeypatch, to: str) -> Place:
    place = Place(folder, backbone, monkeypatch, to=to)
    place.flags = [*(word for setting in TRAINING for word in ("--set", setting)), *place.flags]
    place.flags += ["--set", "training_model.output_dim=16"]
    # which takes longer than all the rest
    monkeypatch.setattr(parity, "check", lambda *_: parity.Parity(1, 0.0, 0.0))
    return place


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a chain that has been run to its end, and of its backbone."""
    folder = tmp_path_factory.mktemp("finished")
    write_local_backbone(folder / "backbone")
    write_dataset(folder / "whole" / "raw", streets=6, cities=2, image_px=64, facades_per_street=4)
    with pytest.MonkeyPatch.context() as monkeypatch:
        code, told = place_of(folder / "whole", folder / "backbone", monkeypatch, "convert_to_hf").run("--local")
        assert code == 0, told
    return folder


@pytest.fixture
def copy(finished, tmp_path, monkeypatch):
    """`copy()`: a copy of the chain, where it may be changed; by default it is run to the evaluation."""

    def make(to: str = "evaluate", name: str = "copy") -> Place:
        shutil.copytree(finished / "whole", tmp_path / name)
        return place_of(tmp_path / name, finished / "backbone", monkeypatch, to)

    return make


def stage_flags(place: Place) -> list[str]:
    """Those of a stage: without --to."""
    return place.flags[: place.flags.index("--to")] + place.flags[place.flags.index("--to") + 2 :]


def run_folder(place: Path) -> Path:
    return place.folder("checkpoints") / "default"


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def changed(before: dict[Path, int], place: Place) -> set[str]:
    """The names of the files that have been written since."""
    return {path.name for path, when in place.written().items() if before.get(path) != when}


CHECKPOINTS = {"checkpoint_best.pt", "checkpoint_last.pt", "history.parquet", "curves.png"}
EVALUATION = {"metrics.json", "queries.parquet", "report.html"}
SUMMARY = {"summary.parquet", "summary.json", "summary.html"}
LOST = [  # what is done to a file -> what is written again; nothing else is
    (Path.unlink, "checkpoints/fixed/default/checkpoint_best.pt", CHECKPOINTS),
    (cut_off, "checkpoints/fixed/default/checkpoint_best.pt", CHECKPOINTS),
    (Path.unlink, "checkpoints/fixed/default/checkpoint_last.pt", CHECKPOINTS),
    (Path.unlink, "checkpoints/fixed/default/history.parquet", CHECKPOINTS),
    (Path.unlink, "checkpoints/fixed/default/curves.png", CHECKPOINTS),
    (shutil.rmtree, "checkpoints/fixed/default", CHECKPOINTS),
    (Path.unlink, "data/fixed/evaluation/default/report.html", EVALUATION),
    (Path.unlink, "data/fixed/evaluation/default/metrics.json", EVALUATION),
    (Path.unlink, "data/fixed/summary_report/summary.html", SUMMARY),
]


@pytest.mark.parametrize(("change", "path", "again"), LOST)
def test_a_file_that_is_gone_or_cut_off_is_made_again_and_what_came_of_it_stays_valid(copy, change, path, again):
    place = copy()
    before = place.written()
    change(place.root / path)
    assert place.follow() == []
    assert changed(before, place) == again
    code, told = place.run("--local")
    assert (code, told[:13]) == (0, "nothing to do")


@pytest.mark.parametrize("path", ["checkpoint_last.pt", "history.parquet", "metrics.json"])
def test_a_damaged_file_that_only_a_remake_can_replace_is_named_with_the_command(copy, path):
    place = copy()
    (damaged,) = (found for found in place.root.rglob(path) if "published" not in found.parts)
    before = place.written()
    cut_off(damaged)
    code, told = place.run("--local")
    assert code == 1
    assert re.search(rf"damaged files: {damaged}|{damaged} is damaged", told)
    assert "--remake" in told
    step = "evaluate" if path == "metrics.json" else "train"
    assert place.run("--local", "--remake", step)[0] == 0
    assert changed(before, place) == (EVALUATION if step == "evaluate" else CHECKPOINTS)
    assert place.run("--local")[1].startswith("nothing to do")


def test_a_published_file_that_is_gone_or_cut_off_is_published_again(copy):
    place = copy(to="convert_to_hf")
    published = place.folder("published")
    weights = (published / "model.safetensors").read_bytes()
    before = place.written()
    (published / "README.md").unlink()
    cut_off(published / "model.safetensors")
    _, plan = place.run("--dry-run")
    assert re.search("^convert_to_hf +to do", plan, re.MULTILINE)
    assert place.follow() == []
    assert (published / "model.safetensors").read_bytes() == weights
    assert (published / "README.md").exists()
    assert changed(before, place) == {path.name for path in published.iterdir()}
    assert place.run("--local")[1].startswith("nothing to do")


def test_a_changed_setting_of_training_is_explained_and_remade_as_from_nothing(copy):
    place, flags = copy(), ("--set", "training.epochs=1", "--set", "training.seed=3")
    (told,) = place.follow(*flags)
    assert "train is stale" in told
    assert "training.epochs" in told
    oracle = copy(name="oracle")
    shutil.rmtree(run_folder(oracle))
    shutil.rmtree(oracle.folder("evaluation"))
    assert oracle.run("--local", *flags)[0] == 0
    weights = [(run_folder(one) / "checkpoint_best.pt").read_bytes() for one in (place, oracle)]
    figures = [(one.folder("evaluation") / "metrics.json").read_text() for one in (place, oracle)]
    same = [re.search('"methods".*?"breakdowns"', text, re.DOTALL)[0] for text in figures]
    assert same[0] == same[1]
    assert len(weights[0]) == len(weights[1])


@pytest.mark.parametrize("epochs", [0, 1])
def test_after_a_killed_remake_the_former_settings_bring_back_the_finished_run(copy, monkeypatch, capsys, epochs):
    """`epochs`: how many validations the new run has saved when it dies."""
    place, new = copy(to="convert_to_hf"), ("--set", "training.margin=0.3")
    before = place.written()

    def die(*_):
        if not epochs or (run_folder(place) / "history.parquet").exists():
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fit, "draw" if epochs else "make_feed", die)
        patch.setattr(cli, "exit_code_of", lambda main: main())
        with pytest.raises(Killed):
            place.run("--local", *new, "--remake", "train")
    assert (run_folder(place) / "former" / "checkpoint_best.pt").exists()
    if epochs:
        for stage in (evaluate, convert_to_hf):  # the unfinished run does not take the place of the finished one
            code = cli.exit_code_of(lambda stage=stage: stage.main([*stage_flags(place), *new, "--remake"]))
            assert code == 1
            assert "has not finished" in capsys.readouterr().err
        assert list_runs.main(stage_flags(place)) == 0
        assert "0 of 0, unfinished" in capsys.readouterr().out
        with pytest.raises(PipelineError, match="has not finished"):
            evaluate.compared(config.load(None, stage_flags(place)[1::2]), "default")
    code, told = place.run("--local", "--set", "training.margin=0.4")  # which is neither
    assert (code, "train is stale" in told) == (1, True)
    messages = place.follow()
    assert len(messages) == epochs
    assert place.run("--local")[1].startswith("nothing to do")
    assert place.written() == before


def test_what_a_finished_run_has_replaced_is_not_kept_in_its_place(copy):
    """A run died after its last epoch, before it had removed what it replaced."""
    folder = run_folder(copy())
    finished = (folder / "checkpoint_best.pt").read_bytes()
    (folder / "former").mkdir()
    (folder / "former" / "checkpoint_best.pt").write_bytes(b"an older one")
    checkpoints.set_aside(folder)
    assert (folder / "former" / "checkpoint_best.pt").read_bytes() == finished
    assert not (folder / "checkpoint_best.pt").exists()


def test_a_run_of_an_earlier_merge_and_a_damaged_one_are_marked_in_the_list(copy, capsys):
    place = copy()
    cfg = config.load(None, stage_flags(place)[1::2])
    shutil.copytree(run_folder(place), cfg.paths.checkpoints_dir / "b")
    cut_off(cfg.paths.checkpoints_dir / "b" / "history.parquet")
    place.follow(*SPLIT, "--to", "merge_and_split")
    assert list_runs.main(stage_flags(place)) == 0
    header, first, second = (re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())
    assert header[4:7] == ["validation mAP@R (%)", "test Recall@1 (%)", "test mAP@R (%)"]
    assert first[0] == "default"
    assert first[3].endswith(", earlier merge")
    assert first[5:8] == ["earlier merge"] * 3
    assert (second[0], second[-1]) == ("b", "damaged")


def test_a_run_of_an_earlier_merge_is_refused_with_the_command_that_trains_it_again(copy, capsys):
    place = copy()
    flags, b = stage_flags(place), ("--set", "training.run=b", "--set", "training.margin=0.3")
    assert place.run("--local", "--from", "train", "--to", "train", *b)[0] == 0
    place.follow(*SPLIT)
    capsys.readouterr()
    code = cli.exit_code_of(lambda: evaluate.main([*flags, *SPLIT, "--compare", "b"]))
    told = capsys.readouterr().err
    assert code == 1
    assert "--set training.margin=0.3 --set training.run=b --remake" in told
