"""The published model, as the scripts of this repository load it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common import parquet, provenance
from common.errors import PipelineError, StaleArtefact
from common.sections import Config
from generate import backbone, model_files
from generate.pixels import Preprocessing, read_preprocessing
from publish.modeling_spatial_embeddings import SpatialEmbeddingsModel


@dataclass(frozen=True)
class Published:
    """A published model in inference mode."""

    model: SpatialEmbeddingsModel
    preprocessing: Preprocessing
    device: torch.device

    @torch.inference_mode()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) float32 -> unit vectors, (N, dim) float32."""
        return self.model(pixel_values).pooler_output

    @torch.inference_mode()
    def project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Stored embeddings, (N, input_dim) -> unit vectors, (N, dim) float32, on the CPU."""
        return self.model.project(embeddings.to(self.device)).cpu()


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


def load(folder: Path, dtype: str, device: torch.device, views: list[float] | None = None) -> Published:
    """The model in `folder`, with other `views` than its own if given.

    Raises PipelineError if files are missing or damaged.
    """
    preprocessing = read_preprocessing(folder)
    model = backbone.load_weights(SpatialEmbeddingsModel, folder, dtype)
    if views:
        model.config.views, model.config.view_size = views, model.config.view_size or preprocessing.image_size
    return Published(model.eval().to(device), preprocessing, device)
