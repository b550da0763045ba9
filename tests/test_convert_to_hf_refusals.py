"""publish/convert_to_hf.py where it must not publish: vectors that are not the pipeline's, inputs that do not
belong together, a folder in its way. Oracle: the message, and what lies in the folder afterwards.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from huggingface_hub import errors as hub_errors
from local_backbone import write_tiny_backbone
from trained_model import Trained, write_metrics

from common import cli, config, files, parquet
from common.errors import PipelineError, StaleArtefact
from generate import model_files
from publish import demo_usage, generate_embeddings_from_parquet
from publish.convert_to_hf import main
from publish.hub import parity, published_folder, push


@pytest.fixture
def unpublished(tmp_path) -> Trained:
    return Trained(tmp_path)


@pytest.mark.parametrize(
    ("rolled", "message"),
    [
        (0, r"model's embeddings .* cosine distance from the stored ones, over 7 images"),
        (1, r"head's vectors .* cosine distance from the trained head's for the same embeddings, over 7 images"),
    ],
)
def test_a_model_that_gives_other_vectors_is_not_published(rolled, message, unpublished, monkeypatch):
    outputs = [unpublished.embeddings().numpy(), unpublished.vectors()]
    outputs[rolled] = np.roll(outputs[rolled], 1, axis=0)
    monkeypatch.setattr(parity, "outputs_of", lambda *_: outputs)
    with pytest.raises(PipelineError, match=message):
        main(unpublished.flags)
    assert not list(unpublished.cfg.paths.published_dir.parent.iterdir())


def test_weights_that_the_disk_has_no_room_for_are_an_error_and_leave_nothing(unpublished, full_disk):
    with full_disk(20_000), pytest.raises(PipelineError, match=r"weights cannot be written to .*File too large"):
        main(unpublished.flags)
    assert not list(unpublished.cfg.paths.published_dir.parent.iterdir())


def test_images_damaged_since_are_left_out_of_the_check(unpublished, monkeypatch):
    rows = parquet.read(unpublished.cfg.paths.merged_dir / "test.parquet")
    with (unpublished.cfg.paths.raw_dir / "0088.tar").open("r+b") as tar:
        tar.seek(rows["image_offset"][2].as_py() + 400)
        tar.write(bytes(300))
    with pytest.raises(PipelineError, match=r"0088\.tar has other images than when process_tar\.py read it"):
        main(unpublished.flags)
    shutil.rmtree(unpublished.cfg.paths.intermediates_dir)  # nobody knows which tar it was
    kept = [np.delete(output, 2, axis=0) for output in (unpublished.embeddings().numpy(), unpublished.vectors())]
    monkeypatch.setattr(parity, "outputs_of", lambda *_: kept)
    assert main(unpublished.flags) == 0
    made = json.loads((unpublished.cfg.paths.published_dir / "provenance.json").read_text())
    assert made["facts"]["parity_images"] == 6


@pytest.mark.parametrize("factors", [(np.nan, 1), (1, np.nan)])
def test_vectors_that_are_not_numbers_are_not_published(factors, unpublished, monkeypatch):
    outputs = unpublished.embeddings().numpy() * factors[0], unpublished.vectors() * factors[1]
    monkeypatch.setattr(parity, "outputs_of", lambda *_: outputs)
    with pytest.raises(PipelineError, match="nothing was published"):
        main(unpublished.flags)


def test_a_head_of_another_backbone_is_refused_naming_both(unpublished):
    write_tiny_backbone(unpublished.root / "other", "dinov2_with_registers")
    label = config.label_of(unpublished.cfg.embedding_model)
    same = [*unpublished.flags, "--set", f"embedding_model.label={label}"]
    other = [*same, "--set", f"embedding_model.name={unpublished.root / 'other'}"]
    with pytest.raises(StaleArtefact, match=r'name = "tiny".*settings say name = "other"'):
        main(other)
    with pytest.raises(StaleArtefact, match=r'pooling = "cls".*settings say pooling = "mean"'):
        main([*same, "--set", "embedding_model.pooling=mean"])
    with pytest.raises(StaleArtefact, match=r"views = \[1.0, 0.5\]; the settings say views = \[1.0\]"):
        main([*same, "--set", "embedding_model.views=[1.0]"])


def test_a_branch_of_the_hub_is_the_commit_that_it_stands_for(monkeypatch):
    model = ["name=some/model", "revision=main", "views=[1.0]"]
    cfg = config.load(None, [f"embedding_model.{setting}" for setting in model])
    trained_on = {"name": "some/model", "revision": "abc123", "pooling": cfg.embedding_model.pooling}
    checkpoint = {"embedding_model": {**trained_on, "dtype": "float32"}}
    monkeypatch.setattr(model_files, "locate", lambda name, revision: Path("snapshots/abc123"))
    settings = published_folder.backbone_settings(cfg, Path("checkpoint_best.pt"), checkpoint)
    assert (settings.name, settings.dtype) == ("some/model", "float32")
    monkeypatch.setattr(model_files, "locate", lambda name, revision: Path("snapshots/def456"))  # it has moved on
    with pytest.raises(StaleArtefact, match=r'revision = "abc123".*settings say revision = "main"'):
        published_folder.backbone_settings(cfg, Path("checkpoint_best.pt"), checkpoint)


def test_without_an_image_to_check_with_nothing_is_published(unpublished):
    tar = unpublished.cfg.paths.raw_dir / "0088.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    shutil.rmtree(unpublished.cfg.paths.intermediates_dir)  # nobody knows which tar it was
    with pytest.raises(PipelineError, match="none of the first 7 images"):
        main(unpublished.flags)
    assert not unpublished.cfg.paths.published_dir.exists()


def test_a_repository_that_the_hub_refuses_says_how_to_log_in(tmp_path, monkeypatch):
    import httpx

    def refuse(*_, **__):
        response = httpx.Response(403, request=httpx.Request("POST", "https://huggingface.co"))
        raise hub_errors.HfHubHTTPError("no", response=response)

    monkeypatch.setattr(push.HfApi, "create_repo", refuse)
    with pytest.raises(PipelineError, match=r"(?s)the hub refuses me/buildings.*hf auth login"):
        push.push(tmp_path, "me/buildings")


def test_metrics_of_another_checkpoint_or_test_split_are_refused(unpublished):
    write_metrics(unpublished.cfg, checkpoint_id="run-0")
    with pytest.raises(StaleArtefact, match=r"metrics\.json was made from an earlier version of .*_best\.pt"):
        main(unpublished.flags)


def test_missing_inputs_name_their_stage(unpublished):
    (unpublished.cfg.paths.evaluation_dir / "metrics.json").unlink()
    with pytest.raises(PipelineError, match=r"metrics\.json does not exist: run train/evaluate\.py"):
        main(unpublished.flags)
    shutil.rmtree(unpublished.cfg.paths.checkpoints_dir)
    with pytest.raises(PipelineError, match=r"checkpoint_best\.pt does not exist: run train/train\.py"):
        main(unpublished.flags)


def test_a_new_checkpoint_is_refused_and_remake_replaces_the_folder(unpublished, monkeypatch):
    monkeypatch.setattr(parity, "check", lambda *_: parity.Parity(7, 0.0, 0.0))  # another test has it
    main(unpublished.flags)
    folder = unpublished.cfg.paths.published_dir
    (folder / "leftover").write_text("")
    write_metrics(unpublished.cfg)
    metrics = json.loads((unpublished.cfg.paths.evaluation_dir / "metrics.json").read_text())
    metrics["provenance"]["id"] = "figures-2"
    (unpublished.cfg.paths.evaluation_dir / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(StaleArtefact, match=r"was made from an earlier version of metrics\.json\nto redo"):
        main(unpublished.flags)
    assert main([*unpublished.flags, "--remake"]) == 0
    assert not (folder / "leftover").exists()
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_a_folder_that_is_not_ours_is_not_replaced(unpublished):
    folder = unpublished.cfg.paths.published_dir
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(PipelineError, match=r"was not written by this stage"):
        main([*unpublished.flags, "--overwrite"])
    assert (folder / "thesis.tex").exists()


def test_what_a_dead_run_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    target = tmp_path / "published"
    dead = tmp_path / ".published.tmp-0123456789ab"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    with files.new_folder(target) as live:
        (live / "config.json").write_text("{}")
        files.remove_dead_folders(target)
        assert not dead.exists()
        assert live.exists()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


KILLED = """
import os, signal, sys
from pathlib import Path
from common import files

path, rename = Path(sys.argv[1]), Path.rename

def killed(source, target):
    if target == path:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target)

Path.rename = killed
with files.new_folder(path) as folder:
    (folder / "config.json").write_text("{}")
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_whose_replacement_was_killed_between_its_renames_is_put_back(unpublished, monkeypatch, capsys):
    monkeypatch.setattr(parity, "check", lambda *_: parity.Parity(7, 0.0, 0.0))
    main(unpublished.flags)
    published = unpublished.cfg.paths.published_dir
    before = contents(published)
    assert subprocess.run([sys.executable, "-c", KILLED, published], cwd=ROOT).returncode == -signal.SIGKILL
    assert not published.exists()
    for command in (demo_usage.main, generate_embeddings_from_parquet.main):  # these only read
        arguments = ["compare", "a.jpg", "b.jpg"] if command is demo_usage.main else ["in.parquet", "out"]
        with pytest.raises(PipelineError, match=r"holds no published model .*\nrun publish/convert_to_hf\.py"):
            command([*arguments, *unpublished.flags])
    capsys.readouterr()
    assert main(unpublished.flags) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(published) == before
    assert not list(published.parent.glob(".*"))
    assert subprocess.run([sys.executable, "-c", KILLED, published], cwd=ROOT).returncode == -signal.SIGKILL
    (unpublished.cfg.paths.evaluation_dir / "metrics.json").unlink()
    with pytest.raises(PipelineError, match=r"metrics\.json does not exist"):  # put back whatever else is wrong
        main([*unpublished.flags, "--overwrite"])
    assert contents(published) == before


@pytest.mark.parametrize("interrupts", [1, 2])
def test_a_folder_whose_replacement_is_interrupted_between_its_renames_is_put_back(
    interrupts, tmp_path, monkeypatch
):
    path, rename, left = tmp_path / "published", Path.rename, [KeyboardInterrupt] * interrupts
    path.mkdir()
    (path / "config.json").write_text("former")

    def interrupted(source, target):
        if target == path and left:
            raise left.pop()
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), files.new_folder(path) as folder:
        (folder / "config.json").write_text("new")
    files.remove_dead_folders(path)  # the second Ctrl-C interrupts the putting back
    assert contents(path) == {"config.json": b"former"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["published"]


@pytest.mark.parametrize("name", ["former", "new"])
def test_a_run_may_have_any_name(name, tmp_path):
    path = tmp_path / name
    path.mkdir()
    (path / "config.json").write_text("first")
    with pytest.raises(KeyError), files.new_folder(path):
        raise KeyError
    assert contents(path) == {"config.json": b"first"}
    with files.new_folder(path) as folder:
        (folder / "config.json").write_text("second")
    assert contents(path) == {"config.json": b"second"}
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(KeyError), files.new_folder(path):
        raise KeyError
    assert not path.exists()


def test_a_former_folder_is_not_put_back_over_a_new_one(tmp_path):
    path, dead = tmp_path / "published", tmp_path / ".published.tmp-0123abcd"
    (dead / "former").mkdir(parents=True)
    path.mkdir()
    (path / "config.json").write_text("new")
    files.remove_dead_folders(path)
    assert contents(path) == {"config.json": b"new"}
    assert not dead.exists()


def test_errors_are_two_lines_for_the_user(tmp_path, capsys):
    assert cli.exit_code_of(lambda: main(["--set", f"paths.root={tmp_path}"])) == 1
    assert "checkpoint_best.pt does not exist" in capsys.readouterr().err
