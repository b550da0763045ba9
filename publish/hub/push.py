"""Sending the published folder to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors

from common.errors import PipelineError
from common.parquet import first_line

# only these: reports and photographs in the folder stay here, as the dataset's terms demand
PATTERNS = (
    *("README.md", "config.json", "preprocessor_config.json", "provenance.json"),
    *("configuration_spatial_embeddings.py", "modeling_spatial_embeddings.py", "projection_head.py"),
    *("model*.safetensors", "model.safetensors.index.json"),
)


def going(folder: Path) -> list[Path]:
    """The files of the folder that are sent to the hub."""
    return sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})


def listing(folder: Path, repo: str) -> str:
    """What would be sent where, with sizes, and what would stay."""
    files = going(folder)
    total = sum(path.stat().st_size for path in files)
    lines = [f"to https://huggingface.co/{repo} (private, if it is new):"]
    lines += [f"{path.stat().st_size:>15,} bytes  {path.name}" for path in files]
    lines += [f"{total:>15,} bytes  in total"]
    lines += [f"stays here: {path.name}" for path in sorted(folder.iterdir()) if path not in files]
    return "\n".join(lines)


def push(folder: Path, repo: str) -> str:
    """Send the folder to the repository `repo` ("name/model"); the commit's URL. Raises PipelineError."""
    api = HfApi()
    try:
        api.create_repo(repo, repo_type="model", private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[path.name for path in going(folder)],  # PATTERNS would match in subfolders too
            delete_patterns=list(PATTERNS),  # of a former model: its weights would hide the shards of this one
            commit_message="Publish building embeddings",
        )
    except hub_errors.HFValidationError as error:
        message = f"--push {repo} is not a valid repository name: {first_line(error)}"
    except (hub_errors.HfHubHTTPError, hub_errors.LocalTokenNotFoundError) as error:
        message = (
            f"the hub refuses {repo}: {first_line(error)}\nlog in with `hf auth login`, or set HF_TOKEN to a "
        )
        message += "token that may write there; the folder is kept"
    except (hub_errors.OfflineModeIsEnabled, hub_errors.HTTPError) as error:  # of its HTTP library
        message = f"the hub cannot be reached from here: {first_line(error)}\n"
        message += f"push {folder} where there is a network, with HF_HUB_OFFLINE unset"
    else:
        return done.commit_url
    raise PipelineError(message)
