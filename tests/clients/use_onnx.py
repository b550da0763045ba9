"""The card's code for ONNX, then the photographs through the session, in a batch of another size."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor

space: dict = {}
exec(json.loads(Path("card.json").read_text())["ONNX"], space)
images = [Image.open(path).convert("RGB") for path in sorted(Path("photographs").rglob("*.jpg"))]
inputs = AutoImageProcessor.from_pretrained("published")(images, return_tensors="np")
(vectors,) = space["session"].run(["pooler_output"], {"pixel_values": inputs["pixel_values"]})
difference = np.abs(vectors - np.load("expected.npy")).max()
assert difference < 1e-5, difference
print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}: largest difference {difference:.1e}")
