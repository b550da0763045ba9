"""Duplicates and splits of millions of images, by their metadata: seconds and peak memory against what is allowed.

1. merge: intermediates, fingerprints and tiny embeddings of 40,000 images to a tar, decided and merged.
2. duplicates: images of which 100,000 have one content hash, and a building of 2,000 views that all differ.

Each runs in a process of its own, so that its peak memory is its own. The ratio is what is allowed over what was
taken: of seconds for this many images, and of memory.

Command  python tests/benchmarks/bench_scale.py            a tenth of the images
         python tests/benchmarks/bench_scale.py --full     2 and 5 million; a gigabyte of disk
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timing  # puts the repository's root on sys.path

from common import config, parquet, provenance, schemas, sections, stages
from common.places import geo

FULL = "--full" in sys.argv
MERGED, MERGED_S, MERGED_GB = 2_000_000, 180, 2
HASHED, HASHED_S, HASHED_GB = 5_000_000, 120, 3
SHARE = 1.0 if FULL else 0.1
PER_TAR, VIEWS, DIM = 40_000, 4, 8
EQUAL, MANY_VIEWS = 100_000, 2_000
SETTINGS = ("data.rows_per_part=20000", "data.split_cell_m=1000")


def places(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(building of each of n images, latitude, longitude): 12 m apart along streets 200 m apart."""
    building = np.arange(n) // VIEWS
    along, street = building % 100, building // 100
    lat = 45 + street % 500 * 200 / geo.METRES_PER_DEGREE
    return building, lat, (street // 500 * 2_000 + along * 12) / geo.METRES_PER_DEGREE / 0.7


def write_tar_files(cfg: sections.Config, number: int, rows: slice, columns: dict) -> None:
    """Intermediates, fingerprints and embeddings of one tar, as the stages before the merge leave them."""
    stem, n = f"{number:04d}", rows.stop - rows.start
    tar = cfg.paths.raw_dir / f"{stem}.tar"
    tar.parent.mkdir(parents=True, exist_ok=True)
    tar.write_bytes(b"tar")
    table = {name: column[rows] for name, column in columns.items()}
    table |= {"dataset_id": np.full(n, number), "patch_id": np.arange(n), "tar_file": [tar.name] * n}
    table["building_id"] = [f"{stem}_{target}" for target in table["target_id"]]
    table["streetview_image_id"] = table["image_path"] = [f"{stem}_{patch}" for patch in range(n)]
    for field in schemas.INTERMEDIATES:
        if field.name not in table:
            table[field.name] = np.zeros(n, field.type.to_pandas_dtype())
    source = cfg.paths.intermediates_dir / f"{stem}.parquet"
    with parquet.writer(
        source, schemas.INTERMEDIATES, provenance.record("process_tar", {}, stages.ids([tar]))
    ) as out:
        out.append({name: table[name] for name in schemas.INTERMEDIATES.names})
    hashed = provenance.record("compute_fingerprints", {}, stages.ids([source]))
    embedded = provenance.record("generate_embeddings", {"embedding_model.name": "made-up"}, stages.ids([source]))
    for part, start in enumerate(range(0, n, cfg.data.rows_per_part)):
        chosen = parquet.read(source).slice(start, cfg.data.rows_per_part)
        there = {name: chosen[name] for name in chosen.column_names}
        hashes = {name: table[name][start : start + chosen.num_rows] for name in ("phash", "dhash")}
        name = f"{stem}-{part}.parquet"
        with parquet.writer(cfg.paths.fingerprints_dir / name, schemas.FINGERPRINTS, hashed) as out:
            out.append({**there, **hashes})
        with parquet.writer(cfg.paths.embeddings_dir / name, schemas.embeddings(DIM), embedded) as out:
            vectors = np.zeros((chosen.num_rows, DIM), np.float16)
            out.append({**there, "embedding": vectors})
            out.facts = {"dim": DIM}


def write_chain(root: Path, n: int) -> None:
    cfg = config.load(None, [f"paths.root={root}", *SETTINGS])
    rng = np.random.default_rng(0)
    building, lat, lon = places(n)
    columns = {"target_id": building, "target_lat": lat, "target_lon": lon, "street_view_id": np.arange(n) // 3}
    columns |= {name: rng.integers(0, 2**63, n, np.uint64) for name in ("content_hash", "phash", "dhash")}
    for number, start in enumerate(range(0, n, PER_TAR)):
        write_tar_files(cfg, number + 1, slice(start, min(start + PER_TAR, n)), columns)


def merge(root: Path, _: int) -> None:
    from preprocess import merge_and_split

    flags = [f"paths.root={root}", *SETTINGS]
    assert merge_and_split.main([word for flag in flags for word in ("--set", flag)]) == 0


def duplicates(_: Path, n: int) -> None:
    from preprocess.duplicates import duplicate_rules as rules

    rng = np.random.default_rng(0)
    equal = int(EQUAL * n / HASHED)
    building, lat, lon = places(n)
    building[:MANY_VIEWS] = 0
    building = np.maximum.accumulate(building)
    content, phash, dhash = (rng.integers(0, 2**63, n, np.uint64) for _ in range(3))
    content[rng.choice(np.arange(MANY_VIEWS, n), equal, replace=False)] = 404
    like = rules.within_buildings(building, phash, dhash, 4)
    xyz = geo.to_xyz_m(lat, lon)
    assert (like < 0).all()
    assert rules.across_buildings(building, content, xyz, 25).sum() == equal
    assert rules.count_lookalikes(building, content, phash, dhash) == 0


def run(step: str, root: Path, n: int) -> dict:
    """{"seconds", "gb"} of a step in a process of its own."""
    command = [sys.executable, __file__, "--step", step, str(root), str(n)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def as_ratios(what: str, found: dict, seconds: float, gb: float) -> list[timing.Ratio]:
    return [
        timing.Ratio(what, f"{allowed:g} {unit} allowed", found[key], unit, *3 * [allowed / found[key]], 1)
        for key, allowed, unit in (("seconds", seconds, "s"), ("gb", gb, "GB"))
    ]


def measure() -> list[timing.Ratio]:
    merged, hashed = int(MERGED * SHARE), int(HASHED * SHARE)
    with tempfile.TemporaryDirectory() as folder:
        write_chain(Path(folder), merged)
        ratios = as_ratios(
            f"merge {merged:,} images", run("merge", Path(folder), merged), MERGED_S * SHARE, MERGED_GB
        )
        found = run("duplicates", Path(folder), hashed)
    return ratios + as_ratios(f"find duplicates of {hashed:,} images", found, HASHED_S * SHARE, HASHED_GB)


if __name__ == "__main__":
    if "--step" in sys.argv:
        step, root, n = sys.argv[2:]
        started = time.perf_counter()
        {"merge": merge, "duplicates": duplicates}[step](Path(root), int(n))
        seconds = time.perf_counter() - started
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({"seconds": seconds, "gb": peak_gb}))
    else:
        sys.argv = [argument for argument in sys.argv if argument != "--full"]
        timing.main(__doc__, measure)
