"""The card's code for AutoModel, folders, means of buildings and faiss; the pipeline; dynamic quantisation."""

import json
from pathlib import Path

import faiss
import numpy as np
import torch
import transformers
from torch.ao.quantization import quantize_dynamic

card, expected = json.loads(Path("card.json").read_text()), np.load("expected.npy")
space: dict = {}
for section in ("Use", "A folder, in batches", "A vector for each building", "Search with faiss"):
    exec(card[section], space)
means = np.stack([expected[start : start + 3].mean(axis=0) for start in (0, 3, 6)])
means /= np.linalg.norm(means, axis=1, keepdims=True)
pairs = {
    "AutoModel": (space["vectors"], expected),
    "means of buildings": (space["building_vectors"], means),
    "faiss": (space["cosines"][0], np.sort(means @ expected[0])[::-1]),
}
extract = transformers.pipeline("image-feature-extraction", model="published", trust_remote_code=True, pool=True)
paths = [str(path) for path in sorted(Path("photographs").rglob("*.jpg"))]
pairs["pipeline"] = (np.array([extract(path)[0] for path in paths]), expected)
for name, (found, wanted) in pairs.items():
    difference = np.abs(np.asarray(found) - wanted).max()
    assert difference < 1e-5, (name, difference)
    print(f"{name}: largest difference {difference:.1e}")
space["model"] = quantize_dynamic(space["model"], {torch.nn.Linear})
cosine = (space["embed"](paths).numpy() * expected).sum(axis=1).min()
assert cosine > 0.99, cosine
print(f"quantize_dynamic: least cosine {cosine:.4f} (8 bits)")
print(f"transformers {transformers.__version__}, torch {torch.__version__}, faiss {faiss.__version__}")
