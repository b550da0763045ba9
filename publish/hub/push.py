"""The published folder on the Hugging Face hub: what of it goes there, and sending it."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors

from common.errors import PipelineError
from common.parquet import first_line

# only these: a report, a sheet or a photograph that lies in the folder stays here, as the dataset's terms demand
PATTERNS = (
    "README.md",
    "config.json",
    "preprocessor_config.json",
    "provenance.json",
    "configuration_spatial_embeddings.py",
    "modeling_spatial_embeddings.py",
    "projection_head.py",
    "model*.safetensors",
    "model.safetensors.index.json",
)


def going(folder: Path) -> list[Path]:
    """The files of the folder that go to the hub."""
    return sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})


def listing(folder: Path, repo: str) -> str:
    """What would go where, with sizes, and what would stay."""
    files = going(folder)
    total = sum(path.stat().st_size for path in files)
    lines = [f"to https://huggingface.co/{repo} (private, if it is new):"]
    lines += [f"{path.stat().st_size:>15,} bytes  {path.name}" for path in files]
    lines += [f"{total:>15,} bytes  in all"]
    lines += [f"stays here: {path.name}" for path in sorted(folder.iterdir()) if path not in files]
    return "\n".join(lines)


def push(folder: Path, repo: str) -> str:
    """Send the folder to the hub's repository `repo` ("name/model"); the address of what is there then.

    Raises PipelineError, with what to do, if the hub cannot be reached or refuses.
    """
    api = HfApi()
    try:
        api.create_repo(repo, repo_type="model", private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[path.name for path in going(folder)],  # as patterns they match in subfolders too
            delete_patterns=list(PATTERNS),  # of a former model: one file of weights hides the shards of another
            commit_message="Publish building embeddings",
        )
    except hub_errors.HFValidationError as error:
        raise PipelineError(f"--push {repo} cannot be a repository's name: {first_line(error)}") from None
    except (hub_errors.HfHubHTTPError, hub_errors.LocalTokenNotFoundError) as error:
        raise PipelineError(
            f"the hub refuses {repo}: {first_line(error)}\n"
            "log in with `hf auth login`, or set HF_TOKEN to a token that may write there; the folder is kept"
        ) from None
    except (hub_errors.OfflineModeIsEnabled, hub_errors.HTTPError) as error:  # of the client's library
        raise PipelineError(
            f"the hub cannot be reached from here: {first_line(error)}\n"
            f"push {folder} where there is a network, with HF_HUB_OFFLINE unset"
        ) from None
    return done.commit_url
