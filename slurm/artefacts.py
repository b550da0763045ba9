"""What each step of the chain leaves behind, and which of it is there already: judged from the files' own records.

A file counts as done if no setting that it records has another value now and its inputs are still the same. A file
that is there but does not match is its stage's to refuse: here it is merely not done. Reads footers only, and
imports Optuna and torch where there is a study.
"""

import functools
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import config, parquet, provenance, schemas
from common.archives import tar_parts, tars
from common.errors import PipelineError
from common.files import beside
from common.provenance import Provenance
from common.sections import Config
from generate.model_files import weights_digest

_weights_digest = functools.cache(weights_digest)


@dataclass(frozen=True)
class Artefact:
    """A file that a stage makes, and what from: name in its record -> file."""

    path: Path
    inputs: dict[str, Path]

    def is_done(self, cfg: Config) -> bool:
        """Whether it is there, of these settings and of the inputs that are there now."""
        try:
            there = record_of(self.path)
            now = {name: identity(path) for name, path in self.inputs.items()}
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, PipelineError):
            return False  # it or an input is absent, damaged or somebody else's: its stage says which
        return there.inputs == now and _same_settings(there, cfg) and _is_finished(self.path)


def missing(steps, cfg: Config) -> dict[str, list[int]]:
    """Step -> its tasks that have something to do, among `steps` in the order of the chain.

    A task whose input is about to be made has something to do, whatever is there: its stage looks again.
    """
    todo: dict[str, list[int]] = {}
    for step in steps:
        needed = [todo[name] for name in step.needs if todo.get(name)]
        if needed and not step.shards_match:
            todo[step.name] = list(range(step.tasks))
            continue
        again = {task for tasks in needed for task in tasks}
        period = num_tars(cfg) or step.tasks  # of the tasks that take the same tars
        todo[step.name] = [
            task
            for task in range(step.tasks)
            if task in again or task % period in again or not is_done(step, task, cfg)
        ]
    return todo


def num_busy(step, cfg: Config) -> int | None:
    """How many tasks of a step have something to make, or had; None where that is not known yet."""
    made = [of_task(step, task, cfg) for task in range(step.tasks)]
    return None if None in made else sum(map(bool, made))


def is_done(step, task: int, cfg: Config) -> bool:
    """Whether a task of a step has nothing left to do."""
    if step.name == "optuna_worker":
        finished, total = trials(cfg)
        return finished >= total
    if step.name == "neighbor_parts" and all(a.is_done(cfg) for a in _difficulty(cfg)):
        return True
    if step.resources == "fetch_best_and_train":
        best = _with_best_trial(cfg)
        if best is None:
            return False
        cfg = best
    made = of_task(step, task, cfg)
    return made is not None and all(artefact.is_done(cfg) for artefact in made)


def of_task(step, task: int, cfg: Config) -> list[Artefact] | None:
    """The files of one task of a step; None where that cannot be known before its inputs are there."""
    try:
        return list(_of_task(step, task, cfg))
    except (OSError, PipelineError):
        return None


def trials(cfg: Config) -> tuple[int, int]:
    """How many trials the study has that need no worker any more, of how many."""
    if cfg.tuning.study_storage == "journal" and not (cfg.paths.study_dir / "journal.log").exists():
        return 0, cfg.tuning.num_trials
    from train.tuning import shared_study

    try:
        tuning = shared_study.open_study(cfg, shared_study.record(cfg), create=False)
    except PipelineError:  # of other data or settings: the worker says so
        return 0, cfg.tuning.num_trials
    return shared_study.num_counted(tuning.trials) - shared_study.num_open(tuning), cfg.tuning.num_trials


def epochs(cfg: Config) -> tuple[int, int]:
    """How many epochs of training.run are over, of how many at most."""
    try:
        rows = parquet.num_rows(_run_dir(cfg) / "history.parquet")
    except PipelineError:
        rows = 1
    return rows - 1, cfg.training.epochs  # the first row is of before training


def target_of(name: str, cfg: Config) -> Path:
    """The folder that the step of this name writes: two steps with the same one must not run at once."""
    paths = cfg.paths
    return {
        "process_tar": paths.intermediates_dir,
        "compute_fingerprints": paths.fingerprints_dir,
        "generate_embeddings": paths.embeddings_dir,
        "merge_and_split": paths.merged_dir,
        "summarize_ids": paths.summary_dir,
        "neighbor_parts": beside(paths.difficulty_dir, "parts"),
        "compute_visual_neighbors": paths.difficulty_dir,
        "optuna_worker": paths.study_dir,
        "train": _run_dir(cfg),
        "evaluate": paths.evaluation_dir,
        "convert_to_hf": paths.published_dir,
    }[name]


def _of_task(step, task: int, cfg: Config) -> Iterator[Artefact]:
    paths, run = cfg.paths, _run_dir(cfg)
    best = run / "checkpoint_best.pt"
    merged = {f"{split}.parquet": paths.merged_dir / f"{split}.parquet" for split in schemas.SPLITS}
    if step.name in ("process_tar", "compute_fingerprints", "generate_embeddings"):
        folder = target_of(step.name, cfg)
        for share in tars.shares_of(_tars(cfg), task, step.tasks):
            name = f"{tars.stem(share.tar)}.parquet"
            source, tar = paths.intermediates_dir / name, {share.tar.name: share.tar}
            if step.name == "process_tar":  # its rejects are written first
                yield from [Artefact(folder / name, tar)] if share.piece == 0 else []
            else:
                targets = tar_parts.targets(folder, share.tar, _num_parts(source, cfg))
                yield from (Artefact(targets[n], {**tar, name: source}) for n in share.of(len(targets)))
    elif step.name == "merge_and_split":
        inputs = _inputs_of_merge(cfg)
        report = beside(paths.merged_dir, "report") / "split_report.json"  # it comes last
        yield from (Artefact(path, inputs) for path in (*merged.values(), report))
    elif step.name == "summarize_ids":
        inputs = {f"{path.parent.name}/{name}": path for name, path in merged.items()}
        yield Artefact(beside(paths.summary_dir, "report") / "summary.json", inputs)
    elif step.name == "neighbor_parts":
        total = _num_parts(merged["train.parquet"], cfg)
        for part in range(total * task // step.tasks, total * (task + 1) // step.tasks):
            yield Artefact(target_of(step.name, cfg) / f"{part:05d}.parquet", _only(merged, "train"))
    elif step.name == "compute_visual_neighbors":
        yield from _difficulty(cfg)
    elif step.name == "train":
        difficulty = [artefact.path for artefact in _difficulty(cfg)]
        inputs = _only(merged, "train", "val") | {path.name: path for path in difficulty}
        yield from (Artefact(run / f"checkpoint_{which}.pt", inputs) for which in ("best", "last"))
    elif step.name == "evaluate":
        history = run / "history.parquet"  # for the report, if it is there
        inputs = merged | {best.name: best} | ({history.name: history} if history.exists() else {})
        yield Artefact(paths.evaluation_dir / "metrics.json", inputs)
    elif step.name == "convert_to_hf":
        metrics = paths.evaluation_dir / "metrics.json"
        inputs = {best.name: best, metrics.name: metrics}
        yield Artefact(paths.published_dir / "provenance.json", inputs)
    else:
        raise NotImplementedError(f"slurm/artefacts.py does not know what {step.name} makes")


def _tars(cfg: Config) -> list[Path]:
    raw_dir = cfg.paths.raw_dir
    return _listing(raw_dir, raw_dir.stat().st_mtime_ns)


@functools.cache  # every shard of three stages asks, and on a parallel file system each tar's stat is a round trip
def _listing(raw_dir: Path, mtime_ns: int) -> list[Path]:
    return tars.of_shard(raw_dir, 0, 1)


def num_tars(cfg: Config) -> int:
    """0 before there are any. Raises PipelineError for a folder that process_tar.py would refuse."""
    raw_dir = cfg.paths.raw_dir
    return len(_tars(cfg)) if raw_dir.is_dir() and any(raw_dir.iterdir()) else 0


def _num_parts(source: Path, cfg: Config) -> int:
    return tar_parts.count(_num_rows(source, source.stat().st_mtime_ns), cfg.data.rows_per_part)


@functools.cache
def _num_rows(source: Path, mtime_ns: int) -> int:
    return parquet.num_rows(source)


def _inputs_of_merge(cfg: Config) -> dict[str, Path]:
    inputs, paths = {}, cfg.paths
    for tar in _tars(cfg):
        source = paths.intermediates_dir / f"{tars.stem(tar)}.parquet"
        inputs[f"intermediates/{source.name}"] = source
        for stage, folder in (("fingerprints", paths.fingerprints_dir), ("embeddings", paths.embeddings_dir)):
            for path in tar_parts.targets(folder, tar, _num_parts(source, cfg)):
                inputs[f"{stage}/{path.name}"] = path
    return inputs


def _difficulty(cfg: Config) -> list[Artefact]:
    train = {"train.parquet": cfg.paths.merged_dir / "train.parquet"}
    return [Artefact(cfg.paths.difficulty_dir / "difficulty_metadata.parquet", train)]


def _only(merged: dict[str, Path], *splits: str) -> dict[str, Path]:
    return {f"{split}.parquet": merged[f"{split}.parquet"] for split in splits}


def _run_dir(cfg: Config) -> Path:
    return cfg.paths.checkpoints_dir / cfg.training.run


def _with_best_trial(cfg: Config) -> Config | None:
    """The settings with which fetch_best_and_train trains; None if the study is not there or not of `cfg`."""
    if cfg.tuning.study_storage == "journal" and not (cfg.paths.study_dir / "journal.log").exists():
        return None
    from train.tuning import shared_study

    try:
        tuning = shared_study.open_study(cfg, shared_study.record(cfg), create=False)
        return config.with_training(cfg, **shared_study.best_trial(tuning).params)
    except PipelineError:
        return None


# ------------------------------------------------------------------------------------------------ records


def identity(path: Path) -> str:
    """What a file is known by in the records of what was made from it."""
    return _identity_of_tar(path, path.stat().st_mtime_ns) if tars.is_named_so(path) else record_of(path).id


@functools.cache  # each of a tar's parts asks
def _identity_of_tar(tar: Path, mtime_ns: int) -> str:
    return provenance.identity(tar)


def record_of(path: Path) -> Provenance:
    """The record in a file. Raises whatever goes wrong where there is none."""
    return _read(path, path.stat().st_mtime_ns)[0]


def _is_finished(path: Path) -> bool:
    """False for the checkpoint of a run that is to be continued."""
    return _read(path, path.stat().st_mtime_ns)[1]


@functools.cache  # many steps look at the same files, and status.py looks again and again
def _read(path: Path, mtime_ns: int) -> tuple[Provenance, bool]:
    if path.suffix == ".parquet":
        return parquet.read_provenance(path), True
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        return Provenance(**content.get("provenance", content)), True
    content = _plain_values_of(path)
    finished = "resume" not in content or content["resume"]["finished"]
    return Provenance(**content["provenance"]), finished


class _PlainValues(pickle.Unpickler):
    """Dicts, lists, numbers and texts of a checkpoint; None in place of tensors and of whatever else it holds."""

    def find_class(self, module: str, name: str):
        return OrderedDict if name == "OrderedDict" else lambda *_: None

    def persistent_load(self, _) -> None:  # a tensor's numbers
        return None


def _plain_values_of(path: Path) -> dict:
    """A checkpoint without its tensors and without torch, whose import takes seconds. Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            return _PlainValues(archive.open(name)).load()
    except (zipfile.BadZipFile, StopIteration, EOFError, AttributeError, IndexError, pickle.PickleError) as error:
        raise ValueError(f"{path} is no checkpoint: {error}") from None


def _same_settings(there: Provenance, cfg: Config) -> bool:
    """Whether no setting in a record has another value now; what is not a setting is left to the stage."""
    plain = cfg.model_dump(mode="json", by_alias=True)
    if config.is_folder(cfg.embedding_model.name) and "embedding_model.weights" in there.config:
        folder = Path(cfg.embedding_model.name)  # recorded by its last part and content, so that it may be moved
        plain["embedding_model"] |= {"name": folder.name, "weights": _weights_digest(folder)}
    for key, value in there.config.items():
        section, _, name = key.partition(".")
        now = plain.get(section, {}).get(name, value)
        unknown = key == "embedding_model.dtype" and now == "auto"  # the compute node's device decides
        if now != value and not unknown:
            return False
    return True
