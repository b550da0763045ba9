"""Images out of tars, by the rows that say where they lie: the one reader of all stages, for plain and gzip tars.

In row order an image costs its share of a pass through the tar. One out of the middle of a gzip tar costs what
lies between it and the last restart point, 8 MB or little more. These points lie beside the intermediates, where
process_tar.py writes them in its only pass; where they are absent, or another tar's, they are made again.

Memory: of a plain tar the images that are asked for; of a gzip tar 64 MB of what was inflated last, and 0.4 % of
it for the restart points.
"""

import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import xxhash

from common import files, parquet, provenance, schemas
from common.archives import gzip_streams, tars
from common.archives.restart_points import RestartPoint
from common.archives.tar_blocks import read_at
from common.errors import PipelineError
from common.provenance import Provenance
from common.sections import Paths

log = logging.getLogger("pipeline")
_POINTS_AT_A_TIME = 250  # written as a row group of 8 MB, which takes five times as much memory meanwhile
_KEPT_BYTES = 64 * 2**20  # inflated last: threads take chunks of up to 3 MB each, in nearly the order of the tar
OPEN_TARS = 2  # a stage goes from one to the next while threads still read the first


class ChangedTar(PipelineError):
    """A tar does not hold the images any more that process_tar.py found in it."""


class Tar:
    """One tar's images, read by where they lie. Several threads may read; a gzip tar stays open meanwhile."""

    def __init__(
        self,
        path: Path,
        index: Path | None = None,
        points: list[RestartPoint] | None = None,
        intermediates: Path | None = None,
    ):
        """`index`: file of a gzip tar's restart points; `points`: they themselves, where there is no such file;
        `intermediates`: the file whose record says which tar it was.
        """
        self.path, self._index, self._points, self._intermediates = path, index, points, intermediates
        self._lock, self._turn = Lock(), Lock()
        self._stream: gzip_streams.Stream | None = None

    def read(self, offsets, sizes, content_hashes=None) -> list[bytes]:
        """The bytes of images. Raises PipelineError if some lack, ChangedTar if they are not those of
        `content_hashes` (xxh3-64), BadSector if the disk does not give one of them.
        """
        offsets, sizes = [int(offset) for offset in offsets], [int(size) for size in sizes]
        if not offsets:
            return []
        with tars.opened(self.path) as file:
            self._refuse_another()
            if tars.is_gzip(self.path, file):
                stream = self._opened()
                with self._turn:  # images by turns would have the threads jump back and forth
                    contents = [stream.read(offset, size) for offset, size in zip(offsets, sizes, strict=True)]
            else:
                contents = [read_at(file.fileno(), *place) for place in zip(offsets, sizes, strict=True)]
        if [len(content) for content in contents] != sizes:
            raise ChangedTar(self._changed())
        if content_hashes is not None:
            digests = np.array([xxhash.xxh3_64_intdigest(content) for content in contents], np.uint64)
            if not np.array_equal(digests, content_hashes):
                raise ChangedTar(self._changed())
        return contents

    def reader(self, rows: pa.Table) -> Callable[[int, int], list[bytes]]:
        """A function that reads the images of rows start..stop, and where `rows` have content_hash checks them."""
        offsets, sizes = (rows[name].to_numpy() for name in ("image_offset", "image_size"))
        hashes = rows["content_hash"].to_numpy() if "content_hash" in rows.column_names else None

        def read(start: int, stop: int) -> list[bytes]:
            expected = None if hashes is None else hashes[start:stop]
            return self.read(offsets[start:stop], sizes[start:stop], expected)

        return read

    def _refuse_another(self) -> None:
        """Raises ChangedTar if the intermediates were made from another tar of this name."""
        with self._lock:
            if self._intermediates is not None and self._intermediates.exists():
                recorded = parquet.read_provenance(self._intermediates).inputs.get(self.path.name)
                if recorded not in (None, provenance.identity(self.path)):
                    raise ChangedTar(self._changed())
            self._intermediates = None  # once is enough

    def _changed(self) -> str:
        return (
            f"{self.path} has other images than when process_tar.py read it\n"
            "put the old tar back, or run process_tar.py and what follows with --overwrite"
        )

    def _opened(self) -> gzip_streams.Stream:
        with self._lock:
            if self._stream is None:
                points = self._points
                if points is None:
                    points = restart_points(self.path, self._index) if self._index else []
                descriptor = os.open(self.path, os.O_RDONLY)
                read = lambda at, size: os.pread(descriptor, size, at)  # noqa: E731
                self._stream = gzip_streams.Stream(read, points, _KEPT_BYTES)
                weakref.finalize(self, os.close, descriptor)
            return self._stream


class TarImages:
    """The dataset's tars in `raw_dir`, which `intermediates_dir` was made from. Several threads may read."""

    def __init__(self, raw_dir: Path, intermediates_dir: Path):
        self.raw_dir, self._intermediates_dir = raw_dir, intermediates_dir
        self._open: dict[str, Tar] = {}  # those used last
        self._lock = Lock()

    def tar(self, name: str) -> Tar:
        """A tar by its name; the OPEN_TARS that were asked for last stay open."""
        with self._lock:
            if name not in self._open:
                path, folder = self.raw_dir / name, self._intermediates_dir
                intermediates = folder / f"{tars.stem(path)}.parquet"
                self._open[name] = Tar(path, index_of(folder, path), intermediates=intermediates)
            tar = self._open[name] = self._open.pop(name)  # to the end
            if len(self._open) > OPEN_TARS:
                del self._open[next(iter(self._open))]
            return tar

    def read(self, rows: pa.Table) -> list[bytes]:
        """The encoded images of rows with tar_file, image_offset and image_size, of any tars; checked if they have
        content_hash. Raises what Tar.read does.
        """
        names = np.array(rows["tar_file"].to_pylist(), object)
        offsets, sizes = (rows[name].to_numpy() for name in ("image_offset", "image_size"))
        hashes = rows["content_hash"].to_numpy() if "content_hash" in rows.column_names else None
        contents = np.empty(len(names), object)
        for name in dict.fromkeys(names.tolist()):
            chosen = np.flatnonzero(names == name)
            chosen = chosen[np.argsort(offsets[chosen], kind="stable")]  # a gzip tar is read forward
            expected = None if hashes is None else hashes[chosen]
            contents[chosen] = self.tar(name).read(offsets[chosen], sizes[chosen], expected)
        return contents.tolist()


def of_paths(paths: Paths) -> TarImages:
    return TarImages(paths.raw_dir, paths.intermediates_dir)


def index_of(intermediates_dir: Path, tar: Path) -> Path:
    """Where the restart points of a tar lie."""
    return files.beside(intermediates_dir, "index") / f"{tars.stem(tar)}.parquet"


def restart_points(tar: Path, index: Path) -> list[RestartPoint]:
    """The restart points of a gzip tar, from its index; where that is absent or another tar's, it is made anew."""
    made = provenance.record("process_tar", {}, [tar])
    try:
        if not provenance.differences(parquet.read_provenance(index), made):
            tables = parquet.batches(index, schemas.RESTART_POINTS.names, _POINTS_AT_A_TIME)
            return [RestartPoint(**row) for table in tables for row in table.to_pylist()]
    except (PipelineError, OSError):
        pass  # absent, damaged, or not to be read
    log.info(
        "reading %s (%.1f GB) once to index it: there is no %s of this tar", tar, tar.stat().st_size / 1e9, index
    )
    points: list[RestartPoint] = []
    with tars.opened(tar) as file:
        for _ in gzip_streams.inflate(lambda at, size: os.pread(file.fileno(), size, at), points, []):
            pass
    write_restart_points(index, points, made)
    return points


def write_restart_points(index: Path, points: list[RestartPoint], made: Provenance) -> None:
    """Write the restart points of a gzip tar; for a plain tar, which has none, remove what is there.

    Where that cannot be done, it is said: everything can be read without them.
    """
    try:
        if not points:
            index.unlink(missing_ok=True)
            return
        with parquet.writer(index, schemas.RESTART_POINTS, made) as out:
            for start in range(0, len(points), _POINTS_AT_A_TIME):
                columns = zip(*points[start : start + _POINTS_AT_A_TIME], strict=True)
                out.append(dict(zip(schemas.RESTART_POINTS.names, map(list, columns), strict=True)))
                out.flush()
    except (PipelineError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else parquet.first_line(error)
        log.warning("%s cannot be written (%s): whoever needs it reads the whole tar for it", index, reason)
