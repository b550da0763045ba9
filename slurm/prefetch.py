"""Locate the backbone's files as generate_embeddings does, and fetch them where there is a network.

`python slurm/submit.py --prefetch` runs this in the jobs' environment (slurm/env.sh): first with the network, then
without it, then on a compute node.

Reads    embedding_model.name and .revision; the hub, unless HF_HUB_OFFLINE=1
Writes   Hugging Face's cache: $HF_HOME, or ~/.cache/huggingface
Command  python slurm/prefetch.py
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import PipelineError


def main(argv=None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.config_flags(arguments)
    cfg = cli.load_config(arguments.parse_args(argv))
    import socket

    from generate import model_files, pixels

    settings = cfg.embedding_model
    folder = model_files.locate(settings.name, settings.revision)
    family = model_files.read_json(folder / "config.json").get("model_type")
    size = pixels.read_preprocessing(folder).image_size
    num_bytes = check_weights(folder)
    print(
        f"{socket.gethostname()}: {settings.name} ({family}, images of {size[0]} x {size[1]}), "
        f"{num_bytes / 1e6:,.0f} MB of weights in {folder}"
    )
    return 0


def check_weights(folder: Path) -> int:
    """The size of a model's weights in bytes. Raises PipelineError unless all files exist and are complete.

    Compares headers with file sizes and loads nothing: the model may be too large for a login node.
    """
    import json

    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
    for name in sorted(names):
        try:
            with safe_open(folder / name, "numpy") as weights:
                weights.keys()
        except (OSError, SafetensorError) as error:
            raise PipelineError(f"{folder / name} is missing or damaged ({error}): fetch it again") from None
    return sum((folder / name).stat().st_size for name in names)


if __name__ == "__main__":
    cli.run(main)
