"""Sending files to a repository of the Hugging Face hub, among them the published model."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors

from common import errors
from common.errors import PipelineError, first_line
from publish.hub import model_card

Files = Mapping[str, Path | str]  # what is sent: name in the repository -> the file, or its text

# only these: reports and photographs in the folder stay here, as the dataset's terms demand
PATTERNS = (
    *("README.md", "config.json", "preprocessor_config.json", "provenance.json", model_card.FIGURES),
    *("configuration_spatial_embeddings.py", "modeling_spatial_embeddings.py", "projection_head.py"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("model*.safetensors", "model.safetensors.index.json"),
)


def of_model(folder: Path, repo: str) -> dict[str, Path | str]:
    """The files of a published folder that are sent to the hub; the card names the repository in its code."""
    if (folder / "preprocessor_config.json").exists() and not (folder / "modules.json").exists():
        raise PipelineError(  # sentence-transformers would take the backbone's vectors, without a word
            f"{folder} was published by an older version, without the files for sentence-transformers\n"
            f"publish it again: {errors.command('publish/convert_to_hf.py', '--overwrite')}"
        )
    files: dict[str, Path | str] = {
        path.name: path for pattern in PATTERNS for path in sorted(folder.glob(pattern)) if path.is_file()
    }
    if card := files.get(model_card.CARD):
        files[model_card.CARD] = model_card.for_repository(Path(card).read_text(), repo)
    return files


def listing(files: Files, url: str, folder: Path | None = None) -> str:
    """What would be sent to `url`, with sizes, and what in `folder` would stay."""
    sizes = {
        name: content.stat().st_size if isinstance(content, Path) else len(content.encode())
        for name, content in sorted(files.items())
    }
    lines = [f"to {url} (private, if it is new):"]
    lines += [f"{size:>15,} bytes  {name}" for name, size in sizes.items()]
    lines += [f"{sum(sizes.values()):>15,} bytes  in total"]
    if folder:
        lines += [f"stays here: {path.name}" for path in sorted(folder.iterdir()) if path.name not in files]
    return "\n".join(lines)


def columns_of_bytes(schema: pa.Schema) -> list[str]:
    """The names of the columns that hold bytes, or a part of which does: they may be photographs."""
    return [field.name for field in schema if _holds_bytes(field.type)]


def _holds_bytes(kind: pa.DataType) -> bool:
    parts = [kind.field(n).type for n in range(kind.num_fields)]
    if pa.types.is_dictionary(kind):
        parts.append(kind.value_type)
    is_bytes = (
        *(pa.types.is_binary, pa.types.is_large_binary),
        *(pa.types.is_binary_view, pa.types.is_fixed_size_binary),
    )
    return any(test(kind) for test in is_bytes) or any(map(_holds_bytes, parts))


def upload(
    files: Files, repo: str, message: str, *, replaced: Sequence[str] = (), flag: str = "--push", **kind: Any
) -> str:
    """Send files to the repository `repo` ("user/name"), a private one if it is new; the commit's URL.

    `replaced`: patterns of files of former uploads, which are deleted unless they are sent again. `flag`: of the
    command, for messages. `kind`: repo_type, "model" unless given, and space_sdk of a Space. Raises PipelineError.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True, **kind)
        with tempfile.TemporaryDirectory() as place:
            for name, content in files.items():
                path = Path(place) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    path.symlink_to(content.resolve())
                else:
                    path.write_text(content)
            done = api.upload_folder(
                repo_id=repo,
                folder_path=place,
                repo_type=kind.get("repo_type"),
                delete_patterns=list(replaced),
                commit_message=message,
            )
    except hub_errors.HFValidationError as error:
        advice = f"{flag} {repo} is not a valid repository name: {first_line(error)}"
    except (hub_errors.HfHubHTTPError, hub_errors.LocalTokenNotFoundError) as error:
        advice = f"the hub refuses {repo}: {first_line(error)}\n"
        advice += (
            "log in with `hf auth login`, or set HF_TOKEN to a token that may write there; the files are kept"
        )
    except (hub_errors.OfflineModeIsEnabled, hub_errors.HTTPError) as error:  # of its HTTP library
        advice = f"the hub cannot be reached from here: {first_line(error)}\n"
        advice += f"run it again with {flag} where there is a network, with HF_HUB_OFFLINE unset"
    else:
        return done.commit_url
    raise PipelineError(advice)


def push(folder: Path, repo: str) -> str:
    """Send a published folder to `repo`; the commit's URL. Raises PipelineError."""
    # of a former model: its weights would hide the shards of this one
    return upload(of_model(folder, repo), repo, "Publish building embeddings", replaced=PATTERNS)
