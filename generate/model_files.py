"""A model's files, on the hub or in a folder, and how they identify the embeddings made with them.

Imports neither transformers, torch nor the hub's client, which take seconds: submit.py, and runs without work,
need only this.
"""

import json
import sys
from pathlib import Path

from common import parquet
from common.config import is_folder, vector_files
from common.errors import PipelineError, first_line
from common.parquet import content_id
from common.provenance import digest_of
from common.sections import EmbeddingModel

PREPROCESSING = "preprocessor_config.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MIB = 2**20
EMBEDDING = "embedding"  # the column of another network's vectors


def locate(name: str, revision: str, weights: bool = True) -> Path:
    """The folder of a model's files, with or without `weights`: `name`, or the hub's snapshot, from its cache or
    downloaded. Raises PipelineError, with advice, if the model is unavailable.
    """
    if vector_files(name):
        raise PipelineError(
            f"{name} holds vectors that another network has made: there is no backbone to load or estimate\n"
            "to use one, set embedding_model.name to its folder or its name on the hub"
        )
    if is_folder(name):
        if not (Path(name) / "config.json").is_file():
            raise PipelineError(f"{name} is not a model's folder: it has no config.json")
        return Path(name)
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # noise in the logs of a cluster
    page = f"https://huggingface.co/{name}"
    patterns = ["config.json", PREPROCESSING, *(WEIGHTS if weights else ())]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        message = f"{name} is gated: accept its licence at {page}\n"
        message += "then log in with `hf auth login`, or set HF_TOKEN to a token of that account"
    except errors.RevisionNotFoundError:
        message = f"{name} has no revision {revision}: see {page}/commits and set embedding_model.revision"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        message = f"the hub has no model {name} that you may read\n"
        message += "fix embedding_model.name (folders are relative to config.toml); a private model needs HF_TOKEN"
    except errors.LocalEntryNotFoundError:
        message = f"{name} at revision {revision} is not in the cache, and the hub cannot be reached from here\n"
        message += f"fetch it where there is a network: hf download {name} --revision {revision}; "
        message += "leave HF_HUB_OFFLINE=1 set on machines without one"
    except errors.HfHubHTTPError as error:
        message = f"the hub returned an error for {name}: {first_line(error)}"
    raise PipelineError(message)


def identity(settings: EmbeddingModel, dtype: str) -> dict:
    """What embeddings depend on, for their provenance. A folder is identified by its files: it may be moved. Of
    vectors that another network has made, the settings of a backbone say nothing."""
    if paths := vector_files(settings.name):
        content = digest_of(*sorted(map(content_id, paths)))
        name = Path(settings.name).name.removesuffix(".parquet")
        return {"embedding_model.name": name, "embedding_model.weights": content}
    if is_folder(settings.name):
        folder = locate(settings.name, settings.revision)
        model: dict = {"name": folder.name, "weights": weights_digest(folder)}
    else:
        model = {"name": settings.name, "revision": settings.revision}
    model |= {"pooling": settings.pooling, "views": settings.views, "dtype": dtype}
    return {f"embedding_model.{key}": value for key, value in model.items()}


def embedding_width(settings: EmbeddingModel) -> int | None:
    """The dimension of a model's embeddings, from its folder or the hub's cache, or of a table's vectors; None if
    they do not tell."""
    if paths := vector_files(settings.name):
        return vector_width(paths)
    path = Path(settings.name, "config.json")
    if not is_folder(settings.name):
        import huggingface_hub

        cached = huggingface_hub.try_to_load_from_cache(settings.name, "config.json", revision=settings.revision)
        path = Path(cached if isinstance(cached, str) else "")
    if not path.is_file():
        return None
    width = read_json(path).get("hidden_size")
    return width * (2 if settings.pooling == "cls_mean" else 1) if isinstance(width, int) else None


def vector_width(paths: list[Path]) -> int | None:
    """The dimension of the first vector in a table's files; None without rows or vectors."""
    for path in paths:
        with parquet.open_file(path, MIB) as file:
            if EMBEDDING in file.schema_arrow.names and file.metadata.num_rows:
                rows = parquet.batches_of(path, file, range(file.num_row_groups), [EMBEDDING], 1)
                return parquet.embedding_matrix(path, next(rows), EMBEDDING, lambda _: "the first row").shape[1]
    return None


def weights_digest(folder: Path) -> str:
    """A digest of a model's configuration, and of its weights by name, size, and first and last MiB."""
    parts: list[bytes | str] = []
    for path in (folder / "config.json", folder / PREPROCESSING):
        if path.is_file():
            parts += [path.name, path.read_bytes()]
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(MIB)
            file.seek(max(0, size - MIB))
            parts += [path.name, str(size), head, file.read(MIB)]
    return digest_of(*parts)


def read_json(path: Path) -> dict:
    """The content of a model's JSON file. Raises PipelineError if it is absent or damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        advice = "download the model again, or copy this file from the model that it was derived from"
        raise PipelineError(f"{path} cannot be read ({first_line(error)})\n{advice}") from None
