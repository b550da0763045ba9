"""The verified pairs whose images have embeddings, the files about them, and how many images are in train."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from common import files, parquet, schemas
from common.errors import PipelineError
from common.imagery import verified_pairs
from common.imagery.verified_pairs import PairFiles
from common.places import zones
from common.provenance import Provenance
from common.schemas import Reject, Rejected, count_reasons
from common.sections import Config
from generate import embedding_parts
from train.evaluation import heads
from train.evaluation.gallery import Gallery
from train.pairs.pair_metrics import JudgedPairs

SUFFIXES = {"whole": "_i.jpg", "patches": "_p.jpg"}  # of the images' names
_SPLITS = ("train", "val")


def embeddings_path(cfg: Config, kind: str) -> Path:
    """Where the embeddings of the images of this kind are, whatever the run."""
    return files.beside(cfg.paths.embeddings_dir, "pairs") / f"{kind}.parquet"


@dataclass(frozen=True)
class PairImages:
    """The pairs whose images both have an embedding, these images, and what is left out."""

    pairs: pa.Table  # schemas.pairs, without cosines
    gallery: Gallery  # the I images of these; streetview_image_id is an id of the list
    judged: JudgedPairs  # `pairs` by the rows of the gallery
    left_out: list[tuple[str, Rejected]]  # lines of the list: other pairs, and what is none
    damages: list[tuple[str, Rejected]]  # of the tar

    @property
    def ids(self) -> list[str]:
        return self.gallery.table["streetview_image_id"].to_pylist()


def load(source: PairFiles, cfg: Config, kind: str) -> PairImages:
    """What `embed` has written, with its list. Raises PipelineError unless pairs of both kinds are left."""
    pairs, malformed = verified_pairs.parse(verified_pairs.listed_in(source))
    path = embeddings_path(cfg, kind)
    table = parquet.read(path)
    ids = pd.Index([name.removesuffix(SUFFIXES[kind]) for name in table["image"].to_pylist()])
    rows = np.stack([ids.get_indexer(pairs[column].to_pandas()) for column in ("first", "second")])
    usable = (rows >= 0).all(axis=0)
    kept = pairs.filter(pa.array(usable))
    same = kept["same"].to_numpy(zero_copy_only=False)
    if not (same.any() and (~same).any()):
        raise PipelineError(
            f"{source.path}: {same.sum():,} pairs of one target and {(~same).sum():,} of two have "
            f"both images\nsome of each are needed; see {embedding_parts.rejects_path(path)}"
        )
    used, numbers = np.unique(rows[:, usable], return_inverse=True)
    first, second = numbers.reshape(2, -1)
    names = ids[used]
    unknown = np.full(len(used), np.nan)
    gallery = Gallery(
        0,
        pa.table({"streetview_image_id": pa.array(names, pa.string())}),
        parquet.to_matrix(table["embedding"])[used],
        zones.make_zones(np.arange(len(used)), unknown, unknown, 0.0),
    )
    judged = JudgedPairs(
        first,
        second,
        same,
        kept["heading_difference"].to_numpy(),
        np.array([verified_pairs.split_id(name)[0] for name in names], np.int64),
    )
    lost = pairs.filter(pa.array(~usable)).to_pylist()
    left_out = [
        (f"line {row}: {text}", Rejected(Reject.PAIR_MALFORMED, "not two ids, 1 or 0, and two angles"))
        for row, text in malformed.items()
    ]
    left_out += _without_image(lost, set(ids), path, kind)
    damages = [(damage.member, Rejected(damage.reason, damage.detail)) for damage in source.damages]
    return PairImages(kept, gallery, judged, left_out, damages)


def _without_image(lost: list[dict], ids: set[str], path: Path, kind: str) -> list[tuple[str, Rejected]]:
    """Each of these pairs with the reason for which its first missing image has no embedding."""
    rejects_path = embedding_parts.rejects_path(path)
    rows = parquet.read(rejects_path).to_pylist() if rejects_path.exists() else []
    why = {row["member"]: Rejected(Reject(row["reason"]), f"{row['member']}: {row['detail']}") for row in rows}
    rejects = []
    for pair in lost:
        absent = next(name for name in (pair["first"], pair["second"]) if name not in ids)
        rejects.append((f"line {pair['line']}: {pair['first']} {pair['second']}", why[absent + SUFFIXES[kind]]))
    return rejects


def vectors_of(path: Path, gallery: Gallery) -> torch.Tensor:
    """(I, d) float32 unit vectors of the gallery's images, from a Parquet file with `id` and `embedding` in any
    order. Raises PipelineError if an image is missing or there twice, or a vector has no direction."""
    with parquet.open_file(path) as file:
        missing = sorted({"id", "embedding"} - set(file.schema_arrow.names))
    if missing:
        raise PipelineError(
            f"{path} has no column {', '.join(missing)}\n--vectors needs id, such as 0006-0087241, and embedding"
        )
    table = parquet.read(path, ["id", "embedding"])
    found = pd.Index(table["id"].to_pandas())
    if not found.is_unique:
        raise PipelineError(f"{path} holds image {found[found.duplicated()][0]} twice")
    wanted = gallery.table["streetview_image_id"].to_pandas()
    rows = found.get_indexer(wanted)
    if (rows < 0).any():
        more = int((rows < 0).sum()) - 1
        raise PipelineError(
            f"{path} has no vector of image {wanted[rows.argmin()]} and {more:,} more of the pairs"
        )
    name = lambda row: f"image {found[row]}"  # noqa: E731
    vectors = parquet.embedding_matrix(path, table, "embedding", name)
    parquet.refuse_zeros(path, "embedding", vectors, name)
    return heads.normalized(vectors[rows], torch.device("cpu"))


def counts(images: PairImages) -> dict[str, int]:
    """What is judged, in numbers."""
    return {
        "pairs": len(images.pairs),
        "same": int(images.judged.same.sum()),
        "different": int((~images.judged.same).sum()),
        "images": len(images.ids),
        "datasets": len(np.unique(images.judged.dataset_of_image)),
        "left_out": len(images.left_out),
    }


def write(folder: Path, images: PairImages, cosines: dict[str, np.ndarray], record: Provenance) -> None:
    """pairs.parquet, a row for each pair with the cosine of each method, and rejects.parquet."""
    schema = schemas.pairs(cosines)
    rejects = [*images.left_out, *images.damages]
    with parquet.writer(folder / "rejects.parquet", schemas.REJECTS, record) as out:
        members, why = [member for member, _ in rejects], [why for _, why in rejects]
        out.append({"member": members, "reason": [r.reason for r in why], "detail": [r.detail for r in why]})
    with parquet.writer(folder / "pairs.parquet", schema, record) as out:
        out.append(dict(zip(schema.names, [*images.pairs.columns, *cosines.values()], strict=True)))
        out.rows = {"in": len(images.pairs) + len(images.left_out), **count_left_out(images)}


def count_left_out(images: PairImages) -> dict[str, int]:
    """The number of pairs, and of lines that are none, by the reason for which they are left out."""
    return count_reasons(why for _, why in images.left_out)


def seen(cfg: Config, images: PairImages) -> dict[str, int]:
    """How many of the images are in the intermediates ("found"), and of how many the building or the panorama is
    in "train" and in "val". Reads the ids of all rows, 32 bytes each, a batch at a time."""
    patches = verified_pairs.patches_of(images.ids)
    columns = ["dataset_id", "patch_id", "target_id", "street_view_id"]
    located = []
    for path in sorted(cfg.paths.intermediates_dir.glob("*.parquet")):
        for rows in parquet.batches(path, columns):
            listed = verified_pairs.is_listed(patches, *(rows[name].to_numpy() for name in columns[:2]))
            located.append(rows.filter(pa.array(listed)).to_pandas())
    found = pd.concat([pd.DataFrame(columns=columns, dtype=np.int64), *located]).drop_duplicates(columns[:2])
    counts = {"images": len(images.ids), "found": len(found)}
    for split in _SPLITS:
        is_seen = np.zeros(len(found), bool)
        for rows in parquet.batches(cfg.paths.merged_dir / f"{split}.parquet", columns):
            for key in ("target_id", "street_view_id"):
                there = pd.MultiIndex.from_arrays([rows["dataset_id"].to_numpy(), rows[key].to_numpy()])
                is_seen |= pd.MultiIndex.from_frame(found[["dataset_id", key]]).isin(there)
        counts[split] = int(is_seen.sum())
    return counts
