"""Names of the retrieval metrics: keys of metrics.json and checkpoints, and as they are printed."""

RECALL_AT = (1, 5, 10, 100, 1000)
TITLES = {**{f"recall@{k}": f"Recall@{k}" for k in RECALL_AT}, "map@r": "mAP@R", "median_rank": "median rank"}
METRICS = tuple(TITLES)
MAIN_METRICS = ("recall@1", "recall@5", "map@r")  # by class of match, and in printed tables
