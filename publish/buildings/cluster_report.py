"""What a cluster of buildings holds: figures, and a sheet with pictures of its most typical buildings."""

from collections import Counter

import numpy as np

from common.imagery import pictures
from common.imagery.tar_images import TarImages
from publish.buildings.building_clusters import Clusters
from publish.buildings.building_means import Buildings
from publish.buildings.image_vectors import ImageVectors
from publish.inference.vector_tables import LOCATION

SHOWN = 6  # buildings of each cluster


def typical(clusters: Clusters) -> list[np.ndarray]:
    """The SHOWN buildings nearest to each cluster's centre, nearest first."""
    order = np.lexsort((-clusters.similarity, clusters.label))
    ends = np.cumsum(np.bincount(clusters.label, minlength=clusters.number))
    return [order[start : min(start + SHOWN, end)] for start, end in zip([0, *ends], ends, strict=False)]


def figures(buildings: Buildings, clusters: Clusters) -> dict:
    """The content of clusters.json; shares of datasets are of buildings, where their images have a dataset_id."""
    datasets = None
    if "dataset_id" in buildings.others.column_names:
        datasets = np.array(buildings.others["dataset_id"].to_pylist(), object)
    rows = []
    for number, examples in enumerate(typical(clusters)):
        members = clusters.label == number
        size = int(members.sum())
        row = {
            "cluster": number,
            "buildings": size,
            "images": int(buildings.images[members].sum()),
            "mean_similarity": round(float(clusters.similarity[members].mean()), 4),
            "typical": [buildings.names[int(building)].as_py() for building in examples],
        }
        if datasets is not None:
            counts = Counter(datasets[members].tolist()).most_common()
            row["dataset_shares"] = {str(name): round(count / size, 4) for name, count in counts}
        rows.append(row)
    stability = None if clusters.stability is None else round(clusters.stability, 4)
    return {"stability": stability, "buildings": len(buildings), "clusters": rows}


def sheet(buildings: Buildings, clusters: Clusters, source: ImageVectors, store: TarImages) -> bytes | None:
    """A PNG with a line for each cluster: the most typical image of its most typical buildings. None if no image
    can be read."""
    if not set(source.columns) >= LOCATION:
        return None
    examples = typical(clusters)
    shown = np.concatenate(examples)
    images = iter(pictures.read(store, source.take(buildings.order[buildings.offsets[shown]], sorted(LOCATION))))
    lines, readable = [], 0
    for number, members in enumerate(examples):
        found = [next(images) for _ in members]
        readable += sum(image is not None for image in found)
        names = [buildings.names[int(building)].as_py()[-22:] for building in members]
        size, similarity = (clusters.label == number).sum(), clusters.similarity[members].mean()
        title = f"cluster {number}: {size:,} buildings; cosine of these to its centre {similarity:.2f}"
        lines.append(pictures.Line(title, [image or pictures.absent() for image in found], names))
    return pictures.sheet(lines) if readable else None
