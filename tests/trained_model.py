"""A tiny model, trained as far as its files tell: everything up to the evaluation, whose figures are invented."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from embedding_setup import Setup, photographs
from invented_metrics import FIGURES, FOUND

from common import config, parquet, provenance, schemas, sections, stages
from generate import generate_embeddings
from publish.model.projection_head import ProjectionHead
from train.evaluation import metrics_json

JPEGS = photographs(7)
NOTHING = {key: {"value": 0.0, "low": 0.0, "high": 0.0} for key in FIGURES}


def write_merged(cfg: sections.Config) -> None:
    """All embeddings as each of the three splits, as merge_and_split has them."""
    parts = sorted(cfg.paths.embeddings_dir.glob("*.parquet"))
    rows = pa.concat_tables([parquet.read(path) for path in parts])
    rows = rows.append_column("cell_id", pa.array(np.zeros(rows.num_rows, np.int64)))
    dim = rows.schema.field("embedding").type.list_size
    for split in ("train", "val", "test"):
        made = provenance.record("merge_and_split", config.values(cfg, "data"), stages.ids(parts))
        with parquet.writer(cfg.paths.merged_dir / f"{split}.parquet", schemas.merged(dim), made) as out:
            out.append(rows)


def write_checkpoint(cfg: sections.Config, **changes) -> ProjectionHead:
    """A random head for the embeddings, as train.py saves it."""
    part = next(cfg.paths.embeddings_dir.glob("*.parquet"))
    made = parquet.read_provenance(part)
    model = {key.removeprefix("embedding_model."): v for key, v in made.config.items() if "embedding_model" in key}
    torch.manual_seed(1)
    sizes = {"input_dim": made.facts["dim"], "hidden_dim": 24, "output_dim": 16, "dropout": 0.1}
    head = ProjectionHead(**sizes).eval()
    with torch.no_grad():
        head.gain.fill_(0.5)
        head.mean.normal_(std=0.1)
    record = provenance.record("train", config.values(cfg, "training"), {}).finished("run-1", {})
    checkpoint = {
        "head": head.state_dict(),
        **sizes,
        "epoch": 3,
        "metrics": {"map@r": 0.3},
        "config": config.values(cfg, "training"),
        "embedding_model": {**model, "dim": made.facts["dim"], "image_size": made.facts["image_size"]},
        "baselines": {"pca": {}, "whitening": {}},
        "provenance": record.to_dict(),
        **changes,
    }
    path = cfg.paths.checkpoints_dir / "default" / "checkpoint_best.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return head


def write_metrics(cfg: sections.Config, checkpoint_id: str = "run-1") -> dict:
    """metrics.json as evaluate.py writes it, with invented figures."""
    test = parquet.read_provenance(cfg.paths.merged_dir / "test.parquet").id
    made = provenance.record("evaluate", {}, {"checkpoint_best.pt": checkpoint_id, "test.parquet": test})
    metrics = {
        **FOUND,
        "methods": {**dict.fromkeys(("raw", "pca", "whitening"), NOTHING), "trained": FIGURES},
        "differences": dict.fromkeys(("trained-whitening", "trained-raw"), FIGURES),
        "provenance": made.finished("figures-1", {}).to_dict(),
    }
    path = cfg.paths.evaluation_dir / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(metrics_json.to_json(metrics))
    return metrics


class Trained(Setup):
    """A folder in which everything up to the evaluation is done; `head` is the trained one."""

    def __init__(self, root: Path, family: str = "dinov2", **settings):
        super().__init__(root, {"0088": JPEGS}, family, data__rows_per_part=100, **settings)
        generate_embeddings.main(self.flags)
        write_merged(self.cfg)
        self.head = write_checkpoint(self.cfg)
        self.metrics = write_metrics(self.cfg)

    def embeddings(self) -> torch.Tensor:
        column = parquet.read(self.cfg.paths.merged_dir / "test.parquet")["embedding"]
        return torch.from_numpy(parquet.to_matrix(column).astype(np.float32))

    def vectors(self) -> np.ndarray:
        with torch.inference_mode():
            return self.head(self.embeddings()).numpy()
