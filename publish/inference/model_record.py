"""A published model's folder, and what it says of the model. Loads neither torch nor the model, for submit.py."""

from pathlib import Path

from common import parquet, provenance
from common.errors import PipelineError, StaleArtefact
from common.sections import Config
from generate import model_files


def folder_of(cfg: Config, argument: Path | None) -> Path:
    """The published model's folder: --model, or the settings'. Raises PipelineError if it holds none."""
    folder = (argument or cfg.paths.published_dir).resolve()
    config = folder / "config.json"
    kind = model_files.read_json(config).get("model_type") if config.is_file() else None
    if kind != "spatial_embeddings":
        contents = f"a model of type {kind}" if kind else "no config.json"
        raise PipelineError(
            f"{folder} holds no published model ({contents})\n"
            "run publish/convert_to_hf.py, or name the model's folder with --model"
        )
    return folder


def evaluation_of(folder: Path) -> str | None:
    """The id of the metrics.json that the model was published with; None if its folder does not say."""
    return _record(folder)["inputs"].get("metrics.json")


def refuse_other_embeddings(folder: Path, path: Path) -> None:
    """Raise StaleArtefact if the file at `path` holds embeddings by another backbone, or of other views, than the
    head in `folder` was trained on. Nothing is known of files that other programs wrote.
    """
    facts = _record(folder)["facts"]
    ours = provenance.embedding_model(parquet.read_provenance(path)) if parquet.has_provenance(path) else {}
    if "trained_on" not in facts or "name" not in ours:
        return
    theirs = provenance.with_views(facts["trained_on"]["embedding_model"])
    keys = ("name", "revision", "weights", "pooling", "views")
    held, wanted = provenance.model_differences(ours, theirs, keys)
    if held:
        raise StaleArtefact(
            f"{path} holds embeddings with {held}; the head in {folder} was trained on embeddings with {wanted}\n"
            "use embeddings of the same backbone and views, or a column of images"
        )


def _record(folder: Path) -> dict:
    """What provenance.json says; inputs and facts are empty where it says nothing."""
    path = folder / "provenance.json"
    return {"inputs": {}, "facts": {}, **(model_files.read_json(path) if path.is_file() else {})}
