"""Sending the Space (publish/space/) with an index and the name of its model to the hub."""

from pathlib import Path

from common import parquet
from common.errors import PipelineError
from generate import model_files
from generate.pixels import read_preprocessing
from publish.hub import push
from publish.retrieval import vector_index

SPACE = Path(__file__).parents[1] / "space"
INDEX = ("vectors.npy", "rows.parquet", "index.json")  # of publish/build_index.py; the app searches exactly


def of_space(published: Path, model_repo: str, index: Path) -> dict[str, Path | str]:
    """The files of a Space that searches `index` with the model that is published as `model_repo`.

    Raises PipelineError if there is no index, if it may hold photographs, or if another model made its vectors.
    """
    dim = model_files.read_json(published / "config.json")["output_dim"]
    weights = model_files.weights_digest(published)
    vector_index.refuse_other_model(vector_index.open(index), weights, dim, published)
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
    return push.upload(files, repo, "Publish the search", flag="--push-space", **kind)
