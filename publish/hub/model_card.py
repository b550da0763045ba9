"""The model card: model_card.md filled in with the facts of the run, and its picture."""

from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from common import parquet, schemas
from common.config import is_folder
from common.sections import Config
from generate.pixels import Preprocessing
from publish.hub import card_figures
from publish.inference import model_sizes
from publish.model.configuration_spatial_embeddings import SpatialEmbeddingsConfig
from publish.model.modeling_spatial_embeddings import SpatialEmbeddingsHead, SpatialEmbeddingsModel
from train.evaluation.metric_names import BUILDING_METRICS, TITLES, shown_recalls

CARD, FIGURES = "README.md", "results.png"
REPOSITORY = "https://github.com/embedding-pipeline/embedding-pipeline"
PLACE_OF_THE_MODEL = "`PATH` is the folder that holds this card, or the model's name on the hub."
TEMPLATE = Path(__file__).with_name("model_card.md")
METHODS = {"raw": "raw backbone", "pca": "PCA", "whitening": "learned whitening", "trained": "this model"}
SEARCHES = {
    "image_to_building": "one image",
    "half_to_half": "half of a building's images, among the other halves",
}
_LICENCES = {  # of the backbone's weights: prefix of its name on the hub -> fields of the card
    "facebook/dinov2": {
        "license": "apache-2.0",
        "license_link": "https://github.com/facebookresearch/dinov2/blob/main/LICENSE",
    },
    "facebook/dinov3": {
        "license": "other",
        "license_name": "dinov3-license",
        "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
    },
}


def write(folder: Path, cfg: Config, checkpoint: dict, metrics: dict, preprocessing: Preprocessing | None) -> None:
    """README.md and results.png in `folder`, which holds the model. `metrics`: see train/evaluate.py;
    `preprocessing`: None for a head alone."""
    backbone, on_hub = checkpoint["embedding_model"]["name"], not is_folder(cfg.embedding_model.name)
    test = parquet.read_provenance(cfg.paths.merged_dir / "test.parquet")
    imported = test.facts.get("imported", [])  # sets of photographs that are not the dataset's
    has_tars = not imported or sum(name.startswith("intermediates/") for name in test.inputs) > len(imported)
    datasets, titles = [*(["3D Street View"] * has_tars), *imported], shown_titles(metrics)
    name = f"building-embeddings-{Path(backbone).name}"
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if preprocessing else "feature-extraction",
        tags=["image-retrieval", "visual-place-recognition", "street-view", "buildings"],
        base_model=backbone if on_hub else None,
        language="en",  # of this card: the hub asks for it
        datasets=[slug(dataset) for dataset in datasets],
        eval_results=results(metrics, datasets),
        **(licence(backbone) if preprocessing else {}),  # type: ignore[arg-type]
    )
    table = [(METHODS.get(method, method), values, "") for method, values in metrics["methods"].items()]
    for other in ("whitening", "raw"):  # paired differences from the linear baselines
        table.append(
            (f"{METHODS['trained']} minus {METHODS[other]}", metrics["differences"][f"trained-{other}"], "+")
        )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        place_of_the_model=PLACE_OF_THE_MODEL,
        backbone=checkpoint["embedding_model"],
        on_hub=on_hub,
        licence=data.license_name or data.license,
        checkpoint=checkpoint,
        preprocessing=preprocessing,
        views=cfg.embedding_model.views,
        shares=", ".join(f"{100 * share:g} %" for share in cfg.embedding_model.views),
        images={split: parquet.num_rows(cfg.paths.merged_dir / f"{split}.parquet") for split in schemas.SPLITS},
        splits=test.config | {"data.split_by": test.facts.get("split_by", test.config.get("data.split_by"))},
        imported=imported,
        has_tars=has_tars,
        training={
            key.removeprefix("training."): value
            for key, value in checkpoint["config"].items()
            if key.startswith("training.") and not isinstance(value, dict)
        },
        metrics=metrics,
        titles=list(titles.values()),
        table=[(row, [as_text(values[key], key, sign) for key in titles]) for row, values, sign in table],
        buildings=of_buildings(metrics),
        thresholds=card_figures.thresholds(metrics["similarity_histograms"]),
        pairs={kind: sum(metrics["similarity_histograms"][kind]) for kind in ("matches", "non_matches")},
        sizes=sizes(folder, preprocessing),
        figures=FIGURES,
        repository=REPOSITORY,
    )
    card_figures.draw(folder / FIGURES, metrics, METHODS)
    (folder / CARD).write_text(str(card).rstrip() + "\n")


def for_repository(card: str, repo: str) -> str:
    """The card with the name of the hub's repository in its code."""
    return card.replace(f"{PLACE_OF_THE_MODEL}\n\n", "").replace("PATH", repo)


def shown_titles(metrics: dict) -> dict[str, str]:
    """The metrics that tell something in a gallery of this size, and how they are printed."""
    recalls = shown_recalls(metrics["counts"]["gallery"])
    return {key: title for key, title in TITLES.items() if key in recalls or not key.startswith("recall@")}


def of_buildings(metrics: dict) -> dict[str, list]:
    """The table of the trained head's search for buildings: "titles", and "rows" of a name and figures."""
    found = metrics["building_level"]
    keys = [key for key in BUILDING_METRICS if key in shown_recalls(found["buildings"])]
    rows = [
        (what, [as_text(found[search]["methods"]["trained"][key], key) for key in keys])
        for search, what in SEARCHES.items()
    ]
    return {"titles": [TITLES[key] for key in keys], "rows": rows}


def sizes(folder: Path, preprocessing: Preprocessing | None) -> dict[str, int]:
    """Parameters of the backbone and of the head, the weights' bytes, and the operations for an image."""
    config = SpatialEmbeddingsConfig.from_pretrained(folder)
    with torch.device("meta"):  # counted without their values
        if preprocessing:
            model, height_width = SpatialEmbeddingsModel(config), preprocessing.image_size
            flops, _ = model_sizes.measure(model.eval(), torch.empty(1, 3, *height_width))
        else:
            model, flops = SpatialEmbeddingsHead(config), 0
    parameters, head = (sum(p.numel() for p in part.parameters()) for part in (model, model.head))
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"backbone": parameters - head, "head": head, "bytes": weights, "flops": flops}


def slug(name: str) -> str:
    """A name as the hub's metadata wants it."""
    return name.lower().replace(" ", "-")


def licence(backbone: str) -> dict[str, str]:
    """The card's licence fields: the model contains the weights of the backbone."""
    unknown = {"license": "other", "license_name": f"that-of-the-backbone-{Path(backbone).name.lower()}"}
    return next((fields for prefix, fields in _LICENCES.items() if backbone.startswith(prefix)), unknown)


def results(metrics: dict, datasets: list[str]) -> list[EvalResult]:
    """The trained head's figures for the card's model-index, with 95 % intervals if there are any."""
    return [
        EvalResult(
            task_type="image-feature-extraction",
            task_name="Retrieval of other views of the same building",
            dataset_type=slug("-".join(datasets)),
            dataset_name=f"{', '.join(datasets)}, held-out test split",
            dataset_split="test",
            metric_type=key,
            metric_name=title,
            metric_value=figure["value"],
            metric_args={end: figure[end] for end in ("low", "high") if figure[end] is not None} or None,
        )
        for key, title in shown_titles(metrics).items()
        for figure in (metrics["methods"]["trained"][key],)
    ]


def as_text(figure: dict, key: str, sign: str = "") -> str:
    """A figure like "54.3 [52.1, 56.4]", in percent unless it is a rank. `sign`: "+" for a difference."""
    factor, digits = (1, 0) if key == "median_rank" else (100, 1)
    present = [figure[part] for part in ("value", "low", "high") if figure[part] is not None]
    value, *interval = [f"{factor * number:{sign}.{digits}f}" for number in present]
    return f"{value} [{', '.join(interval)}]" if interval else value
