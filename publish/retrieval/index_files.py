"""Writing the files of an index, whose format is in vector_index.py."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from common import cli, errors, files, parquet, provenance, stages
from common.errors import PipelineError, StaleArtefact
from common.provenance import Provenance, Redo
from common.schemas import Reject, Rejected
from generate import embedding_parts
from publish.retrieval import inverted_file, vector_index
from publish.retrieval.embedding_tables import UNUSABLE, EmbeddingTables
from publish.retrieval.vector_index import INVERTED, RECORD, ROWS, VECTORS


def refuse_folder(tables: EmbeddingTables, out: Path) -> None:
    """Raise PipelineError if the index would be written among the vectors, or in place of other files."""
    if tables.paths[0].parent.resolve() == out:
        raise PipelineError(f"{out} is the folder of the vectors, one table: name another folder for the index")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if others := names - {VECTORS, ROWS, RECORD, INVERTED}:
        raise PipelineError(f"{out} holds other files, such as {min(others)}: name another folder for the index")


def is_done(folder: Path, record: Provenance, kind: str, redo: Redo) -> bool:
    """Whether the folder holds the index that a run with this `record` would write, whole; with "auto", of either
    kind.

    Raises StaleArtefact if it holds another one and `redo` does not allow to replace it.
    """
    path = folder / RECORD
    if redo == "all" or not path.exists():
        return False
    try:
        existing = stages.record_of(path)
    except PipelineError:
        if redo:
            return False
        raise
    had = existing.facts["kind"]
    is_kind = kind in ("auto", had)
    if not is_kind and not redo:
        again = errors.command("", "--remake")
        raise StaleArtefact(f"{folder} holds an index of kind {had}, not {kind}\nto build it anew: {again}")
    is_current = parquet.matches(path, existing, record, redo, "the whole index") and is_kind
    return is_current and vector_index.is_whole(folder, existing)


def write(
    target: Path,
    tables: EmbeddingTables,
    kind: str,
    record: Provenance,
    device: torch.device,
    progress: cli.Progress,
) -> str:
    """Write an index of `kind` to a folder that replaces `target` when it is complete; returns a line about it."""
    with files.new_folder(target) as folder:
        total, rejected = _write_vectors(folder, tables, record, progress)
        names, measured = [VECTORS, ROWS], {}
        if kind == "ivf":
            vectors = np.load(folder / VECTORS, mmap_mode="c")
            index = inverted_file.build(vectors)
            measured = inverted_file.tune(index, vectors, device)
            inverted_file.write(folder / INVERTED, index)
            names.append(INVERTED)
        size = sum((folder / name).stat().st_size for name in names)
        built = {name: provenance.identity(folder / name) for name in names}
        content = provenance.digest_of(*built.values())
        counts = {"in": tables.num_rows, "out": total}
        finished = record.finished(content, counts, {"kind": kind, "files": built})
        about = {"rows": total, "dim": tables.dim, "kind": kind, "model": tables.model, "by": tables.by}
        about |= {**measured, "bytes": size, "seconds": finished.seconds, "provenance": finished.to_dict()}
        files.write_text(folder / RECORD, json.dumps(about, indent=1) + "\n")
        why = dict.fromkeys(range(len(rejected)), Rejected(Reject.VECTOR_UNUSABLE, UNUSABLE))
        embedding_parts.write_rejects(target / ROWS, record, why, pa.chunked_array([rejected], pa.string()))
    recalls = [f"{name} {value:.4f}" for name, value in measured.items() if "recall" in name]
    lists = f", {measured['nprobe']} of {measured['nlist']:,} lists, {', '.join(recalls)}" if measured else ""
    return f"{kind} index of {total:,} x {tables.dim}, {size / 1e6:,.1f} MB{lists}"


def _write_vectors(
    folder: Path, tables: EmbeddingTables, record: Provenance, progress: cli.Progress
) -> tuple[int, list[str]]:
    """vectors.npy and rows.parquet, in one pass. Returns how many vectors there are, and which rows have none."""
    rejected: list[str] = []
    header = {"descr": "<f2", "fortran_order": False, "shape": (tables.num_rows, tables.dim)}
    with (
        files.atomic(folder / VECTORS) as file,
        parquet.writer(folder / ROWS, tables.schema, record) as rows,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for vectors, usable, lacking, others in tables.batches():
            rejected += lacking
            file.write(vectors[usable].data)
            rows.append(others.filter(pa.array(usable)))
            rows.flush()  # row groups as small as a batch: a search reads those of its results
            reasons = {Reject.VECTOR_UNUSABLE.value: len(lacking)} if lacking else None
            progress.add(len(vectors), int(usable.sum()), reasons)
        if not rows.num_rows:
            raise PipelineError(f"no row of {tables.paths[0].parent} can be used: the vectors are {UNUSABLE}")
        file.seek(0)  # NumPy leaves room for a header with any number of rows
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (rows.num_rows, tables.dim)})
    return rows.num_rows, rejected
