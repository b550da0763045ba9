"""Sending the Space (publish/space/) with an index and the name of its model to the hub."""

import json
from pathlib import Path

from common import errors, parquet
from common.errors import PipelineError, StaleArtefact
from generate.model_files import weights_digest
from generate.pixels import read_preprocessing
from publish.hub import push

SPACE = Path(__file__).parents[1] / "space"
INDEX = ("vectors.npy", "rows.parquet", "index.json")  # of publish/build_index.py; the app searches exactly


def of_space(published: Path, model_repo: str, index: Path) -> dict[str, Path | str]:
    """The files of a Space that searches `index` with the model that is published as `model_repo`.

    Raises PipelineError if there is no index, if it may hold photographs, or if another model made its vectors.
    """
    for name in INDEX:
        parquet.require(index / name, "publish/build_index.py")
    if json.loads((index / "index.json").read_text())["model"] not in ("unknown", weights_digest(published)):
        raise StaleArtefact(
            f"{index} has vectors by another model than {published}\n"
            f"build it again: {errors.command('publish/build_index.py', '--remake')}"
        )
    with parquet.open_file(index / "rows.parquet") as file:
        columns = file.schema_arrow
    if binary := push.columns_of_bytes(columns):
        raise PipelineError(
            f"{index}/rows.parquet has columns of bytes, which may be photographs: {', '.join(binary)}\n"
            "build the index from vectors without these columns"
        )
    needs = (SPACE / "requirements.txt").read_text()
    if read_preprocessing(published).rescale_first:
        needs += "torchvision>=0.23\n"  # which the processor of DINOv3 is written with
    card = (SPACE / "README.md").read_text().replace("MODEL_NAME", model_repo)
    app: dict[str, Path | str] = {"README.md": card, "requirements.txt": needs, "app.py": SPACE / "app.py"}
    return app | {"MODEL": f"{model_repo}\n"} | {name: index / name for name in INDEX}


def push_space(files: push.Files, repo: str) -> str:
    """Send the files of `of_space` to the Space `repo`, a private one if it is new; the commit's URL."""
    kind = {"repo_type": "space", "space_sdk": "gradio"}
    return push.upload(files, repo, "Publish the search", replaced=[*files], flag="--push-space", **kind)
