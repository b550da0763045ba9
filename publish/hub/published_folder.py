"""The published folder: its contents, and the check that they belong together."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from common import errors, parquet, provenance
from common.config import is_folder, vector_files
from common.errors import PipelineError, StaleArtefact
from common.provenance import Provenance, Redo
from common.sections import Config, EmbeddingModel
from generate import backbone, model_files
from generate.model_files import PREPROCESSING
from generate.pixels import Preprocessing, read_config
from publish.model.configuration_spatial_embeddings import SpatialEmbeddingsConfig
from publish.model.modeling_spatial_embeddings import SpatialEmbeddingsHead, SpatialEmbeddingsModel
from train.evaluation.heads import head_of

MAX_SHARD_SIZE = "5GB"  # of the weights: larger files are slow to fetch, and to resume
# sentence-transformers takes the model's own output; without these files it averages the backbone's tokens
SENTENCE_TRANSFORMERS: dict[str, list | dict] = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {"image": {"method": "forward", "method_output_name": "pooler_output"}},
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
}


def refuse_mixture(test: Path, checkpoint_path: Path, checkpoint: dict, metrics_path: Path, metrics: dict) -> None:
    """Raises StaleArtefact unless the metrics are those of this checkpoint on the current test split."""
    evaluated = metrics["provenance"]["inputs"]
    current = {checkpoint_path: checkpoint["provenance"]["id"], test: parquet.read_provenance(test).id}
    for path, content_id in current.items():
        if evaluated.get(path.name) != content_id:
            raise StaleArtefact(
                f"{metrics_path} was made from an earlier version of {path}\n"
                f"evaluate again: {errors.command('train/evaluate.py', '--remake')}"
            )


def backbone_settings(cfg: Config, checkpoint_path: Path, checkpoint: dict) -> EmbeddingModel:
    """The backbone, in the dtype of the head's training embeddings. Raises StaleArtefact if those differ."""
    trained_on, settings = provenance.with_views(checkpoint["embedding_model"]), cfg.embedding_model
    dtype = trained_on.get("dtype", "float32") if settings.dtype == "auto" else settings.dtype
    identity = model_files.identity(settings, dtype)
    ours = {key.removeprefix("embedding_model."): value for key, value in identity.items()}
    if not is_folder(settings.name):  # the checkpoint records the commit that a branch or a tag stood for
        commit = model_files.locate(settings.name, settings.revision).name
        ours["revision"] = commit if trained_on.get("revision") == commit else ours["revision"]
    theirs, now = provenance.model_differences(trained_on, ours, ours)
    if theirs:
        raise StaleArtefact(
            f"{checkpoint_path} was trained on embeddings with {theirs}; the settings say {now}\n"
            "restore [embedding_model], or train on embeddings of the other model"
        )
    return settings.model_copy(update={"dtype": dtype})


def write_model(
    folder: Path, settings: EmbeddingModel, checkpoint_path: Path, checkpoint: dict
) -> Preprocessing | None:
    """Write weights, configuration and code to `folder`, as save_pretrained does, the preprocessing, and what
    sentence-transformers needs; of a head trained on vectors that another network has made, the head alone."""
    shape = {key: checkpoint[key] for key in ("input_dim", "hidden_dim", "output_dim", "dropout")}
    if vector_files(settings.name):
        alone = SpatialEmbeddingsHead(SpatialEmbeddingsConfig(**shape))
        alone.head = head_of(checkpoint)
        _save(alone, folder)
        return None
    loaded = backbone.load(settings, settings.dtype, torch.device("cpu"))
    if loaded.dim != checkpoint["input_dim"]:
        raise PipelineError(
            f"{checkpoint_path} has a head for {checkpoint['input_dim']} dimensions, but {settings.name} gives "
            f"{loaded.dim} with pooling = {settings.pooling}"
        )
    loaded.model.config._name_or_path = loaded.facts["model"]  # no path of this machine in the published files
    shape |= {"views": settings.views, "view_size": loaded.view_size}
    config = SpatialEmbeddingsConfig(loaded.model.config, settings.pooling, **shape)
    with torch.device("meta"):  # the structure alone: the weights are loaded already
        model = SpatialEmbeddingsModel(config)
    model.backbone, model.head = loaded.model, head_of(checkpoint)
    loaded.model.config.dtype = loaded.model.dtype  # the backbone's configuration in `config`
    _save(model, folder)
    preprocessing = read_config(loaded.folder, min(settings.views))
    for name, content in {PREPROCESSING: preprocessing, **SENTENCE_TRANSFORMERS}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return loaded.preprocessing


def _save(model: PreTrainedModel, folder: Path) -> None:
    try:
        model.eval().save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    except SafetensorError as error:  # the disk is full, for instance
        raise PipelineError(f"the weights cannot be written to {folder}: {error}\nfree space and rerun") from None
    for weights in folder.glob("*.safetensors"):  # save_pretrained makes them readable by their owner alone
        shutil.copymode(folder / "config.json", weights)


def is_done(folder: Path, record: Provenance, redo: Redo) -> bool:
    """Whether the folder is what a run that records `record` would write. Raises PipelineError if it is not,
    unless `redo` allows to replace it, or if this stage did not write it."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        existing = Provenance.from_json((folder / "provenance.json").read_text())
    except (OSError, ValueError, TypeError):
        raise PipelineError(
            f"{folder} was not written by this stage (it has no provenance.json), so it is not replaced\n"
            "move it away, or set paths.published_dir to another folder"
        ) from None
    return redo != "all" and parquet.matches(folder, existing, record, redo, "the whole folder is replaced")


def write_provenance(folder: Path, record: Provenance, facts: dict) -> None:
    """provenance.json, whose id is a digest of the model's files."""
    finished = record.finished(model_files.weights_digest(folder), {}, facts)
    (folder / "provenance.json").write_text(json.dumps(finished.to_dict(), indent=1) + "\n")
