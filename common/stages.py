"""A stage of the chain, declared once: its outputs, inputs and settings, and how much of its work is done.

Each stage's script holds its declaration, `STAGE`. The script, slurm/submit.py, slurm/status.py and the tables of
the documentation use it. Imports nothing heavy, so `--help` is instant.
"""

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common import files, provenance
from common.errors import PipelineError
from common.provenance import Provenance

if TYPE_CHECKING:
    from common.sections import Config


@dataclass(frozen=True)
class Output:
    """An output file of a stage, and its record if made with these settings and inputs."""

    path: Path
    record: Provenance
    facts: dict = field(default_factory=dict)  # also required in the record of a finished file
    companions: tuple[Path, ...] = ()  # files without a record that belong to it


@dataclass(frozen=True)
class Stage:
    """One stage. Its work is divided into tasks: task i of n of a job array is shard i."""

    name: str
    folder: Callable[["Config"], Path]  # where it writes: two runs must not write to it at once
    # of task i of n; raises PipelineError or OSError while its inputs are missing
    outputs: Callable[["Config", int, int], Iterable[Output]]
    settings: tuple[str, ...] = ()  # "section.key" or "section", that affect the output
    recorded: Callable[["Config"], dict] | None = None  # their values in records; None: as configured
    auto: tuple[str, ...] = ()  # settings whose "auto" is resolved by the machine that runs the stage
    progress: Callable[["Config"], tuple[int, int, str]] | None = (
        None  # (done, total, unit), if not counted in files
    )
    reads: tuple[Path, ...] = ()  # folders of its inputs beside those of the steps that it needs
    # the records of what is in no file of ours, such as a study; `progress` says then whether it is done
    existing: Callable[["Config"], dict[Path, Provenance]] | None = None

    def record(self, cfg: "Config", inputs: dict[str, str]) -> Provenance:
        """The record of a file that this stage makes from `inputs`: name -> identity."""
        return provenance.record(self.name, self.recorded_settings(cfg), inputs)

    def recorded_settings(self, cfg: "Config") -> dict:
        from common import config

        return self.recorded(cfg) if self.recorded else config.values(cfg, *self.settings)

    def outputs_of(self, cfg: "Config", task: int = 0, num_tasks: int = 1) -> list[Output] | None:
        """The files of a task; None if they cannot be listed yet because inputs are missing."""
        outputs, is_all = self.known_outputs(cfg, task, num_tasks)
        return outputs if is_all else None

    def known_outputs(self, cfg: "Config", task: int = 0, num_tasks: int = 1) -> tuple[list[Output], bool]:
        """The files of a task, as far as its inputs exist, and whether these are all."""
        found: list[Output] = []
        try:
            found += self.outputs(cfg, task, num_tasks)
        except (OSError, PipelineError):
            return found, False
        return found, True

    def is_done(self, cfg: "Config", task: int = 0, num_tasks: int = 1) -> bool:
        """Whether a task is complete."""
        if self.existing:
            assert self.progress is not None
            done, total, _ = self.progress(cfg)
            return done >= total
        outputs = self.outputs_of(cfg, task, num_tasks)
        return outputs is not None and all(self.is_current(output) for output in outputs)

    def records(self, cfg: "Config") -> dict[Path, Provenance]:
        """The records of the files in its folder, whatever they were made with."""
        folder, found = self.folder(cfg), {}
        if self.existing:
            with contextlib.suppress(OSError, PipelineError):  # damaged, or out of reach: the stage says so
                found = self.existing(cfg)
            return found
        for path in [*sorted(folder.glob("*.parquet")), *sorted(folder.glob("*.json"))]:
            with contextlib.suppress(OSError, PipelineError):  # damaged, or not ours
                record = record_of(path)
                if record.stage == self.name:
                    found[path] = record
        return found

    def is_current(self, output: Output) -> bool:
        """Whether a file exists, is complete, and was made with these settings from these inputs."""
        try:
            existing = record_of(output.path)
        except (OSError, PipelineError):
            return False  # missing, damaged or not ours: the stage itself reports which
        is_finished = all(existing.facts.get(name) == value for name, value in output.facts.items())
        is_finished &= all(map(files.is_whole, output.companions))
        return is_finished and not provenance.differences(existing, self.expected(existing, output.record))

    def expected(self, existing: Provenance, record: Provenance) -> Provenance:
        """`record`, with the values of an existing file for what the machine that runs the stage decides."""
        undecided = {key for key in self.auto if record.config.get(key) == "auto"} & existing.config.keys()
        return replace(record, config={**record.config, **{key: existing.config[key] for key in undecided}})


def ids(paths: Iterable[Path]) -> dict[str, str]:
    """File name -> identity, for a record."""
    return {path.name: identity(path) for path in paths}


def identity(path: Path) -> str:
    """The identity of an input file in records: its own id if a stage of ours wrote it."""
    return record_of(path).id if path.suffix in (".parquet", ".json") else provenance.identity(path)


def record_of(path: Path) -> Provenance:
    """The record in a Parquet file's footer or in a JSON file.

    Raises OSError or PipelineError if there is none.
    """
    if path.suffix == ".parquet":
        from common import parquet

        return parquet.read_provenance(path)
    try:
        content = json.loads(path.read_text())
        return Provenance.from_dict(content.get("provenance", content))
    except (ValueError, AttributeError):
        raise PipelineError(f"{path} is damaged or not ours") from None
