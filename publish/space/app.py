"""A Space of the Hugging Face hub: upload a photograph, see the nearest rows of an index, and where they are.

Reads    beside this file: MODEL (the model's name on the hub, or its folder), and of an index, as
         publish/build_index.py writes it, vectors.npy, rows.parquet and index.json
Command  python app.py; publish/convert_to_hf.py --push-space uploads it
Memory   the model and the index

It stands alone: a Space has neither the pipeline nor photographs.
"""

import html
import json
import math
from pathlib import Path

import gradio as gr
import numpy as np
import pyarrow.parquet as pq
import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

HERE = Path(__file__).resolve().parent
SHOWN = ("building", "building_id", "streetview_image_id", "images", "dataset_id")
POSITIONS = (("lat", "lon"), ("target_lat", "target_lon"))  # of buildings, of images
NUM_NEAREST = 10
MAP_PX, MAP_MARGIN_PX = 480, 24
MAP_RADIUS_M = 10_000  # around the nearest row; what is farther is not on the map
MAX_DOTS = 5_000  # of other rows
METRES_PER_DEGREE = 111_195
NUMBER_STYLE = 'font-size="11" text-anchor="middle" fill="#fff"'

name = (HERE / "MODEL").read_text().strip()
folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name))
made_by, own = json.loads((HERE / "index.json").read_text())["model"], folder / "provenance.json"
if made_by != "unknown" and json.loads(own.read_text())["id"] != made_by:
    raise SystemExit(f"the index beside {__file__} has vectors by another model than {name}: build it again")
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(folder)
vectors = torch.from_numpy(np.load(HERE / "vectors.npy"))  # (n, D) float16, of length 1
rows = pq.read_table(HERE / "rows.parquet")
position = next((pair for pair in POSITIONS if set(pair) <= set(rows.column_names)), ())
shown = [*(column for column in SHOWN if column in rows.column_names), *position] or rows.column_names[:5]
places = np.full((len(rows), 2), np.nan)  # latitude and longitude, degrees
for number, axis in enumerate(position):
    places[:, number] = rows[axis].to_numpy()


def embed(image: Image.Image) -> torch.Tensor:
    """(D,) float32 of length 1."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    with torch.inference_mode():
        return model(**processor([image], return_tensors="pt")).pooler_output[0]


def nearest(query: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows most similar to a query (D,), most similar first, and their cosines."""
    rough = vectors @ query.half()  # (n,): with 11 bits, so some more are compared in float32
    some = rough.topk(min(10 * NUM_NEAREST, len(vectors))).indices
    cosines, order = (vectors[some].float() @ query).sort(descending=True, stable=True)
    return some[order[:NUM_NEAREST]].numpy(), cosines[:NUM_NEAREST].numpy()


def map_of(found: np.ndarray) -> str:
    """The rows within MAP_RADIUS_M of the nearest one that has a position, on a map, as SVG."""
    known = [row for row in found if np.isfinite(places[row]).all()]
    if not known:
        return "<p>The nearest rows have no positions.</p>"
    lat, lon = (places - places[known[0]]).T
    east, north = lon * math.cos(math.radians(places[known[0], 0])), lat
    metres = np.stack([east, north], axis=1) * METRES_PER_DEGREE  # (n, 2), from the nearest row
    near = [row for row in known if np.hypot(*metres[row]) <= MAP_RADIUS_M]
    low, high = metres[near].min(axis=0), metres[near].max(axis=0)
    metres -= (low + high) / 2
    half = max(100.0, 0.55 * (high - low).max())  # metres from the centre of the map to an edge
    px_per_m = (MAP_PX / 2 - MAP_MARGIN_PX) / half
    xy = MAP_PX / 2 + metres * [px_per_m, -px_per_m]
    others = np.flatnonzero((np.abs(metres) <= half).all(axis=1))
    others = others[:: max(1, math.ceil(len(others) / MAX_DOTS))]
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="#8c8c8c" opacity=".5"/>' for x, y in xy[others]]
    for number, row in reversed([*enumerate(found, 1)]):  # the nearest on top
        if row in near:
            x, y = xy[row]
            dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="#2a86d8"/>')
            dots.append(f'<text x="{x:.1f}" y="{y + 4:.1f}" {NUMBER_STYLE}>{number}</text>')
    bar_m = 10 ** math.floor(math.log10(half))
    text = f"{bar_m:,} m"
    if len(near) < len(found):
        text += f"; {len(found) - len(near)} of the {len(found)} are not on this map"
    return (
        f'<svg viewBox="0 0 {MAP_PX} {MAP_PX}" role="img" aria-label="Map of the nearest rows" style="width:100%">'
        f'<rect width="{MAP_PX}" height="{MAP_PX}" fill="none" stroke="#8c8c8c"/>{"".join(dots)}'
        f'<path d="M10 {MAP_PX - 8}h{bar_m * px_per_m:.1f}" stroke="currentColor" stroke-width="2"/>'
        f'<text x="10" y="{MAP_PX - 14}" font-size="12" fill="currentColor">{text}</text></svg>'
    )


def search(image: Image.Image | None) -> tuple[list[list], str]:
    """The table and the map for a photograph."""
    if image is None:
        return [], ""
    found, cosines = nearest(embed(image))
    values = rows.select(shown).take(found).to_pylist()
    table = [
        [number, f"{cosine:.4f}", *(row[column] for column in shown)]
        for number, (cosine, row) in enumerate(zip(cosines, values, strict=True), 1)
    ]
    return table, map_of(found)


# delete_cache: every minute, what is older than nine
with gr.Blocks(title="Nearest buildings", analytics_enabled=False, delete_cache=(60, 540)) as page:
    gr.Markdown(
        "# Nearest buildings\n\nUpload a street-level photograph with a building at its centre. The model "
        f"`{html.escape(Path(name).name)}` compares it with {len(rows):,} rows of an index. A high cosine is no "
        "proof that it is the same building. Photographs are deleted within ten minutes."
    )
    with gr.Row():
        photograph = gr.Image(type="pil", label="photograph", sources=["upload", "clipboard"])
        place = gr.HTML(label="map")
    table = gr.Dataframe(headers=["", "cosine", *shown], label="nearest", interactive=False)
    photograph.change(search, photograph, [table, place], api_name="search")

system_fonts = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from a network
page.launch(theme=system_fonts, ssr_mode=False)
