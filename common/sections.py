"""The sections of config.toml, a frozen model each: keys, types and ranges. config.toml explains the keys.

Unknown and missing keys are errors: the file is the only place with defaults.
"""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)]  # of a folder
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no larger ones
PLACEHOLDERS = ("backbone", "run")  # of [paths]: embedding_model.label, or what "auto" means, and training.run
SAME_IN_ALL_TRIALS = "same in all trials"  # marks settings that define a study's data, metric or size


class Section(BaseModel):
    """A section of config.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Global(Section):
    seed: Seed


class Paths(Section):
    """Directories; absolute and without placeholders after `config.load`."""

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
    vectors_dir: Path
    buildings_dir: Path
    index_dir: Path
    checkpoints_dir: Path
    logs_dir: Path

    @field_validator("*")
    @classmethod
    def _known_placeholders(cls, path: Path) -> Path:
        for name in re.findall(r"\{(.*?)\}", str(path)):
            if name not in PLACEHOLDERS:
                known = " and ".join(f"{{{one}}}" for one in PLACEHOLDERS)
                raise ValueError(f"there is no placeholder {{{name}}}: {known} are those that are filled in")
        return path

    def filled(self, **values: str) -> "Paths":
        """These paths with the values of PLACEHOLDERS in them, links resolved."""
        filled: dict[str, Any] = {}
        for field, path in self:
            text = str(path)
            for name in PLACEHOLDERS:
                text = text.replace(f"{{{name}}}", values[name])
            filled[field] = Path(text).resolve()
        return Paths.model_construct(**filled)  # a folder above them may be called anything


class EmbeddingModel(Section):
    label: Name
    name: str
    revision: str
    pooling: Literal["cls", "mean", "cls_mean"]
    views: Annotated[list[Annotated[float, Field(ge=0.25, le=1)]], Field(min_length=1)]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]

    @field_validator("views")
    @classmethod
    def _distinct_and_ordered(cls, views: list[float]) -> list[float]:
        if len(set(views)) < len(views):
            raise ValueError("each view must be named once")
        return sorted(views, reverse=True)  # the order does not matter, and is recorded


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
    held_out: str
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
    run: Annotated[Name, SAME_IN_ALL_TRIALS]
    seed: Annotated[Seed, SAME_IN_ALL_TRIALS]
    epochs: Annotated[Positive, SAME_IN_ALL_TRIALS]
    steps_per_epoch: Literal["auto"] | Positive
    batch_size: Annotated[int, Field(ge=2)]
    sampler: Literal["ucb", "uniform", "hard_random", "random"]
    loss: Literal["triplet", "infonce", "multi_similarity"]
    mining: Literal["none", "semi_hard"]
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
    sample_buildings: Annotated[Literal["all"] | Positive, SAME_IN_ALL_TRIALS]
    val_max_queries: Annotated[Positive, SAME_IN_ALL_TRIALS]

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.bandit_groups > self.batch_size:
            raise ValueError(f"bandit_groups ({self.bandit_groups}) exceeds batch_size ({self.batch_size})")
        if self.mining != "none" and self.loss != "triplet":
            raise ValueError(
                f'mining = "{self.mining}" selects a negative per triplet, but loss = "{self.loss}" contrasts all '
                'pairs of the batch: set mining to "none", or loss to "triplet"'
            )
        if self.mining != "none" and self.sampler == "ucb":
            raise ValueError(
                f'sampler = "ucb" learns from the negatives it draws, but mining = "{self.mining}" replaces them: '
                'set mining to "none", or sampler to "random", "uniform" or "hard_random"'
            )
        return self


class Evaluation(Section):
    gallery: Literal["test", "all"]
    bootstrap_samples: Annotated[int, Field(ge=10)]


class Tuning(Section):
    num_trials: Positive
    trial_epochs: Positive
    study_storage: Annotated[str, Field(repr=False)]  # a refused value is not shown: it may hold a password
    pruner: Literal["median", "hyperband"]
    search_space: dict[str, Range | Choices]

    @field_validator("study_storage")
    @classmethod
    def _without_password(cls, storage: str) -> str:
        """Settings are printed, recorded and handed on to jobs: none may hold a password."""
        if storage == "journal":
            return storage
        import sqlalchemy  # here: it takes a tenth of a second

        try:
            url = sqlalchemy.make_url(storage)
        except (sqlalchemy.exc.ArgumentError, ValueError):
            url = None
        if url is None or url.get_backend_name() != "postgresql":
            raise ValueError('must be "journal" or a URL such as postgresql://user@host/database')
        if url.password is not None or any("password" in name.lower() for name in url.query):
            raise ValueError("holds a password: put it into ~/.pgpass, or the environment variable PGPASSWORD")
        return storage

    @field_validator("search_space")
    @classmethod
    def _known_and_ordered(cls, space: dict[str, Any]) -> dict[str, Any]:
        for key, dimension in space.items():
            field = Training.model_fields.get(key)
            if field is None:
                raise ValueError(f"{key} is not a setting of [training]{suggestion(key, Training.model_fields)}")
            if SAME_IN_ALL_TRIALS in field.metadata:
                raise ValueError(f"{key} is the same for all trials and cannot be tuned")
            if isinstance(dimension, tuple) and dimension[0] >= dimension[1]:
                raise ValueError(f"{key}: the lower end {dimension[0]} is not below {dimension[1]}")
            if isinstance(dimension, tuple) and dimension[2:] and dimension[0] <= 0:
                raise ValueError(f'{key}: the lower end of a range with "log" must be above 0')
        return space


class Infrastructure(Section):
    """Settings that affect speed but not results."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$")]
    workers: Count
    embedding_batch_size: Literal["auto"] | Positive
    compile: bool
    search_memory_mb: Literal["auto"] | Annotated[int, Field(ge=16)]

    @property
    def threads(self) -> int:
        """`workers`, or if that is 0, the cores available to this process."""
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
        """The time limit in seconds, in sbatch's formats: minutes, m:s, h:m:s, days-h, days-h:m or days-h:m:s."""
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
    stage_to: str
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
                    "the job would be stopped as it starts"
                )
        return self


class Config(Section):
    """All of config.toml. `global` is a Python keyword, hence `global_`."""

    global_: Global = Field(alias="global")
    paths: Paths
    embedding_model: EmbeddingModel
    data: Data
    training_model: TrainingModel
    training: Training
    evaluation: Evaluation
    tuning: Tuning
    infrastructure: Infrastructure
    logging: Logging
    slurm: Slurm
    _templates: Paths | None = PrivateAttr(None)

    @property
    def templates(self) -> Paths:
        """[paths], absolute, but with their placeholders."""
        return self._templates or self.paths


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the most similar known name; empty if none is similar."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
