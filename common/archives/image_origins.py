"""Where images come from: the dataset's tars, and the sets of photographs that import_photographs.py has read.

An origin is a path: that of the tar, or of the set's intermediates. Files made from it are named after its
`tars.stem`, and records know it by its `stages.identity`.
"""

import contextlib
import functools
from pathlib import Path

from common import parquet
from common.archives import tars
from common.errors import PipelineError
from common.sections import Paths

IMPORTED = "import_photographs"  # the stage in the record of an imported set


def of_paths(paths: Paths) -> list[Path]:
    """All of them, the tars first. Raises PipelineError as `tars.of_shard`, if there are no tars, unless there are
    imported sets.
    """
    return [*raw_tars(paths), *imported(paths.intermediates_dir)]


def raw_tars(paths: Paths, shard: int = 0, num_shards: int = 1) -> list[Path]:
    """`tars.of_shard` of paths.raw_dir; none if there are only imported sets."""
    if imported(paths.intermediates_dir) and not tars.listed(paths.raw_dir):
        return []
    return tars.of_shard(paths.raw_dir, shard, num_shards)


def intermediates(paths: Paths, origin: Path) -> Path:
    """The file of an origin's intermediates, which need not exist."""
    return paths.intermediates_dir / f"{tars.stem(origin)}.parquet"


def imported(intermediates_dir: Path) -> list[Path]:
    """The intermediates of the imported sets, sorted."""
    return _imported(intermediates_dir, intermediates_dir.stat().st_mtime_ns if intermediates_dir.exists() else 0)


@functools.cache  # as the listing of tars
def _imported(intermediates_dir: Path, mtime_ns: int) -> list[Path]:
    return [path for path in sorted(intermediates_dir.glob("*.parquet")) if _is_imported(path)]


def _is_imported(path: Path) -> bool:
    with contextlib.suppress(PipelineError):  # damaged, or not ours: the stage that reads it says so
        return parquet.read_provenance(path).stage == IMPORTED
    return False
