"""The chain on tars with every damage of damaged_tars.py, gzip and plain, against that on undamaged plain tars.

Oracles: damaged_tars.damage, which knows what is lost, and for undamaged tars GNU tar and Python's tarfile.
"""

import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xxhash
from damaged_tars import KINDS, PLAIN_KINDS, DamagedTar, Member, damage, inflated, members_of
from local_backbone import write_local_backbone
from synthetic import write_dataset

from common import config, parquet
from common.archives import gzip_streams
from common.imagery import tar_images
from generate import generate_embeddings
from preprocess import compute_fingerprints, merge_and_split, process_tar

DAMAGES = [(kind, "gzip") for kind in KINDS] + [(kind, "plain") for kind in PLAIN_KINDS]
STEMS = [f"{88 + number:04d}" for number in range(len(DAMAGES))]  # a tar for each
OF_TAR = ("tar_damaged", "tar_truncated", "gzip_damaged")
UNHARMED = ("three_streams", "trailing_zeros")  # no damages at all, to whoever reads all streams
each_tar = pytest.mark.parametrize("stem", STEMS, ids=["-".join(pair) for pair in DAMAGES])


class Run:
    """The stages up to the splits, in one folder."""

    def __init__(self, root: Path, backbone: Path):
        settings = [
            *(f"paths.root={root}", "data.max_reject_share=1", "data.rows_per_part=10"),
            *(f"embedding_model.name={backbone}", "embedding_model.pooling=mean"),
            *("infrastructure.embedding_batch_size=16", "infrastructure.workers=2"),
            *("data.split_cell_m=300", "data.train_ratio=0.5", "data.val_ratio=0.25", "data.test_ratio=0.25"),
        ]
        self.cfg = config.load(None, settings)
        flags = [word for setting in settings for word in ("--set", setting)]
        for stage in (process_tar, compute_fingerprints, generate_embeddings, merge_and_split):
            assert stage.main(flags) == 0
        self.rows = {stem: self._rows(stem) for stem in STEMS}

    def _rows(self, stem: str) -> pd.DataFrame:
        """Intermediates, fingerprints and embeddings of a tar, side by side."""
        rows = parquet.read(self.cfg.paths.intermediates_dir / f"{stem}.parquet").to_pandas()
        for folder in (self.cfg.paths.fingerprints_dir, self.cfg.paths.embeddings_dir):
            parts = [parquet.read(folder / f"{stem}-{n}.parquet") for n in range(-(-len(rows) // 10))]
            other = pd.concat([part.to_pandas() for part in parts], ignore_index=True)
            assert other["streetview_image_id"].tolist() == rows["streetview_image_id"].tolist()
            rows = rows.join(other[other.columns.difference(rows.columns)])
        return rows

    def footer(self, stem: str) -> dict:
        return parquet.read_provenance(self.cfg.paths.intermediates_dir / f"{stem}.parquet").rows

    def rejects(self, stem: str) -> list[dict]:
        rejects_dir = self.cfg.paths.intermediates_dir.with_name("intermediates_rejects")
        return parquet.read(rejects_dir / f"{stem}.parquet").to_pylist()


class Chains:
    """A run on plain tars, and one on these with a damage each."""

    def __init__(self, folder: Path):
        backbone, raw = write_local_backbone(folder / "backbone"), folder / "damaged/data/raw"
        count = len(STEMS)
        write_dataset(
            folder / "whole/data/raw",
            streets=count,
            cities=count,
            image_px=96,
            facades_per_street=5,
            compress=False,
        )
        raw.mkdir(parents=True)
        self.tars = {path.stem: path.read_bytes() for path in sorted((folder / "whole/data/raw").iterdir())}
        self.members = {stem: members_of(tar) for stem, tar in self.tars.items()}
        self.damaged_tars: dict[str, DamagedTar] = {}
        for number, (stem, (kind, form)) in enumerate(zip(STEMS, DAMAGES, strict=True)):
            rng = np.random.default_rng(number)
            self.damaged_tars[stem] = damage(kind, self.tars[stem], self.members[stem], rng, form == "gzip")
            (raw / f"{stem}.tar").write_bytes(self.damaged_tars[stem].content)
        self.whole, self.damaged = (Run(folder / name, backbone) for name in ("whole", "damaged"))

    def lost_pairs(self, stem: str) -> set[str]:
        """The stems of lost files: with them their partners are of no use."""
        return {without_suffix(name) for name in self.damaged_tars[stem].lost}


def without_suffix(name: str) -> str:
    return name.rsplit(".", 1)[0]


def partner_of(name: str) -> str:
    return without_suffix(name) + (".jpg" if name.endswith(".txt") else ".txt")


@pytest.fixture(scope="module")
def chains(tmp_path_factory) -> Chains:
    with pytest.MonkeyPatch.context() as patch:  # so that these small streams have several restart points
        patch.setattr(gzip_streams, "SPACING_BYTES", 5_000)
        patch.setattr(gzip_streams, "READ_BYTES", 10_000)
        patch.setattr(gzip_streams, "_SEARCHED_BYTES", 8_000)
        return Chains(tmp_path_factory.mktemp("chains"))


def test_every_damage_is_tried_and_most_lose_something(chains):
    assert len(DAMAGES) == 18
    losing = [stem for stem in STEMS if chains.damaged_tars[stem].lost]
    assert len(losing) == 11
    for stem in STEMS:
        assert 0.2 < len(chains.damaged.rows[stem]) / len(chains.whole.rows[stem]) <= 1


@each_tar
def test_undamaged_tars_hold_what_gnu_tar_and_tarfile_list(stem, chains, tmp_path):
    path = chains.whole.cfg.paths.raw_dir / f"{stem}.tar"
    listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True).stdout.splitlines()
    files = sorted(name for name in listed if not name.endswith("/"))
    rows = chains.whole.rows[stem]
    assert files == sorted(
        name for image in rows["image_path"] for name in (image, without_suffix(image) + ".txt")
    )
    with tarfile.open(path) as tar:
        for row in rows.itertuples():
            assert xxhash.xxh3_64_intdigest(tar.extractfile(row.image_path).read()) == row.content_hash
    assert chains.whole.rejects(stem) == []


@each_tar
def test_every_image_that_is_not_lost_has_the_same_row_everywhere(stem, chains):
    whole, ours = chains.whole.rows[stem], chains.damaged.rows[stem]
    expected = whole[~whole["image_path"].map(without_suffix).isin(chains.lost_pairs(stem))]
    same = whole.columns.difference(["image_offset", "embedding"])
    pd.testing.assert_frame_equal(ours[same], expected[same].reset_index(drop=True))  # ids, labels, hashes, order
    a, b = (np.stack(rows["embedding"]).astype(np.float32) for rows in (ours, expected))
    assert np.allclose(a, b, atol=2e-3, rtol=2e-3)  # batches are cut elsewhere; float16 has 11 bits


@each_tar
def test_a_lost_file_is_a_reject_by_its_name_or_lies_where_one_says_that_bytes_are_lost(stem, chains):
    whole, (content, lost) = chains.tars[stem], chains.damaged_tars[stem]
    broken = inflated(content) if content.startswith(b"\x1f\x8b") else content
    rejects = chains.damaged.rejects(stem)
    named = {row["member"]: row["reason"] for row in rejects}
    gaps = [span(row["detail"], len(broken)) for row in rejects if row["reason"] in OF_TAR]
    for member in chains.members[stem]:
        why, fate_of_partner = lost.get(member.name), lost.get(partner_of(member.name))
        if why is None:  # used with its partner, or rejected for it
            missing = "image_missing" if member.name.endswith(".txt") else "label_missing"
            expected = {None: None, "absent": missing}.get(fate_of_partner, "partner_rejected")
            assert named.get(member.name) == expected
        elif why == "absent":
            start, end = where(member, whole, broken)
            assert any(a <= end and start <= b for a, b in gaps), (member, gaps)
            assert member.name not in named
        else:  # the half member that the damage begins or ends in
            assert named[member.name] in (*OF_TAR, "jpeg_corrupt")
    for name in named:
        assert name == f"{stem}.tar" or without_suffix(name) in chains.lost_pairs(stem)


def span(detail: str, tar_bytes: int) -> tuple[int, int]:
    """The bytes of a damaged tar that a reject is about, as it says."""
    number = lambda text: int(text.replace(",", ""))  # noqa: E731
    if match := re.search(r"only ([\d,]+) of [\d,]+ bytes present from byte ([\d,]+) on", detail):
        start = number(match[2])
        return start, start + number(match[1])
    if match := re.search(r"([\d,]+) bytes lost from byte ([\d,]+) on", detail):
        return number(match[2]), number(match[2]) + number(match[1])
    return number(re.search(r"at byte ([\d,]+)", detail)[1]), tar_bytes


def where(member: Member, whole: bytes, broken: bytes) -> tuple[int, int]:
    """Where in the damaged tar a member lay before one span of it was taken out, put in, or made another."""
    a, b = np.frombuffer(whole, np.uint8), np.frombuffer(broken, np.uint8)
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    start = int(differ[0]) if len(differ) else shorter
    differ = np.flatnonzero(a[::-1][: shorter - start] != b[::-1][: shorter - start])
    tail = int(differ[0]) if len(differ) else shorter - start

    def mapped(at: int) -> int:
        if at <= start:
            return at
        return at + len(b) - len(a) if at >= len(a) - tail else len(b) - tail

    return mapped(member.header), mapped(member.data + member.size)


@each_tar
def test_members_are_images_labels_rejects_and_others(stem, chains):
    footer, rejects = chains.damaged.footer(stem), chains.damaged.rejects(stem)
    assert footer["images"] == footer["labels"] == len(chains.damaged.rows[stem])
    assert footer["rejects"] == len(rejects) == sum(footer["rejected"].values())
    assert footer["members"] == footer["images"] + footer["labels"] + footer["rejects"] + footer["other"]
    # files of the undamaged tar, without those of which nothing is there, and the damages that are no file's
    absent = sum(why == "absent" for why in chains.damaged_tars[stem].lost.values())
    gaps = sum(row["member"] == f"{stem}.tar" for row in rejects)
    assert footer["members"] == len(chains.members[stem]) - absent + gaps


@each_tar
def test_each_damage_is_told_once_with_its_kind(stem, chains):
    kind, form = DAMAGES[STEMS.index(stem)]
    reasons = [row["reason"] for row in chains.damaged.rejects(stem) if row["reason"] in OF_TAR]
    if kind in UNHARMED or kind == "garbage_member":  # which is one JPEG that is corrupt
        assert reasons == []
    elif kind in ("checksum", "length", "trailing_garbage"):
        assert reasons == ["gzip_damaged"]
    elif kind == "garbage_deflate":  # whatever it makes of the data, and of where the stream ends
        assert "gzip_damaged" in reasons
    elif kind == "cut":
        assert sorted(reasons) == ["gzip_damaged"] * (form == "gzip") + ["tar_truncated"]
    else:  # a gap, and the half member before it, if there is one
        half = kind in ("spliced_out", "blocks_spliced_out")
        assert reasons in (["tar_damaged"] * (1 + half), ["tar_damaged"])


@pytest.mark.parametrize("kind", ["checksum", "length", "trailing_zeros", "three_streams"])
def test_gnu_tar_lists_what_is_used_of_streams_that_lose_nothing(kind, chains):
    stem = STEMS[DAMAGES.index((kind, "gzip"))]
    done = subprocess.run(["tar", "-tf", chains.damaged.cfg.paths.raw_dir / f"{stem}.tar"], capture_output=True)
    listed = [name for name in done.stdout.decode().splitlines() if name.endswith(".jpg")]
    assert listed == chains.damaged.rows[stem]["image_path"].tolist()
    assert (done.returncode == 0) == (kind in UNHARMED)  # of the others tar says what the reports do


@each_tar
def test_images_are_read_out_of_the_middle_by_the_index_that_was_written(stem, chains, monkeypatch):
    monkeypatch.setattr(tar_images, "write_restart_points", None)  # it is not made again
    index = tar_images.index_of(chains.damaged.cfg.paths.intermediates_dir, Path(f"{stem}.tar"))
    assert index.exists() == (DAMAGES[STEMS.index(stem)][1] == "gzip")
    assert not index.exists() or parquet.num_rows(index) >= 2
    rows = chains.damaged.rows[stem]
    order = np.random.default_rng(0).permutation(len(rows))
    for number in order.tolist():
        row = rows.iloc[number]
        store = tar_images.of_paths(chains.damaged.cfg.paths)
        [content] = store.tar(row["tar_file"]).read([row["image_offset"]], [row["image_size"]])
        assert xxhash.xxh3_64_intdigest(content) == row["content_hash"]


def test_the_splits_of_damaged_tars_have_the_embeddings_of_the_whole_ones(chains):
    paths = chains.damaged.cfg.paths
    splits = pd.concat([parquet.read(path).to_pandas() for path in sorted(paths.merged_dir.glob("*.parquet"))])
    assert len(splits) > 100
    whole = (
        pd.concat(chains.whole.rows.values()).set_index("streetview_image_id").loc[splits["streetview_image_id"]]
    )
    a, b = (np.stack(rows["embedding"]).astype(np.float32) for rows in (splits, whole))
    assert np.allclose(a, b, atol=2e-3, rtol=2e-3)
