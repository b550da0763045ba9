"""A model's files: where they are, on the hub or in a folder, and what embeddings made with them are known by.

Without transformers, which takes seconds to import: a run that finds all its embeddings there needs no more than
this. Without torch and the hub's client too: submit.py looks at a model before it submits anything.
"""

import json
import sys
from pathlib import Path

from common.config import is_folder
from common.errors import PipelineError
from common.parquet import first_line
from common.provenance import digest_of
from common.sections import EmbeddingModel

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MIB = 2**20


def locate(name: str, revision: str, weights: bool = True) -> Path:
    """The folder of a model's files: `name` itself, or the hub's snapshot, which is downloaded if need be.

    Run once where there is a network, it serves machines that share the cache and have none. `weights`: or only
    what describes the model.
    """
    if is_folder(name):
        if not (Path(name) / "config.json").is_file():
            raise PipelineError(f"{name} is not a model's folder: it has no config.json")
        return Path(name)
    import huggingface_hub
    from huggingface_hub import errors as hub_errors
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # in the logs of a cluster
    page = f"https://huggingface.co/{name}"
    wanted = ["config.json", "preprocessor_config.json", *(WEIGHTS if weights else ())]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
    except hub_errors.GatedRepoError:
        raise PipelineError(
            f"{name} is gated: accept its licence at {page}\n"
            "then log in with `hf auth login`, or set HF_TOKEN to a token of that account"
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise PipelineError(
            f"{name} has no revision {revision}: see {page}/commits and set embedding_model.revision"
        ) from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise PipelineError(
            f"there is no model {name} on the hub that you may read\n"
            "mend embedding_model.name (folders are relative to config.toml); a private model needs HF_TOKEN"
        ) from None
    except hub_errors.LocalEntryNotFoundError:
        raise PipelineError(
            f"{name} at revision {revision} is not in the cache, and the hub cannot be reached from here\n"
            f"fetch it where there is a network: hf download {name} --revision {revision}; "
            "HF_HUB_OFFLINE=1 stays set on machines without one"
        ) from None
    except hub_errors.HfHubHTTPError as error:
        raise PipelineError(f"the hub does not answer for {name}: {first_line(error)}") from None


def identity(settings: EmbeddingModel, dtype: str) -> dict:
    """What embeddings depend on, for their provenance. A folder is known by its files, so it may be moved."""
    known = {"embedding_model.pooling": settings.pooling, "embedding_model.dtype": dtype}
    if not is_folder(settings.name):
        return {
            "embedding_model.name": settings.name,
            "embedding_model.revision": settings.revision,
            **known,
        }
    folder = locate(settings.name, settings.revision)
    return {"embedding_model.name": folder.name, "embedding_model.weights": weights_digest(folder), **known}


def weights_digest(folder: Path) -> str:
    """A digest of a model's configuration and of its weights by name, size, and first and last MiB."""
    parts: list[bytes | str] = []
    names = ("config.json", "preprocessor_config.json")
    for path in [folder / name for name in names if (folder / name).is_file()]:
        parts += [path.name, path.read_bytes()]
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(MIB)
            file.seek(max(0, size - MIB))
            parts += [path.name, str(size), head, file.read(MIB)]
    return digest_of(*parts)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise PipelineError(f"{path} cannot be read ({first_line(error)}): download the model again") from None
