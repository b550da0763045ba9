"""A published model in the programs that people use it with, each in an environment of its own.

Reads    nothing: it trains, publishes and embeds something tiny
Writes   PLACE/prepared: what the clients use, made anew; PLACE/environments, which a second run reuses
Command  python tests/clients/run_clients.py [--place PLACE] [CLIENT ...]; make clients
Time     15 minutes, most of them for installing torch into four environments (1 GB each); a network is needed

A client must give the vectors that AutoModel gives in the pipeline's own environment, to 1e-5. Where the model's
card has code for it, that code is what runs. use_<client>.py runs in the client's environment and imports nothing
of this repository.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

TORCH = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
SPACE_SDK = re.findall("sdk_version: (.*)", (ROOT / "publish" / "space" / "README.md").read_text())[0]
CLIENTS = {  # what is installed
    "sentence_transformers": ["sentence-transformers", "pillow", TORCH],
    "transformers": ["transformers", "pillow", "faiss-cpu", TORCH],
    "onnx": ["transformers", "pillow", "onnx", "onnxscript", "onnxruntime", TORCH],
    "tables": ["duckdb", "polars", "datasets", "pandas"],
    "space": [f"gradio=={SPACE_SDK}", "-r", "space/requirements.txt", "playwright", TORCH],
}


def prepare(place: Path) -> None:
    """Everything but the environments: images, a published model, its vectors, its card's code and its Space."""
    import numpy as np
    import torch
    from PIL import Image
    from trained_model import JPEGS, Trained
    from transformers import AutoImageProcessor, AutoModel

    from publish import build_index, convert_to_hf, generate_embeddings_from_parquet
    from publish.hub import space_push

    done = Trained(place / "pipeline")
    published, paths = place / "published", []
    assert convert_to_hf.main([*done.flags, "--set", f"paths.published_dir={published}"]) == 0
    for number, content in enumerate(JPEGS):
        paths.append(place / "photographs" / f"building {number // 3}" / f"{number}.jpg")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(content)
    for name, path in zip(("a.jpg", "b.jpg"), paths, strict=False):
        (place / name).write_bytes(path.read_bytes())
    model = AutoModel.from_pretrained(published, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(published)
    inputs = processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).pooler_output.numpy()
    np.save(place / "expected.npy", expected)
    sections = re.split("^##+ (.*)\n", (published / "README.md").read_text(), flags=re.MULTILINE)
    code = {
        name: "\n".join(re.findall("```python\n(.*?)```", text, re.DOTALL)).replace("PATH", str(published))
        for name, text in zip(sections[1::2], sections[2::2], strict=True)
    }
    (place / "card.json").write_text(json.dumps(code))

    command = [str(done.cfg.paths.merged_dir / "test.parquet"), str(place / "vectors"), "--model", str(published)]
    assert generate_embeddings_from_parquet.main([*command, *done.flags]) == 0
    with torch.inference_mode():
        np.save(place / "projected.npy", model.project(done.embeddings()).numpy())

    assert build_index.main([str(place / "vectors"), str(place / "index")]) == 0
    space = place / "space"
    space.mkdir()
    for name, content in space_push.of_space(published, str(published), place / "index").items():
        (space / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content.encode())


def environment(folder: Path, packages: list[str], place: Path) -> Path:
    """The Python of an environment with these packages, the newest that pip finds."""
    python = folder / "bin" / "python"
    if not (folder / ".complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], cwd=place, check=True)
        (folder / ".complete").touch()
    return python


def run(client: str, place: Path) -> bool:
    """Whether the client gives the model's vectors; prints what it says."""
    start = time.perf_counter()
    folder = place.parent / "environments" / client
    python = environment(folder, CLIENTS[client], place)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    kept |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [str(python), str(HERE / f"use_{client}.py")]
    done = subprocess.run(command, cwd=place, env=kept, capture_output=True, text=True, timeout=600)
    seconds = time.perf_counter() - start
    lines = done.stdout.splitlines() if done.returncode == 0 else done.stderr.splitlines()[-15:]
    print(
        f"{client}: {'ok' if done.returncode == 0 else 'FAILED'}, {seconds:.0f} s", *lines, sep="\n  ", flush=True
    )
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"all of {', '.join(CLIENTS)}")
    parser.add_argument("--place", type=Path, default=ROOT / "demo" / "clients", help="folder (demo/clients)")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    place = args.place.resolve() / "prepared"
    shutil.rmtree(place, ignore_errors=True)  # of an earlier version of the pipeline
    prepare(place)
    worked = [run(client, place) for client in args.clients or CLIENTS]  # all of them, whatever fails
    return 0 if all(worked) else 1


if __name__ == "__main__":
    sys.exit(main())
