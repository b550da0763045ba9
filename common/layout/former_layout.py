"""Files where older versions wrote them, without a folder for each backbone and each run: how to move them.

They count as done where they belong, since records hold no paths; left where they are, they would be made again.
"""

import json
import os
import shlex
from pathlib import Path

from common import config, files, provenance, stages
from common.errors import ConfigError, PipelineError
from common.sections import Config, EmbeddingModel

FORMER = {  # setting -> its former default
    **{f"{name}_dir": f"data/{name}" for name in ("embeddings", "merged", "difficulty", "summary", "study")},
    "evaluation_dir": "data/evaluation",
    "published_dir": "data/published",
    "checkpoints_dir": "checkpoints",
}
_BESIDE = ("rejects", "report", "parts", "moments", "intermediates", "intermediates_report")


def refuse(cfg: Config) -> None:
    """Raise ConfigError, with the commands that move them, if there are files in former places below paths.root.

    Settings without {backbone} name the same places as formerly, and are left alone. Lists two folders.
    """
    settings = [name for name in FORMER if "{backbone}" in str(getattr(cfg.templates, name))]
    data = cfg.paths.root / "data"
    names = set(os.listdir(data)) if data.is_dir() else set()
    former = [(name, path) for name in settings for path in _former_paths(cfg, name, names)]
    if not former:
        return
    root, model = cfg.paths.root, _model_of(cfg)
    moves = {path: _target(cfg, name, path, config.label_of(model)) for name, path in former}
    taken = [target for target in moves.values() if target.exists()]

    def short(path: Path) -> str:
        return shlex.quote(os.path.relpath(path, root) if path.is_relative_to(root) else str(path))

    lines = [f"{root} has files where an older version wrote them, without a folder for each backbone and run"]
    if model is not cfg.embedding_model:
        keys = [key for key in ("name", "revision", "pooling", "views", "dtype")
                if getattr(model, key) != getattr(cfg.embedding_model, key)]  # fmt: skip
        made = ", ".join(f"embedding_model.{key} = {json.dumps(getattr(model, key))}" for key in keys)
        lines.append(f"they were made with other settings, which use them again: {made}")
    lines += [f"{target} exists, too: move one of the two away first" for target in taken]
    lines.append("while no job is running, move them, and nothing is computed again:")
    lines.append(f"cd {shlex.quote(str(root))}")
    lines += [f"mkdir -p {short(parent)}" for parent in dict.fromkeys(path.parent for path in moves.values())]
    lines += [f"mv {short(path)} {short(target)}" for path, target in moves.items()]
    lines.append("or keep the former places, by these lines in config.toml:")
    raise ConfigError("\n".join([*lines, *(f"{name} = {json.dumps(FORMER[name])}" for name in settings)]))


def _former_paths(cfg: Config, setting: str, names: set[str]) -> list[Path]:
    """What is in the former place of a setting: its folder and those beside it; of checkpoints, those of runs.
    `names`: of what is in data/."""
    former = cfg.paths.root / FORMER[setting]
    if setting == "checkpoints_dir":
        folders = sorted(former.iterdir()) if former.is_dir() else []
        return [folder for folder in folders if folder.name == "compare" or _is_run(folder)]
    folders = [former, *(files.beside(former, what) for what in _BESIDE)]
    return [folder for folder in folders if folder.name in names - {config.label_of(cfg.embedding_model)}]


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("checkpoint_last.pt", "checkpoint_best.pt", "config.toml"))


def _target(cfg: Config, setting: str, path: Path, label: str) -> Path:
    """Where something in the former place of a setting belongs."""
    former = cfg.paths.root / FORMER[setting]
    run = _run_of(path, cfg.training.run)
    target = getattr(config.paths_of(cfg, run, label), setting)
    if setting == "checkpoints_dir":
        return target / path.name
    return target.with_name(target.name + path.name.removeprefix(former.name))


def _run_of(folder: Path, otherwise: str) -> str:
    """The run that an evaluation or a published model is of."""
    for name in ("metrics.json", "provenance.json"):
        try:
            return stages.record_of(folder / name).config.get("training.run", otherwise)
        except (OSError, PipelineError):
            continue
    return otherwise


def _model_of(cfg: Config) -> EmbeddingModel:
    """The model that the records of the former embeddings name; that of `cfg` if it is the same, or unknown."""
    data, ours = cfg.paths.root / "data", cfg.embedding_model
    paths = [*sorted((data / "embeddings").glob("*.parquet"))[:1], data / "merged" / "train.parquet"]
    for path in paths:
        try:
            made = provenance.embedding_model(stages.record_of(path))
        except (OSError, PipelineError):
            continue
        name = Path(ours.name).name if config.is_folder(ours.name) else ours.name
        now = {**ours.model_dump(), "name": name}
        compared = ("name", "revision", "pooling", "views", *(["dtype"] if ours.dtype != "auto" else []))
        changed = {key: made[key] for key in compared if key in made and made[key] != now[key]}
        return ours.model_copy(update={**changed, "label": "auto"}) if changed else ours
    return ours
