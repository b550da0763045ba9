"""Listing a tar's members, with their sizes and where their bytes lie: common/archives/tars.py against Python's
tarfile.

The tar's images are holes in a sparse file, of the size that the dataset's have: neither way reads them.

Command  python tests/benchmarks/bench_tars.py
"""

import tarfile
import tempfile
from pathlib import Path

import timing  # puts the repository's root on sys.path

from common.archives import tars

PAIRS = 20_000
IMAGE_BYTES, LABEL_BYTES = 35_000, 230


def write_tar(path: Path, form: int, prefix: str) -> None:
    """A tar of PAIRS images and labels; `prefix`: folders that their names begin with."""
    with path.open("wb") as file:
        for n in range(PAIRS):
            for suffix, size in (("jpg", IMAGE_BYTES + 7 * n % 5_000), ("txt", LABEL_BYTES)):
                info = tarfile.TarInfo(f"{prefix}0088_{n}_{n // 3}_{n // 4}.{suffix}")
                info.size, info.mtime = size, 1_400_000_000
                file.write(info.tobuf(form))
                file.seek(-(-size // 512) * 512, 1)
        file.write(bytes(1024))


def with_tarfile(path: Path) -> list:
    with tarfile.open(path) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


def measure() -> list[timing.Ratio]:
    ratios = []
    kinds = (
        ("", tarfile.GNU_FORMAT, "0088/", 8),
        (", long names", tarfile.GNU_FORMAT, "0088/" + "street/" * 15, None),
        (", pax with long names", tarfile.PAX_FORMAT, "0088/" + "street/" * 15, None),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0088.tar"
        for name, form, prefix, target in kinds:
            write_tar(path, form, prefix)
            assert [member[:3] for member in tars.walk(path)] == with_tarfile(path)
            ways = {"ours": lambda: list(tars.walk(path)), "tarfile": lambda: with_tarfile(path)}
            taken = timing.seconds(ways, rounds=7)
            what = f"index a tar of {2 * PAIRS:,} members{name}"
            ratios.append(
                timing.ratio(what, taken, "ours", "tarfile", items=2 * PAIRS, unit="members/s", target=target)
            )
    return ratios


if __name__ == "__main__":
    timing.main(__doc__, measure)
