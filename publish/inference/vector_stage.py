"""New data through a published model, as a stage: its parts, and which shard makes each.

Loads neither torch nor the model: submit.py and status.py ask, too.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from common import provenance, schemas
from common.config import values
from common.provenance import Provenance
from common.sections import Config
from common.stages import Output, Stage
from generate.model_files import weights_digest
from publish.inference import model_record
from publish.inference.image_sources import ImageSource
from publish.inference.vector_tables import EMBEDDING, TableSource

FLAGS = ("model", "column", "id", "valid")  # of the scripts, beside input and out


@dataclass(frozen=True)
class VectorPart:
    """Rows start..stop of a source, and the file for their vectors."""

    source: ImageSource | TableSource
    start: int
    stop: int
    target: Path
    record: Provenance

    @property
    def count(self) -> int:
        return self.stop - self.start

    def schema(self, dim: int) -> pa.Schema:
        return self.source.schema.append(pa.field(EMBEDDING, schemas.vector(pa.float32(), dim)))


def divided(
    script: str, sources: Iterable[ImageSource | TableSource], args: Namespace, cfg: Config
) -> Iterator[tuple[ImageSource | TableSource, list[VectorPart]]]:
    """Each source with all its parts, which do not depend on the number of shards.

    Shard i of n makes part i, i + n, i + 2n, ..., counted over all sources. Raises PipelineError if there is no
    published model.
    """
    folder = model_record.folder_of(cfg, args.model)
    settings = {"model.weights": weights_digest(folder)}
    settings |= values(cfg, "embedding_model.dtype", "data.rows_per_part")
    for source in sources:
        parts = []
        for number, (start, stop) in enumerate(source.parts(cfg.data.rows_per_part)):
            record = provenance.record(script, {**settings, **source.settings}, source.identity(start, stop))
            target = args.out / f"{source.name}-{number}.parquet"
            parts.append(VectorPart(source, start, stop, target, record))
        yield source, parts


def stage_of(script: str, sources: Callable[[Namespace, Config], Iterable], args: Namespace, cfg: Config) -> Stage:
    """What a script writes with these arguments and settings, as a stage of the chain."""

    @functools.cache  # for all shards: the input is listed once
    def outputs() -> list[Output]:
        parts = [part for _, parts in divided(script, sources(args, cfg), args, cfg) for part in parts]
        return [Output(part.target, part.record) for part in parts]

    folder = args.input if args.input.is_dir() else args.input.parent
    return Stage(
        script,
        lambda _: args.out.resolve(),
        lambda _, task, num_tasks: outputs()[task::num_tasks],
        auto=("embedding_model.dtype",),
        reads=(folder.resolve(), (args.model or cfg.paths.published_dir).resolve()),
    )


def words_of(args: Namespace) -> tuple[str, ...]:
    """A script's arguments as words of a command line that may be run from any folder."""
    chosen = {name: value for name in FLAGS if (value := getattr(args, name, None))}
    flags = [word for name, value in chosen.items() for word in (f"--{name}", _absolute(value))]
    return (_absolute(args.input), _absolute(args.out), *flags, *(["--remake"] if args.redo else []))


def _absolute(value: Path | str) -> str:
    return str(value.absolute() if isinstance(value, Path) else value)
