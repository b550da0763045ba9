"""Verified pairs in the form of the dataset's own test set, of the images of a synthetic one.

As in the real one, some pairs name images that are not there, and some images do not decode.

Reads    data/intermediates, and the images from the tars in data/raw
Writes   OUT, a tar (gzip with --gzip): verTest/verpairs.txt, verTest/format.txt, data/<id>_i.jpg, data/<id>_p.jpg
Command  python tests/synthetic_pairs.py test_matching.tar [--pairs 400] [--set paths.root=demo/80-streets]
"""

import argparse
import io
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image
from synthetic import tar_info

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import config, parquet
from common.imagery import tar_images
from common.sections import Paths

PATCH_SHARE = 0.3  # of an image's sides: 192 of 640 pixels
FORMAT = "id1 id2 label(1: same target, 0: not) relative_heading relative_pitch\n"
_COLUMNS = "dataset_id target_id patch_id heading pitch tar_file image_offset image_size".split()


@dataclass(frozen=True)
class PlantedPairs:
    """What a test set holds: all pairs of its list, and the ids whose images are not there or do not decode."""

    pairs: pd.DataFrame  # first, second, same, heading, pitch
    missing: list[str]
    damaged: list[str]

    @property
    def usable(self) -> pd.DataFrame:
        lost = [*self.missing, *self.damaged]
        return self.pairs[~self.pairs["first"].isin(lost) & ~self.pairs["second"].isin(lost)]


def choose(images: pd.DataFrame, pairs: int, rng: np.random.Generator) -> pd.DataFrame:
    """Rows (one, other, same): as many pairs of one target as of two targets of one dataset; no image is the
    first of two pairs of a kind, so there may be fewer."""
    several = images.groupby(["dataset_id", "target_id"]).filter(lambda of_target: len(of_target) > 1)
    one = several.sample(min(pairs - pairs // 2, len(several)), random_state=rng)
    rows = []
    for row in one.itertuples():
        there = images[(images["dataset_id"] == row.dataset_id) & (images.index != row.Index)]
        rows.append(
            (row.Index, there[there["target_id"] == row.target_id].sample(1, random_state=rng).index[0], True)
        )
    for row in images.sample(min(pairs // 2, len(images)), random_state=rng).itertuples():
        others = images[(images["dataset_id"] == row.dataset_id) & (images["target_id"] != row.target_id)]
        rows.append((row.Index, others.sample(1, random_state=rng).index[0], False))
    return pd.DataFrame(rows, columns=["one", "other", "same"])


def write_pairs(
    out: Path,
    paths: Paths,
    *,
    pairs: int = 60,
    missing: int = 2,
    damaged: int = 2,
    compress: bool = False,
    seed: int = 0,
) -> PlantedPairs:
    """Write a test set of images of the pipeline's tars; returns what is in it."""
    rng = np.random.default_rng(seed)
    tables = [
        parquet.read(path, _COLUMNS).to_pandas() for path in sorted(paths.intermediates_dir.glob("*.parquet"))
    ]
    images = pd.concat(tables, ignore_index=True)
    images = images[~images["tar_file"].str.contains("/")].reset_index(drop=True)  # no imported photographs
    chosen = choose(images, pairs, rng)
    ids = [f"{d:04d}-{p:07d}" for d, p in zip(images["dataset_id"], images["patch_id"], strict=True)]
    one, other = images.loc[chosen["one"]], images.loc[chosen["other"]]
    listed = pd.DataFrame(
        {"first": [ids[row] for row in chosen["one"]], "second": [ids[row] for row in chosen["other"]]}
    )
    listed["same"] = chosen["same"]
    listed["heading"] = (other["heading"].to_numpy() - one["heading"].to_numpy() + 180) % 360 - 180
    listed["pitch"] = other["pitch"].to_numpy() - one["pitch"].to_numpy()
    rows = rng.permutation(np.unique(chosen[["one", "other"]]))
    lost = [ids[row] for row in rows[: missing + damaged]]
    planted = PlantedPairs(listed, lost[:missing], lost[missing:])

    lines = [f"{p.first} {p.second} {int(p.same)} {p.heading:.4f} {p.pitch:.4f}\n" for p in listed.itertuples()]
    files = {"verTest/format.txt": FORMAT.encode(), "verTest/verpairs.txt": "".join(lines).encode()}
    contents = tar_images.of_paths(paths).read(pa.Table.from_pandas(images.loc[rows], preserve_index=False))
    for row, content in zip(rows, contents, strict=True):
        if ids[row] not in planted.missing:
            for suffix, data in (("i", content), ("p", patch_of(content))):
                cut = len(data) // 2 if ids[row] in planted.damaged else len(data)
                files[f"data/{ids[row]}_{suffix}.jpg"] = data[:cut]
    with tarfile.open(out, "w:gz" if compress else "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            tar.addfile(tar_info(name, len(content)), io.BytesIO(content))
    return planted


def patch_of(jpeg: bytes) -> bytes:
    """The centre of an image, as JPEG."""
    image, patch = Image.open(io.BytesIO(jpeg)), io.BytesIO()
    x, y = (side / 2 for side in image.size)
    half_x, half_y = x * PATCH_SHARE, y * PATCH_SHARE
    image.crop((round(x - half_x), round(y - half_y), round(x + half_x), round(y + half_y))).save(patch, "JPEG")
    return patch.getvalue()


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the tar to write")
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--gzip", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    args = parser.parse_args(argv)
    paths = config.load(None, args.set).paths
    write_pairs(args.out, paths, pairs=args.pairs, compress=args.gzip, seed=args.seed)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
