"""Files where older versions wrote them, without a folder for each backbone and each run: how to move them.

They count as done where they belong, since records hold no paths; left where they are, they would be made again.
"""

import json
import os
import shlex
from pathlib import Path

from common import config, files, provenance, stages
from common.errors import ConfigError, PipelineError
from common.sections import Config

FORMER = {  # setting -> its former default
    **{f"{name}_dir": f"data/{name}" for name in ("embeddings", "merged", "difficulty", "summary", "study")},
    "evaluation_dir": "data/evaluation",
    "published_dir": "data/published",
    "checkpoints_dir": "checkpoints",
}
_BESIDE = ("rejects", "report", "parts", "moments", "intermediates", "intermediates_report")


def refuse(cfg: Config) -> None:
    """Raise ConfigError, with the commands that move them, if there are files in former places below paths.root,
    and none in their new ones.

    Settings without {backbone} name the same places as formerly, and are left alone. Lists two folders.
    """
    root, data = cfg.paths.root, cfg.paths.root / "data"
    names = set(os.listdir(data)) if data.is_dir() else set()
    templates = [name for name in FORMER if "{backbone}" in str(getattr(cfg.templates, name))]
    former = [(name, path) for name in templates for path in _former_paths(cfg, name, names)]
    label = _label_of(cfg) if former else ""
    targets = [(name, path, _target(cfg, name, path, label)) for name, path in former]
    moves = [move for move in targets if not move[2].exists()]
    if not moves:
        return

    def short(path: Path) -> str:
        return shlex.quote(os.path.relpath(path, root) if path.is_relative_to(root) else str(path))

    lines = [
        f"{root} has files where an older version wrote them, without a folder for each backbone and run",
        "while no job is running, move them, and nothing is computed again:",
        f"cd {shlex.quote(str(root))}",
        *(f"mkdir -p {short(parent)}" for parent in dict.fromkeys(target.parent for *_, target in moves)),
        *(f"mv {short(path)} {short(target)}" for _, path, target in moves),
        "or keep the former places: in [paths] of config.toml, replace these settings:",
        *(f"{name} = {json.dumps(FORMER[name])}" for name in dict.fromkeys(name for name, *_ in moves)),
    ]
    raise ConfigError("\n".join(lines))


def _former_paths(cfg: Config, setting: str, names: set[str]) -> list[Path]:
    """What is in the former place of a setting: its folder and those beside it; of checkpoints, those of runs.
    `names`: of what is in data/."""
    former = cfg.paths.root / FORMER[setting]
    if setting == "checkpoints_dir":
        folders = sorted(former.iterdir()) if former.is_dir() else []
        marks = ("checkpoint_last.pt", "checkpoint_best.pt", "config.toml")
        return [
            path for path in folders if path.name == "compare" or any((path / name).exists() for name in marks)
        ]
    folders = [former, *(files.beside(former, what) for what in _BESIDE)]
    return [folder for folder in folders if folder.name in names - {config.label_of(cfg.embedding_model)}]


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


def _label_of(cfg: Config) -> str:
    """The folder of the model that the records of the former embeddings name; that of `cfg` if none does."""
    data, ours = cfg.paths.root / "data", cfg.embedding_model
    compared = ("name", "revision", "pooling", "views", *(["dtype"] if ours.dtype != "auto" else []))
    for path in [*sorted((data / "embeddings").glob("*.parquet"))[:1], data / "merged" / "train.parquet"]:
        try:
            made = provenance.embedding_model(stages.record_of(path))
        except (OSError, PipelineError):
            continue
        now = ours.model_dump()
        now["name"] = Path(ours.name).name if config.is_folder(ours.name) else ours.name
        changed = {key: made[key] for key in compared if key in made and made[key] != now[key]}
        return config.label_of(ours.model_copy(update={**changed, "label": "auto"}) if changed else ours)
    return config.label_of(ours)
