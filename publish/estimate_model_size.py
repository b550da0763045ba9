"""A model's parameters, memory, FLOPs and GPU hours, estimated without its weights.

Reads    the backbone's config.json and preprocessor_config.json, from a folder, the hub or its cache
Writes   nothing: prints tables, or JSON with --json
Command  python publish/estimate_model_size.py [--backbone NAME] [--images 25000000] [--json]
Memory   negligible: the model is built on torch's meta device, which has shapes and no values
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import ConfigError


def main(argv=None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.config_flags(arguments)
    arguments.add_argument("--backbone", metavar="NAME", help="hub name or folder (embedding_model.name)")
    arguments.add_argument("--image-size", type=int, metavar="PX", help="side (that of preprocessor_config.json)")
    arguments.add_argument("--images", type=int, default=25_000_000, help="to embed (25,000,000: the dataset)")
    arguments.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = arguments.parse_args(argv)
    if args.images < 1 or (args.image_size or 1) < 1:
        raise ConfigError("--images and --image-size must be at least 1")
    if args.backbone:
        args.set.append(f"embedding_model.name={args.backbone}")
    cfg = cli.load_config(args)
    import json

    from publish.inference import model_sizes

    estimate = model_sizes.estimate(cfg, args.images, args.image_size)
    print(json.dumps(estimate, indent=1) if args.json else model_sizes.as_text(estimate))
    return 0


if __name__ == "__main__":
    cli.run(main)
