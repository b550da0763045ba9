"""Names of the retrieval metrics: keys of metrics.json and checkpoints, and as they are printed."""

RECALL_AT = (1, 5, 10, 100, 1000)
TITLES = {**{f"recall@{k}": f"Recall@{k}" for k in RECALL_AT}, "map@r": "mAP@R", "median_rank": "median rank"}
METRICS = tuple(TITLES)
MAIN_METRICS = ("recall@1", "recall@5", "map@r")  # by class of match, and in printed tables
BUILDING_METRICS = ("recall@1", "recall@5", "recall@10", "median_rank")  # where buildings are searched for


def shown_recalls(gallery: int) -> list[str]:
    """The Recall@k that tell something in a gallery of so many: k is at most a tenth of it, or 1."""
    return [f"recall@{k}" for k in RECALL_AT if k == 1 or 10 * k <= gallery]
