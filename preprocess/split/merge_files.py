"""The files that are merged: found, checked to belong together, read, and written anew by split."""

import contextlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import parquet, schemas
from common.archives import tar_parts, tars
from common.cli import Progress
from common.errors import PipelineError, StaleArtefact
from common.provenance import Provenance
from common.sections import Config
from preprocess.split.split_rules import Decision, Images

_FROM_INTERMEDIATES = ("dataset_id", "target_id", "patch_id", "street_view_id", "target_lat", "target_lon")
_MAKERS = {
    "intermediates": "preprocess/process_tar.py",
    "fingerprints": "preprocess/compute_fingerprints.py",
    "embeddings": "generate/generate_embeddings.py",
}


@dataclass(frozen=True)
class Source:
    """The files of one tar, which are those of one dataset."""

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

    @property
    def num_rows(self) -> int:
        return sum(source.num_rows for source in self.of_tar)


def find(cfg: Config, listing: list[Path]) -> Sources:
    """The files of all tars of `listing`. Raises PipelineError if some lack, StaleArtefact if they do not fit."""
    paths, ids, sources, models = cfg.paths, {}, [], {}
    names = [f"{tars.stem(tar)}.parquet" for tar in listing]
    _refuse_without_tar(paths, names)
    _refuse_missing("intermediates", [paths.intermediates_dir / name for name in names])
    folders = {"fingerprints": paths.fingerprints_dir, "embeddings": paths.embeddings_dir}
    parts_of = {stage: _parts_by_tar(folder) for stage, folder in folders.items()}
    for tar, name in zip(listing, names, strict=True):
        intermediates = paths.intermediates_dir / name
        made, num_rows = parquet.read_provenance(intermediates), parquet.num_rows(intermediates)
        ids[f"intermediates/{name}"] = made.id
        files: dict[str, list[Path]] = {}
        for stage, folder in folders.items():
            files[stage] = tar_parts.targets(folder, tar, tar_parts.count(num_rows, cfg.data.rows_per_part))
            existing = parts_of[stage].get(tars.stem(tar), [])
            _refuse_missing(stage, [path for path in files[stage] if path not in existing])
            _refuse_surplus(sorted(set(existing) - set(files[stage])), stage, cfg.data.rows_per_part)
            for path in files[stage]:
                known = parquet.read_provenance(path)
                _refuse_others(path, known.inputs.get(name), intermediates, made.id, stage)
                ids[f"{stage}/{path.name}"] = known.id
                if stage == "embeddings":
                    models[path] = _model(known)
        sources.append(Source(_dataset_of(intermediates), intermediates, **files, num_rows=num_rows))
    sources.sort(key=lambda source: source.dataset_id)
    for one, other in itertools.pairwise(sources):
        if one.dataset_id == other.dataset_id >= 0:
            raise PipelineError(
                f"{one.intermediates} and {other.intermediates} are both of dataset {one.dataset_id}\n"
                "keep one tar for each dataset in paths.raw_dir"
            )
    return Sources(sources, ids, _one_model(models))


def read_images(sources: Sources) -> Images:
    """What decides about all images, sorted by (dataset_id, target_id, patch_id)."""
    n = sources.num_rows
    kinds = {"dataset_id": np.int32, "target_lat": np.float64, "target_lon": np.float64}
    arrays = {name: np.empty(n, kinds.get(name, np.int64)) for name in _FROM_INTERMEDIATES}
    arrays.update({name: np.empty(n, np.uint64) for name in ("content_hash", "phash", "dhash")})
    arrays["has_embedding"] = np.empty(n, bool)
    end = 0
    for source in sources.of_tar:
        start, end = end, end + source.num_rows
        table = parquet.read(source.intermediates, [*_FROM_INTERMEDIATES, "content_hash"])
        hashes = pa.concat_tables(parquet.read(part, ["phash", "dhash"]) for part in source.fingerprints)
        columns = {name: part[name].to_numpy() for part in (table, hashes) for name in part.column_names}
        embedded = [parquet.read(part, ["patch_id"])["patch_id"].to_numpy() for part in source.embeddings]
        columns["has_embedding"] = np.isin(columns["patch_id"], np.concatenate(embedded))
        order = np.lexsort((columns["patch_id"], columns["target_id"]))
        for name, column in columns.items():
            if len(column) != source.num_rows:
                raise StaleArtefact(
                    f"{source.fingerprints[0].parent} has {len(column):,} rows of {source.intermediates}, not "
                    f"{source.num_rows:,}"
                )
            arrays[name][start:end] = column[order]
    return Images(**arrays)


def write_splits(
    sources: Sources, images: Images, decision: Decision, targets: list[Path], made: Provenance, progress: Progress
) -> list[str]:
    """Write all splits in one pass over the embeddings, tar after tar; returns the files' ids."""
    schema = schemas.merged(sources.model["dim"])
    with contextlib.ExitStack() as stack:
        outs = [stack.enter_context(parquet.writer(target, schema, made)) for target in targets]
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
            out.facts = {"embedding_model": sources.model}
    return [parquet.read_provenance(target).id for target in targets]


def _read_embedded(source: Source, patch_id: np.ndarray) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """A tar's embedded images: columns, (n, D) float16, and for each of `patch_id` its row, if there is one."""
    tables = [parquet.read(part) for part in source.embeddings]
    embeddings = np.concatenate([parquet.to_matrix(table["embedding"]) for table in tables])
    table = pa.concat_tables([table.drop_columns("embedding") for table in tables])
    there = table["patch_id"].to_numpy()
    order = np.argsort(there)
    place = np.searchsorted(there, patch_id, sorter=order)
    return table, embeddings, order[np.minimum(place, max(len(order) - 1, 0))] if len(order) else place


def _parts_by_tar(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in folder.glob("*.parquet"):
        match = re.fullmatch(r"(.+)-\d+", path.stem)
        if match:
            found.setdefault(match[1], []).append(path)
    return found


def _dataset_of(intermediates: Path) -> int:
    """The dataset of all rows; -1 if there are none."""
    found = np.unique(parquet.read(intermediates, ["dataset_id"])["dataset_id"].to_numpy())
    if len(found) > 1:
        raise PipelineError(
            f"{intermediates} has rows of datasets {', '.join(map(str, found[:5]))}; a tar is one dataset\n"
            "run preprocess/process_tar.py again with --overwrite"
        )
    return int(found[0]) if len(found) else -1


def _refuse_without_tar(paths, names: list[str]) -> None:
    """Raise PipelineError if a tar's images would be left out because it is not in raw_dir any more."""
    there = sorted(path.name for path in paths.intermediates_dir.glob("*.parquet"))
    lost = [Path(name).stem for name in there if name not in names]
    if lost:
        raise PipelineError(
            f"{paths.intermediates_dir} has {', '.join(lost[:5])}{' and more' if len(lost) > 5 else ''}, "
            f"of which {paths.raw_dir} has no tar\n"
            "put the tars back, or remove what was made from them, so that it is clear what is merged"
        )


def _refuse_missing(stage: str, paths: list[Path]) -> None:
    missing = [path for path in paths if not path.exists()]
    if missing:
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise PipelineError(f"{missing[0]}{more} does not exist: run {_MAKERS[stage]} first")


def _refuse_surplus(surplus: list[Path], stage: str, rows_per_part: int) -> None:
    if surplus:
        raise StaleArtefact(
            f"{surplus[0]} is not one of its tar's parts, with data.rows_per_part = {rows_per_part}\n"
            f"put that setting back, or delete the tar's {stage} and run {_MAKERS[stage]} again"
        )


def _refuse_others(path: Path, made_from: str | None, intermediates: Path, now: str, stage: str) -> None:
    if made_from != now:
        raise StaleArtefact(
            f"{path} was made from another {intermediates} ({made_from} then, {now} now)\n"
            f"run {_MAKERS[stage]} again with --overwrite"
        )


def _model(known: Provenance) -> dict:
    """What made the embeddings, as their record names it: settings, and what loading the model found."""
    settings = {key.partition(".")[2]: value for key, value in known.config.items() if "embedding_model." in key}
    found = {key: value for key, value in known.facts.items() if value is not None and key != "model"}
    return settings | found


def _one_model(models: dict[Path, dict]) -> dict:
    """The model that all parts share. Raises StaleArtefact that names two parts that differ."""
    (first, model), *others = models.items()
    for path, other in others:
        different = [key for key in sorted({*model, *other}) if model.get(key) != other.get(key)]
        if different:
            key = different[0]
            raise StaleArtefact(
                f"{first} was made with {key} = {json.dumps(model.get(key))}, "
                f"{path} with {key} = {json.dumps(other.get(key))}\n"
                "embeddings of two models cannot be merged: redo one of them with "
                "generate/generate_embeddings.py --overwrite"
            )
    return model
