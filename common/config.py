"""The configuration: config.toml read strictly into frozen models, one per section.

config.toml is the only place with defaults: a key that it lacks is an error, and so is one that is not known
here. `--set section.key=value` overrides; the value is TOML (0.2, true, [1, 2]) or else a plain string.
"""

import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from common.errors import ConfigError

DEFAULT_PATH = Path(__file__).resolve().parents[1] / "config.toml"

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A section of config.toml: its keys, with types and ranges. What a key means stands in config.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Global(Section):
    seed: Count


class Paths(Section):
    """Directories. After `load` all of them are absolute."""

    root: Path
    raw_dir: Path
    intermediates_dir: Path
    fingerprints_dir: Path
    embeddings_dir: Path
    merged_dir: Path
    difficulty_dir: Path
    summary_dir: Path
    study_dir: Path
    evaluation_dir: Path
    published_dir: Path
    checkpoints_dir: Path
    logs_dir: Path


class EmbeddingModel(Section):
    name: str
    revision: str
    pooling: Literal["cls", "mean", "cls_mean"]
    dtype: Literal["auto", "float32", "bfloat16"]


class Data(Section):
    """From tars to bands. Radii, cells and buffers are in metres."""

    max_reject_share: Ratio
    rows_per_part: Positive
    fingerprint: Literal["fast", "exact"]
    dedup_max_hamming: Annotated[int, Field(ge=0, le=64)]
    ignore_radius_m: NonNegative
    split_by: Literal["geo", "building"]
    split_cell_m: Annotated[float, Field(ge=1)]
    split_buffer_m: NonNegative
    train_ratio: Ratio
    val_ratio: Ratio
    test_ratio: Ratio
    neighbors: Annotated[int, Field(ge=1, le=255)]
    search: Literal["exact", "balltree"]
    balltree_dim: Positive
    band_percentiles: list[Annotated[float, Field(gt=0, lt=100)]]
    band_reference_rank: Positive

    @property
    def num_bands(self) -> int:
        return len(self.band_percentiles) + 1

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        total = self.train_ratio + self.val_ratio + self.test_ratio
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train_ratio + val_ratio + test_ratio must be 1, not {total:g}")
        if not self.band_percentiles or sorted(set(self.band_percentiles)) != self.band_percentiles:
            raise ValueError("band_percentiles must be one or more increasing numbers")
        return self


class TrainingModel(Section):
    hidden_dim: Positive
    output_dim: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    init: Literal["whitening", "random"]
    whitening_shrinkage: Annotated[list[PositiveFloat], Field(min_length=1)]


class Choices(Section):
    """A categorical dimension of the search space."""

    choices: Annotated[list[str | int | float | bool], Field(min_length=1)]


Range = tuple[float, float] | tuple[float, float, Literal["log"]]


class Training(Section):
    run: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    seed: Count
    epochs: Positive
    steps_per_epoch: Positive
    batch_size: Annotated[int, Field(ge=2)]
    sampler: Literal["ucb", "uniform", "hard_random", "semi_hard"]
    loss: Literal["triplet", "infonce", "multi_similarity"]
    margin: Annotated[float, Field(gt=0, le=2)]
    temperature: PositiveFloat
    dtype: Literal["auto", "float32", "bfloat16"]
    bandit_groups: Positive
    bandit_exploration: NonNegative
    bandit_discount: Annotated[float, Field(gt=0, le=1)]
    learning_rate: PositiveFloat
    whitening_lr_factor: NonNegative
    gain_lr_factor: NonNegative
    weight_decay: NonNegative
    warmup_steps: Count
    grad_clip: PositiveFloat
    remine_epochs: Count
    patience: Positive
    sample_buildings: Literal["all"] | Positive
    val_max_queries: Positive
    gallery: Literal["test", "all"]
    bootstrap_samples: Annotated[int, Field(ge=10)]
    num_trials: Positive
    trial_epochs: Positive
    study_storage: str
    pruner: Literal["median", "hyperband"]
    search_space: dict[str, Range | Choices]

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.bandit_groups > self.batch_size:
            raise ValueError(f"bandit_groups ({self.bandit_groups}) exceeds batch_size ({self.batch_size})")
        return self

    @field_validator("search_space")
    @classmethod
    def _known_and_ordered(cls, space: dict[str, Any]) -> dict[str, Any]:
        # what is fixed for all trials of a study: its data, its measure, its size
        fixed = {"run", "seed", "epochs", "sample_buildings", "val_max_queries", "gallery", "bootstrap_samples"}
        fixed |= {"num_trials", "trial_epochs", "study_storage", "pruner", "search_space"}
        tunable = set(cls.model_fields) - fixed
        for key, dimension in space.items():
            if key in fixed:
                raise ValueError(f"{key} is the same for all trials and cannot be varied")
            if key not in tunable:
                raise ValueError(f"{key} is not a setting of [training]{_suggestion(key, tunable)}")
            if isinstance(dimension, tuple) and dimension[0] >= dimension[1]:
                raise ValueError(f"{key}: the lower end {dimension[0]} is not below {dimension[1]}")
            if isinstance(dimension, tuple) and dimension[2:] and dimension[0] <= 0:
                raise ValueError(f'{key}: the lower end of a range with "log" must be above 0')
        return space


class Infrastructure(Section):
    """What makes it fast but changes no value."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    workers: Count
    embedding_batch_size: Literal["auto"] | Positive
    compile: bool
    search_memory_mb: Annotated[int, Field(ge=16)]

    @property
    def threads(self) -> int:
        """`workers`, or the cores that this process may use if that is 0."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or cores


class Logging(Section):
    level: Literal["debug", "info", "warning"]
    progress_interval_s: PositiveFloat
    wandb_mode: Literal["disabled", "offline", "online"]
    wandb_project: str


class SlurmStage(Section):
    """Resources of one stage's jobs."""

    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d{1,2}){0,2}$")]
    sbatch: list[str]

    @property
    def time_s(self) -> int:
        """The time limit in seconds. As sbatch reads it: minutes, m:s, h:m:s, days-h, days-h:m or days-h:m:s."""
        days, dash, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        hours, minutes, seconds = ((*parts, 0, 0) if dash or len(parts) == 3 else (0, *parts, 0))[:3]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class SlurmArray(SlurmStage):
    throttle: Count


class Slurm(Section):
    num_shards: Positive
    difficulty_shards: Positive
    max_requeues: Count
    signal_before_s: Count
    sbatch: list[str]
    process_tar: SlurmArray
    compute_fingerprints: SlurmArray
    generate_embeddings: SlurmArray
    merge_and_split: SlurmStage
    summarize_ids: SlurmStage
    compute_visual_neighbors: SlurmArray
    optuna_worker: SlurmArray
    fetch_best_and_train: SlurmStage
    train: SlurmStage
    evaluate: SlurmStage
    convert_to_hf: SlurmStage

    @model_validator(mode="after")
    def _consistent(self) -> "Slurm":
        for name, stage in self:
            if isinstance(stage, SlurmStage) and stage.time_s <= self.signal_before_s:
                raise ValueError(
                    f"{name}.time = {stage.time} is not longer than signal_before_s = {self.signal_before_s}: "
                    "the job would be told to stop as it starts"
                )
        return self


class Config(Section):
    """The whole of config.toml; `global` is a Python keyword, hence `global_`."""

    global_: Global = Field(alias="global")
    paths: Paths
    embedding_model: EmbeddingModel
    data: Data
    training_model: TrainingModel
    training: Training
    infrastructure: Infrastructure
    logging: Logging
    slurm: Slurm


def load(path: Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration at `path` (default: the repository's) with `--set` overrides; paths made absolute.

    Raises ConfigError with every mistake of the file at once.
    """
    path = Path(path or DEFAULT_PATH)
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomli.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(tree, override)
    try:
        cfg = Config.model_validate(tree)
    except ValidationError as error:
        wrong = "what --set says" if overrides and _is_usable(tomli.loads(text)) else path
        raise ConfigError("\n".join([f"{wrong} cannot be used:", *_explain(error)])) from None
    return _absolute(cfg, path.resolve().parent)


def values(cfg: Config, *keys: str) -> dict[str, Any]:
    """The settings named ("section.key" or "section") as plain values: what a stage records of what it reads."""
    plain = cfg.model_dump(mode="json", by_alias=True)
    chosen: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.partition(".")
        names = [name] if name else plain[section]
        chosen.update({f"{section}.{n}": plain[section][n] for n in names})
    return chosen


def to_toml(cfg: Config) -> str:
    """The whole configuration as a TOML file that `config.load` reads back."""
    return "".join(_tables(cfg.model_dump(mode="json", by_alias=True), ()))


def _tables(tree: dict, names: tuple[str, ...]) -> Iterator[str]:
    # a search space's {choices = [...]} is a value in one line
    plain = {k: v for k, v in tree.items() if not isinstance(v, dict) or names[-1:] == ("search_space",)}
    if names:
        yield f"[{'.'.join(names)}]\n"
        yield from (f"{key} = {_toml(value)}\n" for key, value in plain.items())
        yield "\n"
    for key in tree:
        if key not in plain:
            yield from _tables(tree[key], (*names, key))


def _toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are written alike in both


def is_folder(name: str) -> bool:
    """Whether a model's name is a folder on this machine (`load` makes those absolute), not a name on the hub."""
    return Path(name).is_absolute()


def _absolute(cfg: Config, base: Path) -> Config:
    root = (base / cfg.paths.root.expanduser()).resolve()
    paths = {name: (root / Path(value).expanduser()).resolve() for name, value in cfg.paths if name != "root"}
    model = cfg.embedding_model
    folder = base / Path(model.name).expanduser()
    if folder.is_dir():
        model = model.model_copy(update={"name": str(folder.resolve())})
    elif model.name.startswith((".", "/", "~")):
        raise ConfigError(f"embedding_model.name: there is no folder {folder}")
    return cfg.model_copy(update={"paths": Paths(root=root, **paths), "embedding_model": model})


def _apply(tree: dict, override: str) -> None:
    """Set one value in the tree that the file gave. Unknown keys are left for the validation to explain."""
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.strip().split(".")
    if not equals or not sections or not key:
        raise ConfigError(f"--set {override}: write it as --set section.key=value")
    node = tree
    for section in sections:
        if not isinstance(node.get(section), dict):
            raise ConfigError(f"--set {dotted}: there is no section {section}{_suggestion(section, node)}")
        node = node[section]
    if key not in node and "search_space" not in sections:
        raise ConfigError(f"--set {dotted}: [{'.'.join(sections)}] has no key {key}{_suggestion(key, node)}")
    value = _toml_value(text.strip())
    is_text = _is_text(sections, key) and not isinstance(value, str)
    node[key] = text.strip() if is_text else value  # a run may be called 2024, a time limit is 04:00:00


def _toml_value(text: str) -> Any:
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text  # a plain string: a path, a name


def _is_text(sections: list[str], key: str) -> bool:
    """Whether the setting at this place of the tree is a string or a path."""
    fields = _fields_of(sections)
    return key in fields and fields[key].annotation in (str, Path)


def _suggestion(name: str, known) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _is_usable(tree: dict) -> bool:
    """Whether the tree that a file gave is a valid configuration."""
    try:
        Config.model_validate(tree)
    except ValidationError:
        return False
    return True


def _explain(error: ValidationError) -> list[str]:
    """A line for each mistake."""
    lines = []
    for mistake in error.errors():
        *sections, key = [str(part) for part in mistake["loc"]] or ["config.toml"]
        where = f"[{'.'.join(sections)}] {key}" if sections else f"[{key}]"
        if sections[1:2] == ["search_space"]:  # told once, not for each form that a dimension may have
            name = [*sections, key][2]
            form = '[low, high], [low, high, "log"] or { choices = [...] }'
            lines.append(f"[training.search_space] {name} must be {form}")
        elif mistake["type"] == "extra_forbidden":
            lines.append(f"{where} is not a known key{_suggestion(key, _fields_of(sections))}")
        elif mistake["type"] == "missing":
            lines.append(f"{where} is missing")
        else:
            lines.append(f"{where}: {mistake['msg'].removeprefix('Value error, ')}{_given(mistake)}")
    return list(dict.fromkeys(lines))


def _given(mistake) -> str:
    """What stood there, where the message does not say it: of a single value only."""
    value = mistake["input"]
    return "" if isinstance(value, dict) else f" (got {value!r:.80})"


def _fields_of(sections: list[str]) -> dict[str, FieldInfo]:
    """The fields of the model at a place of the tree, by the keys of the file."""
    model: Any = Config
    for section in sections:
        by_alias = {(field.alias or name): field.annotation for name, field in model.model_fields.items()}
        model = by_alias.get(section)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return {}
    return {(field.alias or name): field for name, field in model.model_fields.items()}
