"""train/evaluate_pairs.py on verified pairs of synthetic streets, with missing and damaged images as in the real
test set. Oracles: what was planted; the embeddings of generate_embeddings.py; scikit-learn; sets of ids for what
training has seen.
"""

import gzip
import json
import shutil
import tarfile

import numpy as np
import pandas as pd
import pytest
import torch
from local_backbone import write_tiny_backbone
from small_merge import write_checkpoint
from synthetic import write_dataset
from synthetic_pairs import write_pairs
from test_pair_metrics import by_scikit_learn

from common import config, parquet
from common.cli import exit_code_of
from common.errors import StaleArtefact
from generate import generate_embeddings
from preprocess import compute_fingerprints, merge_and_split, process_tar
from publish.model.projection_head import ProjectionHead
from train import evaluate_pairs

SETTINGS = {
    "data.split_cell_m": 60,
    "data.split_buffer_m": 5,
    "data.train_ratio": 0.5,
    "data.val_ratio": 0.2,
    "data.test_ratio": 0.3,
    "evaluation.bootstrap_samples": 20,
    "infrastructure.workers": 2,
    "embedding_model.label": "backbone",
}


class World:
    """Everything up to a checkpoint, made of synthetic streets, and a test set of their images."""

    def __init__(self, root, **settings):
        if not (root / "tiny").exists():
            write_tiny_backbone(root / "tiny", "dinov2")
        settings = {**SETTINGS, "paths.root": root, "embedding_model.name": root / "tiny", **settings}
        self.flags = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        self.cfg = config.load(None, self.flags[1::2])
        self.tar = root / "test_matching.tar"
        self.folder = self.cfg.paths.evaluation_dir / "pairs"

    def run(self, *words, pairs=None):
        return evaluate_pairs.main([str(pairs or self.tar), *map(str, words), *self.flags])

    def results(self, folder=""):
        return json.loads((self.folder / folder / "pairs.json").read_text())

    def table(self, folder=""):
        return parquet.read(self.folder / folder / "pairs.parquet").to_pandas()

    def split(self, name):
        return parquet.read(self.cfg.paths.merged_dir / f"{name}.parquet").to_pandas()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(World, what was planted in its test set), to be copied."""
    world = World(tmp_path_factory.mktemp("pairs"))
    write_dataset(world.cfg.paths.raw_dir, streets=4, cities=2, image_px=96)
    for stage in (process_tar, compute_fingerprints, generate_embeddings, merge_and_split):
        assert stage.main(world.flags) == 0
    write_checkpoint(world.cfg)
    return world, write_pairs(world.tar, world.cfg.paths, pairs=80, missing=3, damaged=3, compress=True)


@pytest.fixture(scope="module")
def judged(made, tmp_path_factory):
    """The world with an evaluation that nothing may change."""
    world, planted = made
    patch = pytest.MonkeyPatch()
    patch.setattr("common.pages.svg", lambda figure, alt: alt)
    assert world.run() == 0
    patch.undo()
    return world, planted


@pytest.fixture
def world(judged, tmp_path, no_figures):
    """A copy of that, to change."""
    shutil.copytree(judged[0].cfg.paths.root, tmp_path, dirs_exist_ok=True)
    return World(tmp_path)


def test_pairs_without_two_images_are_left_out_and_told(judged):
    world, planted = judged
    table, rejects = world.table(), parquet.read(world.folder / "rejects.parquet").to_pandas()
    expected = planted.usable
    assert len(expected) < len(planted.pairs)
    for name in ("first", "second", "same"):
        assert table[name].tolist() == expected[name].tolist()
    assert np.allclose(table["heading_difference"], expected["heading"], atol=1e-4)
    assert table["line"].tolist() == (expected.index + 1).tolist()
    lost = planted.pairs.drop(expected.index)
    assert rejects["member"].tolist() == [
        f"line {row + 1}: {p.first} {p.second}" for row, p in zip(lost.index, lost.itertuples(), strict=True)
    ]
    is_missing = lost["first"].isin(planted.missing) | (
        lost["second"].isin(planted.missing) & ~lost["first"].isin(planted.damaged)
    )
    assert rejects["reason"].tolist() == np.where(is_missing, "image_missing", "jpeg_corrupt").tolist()
    assert world.results()["left_out"] == rejects["reason"].value_counts().to_dict()
    assert world.results()["counts"]["pairs"] + len(rejects) == len(planted.pairs)


def test_cosines_are_those_of_plain_code_and_figures_those_of_scikit_learn(judged):
    world, _ = judged
    table = world.table()
    rows = pd.concat([world.split(split) for split in ("train", "val", "test")])
    names = [f"{d:04d}-{p:07d}" for d, p in zip(rows["dataset_id"], rows["patch_id"], strict=True)]
    of_image = dict(zip(names, np.stack(rows["embedding"]).astype(np.float64), strict=True))
    known = table[table["first"].isin(of_image) & table["second"].isin(of_image)]
    assert len(known) > 20
    first, second = (np.stack([of_image[name] for name in known[column]]) for column in ("first", "second"))
    raw = (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    assert np.allclose(known["cosine_raw"], raw, atol=2e-4)  # embeddings are stored as float16
    checkpoint = torch.load(next(world.cfg.paths.checkpoints_dir.glob("*/checkpoint_best.pt")))
    sizes = {key: checkpoint[key] for key in ("input_dim", "hidden_dim", "output_dim", "dropout")}
    head = ProjectionHead(**sizes).eval()
    head.load_state_dict(checkpoint["head"])
    with torch.inference_mode():
        trained = (head(torch.tensor(first).float()) * head(torch.tensor(second).float())).sum(dim=1).numpy()
    assert np.allclose(known["cosine_trained"], trained, atol=2e-3)
    results = world.results()
    for method in ("raw", "pca", "whitening", "trained"):
        figures = [figure["value"] for figure in results["methods"][method].values()]
        assert np.allclose(figures, by_scikit_learn(table[f"cosine_{method}"], table["same"], None), atol=1e-6)
    assert list(results["differences"]) == ["trained-whitening", "trained-raw"]


def test_what_training_has_seen_is_counted(judged, capsys):
    world, planted = judged
    ids = sorted({*planted.usable["first"], *planted.usable["second"]})
    images = pd.concat(
        parquet.read(path).to_pandas() for path in world.cfg.paths.intermediates_dir.glob("*.parquet")
    )
    images.index = [f"{d:04d}-{p:07d}" for d, p in zip(images["dataset_id"], images["patch_id"], strict=True)]
    images = images.loc[ids]
    seen = world.results()["seen"]
    assert (seen["images"], seen["found"]) == (len(ids), len(ids))
    for split in ("train", "val"):
        there, shown = world.split(split), np.zeros(len(images), bool)
        for key in ("target_id", "street_view_id"):
            keys = set(zip(there["dataset_id"], there[key], strict=True))
            shown |= np.array([pair in keys for pair in zip(images["dataset_id"], images[key], strict=True)])
        assert seen[split] == shown.sum() > 0
    assert world.run() == 0
    said = capsys.readouterr().out
    assert f"training has seen these images: of {len(ids)}, {seen['train']} show a building" in said
    assert "nothing to do" in said
    assert "training has seen these images" in (world.folder / "pairs.html").read_text()


def test_held_out_images_are_not_seen(world, capsys):
    write_pairs(world.tar, world.cfg.paths, pairs=4, missing=0, damaged=0)  # few: others are left for train
    assert world.run("--remake") == 0
    before = world.results()["seen"]
    assert before["train"] + before["val"] > 0
    world = World(world.cfg.paths.root, **{"data.held_out": "test_matching.tar"})
    merge_and_split.main([*world.flags, "--remake"])
    with pytest.raises(StaleArtefact, match="was trained on an earlier version of"):
        world.run()
    write_checkpoint(world.cfg)
    capsys.readouterr()
    assert world.run("--remake") == 0
    said = capsys.readouterr().out
    assert "and training has seen none" in said
    seen = world.results()["seen"]
    assert seen == {**before, "train": 0, "val": 0}
    assert "Training has seen none of them" in (world.folder / "pairs.html").read_text()


def test_images_are_embedded_once_for_all_comparisons(world, no_figures, monkeypatch, capsys):
    other = world.cfg.paths.checkpoints_dir / "other"
    write_checkpoint(world.cfg, seed=1).parent.rename(other)
    write_checkpoint(world.cfg)
    table = world.table()
    ids = sorted({*table["first"], *table["second"]})
    vectors = np.random.default_rng(0).normal(size=(len(ids), 7))
    theirs = world.cfg.paths.root / "theirs.parquet"
    frame = pd.DataFrame({"id": ids, "embedding": list(vectors)}).sample(frac=1, random_state=0)
    frame.to_parquet(theirs)
    monkeypatch.setattr("generate.backbone.load", lambda *_: pytest.fail("the backbone is not needed"))
    assert world.run("--compare", other, "--vectors", theirs) == 0
    compared = world.table("compared")
    of_id = dict(zip(ids, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), strict=True))
    cosines = [of_id[p.first] @ of_id[p.second] for p in compared.itertuples()]
    assert np.allclose(compared["cosine_theirs"], cosines, atol=1e-6)
    assert list(world.results("compared")["methods"]) == ["raw", "pca", "whitening", "trained", "other", "theirs"]
    frame.iloc[1:].to_parquet(theirs)
    assert exit_code_of(lambda: world.run("--vectors", theirs, "--remake")) == 1
    assert "theirs.parquet has no vector of image" in capsys.readouterr().err


def test_patches_and_a_folder_are_judged_as_well(world, tmp_path, capsys):
    folder = tmp_path / "test_matching"
    with tarfile.open(world.tar) as tar:
        tar.extractall(folder, filter="data")
    assert world.run("--patches", pairs=folder) == 0
    patches = world.results("patches")
    assert patches["images"] == "patches"
    assert patches["counts"] == world.results()["counts"]
    assert not np.allclose(world.table("patches")["cosine_raw"], world.table()["cosine_raw"], atol=0.01)
    shutil.rmtree(folder / "data")
    assert exit_code_of(lambda: world.run("--patches", "--remake", pairs=folder)) == 1
    assert "0 pairs of one target and 0 of two have both images" in capsys.readouterr().err


def test_a_damaged_test_set_is_judged_by_what_it_still_holds(world):
    content = gzip.decompress(world.tar.read_bytes())
    world.tar.write_bytes(content[: len(content) // 2])
    assert world.run("--remake") == 0
    rejects = parquet.read(world.folder / "rejects.parquet").to_pandas()
    assert rejects["reason"].value_counts()["image_missing"] > 10
    assert "tar_truncated" in set(rejects["reason"])
    assert set(world.results()["left_out"]) == {"image_missing", "jpeg_corrupt"}


def test_another_test_set_is_stale_and_never_judged_with_the_former_ones_images(world):
    before = world.results()["counts"]
    write_pairs(world.tar, world.cfg.paths, pairs=40, seed=1)
    with pytest.raises(StaleArtefact, match=r"pairs.json was made from an earlier version of test_matching.tar"):
        world.run()
    (world.folder / "pairs.json").unlink()
    with pytest.raises(
        StaleArtefact, match=r"whole.parquet was made from an earlier version of test_matching.tar"
    ):
        world.run()
    assert world.run("--remake") == 0
    assert world.results()["counts"] != before


def test_a_list_without_usable_pairs_of_both_kinds_is_refused(world, capsys):
    write_pairs(world.tar, world.cfg.paths, pairs=1)
    assert exit_code_of(lambda: world.run("--remake")) == 1
    said = capsys.readouterr().err
    assert "0 of two have both images" in said
    assert "embeddings_pairs_rejects/whole.parquet" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "theirs.parquet"], "name tables of vectors with --vectors"),
        (["--vectors", "raw.parquet"], "give each table a name of its own"),
        (["--set", "embedding_model.pooling=mean"], "the run was trained on embeddings with"),
    ],
)
def test_what_cannot_be_judged_is_refused(world, monkeypatch, capsys, words, message):
    monkeypatch.chdir(world.cfg.paths.root)
    for name in ("theirs", "raw"):
        pd.DataFrame({"id": ["0088-1"], "embedding": [[1.0]]}).to_parquet(f"{name}.parquet")
    (world.folder / "pairs.json").unlink()
    assert exit_code_of(lambda: evaluate_pairs.main([str(world.tar), *world.flags, *words])) == 1
    assert message in capsys.readouterr().err
