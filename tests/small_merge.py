"""A small merge, made directly: three splits with pictures in a tar, and a checkpoint as training leaves it.

An embedding is its building's own vector plus noise that is strong in a few dimensions: learned whitening undoes
that, so it beats the raw vectors, and PCA does not. Buildings come in twins that look alike, 10 m apart:
each is the other's junk, and would often come before the match.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from common import parquet, provenance, schemas
from common.places import geo

DIM, HIDDEN, OUT = 24, 16, 16
MODEL = {"name": "tiny", "revision": "main", "pooling": "cls", "dtype": "float32", "dim": DIM, "weights": "w0"}
METRES = 1 / 111_195.0  # degrees of latitude
NUISANCE = np.where(np.arange(DIM) < 4, 3.0, 0.6)
SPLIT_ORIGIN = {"train": 0.0, "val": 20.0, "test": 40.0}  # degrees of latitude


def write_tar(path: Path, count: int, rng) -> list[tuple[int, int]]:
    """A tar of `count` flat JPEGs; (offset, size) of each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            content = io.BytesIO()
            Image.new("RGB", (64, 64), tuple(rng.integers(0, 255, 3).tolist())).save(content, "JPEG")
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)
    with tarfile.open(path) as tar:
        return [(member.offset_data, member.size) for member in tar]


def split_columns(split: str, buildings: int, views: int, cells: int, rng, places) -> dict:
    """Columns of one split. Buildings 2i and 2i + 1 are twins; cells lie 2 km apart."""
    number = np.arange(buildings)
    first = int(SPLIT_ORIGIN[split] * 1000)
    lat = SPLIT_ORIGIN[split] + (number % (2 * cells) // 2) * 2_000 * METRES
    lat = lat + (number // (2 * cells)) * 100 * METRES + (number % 2) * 10 * METRES
    of_row = np.repeat(number, views)
    n = len(of_row)
    own = np.random.default_rng(first + 1).normal(0, 1, (buildings, DIM))
    own[1::2] = 0.8 * own[: buildings // 2 * 2 : 2] + 0.6 * own[1::2]  # twins look alike
    embedding = own[of_row] + rng.normal(0, 1, (n, DIM)) * NUISANCE
    dataset = np.full(n, 88, np.int32)
    target, patch = first + of_row, first + np.arange(n)
    offsets, sizes = np.array([places[i % len(places)] for i in range(n)]).T
    return {
        "building_id": [f"0088_{t}" for t in target],
        "streetview_image_id": [f"0088_{p}" for p in patch],
        "dataset_id": dataset,
        "target_id": target,
        "patch_id": patch,
        "street_view_id": patch,
        "target_lat": lat[of_row],
        "target_lon": np.zeros(n),
        "target_height": np.zeros(n, np.float32),
        "camera_lat": lat[of_row],
        "camera_lon": rng.uniform(5, 50, n) * METRES,
        "heading": rng.uniform(0, 360, n).astype(np.float32),
        "pitch": np.random.default_rng(first).uniform(-20, 40, n).astype(np.float32),
        "distance": rng.uniform(5, 50, n).astype(np.float32),
        "cell_id": geo.cell_ids(lat[of_row], np.zeros(n), 1000.0),
        "tar_file": ["0088.tar"] * n,
        "image_offset": offsets,
        "image_size": sizes,
        "embedding": embedding.astype(np.float16),
    }


def write_split(cfg, split: str, columns: dict, model: dict = MODEL, config: dict | None = None) -> None:
    """merged/<split>.parquet, as merge_and_split writes it."""
    made = provenance.record("merge_and_split", config or {"data.split_by": "geo"}, {"0088-0.parquet": "e0"})
    path = cfg.paths.merged_dir / f"{split}.parquet"
    with parquet.writer(path, schemas.merged(columns["embedding"].shape[1]), made) as out:
        out.append(columns)
        out.facts["embedding_model"] = model


def write_merge(cfg, *, buildings: int = 60, views: int = 3, cells: int = 24, seed: int = 0) -> dict:
    """The three splits and raw/0088.tar; returns their columns by split."""
    rng = np.random.default_rng(seed)
    places = write_tar(cfg.paths.raw_dir / "0088.tar", 40, rng)
    columns = {split: split_columns(split, buildings, views, cells, rng, places) for split in SPLIT_ORIGIN}
    for split, of_split in columns.items():
        write_split(cfg, split, of_split)
    return columns


def of_run(cfg, run: str):
    """The configuration with another name of the run."""
    return cfg.model_copy(update={"training": cfg.training.model_copy(update={"run": run})})


def write_checkpoint(cfg, seed: int = 0, hidden: int = HIDDEN, out: int = OUT) -> Path:
    """checkpoint_best.pt of an untrained head that starts at the whitening."""
    import torch

    from common.places import zones
    from publish.model.projection_head import ProjectionHead
    from train.linear import whitening

    train = parquet.read(cfg.paths.merged_dir / "train.parquet")
    embeddings = parquet.to_matrix(train["embedding"]).copy()  # torch wants them writable
    buildings = zones.number_buildings(train["target_id"].to_numpy())
    moments = whitening.moments(embeddings, buildings, torch.device("cpu"))
    baselines = {"pca": whitening.pca(moments, out), "whitening": whitening.whiten(moments, out, 1e-2)}
    baselines = {
        name: {"mean": torch.tensor(mean).float(), "projection": torch.tensor(projection).float()}
        for name, (mean, projection) in baselines.items()
    }
    torch.manual_seed(seed)
    dim = embeddings.shape[1]
    head = ProjectionHead(dim, hidden, out)
    with torch.no_grad():
        head.linear.weight.copy_(baselines["whitening"]["projection"])
        head.mean.copy_(baselines["whitening"]["mean"])
        head.gain.fill_(0.05 * seed)
    records = {s: parquet.read_provenance(cfg.paths.merged_dir / f"{s}.parquet") for s in ("train", "val")}
    inputs = {f"{split}.parquet": record.id for split, record in records.items()}
    made = provenance.record("train", {"training.margin": 0.1}, inputs).finished(f"checkpoint{seed}", {})
    checkpoint = {
        "head": head.state_dict(),
        "input_dim": dim,
        "hidden_dim": hidden,
        "output_dim": out,
        "dropout": 0.0,
        "epoch": 2,
        "metrics": {"val_map_at_r": 0.3},
        "config": made.config,
        "embedding_model": records["train"].facts["embedding_model"],
        "baselines": baselines,
        "provenance": made.to_dict(),
    }
    run_dir = cfg.paths.checkpoints_dir / cfg.training.run
    run_dir.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, run_dir / "checkpoint_best.pt")
    return run_dir / "checkpoint_best.pt"
