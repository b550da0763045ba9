"""train/list_runs.py on runs whose files are made up here."""

import json
import re
import subprocess
import sys

import made_up_merge
import pandas as pd
import pytest
from conftest import ROOT
from invented_metrics import FIGURES, FOUND

from common import config, provenance, schemas
from train import list_runs, run_record
from train.evaluation import metrics_json
from train.fitting import history


def write_run(root, validation: list[float], *settings: str, merge: str = "m1", finished: bool = True):
    """The configuration of a run, and its history as train.py leaves it; its checkpoint is "head"."""
    cfg = config.load(None, [f"paths.root={root}", *settings])
    table = pd.DataFrame({name: [0.0] * len(validation) for name in schemas.history(2).names})
    table = table.assign(epoch=range(len(validation)), val_map_at_r=validation)
    record = run_record.record(cfg, {"train.parquet": merge})
    facts = {"finished": finished, "best_checkpoint": "head"}
    history.write(run_record.run_dir(cfg) / run_record.HISTORY, table, record, facts)
    return cfg


def write_results(cfg, checkpoint: str = "head") -> None:
    """The evaluation and the published model of a run."""
    record = provenance.record("made", {"training.run": cfg.training.run}, {run_record.BEST: checkpoint})
    record = record.finished("id", {}).to_dict()
    metrics = {**FOUND, "provenance": record}
    for folder, name, text in (
        (cfg.paths.evaluation_dir, "metrics.json", metrics_json.to_json(metrics)),
        (cfg.paths.published_dir, "provenance.json", json.dumps(record)),
    ):
        folder.mkdir(parents=True)
        (folder / name).write_text(text)


@pytest.fixture
def listed(tmp_path, capsys):
    """The table that is printed: a dict for each run, in order."""

    def read(*settings: str) -> list[dict[str, str]]:
        flags = [word for setting in (f"paths.root={tmp_path}", *settings) for word in ("--set", setting)]
        assert list_runs.main(flags) == 0
        header, *lines = capsys.readouterr().out.splitlines()
        names = [(match.start(), match[0]) for match in re.finditer(r"\S+(?: \S+)*", header)]
        ends = [*(start for start, _ in names[1:]), None]
        return [
            {name: line[start:end].strip() for (start, name), end in zip(names, ends, strict=True)}
            for line in lines
        ]

    return read


def test_runs_are_listed_by_date_with_their_figures_and_what_differs(tmp_path, listed, monkeypatch):
    for day, (run, loss) in enumerate([("zero", "triplet"), ("a", "infonce")], 1):
        monkeypatch.setattr(provenance.time, "strftime", lambda *_, day=day: f"2026-01-0{day}T10:30:00Z")
        cfg = write_run(tmp_path, [0.1, 0.3, 0.25], f"training.run={run}", f"training.loss={loss}")
    write_results(cfg)
    first, second = listed()
    assert first == {
        "run": "zero",
        "backbone": "dinov2-base-cls-1-0.5",
        "date": "2026-01-01 10:30",
        "epoch": "1 of 2",
        "validation mAP@R (%)": "30.0",
        "test Recall@1 (%)": "",
        "test mAP@R (%)": "",
        "published": "no",
        "loss": "triplet",
    }
    assert (second["run"], second["published"], second["loss"]) == ("a", "yes", "infonce")
    assert second["test mAP@R (%)"] == metrics_json.percent(FIGURES["map@r"])
    assert second["test Recall@1 (%)"] == metrics_json.percent(FIGURES["recall@1"])


def test_figures_of_an_earlier_checkpoint_are_not_shown_as_the_runs(tmp_path, listed):
    write_results(write_run(tmp_path, [0.1], finished=False), checkpoint="earlier head")
    (run,) = listed()
    assert (run["test mAP@R (%)"], run["published"], run["epoch"]) == (
        "outdated",
        "outdated",
        "0 of 0, unfinished",
    )


def test_where_all_runs_share_a_folder_the_figures_are_of_one(tmp_path, listed):
    shared = ("paths.evaluation_dir=data/evaluation", "paths.published_dir=data/published")
    write_results(write_run(tmp_path, [0.1], *shared, "training.run=a"))
    write_run(tmp_path, [0.1], *shared, "training.run=b")  # the same head, as far as its id says
    assert {run["run"]: run["published"] for run in listed(*shared)} == {"a": "yes", "b": "no"}


def test_other_backbones_are_listed_and_runs_on_an_earlier_merge_are_marked(tmp_path, listed):
    write_results(write_run(tmp_path, [0.1]))
    write_results(write_run(tmp_path, [0.1], "embedding_model.pooling=mean"))
    merged_dir = config.load(None, [f"paths.root={tmp_path}", "embedding_model.pooling=mean"]).paths.merged_dir
    made_up_merge.write_merge(merged_dir, streets=(2, 1, 1))
    found = {run["backbone"]: (run["epoch"], run["published"], run["test mAP@R (%)"]) for run in listed()}
    figure = metrics_json.percent(FIGURES["map@r"])
    assert found == {
        "dinov2-base-cls-1-0.5": ("0 of 0", "yes", figure),
        "dinov2-base-mean-1-0.5": ("0 of 0, earlier merge", "earlier merge", "earlier merge"),
    }


def test_without_runs_it_says_so(tmp_path, capsys):
    assert list_runs.main(["--set", f"paths.root={tmp_path}"]) == 0
    assert capsys.readouterr().out.startswith(f"no runs in {tmp_path}/checkpoints/dinov2-base-cls-1-0.5: ")


def test_it_needs_no_torch(tmp_path):
    write_results(write_run(tmp_path, [0.1]))
    code = f"import sys; from train import list_runs; list_runs.main(['--set', 'paths.root={tmp_path}']); "
    subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], cwd=ROOT, check=True)
