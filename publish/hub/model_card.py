"""The model card: model_card.md filled in with the run's own facts."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from common import parquet, schemas
from common.config import is_folder
from common.sections import Config
from generate.pixels import Preprocessing
from train.evaluation.metric_names import TITLES

TEMPLATE = Path(__file__).with_name("model_card.md")
METHODS = {"raw": "raw backbone", "pca": "PCA", "whitening": "learned whitening", "trained": "this model"}
_LICENCES = {  # of the backbone's weights: prefix of its name on the hub -> fields of the card
    "facebook/dinov2": {"license": "apache-2.0"},
    "facebook/dinov3": {
        "license": "other",
        "license_name": "dinov3-license",
        "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
    },
}


def write(folder: Path, cfg: Config, checkpoint: dict, metrics: dict, preprocessing: Preprocessing) -> None:
    """README.md in `folder`. `metrics`: see train/evaluate.py."""
    terms = licence(cfg.embedding_model.name)
    data = ModelCardData(
        model_name=model_name(cfg),
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["image-retrieval", "visual-place-recognition", "street-view", "buildings"],
        base_model=None if is_folder(cfg.embedding_model.name) else cfg.embedding_model.name,
        eval_results=results(metrics),
        license=terms["license"],
        license_name=terms.get("license_name"),
        license_link=terms.get("license_link"),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=model_name(cfg),
        backbone=checkpoint["embedding_model"],
        on_hub=not is_folder(cfg.embedding_model.name),
        licence=data.license_name or data.license,
        checkpoint=checkpoint,
        preprocessing=preprocessing,
        images={split: parquet.num_rows(cfg.paths.merged_dir / f"{split}.parquet") for split in schemas.SPLITS},
        splits=parquet.read_provenance(cfg.paths.merged_dir / "test.parquet").config,
        training={
            key.removeprefix("training."): value
            for key, value in checkpoint["config"].items()
            if key.startswith("training.") and not isinstance(value, dict)
        },
        metrics=metrics,
        titles=list(TITLES.values()),
        table=[
            (METHODS.get(method, method), [told(values[key], key) for key in TITLES])
            for method, values in metrics["methods"].items()
        ]
        + [
            (f"{METHODS.get(a, a)} - {METHODS.get(b, b)}", [told(values[key], key, "+") for key in TITLES])
            for (a, b), values in differences(metrics)
        ],
    )
    (folder / "README.md").write_text(str(card).rstrip() + "\n")


def model_name(cfg: Config) -> str:
    """What the model is called in its card."""
    return f"building-embeddings-{Path(cfg.embedding_model.name).name}"


def licence(backbone: str) -> dict[str, str]:
    """The card's licence fields: the weights of the backbone are part of the model."""
    known = next((fields for prefix, fields in _LICENCES.items() if backbone.startswith(prefix)), None)
    return known or {"license": "other", "license_name": f"that-of-the-backbone-{Path(backbone).name.lower()}"}


def results(metrics: dict) -> list[EvalResult]:
    """The trained head's figures for the card's model-index, with their 95 % intervals where there are any."""
    found = []
    for key, title in TITLES.items():
        figure = metrics["methods"]["trained"][key]
        interval = {name: figure[name] for name in ("low", "high") if figure[name] is not None}
        found.append(
            EvalResult(
                task_type="image-feature-extraction",
                task_name="Retrieval of other views of the same building",
                dataset_type="3d-street-view",
                dataset_name="3D Street View, held-out test split",
                dataset_split="test",
                metric_type=key,
                metric_name=title,
                metric_value=figure["value"],
                metric_args=interval or None,
            )
        )
    return found


def differences(metrics: dict) -> list[tuple[tuple[str, str], dict]]:
    """The paired differences between the trained head and the linear baselines that it is measured against."""
    pairs = [("trained", "whitening"), ("trained", "raw")]
    return [(pair, metrics["differences"]["-".join(pair)]) for pair in pairs]


def told(figure: dict, key: str, sign: str = "") -> str:
    """A figure as text: "54.3 [52.1, 56.4]", in percent unless it is a rank. `sign`: "+" for a difference."""
    factor, digits = (1, 0) if key == "median_rank" else (100, 1)
    text = f"{figure['value'] * factor:{sign}.{digits}f}"
    if figure["low"] is None:
        return text
    return f"{text} [{figure['low'] * factor:{sign}.{digits}f}, {figure['high'] * factor:{sign}.{digits}f}]"
