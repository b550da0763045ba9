"""A metrics.json with invented figures, as train/evaluate.py writes it."""

from train.evaluation import metric_names, metrics_json

FIGURE = {"value": 0.5, "low": 0.4, "high": 0.6}
FIGURES = {  # a tenth less and more, as the ends of the interval
    key: {"value": value, "low": value - 0.1, "high": value + 0.1}
    for key, value in zip(metric_names.METRICS, (0.25, 0.5, 0.75, 0.875, 0.9, 0.125, 4.0), strict=True)
}
CLASS = {
    "class": "0-30",
    "queries": 2,
    "matches": 3,
    "cells": 1,
    "methods": {"raw": dict.fromkeys(metric_names.MAIN_METRICS, FIGURE)},
}
SEARCH = {
    "queries": 2,
    "methods": dict.fromkeys(("raw", "trained"), dict.fromkeys(metric_names.BUILDING_METRICS, FIGURE)),
    "differences": {"trained-raw": dict.fromkeys(metric_names.BUILDING_METRICS, FIGURE)},
}
FOUND = {
    "format": metrics_json.FORMAT,
    "subject": {"run": "default"},
    "methods": {"raw": FIGURES, "trained": FIGURES},
    "descriptions": {"raw": "as they are", "trained": "the head"},
    "differences": {"trained-raw": FIGURES},
    "building_level": {"buildings": 2, "image_to_building": SEARCH, "half_to_half": SEARCH},
    "recall_curve": {"k": [1, 2], "methods": {"raw": [0.5, 0.6]}},
    "breakdowns": {"views": {"meaning": "images of the building", "classes": [CLASS]}},
    "similarity_histograms": {"edges": [-1.0, 0.0, 1.0], "matches": [0, 1], "non_matches": [3, 1]},
    "ignore_radius_m": 25.0,
    "gallery": "test",
    "counts": dict.fromkeys(metrics_json.Counts.model_fields, 2),
    "leakage": {"buildings": {"test": 1, "train": 2, "val": 1, "in_two_splits": 0}},
    "provenance": {"stage": "evaluate", "config": {}, "inputs": {}},
}
