"""Images out of tars, by the rows that say where they are: the one reader of all stages, for plain and gzip tars.

A row's tar_file is the name of a tar in paths.raw_dir, or <set>/<file> for a photograph of an imported set. Such a
file is the photograph itself, or an uncompressed tar or Arrow file that holds it. The set's intermediates record
the folder of its files.

In row order an image costs its share of a pass through the tar. One out of the middle of a gzip tar costs what
lies between it and the last restart point, 8 MB or little more. process_tar.py writes these points beside the
intermediates in its only pass; if they are missing, or another tar's, they are recreated.

Memory: of a plain tar the requested images; of a gzip tar the last 64 MB that were inflated, and 0.4 % of it for
the restart points.
"""

import logging
import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from common import errors, files, parquet, provenance, schemas
from common.archives import gzip_streams, tars
from common.archives.restart_points import RestartPoint
from common.archives.tar_blocks import buffered, read_at
from common.errors import PipelineError
from common.provenance import Provenance
from common.sections import Paths

log = logging.getLogger("pipeline")
_POINTS_AT_A_TIME = 250  # written as a row group of 8 MB, which takes five times as much memory meanwhile
_KEPT_BYTES = 64 * 2**20  # inflated last: threads take chunks of up to 3 MB each, in nearly the order of the tar
_PLACE = ("tar_file", "image_offset", "image_size", "content_hash")
OPEN_TARS = 2  # a stage goes from one to the next while threads still read the first


class ChangedTar(PipelineError):
    """A file no longer holds the images that were found in it."""


class Tar:
    """The images of one tar, or other file, read by their offsets. Several threads may read; a gzip tar stays open
    meanwhile."""

    def __init__(
        self,
        path: Path,
        intermediates_dir: Path | None = None,
        points: list[RestartPoint] | None = None,
        imported_as: str = "",
    ):
        """`intermediates_dir`: where a gzip tar's restart points are stored, and the record of which tar it was;
        without it, `points` are used. `imported_as`: the set that the file belongs to, for messages.
        """
        self.path, self._intermediates_dir, self._points = path, intermediates_dir, points or []
        self._imported_as = imported_as
        self._script = "import_photographs.py" if imported_as else "process_tar.py"
        self._lock = Lock()
        self._is_checked = False
        self._stream: gzip_streams.Stream | None = None

    def read(self, offsets, sizes, content_hashes=None) -> list[bytes]:
        """The bytes of images. Raises PipelineError if some are missing, ChangedTar if they do not have
        `content_hashes` (xxh3-64), BadSector if the disk cannot read one of them.
        """
        offsets, sizes = [int(offset) for offset in offsets], [int(size) for size in sizes]
        if not offsets:
            return []
        with tars.opened(self.path, self._remedy() if self._imported_as else "") as file:
            contents = self._contents(file, offsets, sizes) if self._is_as_recorded() else []
        is_same = [len(content) for content in contents] == sizes
        if is_same and content_hashes is not None:
            digests = np.array([xxhash.xxh3_64_intdigest(content) for content in contents], np.uint64)
            is_same = np.array_equal(digests, content_hashes)
        if not is_same:
            raise ChangedTar(f"{self.path} has other images than when {self._script} read it\n{self._remedy()}")
        return contents

    def _remedy(self) -> str:
        """What to do about a file that is another one by now, or a photograph that is missing."""
        photographs = ["SOURCE", "--name", self._imported_as] if self._imported_as else []
        read = errors.command(f"preprocess/{self._script}", *photographs, "--overwrite")
        redo = errors.command(
            "slurm/submit.py", *"--remake compute_fingerprints --remake generate_embeddings".split()
        )
        return (
            f"restore it, or read {'all again from where they are' if photographs else 'the tars again'}: {read}\n"
            f"then redo what has changed (without Slurm add --local): {redo}"
        )

    def _contents(self, file: BinaryIO, offsets: list[int], sizes: list[int]) -> list[bytes]:
        places = zip(offsets, sizes, strict=True)
        if not tars.is_gzip(self.path, file):
            span = offsets[-1] + sizes[-1] - offsets[0]
            # neighbours at once: what is between them is headers and labels, cheaper to read than to skip
            read = buffered(partial(read_at, file.fileno()), span if span <= 2 * sum(sizes) else 0)
            return [read(offset, size) for offset, size in places]
        with self._lock:  # interleaved reads would make the stream jump back and forth
            self._stream = self._stream or self._open_stream()
            return [self._stream.read(offset, size) for offset, size in places]

    def reader(self, rows: pa.Table) -> Callable[[int, int], list[bytes]]:
        """A function that reads the images of rows start..stop, and checks them if `rows` have content_hash."""
        offsets, sizes = (rows[name].to_numpy() for name in ("image_offset", "image_size"))
        hashes = rows["content_hash"].to_numpy() if "content_hash" in rows.column_names else None

        def read(start: int, stop: int) -> list[bytes]:
            expected = None if hashes is None else hashes[start:stop]
            return self.read(offsets[start:stop], sizes[start:stop], expected)

        return read

    def _is_as_recorded(self) -> bool:
        """Whether the intermediates, if there are any, were made from this very tar; checked until it is true."""
        with self._lock:
            if self._intermediates_dir and not self._is_checked:
                intermediates = self._intermediates_dir / f"{tars.stem(self.path)}.parquet"
                if intermediates.exists():
                    recorded = parquet.read_provenance(intermediates).inputs.get(self.path.name)
                    if recorded not in (None, provenance.identity(self.path)):
                        return False
                self._is_checked = True
            return True

    def _open_stream(self) -> gzip_streams.Stream:
        if self._intermediates_dir is not None:
            self._points = restart_points(self.path, index_of(self._intermediates_dir, self.path))
        descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return gzip_streams.Stream(partial(read_at, descriptor), self._points, _KEPT_BYTES)


class TarImages:
    """The tars in `raw_dir` and the imported photographs that `intermediates_dir` was made from. Several threads
    may read."""

    def __init__(self, raw_dir: Path, intermediates_dir: Path):
        self.raw_dir, self._intermediates_dir = raw_dir, intermediates_dir
        self._open: dict[str, Tar] = {}  # those used last
        self._folders: dict[str, Path] = {}  # of the imported sets
        self._lock = Lock()

    def tar(self, name: str) -> Tar:
        """A row's tar_file; the OPEN_TARS most recently requested ones stay open."""
        with self._lock:
            tar = self._open.pop(name, None) or self._find(name)
            self._open[name] = tar  # the last of them
            if len(self._open) > OPEN_TARS:
                del self._open[next(iter(self._open))]
            return tar

    def _find(self, name: str) -> Tar:
        imported, is_imported, file = name.partition("/")
        if not is_imported:
            return Tar(self.raw_dir / name, self._intermediates_dir)
        if imported not in self._folders:
            record = parquet.read_provenance(self._intermediates_dir / f"{imported}.parquet")
            self._folders[imported] = Path(
                record.facts["folder"] or files.beside(self._intermediates_dir, "images")
            )
        return Tar(self._folders[imported] / file, imported_as=imported)

    def reader(self, rows: pa.Table) -> Callable[[int, int], list[bytes]]:
        """A function that reads the images of rows start..stop, and checks them if `rows` have content_hash."""
        names = pc.unique(rows["tar_file"]).to_pylist()
        if len(names) == 1:
            return self.tar(names[0]).reader(rows)
        rows = rows.select([name for name in _PLACE if name in rows.column_names])
        return lambda start, stop: self.read(rows.slice(start, stop - start))

    def read(self, rows: pa.Table) -> list[bytes]:
        """The encoded images of rows with tar_file, image_offset and image_size, of any tars; checked if they have
        content_hash. Raises what Tar.read does.
        """
        names, offsets = np.array(rows["tar_file"].to_pylist(), object), rows["image_offset"].to_numpy()
        contents = np.empty(len(names), object)
        for name in dict.fromkeys(names.tolist()):
            chosen = np.flatnonzero(names == name)
            chosen = chosen[np.argsort(offsets[chosen], kind="stable")]  # a gzip tar is read forward
            contents[chosen] = self.tar(name).reader(rows.take(chosen))(0, len(chosen))
        return contents.tolist()


def of_paths(paths: Paths) -> TarImages:
    return TarImages(paths.raw_dir, paths.intermediates_dir)


def index_of(intermediates_dir: Path, tar: Path) -> Path:
    """The file of a tar's restart points."""
    return files.beside(intermediates_dir, "index") / f"{tars.stem(tar)}.parquet"


def restart_points(tar: Path, index: Path) -> list[RestartPoint]:
    """The restart points of a gzip tar, from its index; if that is missing or another tar's, it is recreated."""
    record = provenance.record("process_tar", {}, {tar.name: provenance.identity(tar)})
    try:
        if not provenance.differences(parquet.read_provenance(index), record):
            tables = parquet.batches(index, schemas.RESTART_POINTS.names, _POINTS_AT_A_TIME)
            return [RestartPoint(**row) for table in tables for row in table.to_pylist()]
    except (PipelineError, OSError):
        pass  # missing, damaged, or unreadable
    size_gb = tar.stat().st_size / 1e9
    log.info("reading %s (%.1f GB) once to index it: %s is missing or another tar's", tar, size_gb, index)
    points: list[RestartPoint] = []
    with tars.opened(tar) as file:
        for _ in gzip_streams.inflate(partial(read_at, file.fileno()), points, []):
            pass
    write_restart_points(index, points, record)
    return points


def write_restart_points(index: Path, points: list[RestartPoint], record: Provenance) -> None:
    """Write the restart points of a gzip tar; for a plain tar, which has none, remove an existing index.

    A failure is only logged: everything can be read without them.
    """
    try:
        if not points:
            index.unlink(missing_ok=True)
            return
        with parquet.writer(index, schemas.RESTART_POINTS, record) as out:
            for start in range(0, len(points), _POINTS_AT_A_TIME):
                columns = zip(*points[start : start + _POINTS_AT_A_TIME], strict=True)
                out.append(dict(zip(schemas.RESTART_POINTS.names, map(list, columns), strict=True)))
                out.flush()
    except (PipelineError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else errors.first_line(error)
        log.warning("%s cannot be written (%s): whoever needs it has to read the whole tar", index, reason)
