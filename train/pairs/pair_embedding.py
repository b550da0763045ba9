"""The embeddings of the test set's images: each image of the list once, by the backbone of the settings.

Imports transformers, in seconds: only where there is work.
"""

import pyarrow as pa
import torch

from common import devices, schemas
from common.imagery import verified_pairs
from common.imagery.verified_pairs import PairFiles
from common.provenance import Provenance
from common.schemas import Reject, Rejected
from common.sections import Config
from generate import backbone, embedding_parts, loop
from train.pairs.pair_images import SUFFIXES, embeddings_path


def embed(cfg: Config, source: PairFiles, kind: str, device: torch.device, record: Provenance) -> None:
    """Write `embeddings_path`: a row for each image of the list that can be decoded; before it, the rejects."""
    pairs, _ = verified_pairs.parse(verified_pairs.listed_in(source))
    names = {name + SUFFIXES[kind] for column in ("first", "second") for name in pairs[column].to_pylist()}
    ordered = sorted(names, key=lambda name: (source.places.get(name, (-1, 0))[0], name))  # as in the tar

    def read(start: int, stop: int) -> list[bytes | Rejected]:
        missing = Rejected(Reject.IMAGE_MISSING, f"{source.path} has no such file")
        return [missing if content is None else content for content in source.read(ordered[start:stop])]

    model = backbone.load(cfg.embedding_model, devices.resolve_dtype(cfg.embedding_model.dtype, device), device)
    images = pa.table({"image": pa.array(ordered, pa.string())})
    schema = images.schema.append(pa.field("embedding", schemas.vector(pa.float16(), model.dim)))
    with loop.run("evaluate_pairs", "image", len(ordered), model.model, cfg) as progress:
        forward = lambda pixels: model(pixels).half()  # noqa: E731 - as all embeddings are stored
        jobs = [loop.Job(kind, len(ordered), read)]
        for result in loop.embed(jobs, forward, model.preprocessing, device, cfg.infrastructure, progress):
            target, names_of = embeddings_path(cfg, kind), images["image"]
            embedding_parts.write_file(target, record, schema, [images], names_of, result, model.facts)
