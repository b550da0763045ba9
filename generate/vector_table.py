"""Vectors that another network has made, from Parquet files, in place of a backbone's embeddings.

Reads    the file or folder of embedding_model.name: a row per image, in any order, with its streetview_image_id
         and its embedding, a list of numbers as long as all others
Memory   20 bytes for each row of the table (6 million: 120 MB), and a part's vectors twice (see
         generate_embeddings.py), whatever the sizes of the table and of its row groups
Time     for each part, that of reading the row groups that hold its images up to the last of them. Least in the
         order of the intermediates; in random order each part reads the whole table
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common import cli, parquet
from common.archives.tar_parts import TarPart
from common.errors import PipelineError
from common.schemas import Reject, Rejected, count_reasons
from common.sections import Config
from generate import embedding_parts, model_files
from generate.loop import Job, Result
from generate.model_files import EMBEDDING, MIB

ID = "streetview_image_id"
_BATCH_ROWS = 4_096


class VectorTable:
    """Images and their vectors. Raises PipelineError if columns are missing or there are no rows."""

    def __init__(self, paths: list[Path]):
        self._source = paths[0] if len(paths) == 1 else paths[0].parent
        self._groups: list[tuple[Path, int, int]] = []  # of each row group: file, number in it, first row
        ids, num_rows = [], 0
        for path in paths:
            with parquet.open_file(path) as file:
                names = file.schema_arrow.names
                for group in range(file.num_row_groups):
                    if rows := file.metadata.row_group(group).num_rows:
                        self._groups.append((path, group, num_rows))
                        num_rows += rows
            if missing := {ID, EMBEDDING}.difference(names):
                raise PipelineError(
                    f"{path} has no column {', '.join(sorted(missing))}, only {', '.join(names)}\n"
                    f"name the ids of data/intermediates {ID}, and the vectors {EMBEDDING}"
                )
            ids += [batch[ID].cast(pa.string()) for batch in parquet.batches(path, [ID])]
        if not (dim := model_files.vector_width(paths)):
            raise PipelineError(f"{paths[0]} has no rows: there are no vectors")
        self.dim = dim
        self._ids = pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string())

    def of(self, images: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """Which of n images have a vector, (m,) ascending, and these, (m, D) float16; zeros, which have no
        direction, are none. Raises PipelineError, naming an image, if it is there twice, or if its vector is
        missing, not finite or too large for float16."""
        place = pc.index_in(self._ids, images.combine_chunks())  # of each row of the table: which image it is
        rows = np.flatnonzero(place.is_valid().to_numpy())
        places = place.take(pa.array(rows)).to_numpy()
        if len(twice := np.flatnonzero(np.bincount(places, minlength=1) > 1)):
            raise PipelineError(f"{self._source} holds image {images[int(twice[0])]} twice")
        vectors = np.empty((len(images), self.dim), np.float16)
        starts = np.array([start for *_, start in self._groups])
        for number in np.unique(np.searchsorted(starts, rows, side="right") - 1):
            path, group, start = self._groups[number]
            stop = starts[number + 1] if number + 1 < len(starts) else len(self._ids)
            own = slice(*np.searchsorted(rows, [start, stop]))
            self._read(path, group, rows[own] - start, places[own], images, vectors)
        found = np.sort(places)
        found = found[vectors[found].any(axis=1)]
        return found, vectors[found]

    def _read(self, path: Path, group: int, rows: np.ndarray, places: np.ndarray, images, out: np.ndarray) -> None:
        """out[places] = the vectors of these rows, ascending, of a row group."""
        start = 0
        with parquet.open_file(path, MIB) as file:
            for batch in parquet.batches_of(path, file, range(group, group + 1), [EMBEDDING], _BATCH_ROWS):
                own = slice(*np.searchsorted(rows, [start, start + len(batch)]))
                taken, of_rows = batch.take(pa.array(rows[own] - start)), places[own]
                name = lambda row, of_rows=of_rows: f"image {images[int(of_rows[row])]}"  # noqa: E731
                matrix = parquet.embedding_matrix(path, taken, EMBEDDING, name, self.dim, "the first one has")
                if len(matrix) and np.abs(matrix).max() > np.finfo(np.float16).max:
                    row = int((np.abs(matrix).max(axis=1) > np.finfo(np.float16).max).argmax())
                    raise PipelineError(
                        f"{path}: the {EMBEDDING} of {name(row)} has a value above 65,504, the largest float16\n"
                        "divide all vectors by a constant, or normalise them: only their directions matter"
                    )
                out[of_rows] = matrix
                start += len(batch)
                if own.stop == len(rows):
                    return


def write(parts: list[TarPart], paths: list[Path], cfg: Config) -> list[str]:
    """Write the parts' embeddings from the table in these files, after the rejects; returns messages about parts
    that lack too many."""
    table, failures = VectorTable(paths), []
    source = Path(cfg.embedding_model.name)
    total = sum(part.count for part in parts)
    with cli.Progress("generate_embeddings", "image", total, cfg.logging.progress_interval_s) as progress:
        for part in parts:
            images = part.rows()
            found, vectors = table.of(images[ID])
            why = Rejected(Reject.VECTOR_MISSING, f"not in {source.name}, or zero there")
            failed = dict.fromkeys(np.setdiff1d(np.arange(part.count), found).tolist(), why)
            job = Job((part, images), part.count, lambda *_: [])
            result = Result(job, found, vectors, failed)
            missing = f"have no vector in {source}"
            failures.append(embedding_parts.write(result, {"dim": table.dim}, cfg.data.max_reject_share, missing))
            progress.add(part.count, len(found), count_reasons(failed.values()))
            cli.check_stop()
    progress.summary(f"vectors of {source.name}, {table.dim} dimensions")
    return list(filter(None, failures))
