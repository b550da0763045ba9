"""The whole chain on small synthetic tars with every kind of damage in them.

Each stage runs twice: undisturbed in one folder, and in another where it is killed with SIGKILL at a random moment
and started again. Oracles: what the generator planted, plain Hugging Face code, and brute force.
"""

import gzip
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import warm
from local_backbone import write_local_backbone
from same_artefacts import assert_same_artefacts
from synthetic import write_dataset

from common import config, files, parquet
from common.imagery import tar_images
from common.places import geo
from slurm.chain import steps_of

SETTINGS = [
    "embedding_model.pooling=mean",
    "data.max_reject_share=0.6",  # every kind of damage in little data
    "data.rows_per_part=50",
    "data.split_cell_m=300",
    "data.train_ratio=0.5",
    "data.val_ratio=0.25",
    "data.test_ratio=0.25",
    "data.neighbors=40",
    "training_model.output_dim=64",
    "training_model.hidden_dim=64",
    "training.epochs=3",
    "training.steps_per_epoch=5",
    "training.batch_size=64",
    "training.warmup_steps=2",
    "infrastructure.embedding_batch_size=16",
]


pytestmark = pytest.mark.timeout(900)  # every stage three times over, on a busy machine
STEPS = {step.name: step.script for step in steps_of(config.load())}


def settings(root: Path) -> list[str]:
    backbone = root.parent / "backbone"
    return [*SETTINGS, f"paths.root={root}", "paths.raw_dir=../raw", f"embedding_model.name={backbone}"]


# what one does with the published model, after the chain: script and arguments
USES = {
    "vectors_of_a_tar": ("publish/generate_embeddings_from_hf.py", "{raw}/0088.tar", "{root}/vectors"),
    "vectors_of_embeddings": (
        "publish/generate_embeddings_from_parquet.py",
        "{root}/data/backbone-mean-1-0.5/merged",
        "{root}/projected",
    ),
}


def flags(root: Path) -> list[str]:
    return [flag for setting in settings(root) for flag in ("--set", setting)]


def command(name: str, root: Path) -> list[str]:
    """A stage of the chain, or one of USES, with its files under `root`."""
    script, *arguments = USES[name] if name in USES else (STEPS[name],)
    return [script, *(argument.format(root=root, raw=root.parent / "raw") for argument in arguments), *flags(root)]


def output_of(name: str, root: Path) -> str:
    done = warm.run(*command(name, root))
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_at_work(name: str, root: Path, delay_s: float) -> None:
    """SIGKILL a stage so long after its first file, temporary or not, has appeared below `root`."""
    before = set(root.rglob("*"))
    victim = warm.Warm(*command(name, root), lingers=True)
    while victim.process.is_alive() and set(root.rglob("*")) == before:
        time.sleep(0.01)
    time.sleep(delay_s)
    victim.process.kill()
    assert victim.finish().returncode == -signal.SIGKILL


class Chain:
    """A finished run, beside one whose every stage was killed once, and what was planted in the tars."""

    def __init__(self, folder: Path):
        self.truth = write_dataset(
            folder / "raw", streets=12, cities=3, image_px=112, damage=True, facades_per_street=5
        )
        write_local_backbone(folder / "backbone")
        self.root, self.killed_root = folder / "run", folder / "killed"
        self.cfg = config.load(None, settings(self.root))
        self.output: dict[str, str] = {}
        rng = random.Random(0)
        for name in (*STEPS, *USES):
            self.output[name] = output_of(name, self.root)
            kill_at_work(name, self.killed_root, rng.uniform(0, 0.02))
            output_of(name, self.killed_root)

    def table(self, path: Path) -> pd.DataFrame:
        return parquet.read(path).to_pandas()

    def image(self, row) -> bytes:
        return tar_images.of_paths(self.cfg.paths).tar(row.tar_file).read([row.image_offset], [row.image_size])[0]

    def all(self, directory: Path) -> pd.DataFrame:
        return pd.concat([self.table(path) for path in sorted(directory.glob("*.parquet"))], ignore_index=True)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))


def test_every_valid_image_is_kept_and_its_label_read(chain):
    kept = chain.all(chain.cfg.paths.intermediates_dir)
    truth = chain.truth.images
    both = truth.merge(
        kept, left_on=["tar", "member"], right_on=["tar_file", "image_path"], suffixes=("", "_read")
    )
    assert len(both) == len(truth) == len(kept)
    for column in ("dataset_id", "target_id", "patch_id", "street_view_id", "aligned"):
        assert (both[column] == both[f"{column}_read"]).all()
    for column in ("target_lat", "target_lon", "camera_lat", "camera_lon", "heading", "pitch", "distance"):
        # rtol: float32 columns; the text has fewer digits than the planted number
        assert np.allclose(both[column], both[f"{column}_read"], rtol=1e-5, atol=1e-4)


def test_every_rejected_member_is_named_with_its_reason(chain):
    folder = files.beside(chain.cfg.paths.intermediates_dir, "rejects")
    told = pd.concat([chain.table(path).assign(tar=f"{path.stem}.tar") for path in folder.glob("*.parquet")])
    told = sorted(zip(told["tar"], told["member"], told["reason"], strict=True))
    planted = chain.truth.rejects
    assert told == sorted(zip(planted["tar"], planted["member"], planted["reason"], strict=True))


def test_members_are_images_labels_rejects_and_other_in_every_tar(chain):
    for tar, planted in chain.truth.members.items():
        rows = parquet.read_provenance(chain.cfg.paths.intermediates_dir / f"{tar}.parquet").rows
        assert {name: rows[name] for name in planted} == planted
        assert rows["members"] == sum(planted.values())


def test_the_offsets_point_at_the_jpegs(chain):
    tars_inflated = {path.name: gzip.decompress(path.read_bytes()) for path in chain.cfg.paths.raw_dir.iterdir()}
    for row in chain.all(chain.cfg.paths.intermediates_dir).itertuples():
        content = tars_inflated[row.tar_file][row.image_offset :][: row.image_size]
        assert content[:2] == b"\xff\xd8"


def test_no_building_panorama_or_picture_stands_in_two_splits_and_every_drop_has_a_reason(chain):
    splits = {
        name: chain.table(chain.cfg.paths.merged_dir / f"{name}.parquet") for name in ("train", "val", "test")
    }
    hashes = chain.all(chain.cfg.paths.intermediates_dir).set_index("streetview_image_id")["content_hash"]
    rows = pd.concat([frame.assign(split=name) for name, frame in splits.items()])
    rows["content_hash"] = hashes.loc[rows["streetview_image_id"]].to_numpy()
    for key in (["building_id"], ["dataset_id", "street_view_id"], ["content_hash"], ["cell_id"]):
        assert (rows.groupby(key)["split"].nunique() == 1).all()
    assert (rows.groupby("building_id").size() >= 2).all()
    report = json.loads((files.beside(chain.cfg.paths.merged_dir, "report") / "split_report.json").read_text())
    assert sum(report["dropped"].values()) == len(hashes) - len(rows)
    assert all(len(frame) > 0 for frame in splits.values())


def test_the_picture_of_no_imagery_is_dropped_from_all_buildings(chain):
    no_imagery = chain.truth.images.query("kind == 'no_imagery'")
    planted = {f"{int(d):04d}_{p}" for d, p in zip(no_imagery["dataset_id"], no_imagery["patch_id"], strict=True)}
    assert planted
    kept = chain.all(chain.cfg.paths.merged_dir)["streetview_image_id"]
    assert not planted & set(kept)


def test_buildings_are_contiguous_and_sorted(chain):
    for name in ("train", "val", "test"):
        frame = chain.table(chain.cfg.paths.merged_dir / f"{name}.parquet")
        keys = list(zip(frame["dataset_id"], frame["target_id"], frame["patch_id"], strict=True))
        assert keys == sorted(keys)


def test_embeddings_equal_plain_forward_passes_of_hugging_faces_code(chain):
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    folder = chain.cfg.embedding_model.name
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    rows = chain.all(chain.cfg.paths.embeddings_dir)
    assert len(rows) == len(chain.truth.images)
    for row in rows.sample(20, random_state=0).itertuples():
        image = Image.open(io.BytesIO(chain.image(row))).convert("RGB")
        margin = image.width // 4
        half = image.crop((margin, margin, image.width - margin, image.height - margin))
        with torch.inference_mode():
            hidden = model(**processor([image, half], return_tensors="pt")).last_hidden_state
        expected = torch.nn.functional.normalize(hidden[:, 1:].mean(dim=1), dim=1).mean(dim=0).numpy()
        ours = np.asarray(row.embedding, np.float32)
        cosine = expected @ ours / np.linalg.norm(expected) / np.linalg.norm(ours)
        assert cosine > 0.999  # the whole is resized twice


def test_neighbours_equal_brute_force_outside_building_and_ignore_zone(chain):
    train = chain.table(chain.cfg.paths.merged_dir / "train.parquet")
    found = chain.table(chain.cfg.paths.difficulty_dir / "difficulty_metadata.parquet")
    assert found["streetview_image_id"].tolist() == train["streetview_image_id"].tolist()
    x = np.stack(train["embedding"]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarities = x @ x.T
    positions = geo.to_xyz_m(train["target_lat"], train["target_lon"])
    near = np.linalg.norm(positions[:, None] - positions[None], axis=-1) <= chain.cfg.data.ignore_radius_m
    buildings = train["building_id"].to_numpy()
    similarities[near | (buildings[:, None] == buildings[None])] = -np.inf
    k = chain.cfg.data.neighbors
    for i, ours in enumerate(found["neighbor_rows"]):
        expected = np.sort(similarities[i])[::-1][:k]
        ours = ours[ours >= 0]
        assert len(ours) == np.isfinite(expected).sum()
        assert len(set(ours)) == len(ours)
        # by similarity: rows whose similarities differ by less than float32 resolves may change places
        assert np.allclose(similarities[i][ours], expected[: len(ours)], atol=1e-5)


def in_a_fresh_process(code: str, folder: Path) -> str:
    """What it prints, offline and without this repository."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "hf_modules")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, env=environment, check=True, timeout=120, stdout=subprocess.PIPE, text=True
    ).stdout


def test_the_published_model_gives_the_pipelines_vectors_in_a_fresh_process_elsewhere(chain, tmp_path):
    import torch

    from publish.model.projection_head import ProjectionHead

    test = chain.table(chain.cfg.paths.merged_dir / "test.parquet").head(7)
    for number, row in enumerate(test.itertuples()):
        (tmp_path / f"{number}.jpg").write_bytes(chain.image(row))
    code = f"""
import glob, numpy, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
folder = {str(chain.cfg.paths.published_dir)!r}
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
images = [Image.open(path).convert("RGB") for path in sorted(glob.glob("*.jpg"))]
with torch.inference_mode():
    numpy.save("vectors.npy", model(**processor(images, return_tensors="pt")).pooler_output.float().numpy())
"""
    in_a_fresh_process(code, tmp_path)

    checkpoint = torch.load(chain.cfg.paths.checkpoints_dir / "default" / "checkpoint_best.pt", weights_only=True)
    sizes = {name: checkpoint[name] for name in ("input_dim", "hidden_dim", "output_dim", "dropout")}
    head = ProjectionHead(**sizes).eval()
    head.load_state_dict(checkpoint["head"])
    with torch.inference_mode():
        expected = head(torch.tensor(np.stack(test["embedding"]).astype(np.float32))).numpy()
    vectors = np.load(tmp_path / "vectors.npy")
    assert vectors.shape == expected.shape
    assert ((vectors * expected).sum(axis=1) > 1 - 1e-3).all()


def test_the_published_folder_is_evaluated_as_the_head_in_it(chain, tmp_path):
    there = ("--set", f"paths.evaluation_dir={tmp_path}", "--compare", chain.cfg.paths.published_dir)
    done = warm.run("train/evaluate.py", *flags(chain.root), *there)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "compared" / "metrics.json").read_text())
    for name, figure in found["differences"]["trained-default"].items():
        assert abs(figure["value"]) < 1e-3, name  # the same head


def test_the_same_vectors_from_a_table_give_the_same_run_and_publish_the_same_head(chain, tmp_path):
    import torch

    from train.evaluation import heads

    theirs = chain.all(chain.cfg.paths.embeddings_dir)[["streetview_image_id", "embedding"]]
    theirs.sample(frac=1, random_state=0).to_parquet(tmp_path / "theirs.parquet", row_group_size=100)
    original, root = chain.cfg.paths, tmp_path / "run"
    changed = [f"paths.root={root}", f"embedding_model.name={tmp_path / 'theirs.parquet'}"]
    changed += [f"embedding_model.label={config.label_of(chain.cfg.embedding_model)}"]  # as in USES
    shared = ("raw_dir", "intermediates_dir", "fingerprints_dir")
    changed += [f"paths.{name}={getattr(original, name)}" for name in shared]
    paths = config.load(None, [*SETTINGS, *changed]).paths
    there = [flag for setting in [*SETTINGS, *changed] for flag in ("--set", setting)]
    names = [name for name in STEPS if name not in ("process_tar", "compute_fingerprints", "summarize_ids")]
    for command_line in [*([STEPS[name]] for name in names), [*USES["vectors_of_embeddings"]]]:
        words = [word.format(root=root) for word in command_line]
        done = warm.run(*words, *there)
        assert done.returncode == 0, done.stderr
    for split in ("train", "val", "test"):
        for one, other in (
            (paths.merged_dir / f"{split}.parquet", original.merged_dir / f"{split}.parquet"),
            (root / "projected" / f"{split}-0.parquet", chain.root / "projected" / f"{split}-0.parquet"),
        ):
            assert parquet.read(one).equals(parquet.read(other)), one
    checkpoint, expected = (
        heads.load_checkpoint(place.checkpoints_dir / "default" / "checkpoint_best.pt")
        for place in (paths, original)
    )
    assert checkpoint["epoch"] == expected["epoch"]
    assert all(torch.equal(checkpoint["head"][name], tensor) for name, tensor in expected["head"].items())
    assert checkpoint["embedding_model"].keys() == {"name", "weights", "dim"}

    assert not (paths.published_dir / "preprocessor_config.json").exists()
    card = (paths.published_dir / "README.md").read_text()
    assert "another network,\n`theirs`, has made" in card
    given = np.stack(theirs["embedding"][:2]).astype(np.float32)
    code = card.split("```python")[1].split("```")[0].replace("PATH", str(paths.published_dir))
    code = re.sub(r"torch\.randn\(2, \d+\)", f"torch.tensor({given.tolist()})", code)
    printed = in_a_fresh_process(f"{code}\nprint(vectors.tolist())", tmp_path).splitlines()[-1]
    with torch.inference_mode():
        vectors = heads.head_of(expected)(torch.from_numpy(given)).numpy()
    np.testing.assert_allclose(json.loads(printed), vectors, atol=1e-6)

    images = ("publish/generate_embeddings_from_hf.py", original.raw_dir / "0088.tar", tmp_path / "out")
    for words in (("publish/demo_usage.py", "search"), images):
        refused = warm.run(*words, *there)
        assert refused.returncode == 1
        *_, what, advice = refused.stderr.strip().splitlines()
        assert "takes vectors that another network has made, not images" in what
        assert "run publish/generate_embeddings_from_parquet.py" in advice


def test_metrics_and_report_tell_all_four_methods(chain):
    metrics = json.loads((chain.cfg.paths.evaluation_dir / "metrics.json").read_text())
    assert set(metrics["methods"]) == {"raw", "pca", "whitening", "trained"}
    for method in metrics["methods"].values():
        assert 0 <= method["map@r"]["value"] <= method["recall@1000"]["value"] <= 1
    assert (chain.cfg.paths.evaluation_dir / "report.html").stat().st_size > 10_000


def test_a_second_run_does_nothing_and_says_so(chain):
    before = {path: path.stat().st_mtime_ns for path in chain.root.rglob("*") if path.is_file()}
    for name in (*STEPS, *USES):
        assert "nothing to do" in output_of(name, chain.root), name
    assert {path: path.stat().st_mtime_ns for path in chain.root.rglob("*") if path.is_file()} == before


def test_a_killed_and_restarted_stage_leaves_what_an_undisturbed_one_does(chain):
    assert_same_artefacts(chain.killed_root, chain.root, folders=(".",))


def test_a_changed_setting_is_refused_and_remake_redoes_it(chain, tmp_path):
    shutil.copytree(chain.root, tmp_path / "run")
    shutil.copytree(chain.root.parent / "raw", tmp_path / "raw")
    shutil.copytree(chain.root.parent / "backbone", tmp_path / "backbone")
    there = flags(tmp_path / "run")
    other = ("preprocess/merge_and_split.py", *there, "--set", "data.split_buffer_m=10")
    refused = warm.run(*other)
    assert refused.returncode == 1
    assert "data.split_buffer_m = 50.0 (now 10" in refused.stderr
    assert refused.stderr.endswith(f"merge_and_split.py {shlex.join([*there, *other[-2:]])} --remake\n")
    assert warm.run(*other, "--remake").returncode == 0
    # what was made from the old merge no longer fits, and says so
    stale = warm.run("difficulty/compute_visual_neighbors.py", *there)
    assert stale.returncode == 1
    assert "train.parquet" in stale.stderr


def test_the_summary_line_counts_every_image(chain):
    line = chain.output["process_tar"]
    rows_in, rows_out, rejected = (
        int(re.search(rf"([\d,]+) {word}", line)[1].replace(",", "")) for word in ("images in", "out", "rejected")
    )
    assert rows_out == len(chain.truth.images)
    assert rows_in == rows_out + rejected
    assert rejected == chain.truth.rejects["member"].str.lower().str.endswith((".jpg", ".jpeg")).sum()


def demo_usage(chain, *arguments):
    return warm.run("publish/demo_usage.py", *arguments, *flags(chain.root))


def test_demo_usage_searches_a_tar_without_the_query_itself_and_compares_two(chain, tmp_path):
    row = chain.table(chain.cfg.paths.merged_dir / "test.parquet").iloc[0]
    tar = chain.cfg.paths.raw_dir / row["tar_file"]
    members = chain.all(chain.cfg.paths.intermediates_dir).set_index("streetview_image_id")["image_path"]
    query = f"{tar}:{members[row['streetview_image_id']]}"
    found = demo_usage(chain, "search", query, "--gallery", tar, "--top", 3, "--out", tmp_path / "a.png")
    assert found.returncode == 0, found.stderr
    results = found.stdout.splitlines()[1:4]
    similarities = [float(line.split()[1]) for line in results]
    assert similarities == sorted(similarities, reverse=True)
    assert similarities[0] < 1  # the query lies in the tar, and would be found with 1.000
    assert not any(line.endswith(query) for line in results)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"

    same = demo_usage(chain, "compare", query, query)
    assert same.stdout.startswith("similarity 1.000")
    assert "0.0% of matches and 0.00% of non-matches" in same.stdout


def test_demo_usage_shows_one_of_the_test_split_by_itself(chain, tmp_path):
    found = demo_usage(chain, "search", "--out", tmp_path / "a.png")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 7
    query = lines[0].split(" to ")[1]
    assert not any(line.endswith(query) for line in lines[1:])  # itself is left out
    similarities = [float(line.split()[1]) for line in lines[1:6]]
    assert similarities == sorted(similarities, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("compare", "nowhere.jpg", "nowhere.jpg"), 1, "nowhere.jpg cannot be read"),
        (("search", "query.jpg"), 2, "a QUERY and a --gallery, or neither"),
    ],
)
def test_demo_usage_says_what_is_wrong(chain, arguments, code, message):
    told = demo_usage(chain, *arguments)
    assert told.returncode == code
    assert message in told.stderr
    assert "Traceback" not in told.stderr
