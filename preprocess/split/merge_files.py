"""The files to merge: listed, checked to belong together, read, and rewritten by split."""

import contextlib
import itertools
import json
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common import errors, files, parquet, provenance, schemas
from common.archives import image_origins, tar_parts, tars
from common.cli import Progress
from common.errors import PipelineError, StaleArtefact
from common.imagery import verified_pairs
from common.provenance import Provenance
from common.sections import Config, Paths
from preprocess.split.split_rules import Decision, HeldOut, Images

_FROM_INTERMEDIATES = ("dataset_id", "target_id", "patch_id", "street_view_id", "target_lat", "target_lon")
log = logging.getLogger("pipeline")
_SCRIPTS = {"fingerprints": "preprocess/compute_fingerprints.py", "embeddings": "generate/generate_embeddings.py"}


@dataclass(frozen=True)
class Source:
    """The files of one tar, or of an imported set: one dataset."""

    dataset_id: int
    intermediates: Path
    fingerprints: list[Path]  # parts, by number
    embeddings: list[Path]
    num_rows: int  # of the intermediates


@dataclass(frozen=True)
class Sources:
    of_tar: list[Source]  # by dataset
    ids: dict[str, str]  # for the provenance: file -> id
    model: dict  # of all embeddings: name, revision or weights, pooling, dtype, dim, ...
    imported: list[str]  # names of the sets of photographs among them

    @property
    def num_rows(self) -> int:
        return sum(source.num_rows for source in self.of_tar)


def find(cfg: Config) -> Sources:
    """The files of all tars and imported sets. Raises PipelineError if some are missing, StaleArtefact if they do
    not belong together."""
    paths, ids, sources, models = cfg.paths, {}, [], {}
    listing = image_origins.of_paths(paths)
    refuse_without_tar(paths, listing)
    _require(cfg, listing)
    for tar in listing:
        intermediates = image_origins.intermediates(paths, tar)
        record, num_rows = parquet.read_provenance(intermediates), parquet.num_rows(intermediates)
        ids[f"intermediates/{intermediates.name}"] = record.id
        parts = _parts_of(cfg, tar, num_rows)
        for stage, targets in parts.items():
            tar_parts.refuse_surplus(targets[0].parent, tars.stem(tar), len(targets), "", _SCRIPTS[stage])
            for path in targets:
                part = parquet.read_provenance(path)
                if part.inputs.get(intermediates.name) != record.id:
                    raise StaleArtefact(
                        f"{path} was made from an earlier version of {intermediates}\n"
                        f"to redo it: {errors.command(_SCRIPTS[stage], '--remake')}"
                    )
                ids[f"{stage}/{path.name}"] = part.id
                if stage == "embeddings":
                    models[path] = provenance.embedding_model(part)
        sources.append(Source(_dataset_of(intermediates), intermediates, **parts, num_rows=num_rows))
    sources.sort(key=lambda source: source.dataset_id)
    for one, other in itertools.pairwise(sources):
        if one.dataset_id == other.dataset_id >= 0:
            raise PipelineError(
                f"{one.intermediates} and {other.intermediates} are both of dataset {one.dataset_id}\n"
                "keep only one tar per dataset in paths.raw_dir; import photographs under another --name"
            )
    imported = [path.stem for path in image_origins.imported(paths.intermediates_dir)]
    return Sources(sources, ids, _only_model(models), imported)


def _require(cfg: Config, listing: list[Path]) -> None:
    """Raise PipelineError, naming all stages to run, if files of these tars are missing."""
    scripts: dict[Path, str] = {}
    for tar in listing:
        intermediates = image_origins.intermediates(cfg.paths, tar)
        scripts[intermediates] = "preprocess/process_tar.py"
        if intermediates.exists():  # else the number of parts is unknown
            for stage, parts in _parts_of(cfg, tar, parquet.num_rows(intermediates)).items():
                scripts |= dict.fromkeys(parts, _SCRIPTS[stage])
    files.require_all(scripts)


def _parts_of(cfg: Config, tar: Path, num_rows: int) -> dict[str, list[Path]]:
    """The fingerprints and the embeddings of a tar with so many images."""
    folders = {"fingerprints": cfg.paths.fingerprints_dir, "embeddings": cfg.paths.embeddings_dir}
    num_parts = tar_parts.count(num_rows, cfg.data.rows_per_part)
    return {stage: tar_parts.targets(folder, tar, num_parts) for stage, folder in folders.items()}


def refuse_without_tar(paths: Paths, listing: list[Path]) -> None:
    """Raise PipelineError if there are files of tars that have gone. `listing`: all tars and imported sets."""
    tables = (paths.intermediates_dir, paths.fingerprints_dir, paths.embeddings_dir)
    whole = (tables[0], files.beside(tables[0], "index"), files.beside(tables[0], "rejects"))
    tar_of = {path: path.stem for folder in whole for path in folder.glob("*.parquet")}
    for folder in (*tables[1:], files.beside(tables[2], "rejects")):
        tar_of |= {path: path.stem.rpartition("-")[0] for path in folder.glob("*.parquet")}
    lost = {stem for path, stem in tar_of.items() if path.parent in tables} - {tars.stem(tar) for tar in listing}
    if lost:
        made = sorted(str(path) for path, stem in tar_of.items() if stem in lost)
        raise PipelineError(
            f"there are files of {provenance.some(lost)}, but {paths.raw_dir} has no such tar\n"
            f"restore the tars, or remove what was made from them: rm {shlex.join(made)}"
        )


def _dataset_of(intermediates: Path) -> int:
    """The dataset of all rows; -1 if there are none."""
    datasets = np.unique(parquet.read(intermediates, ["dataset_id"])["dataset_id"].to_numpy())
    if len(datasets) > 1:
        again = errors.command("preprocess/process_tar.py")
        raise PipelineError(
            f"{intermediates} has rows of datasets {', '.join(map(str, datasets[:5]))}; a tar is one dataset\n"
            f"read it again: rm {shlex.quote(str(intermediates))} && {again}"
        )
    return int(datasets[0]) if len(datasets) else -1


def _only_model(models: dict[Path, dict]) -> dict:
    """The model that all parts share. Raises StaleArtefact with the names of two parts that differ."""
    (first, model), *others = models.items()
    for path, other in others:
        for key in sorted({*model, *other}):
            if model.get(key) != other.get(key):
                raise StaleArtefact(
                    f"{first} was made with {key} = {json.dumps(model.get(key))}, "
                    f"{path} with {key} = {json.dumps(other.get(key))}\n"
                    "embeddings of different models cannot be merged\n"
                    f"to redo those that do not match: {errors.command(_SCRIPTS['embeddings'], '--remake')}"
                )
    return model


def read_images(sources: Sources) -> Images:
    """The columns that the rules need, of all images, sorted by (dataset_id, target_id, patch_id)."""
    tables = []
    for source in sources.of_tar:
        table = parquet.read(source.intermediates, [*_FROM_INTERMEDIATES, "content_hash"])
        hashes = pa.concat_tables(parquet.read(part, ["phash", "dhash"]) for part in source.fingerprints)
        if hashes.num_rows != table.num_rows:
            folder = source.fingerprints[0].parent
            raise StaleArtefact(
                f"{folder} has {hashes.num_rows:,} rows for the {table.num_rows:,} of {source.intermediates}"
            )
        embedded = pa.concat_tables(parquet.read(part, ["patch_id"]) for part in source.embeddings)["patch_id"]
        has_embedding = pc.is_in(table["patch_id"], value_set=embedded)
        names = [*table.column_names, *hashes.column_names, "has_embedding"]
        table = pa.table([*table.columns, *hashes.columns, has_embedding], names)
        tables.append(table.sort_by([("target_id", "ascending"), ("patch_id", "ascending")]))
    images = pa.concat_tables(tables)
    return Images(**{name: images[name].to_numpy() for name in images.column_names})


def held_out(cfg: Config, images: Images) -> HeldOut | None:
    """The images that data.held_out lists, among these; None if it is not set. Raises PipelineError if it lists no
    image, or cannot be read."""
    if not cfg.data.held_out:
        return None
    path = held_out_path(cfg)
    names = verified_pairs.ids_in(verified_pairs.text_of(path))
    if not names:
        raise PipelineError(f"data.held_out: {path} holds no id of an image, such as 0006-0087241")
    rows = verified_pairs.is_listed(verified_pairs.patches_of(names), images.dataset_id, images.patch_id)
    if not rows.any():
        log.warning("data.held_out: none of the %d images in %s is in the intermediates", len(names), path)
    return HeldOut(len(names), rows)


def held_out_path(cfg: Config) -> Path:
    """The file of data.held_out. Raises PipelineError if there is none."""
    path = cfg.paths.root / cfg.data.held_out
    if not path.is_file():
        raise PipelineError(
            f"data.held_out: there is no file {path}\n"
            "name verpairs.txt, or test_matching.tar which holds it, relative to paths.root"
        )
    return path


def write_splits(
    sources: Sources,
    images: Images,
    decision: Decision,
    targets: list[Path],
    record: Provenance,
    facts: dict,
    progress: Progress,
) -> list[str]:
    """Write all splits in one pass over the embeddings, tar by tar; returns the ids of the files. `facts`: for
    their records, beside the embedding model."""
    schema = schemas.merged(sources.model["dim"])
    with contextlib.ExitStack() as stack:
        outs = [stack.enter_context(parquet.writer(target, schema, record)) for target in targets]
        end = 0
        for source in sources.of_tar:
            start, end = end, end + source.num_rows
            split = decision.split[start:end]
            table, embeddings, place = _read_embedded(source, images.patch_id[start:end])
            for number, out in enumerate(outs):
                rows = np.flatnonzero(split == number)
                chosen = table.take(place[rows])
                columns = {name: chosen[name] for name in chosen.column_names}
                columns |= {"cell_id": decision.cell[start + rows], "embedding": embeddings[place[rows]]}
                out.append(columns)
            progress.add(source.num_rows, int(np.sum(split >= 0)))
        for out in outs:
            out.rows = {"in": len(images)}
            out.facts = {"embedding_model": sources.model, **facts}
    return [parquet.read_provenance(target).id for target in targets]


def _read_embedded(source: Source, patch_id: np.ndarray) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """A tar's embedded images: columns, (n, D) float16, and for each of `patch_id` its row, if it has one."""
    tables = [parquet.read(part) for part in source.embeddings]
    embeddings = np.concatenate([parquet.to_matrix(table["embedding"]) for table in tables])
    table = pa.concat_tables([table.drop_columns("embedding") for table in tables])
    order = np.argsort(table["patch_id"].to_numpy())
    place = np.searchsorted(table["patch_id"].to_numpy(), patch_id, sorter=order)
    return table, embeddings, np.append(order, -1)[place]
