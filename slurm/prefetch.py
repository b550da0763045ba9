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

    import safetensors

    from generate import model_files, pixels

    settings = cfg.embedding_model
    folder = model_files.locate(settings.name, settings.revision)
    family = model_files.read_json(folder / "config.json").get("model_type")
    size = pixels.read_preprocessing(folder).image_size
    index = folder / "model.safetensors.index.json"
    weights = {folder / "model.safetensors"}
    if index.exists():
        weights = {folder / name for name in model_files.read_json(index)["weight_map"].values()}
    for path in sorted(weights):
        try:  # compares the header with the file's size; loads nothing, which might not fit on a login node
            with safetensors.safe_open(path, "numpy"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise PipelineError(f"{path} is missing or damaged ({error}): fetch it again") from None
    print(
        f"{socket.gethostname()}: {settings.name} ({family}, images of {size[0]} x {size[1]}), "
        f"{sum(path.stat().st_size for path in weights) / 1e6:,.0f} MB of weights in {folder}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
