"""The published model at work: how similar two photographs are, and which of many show the building in one.

The model looks most closely at the centre. If the building is elsewhere, give its --box; if it fills the frame,
--views 1.0 uses the whole picture only.

Reads    the published model; images: files, or members of a tar as 0088.tar:0088/0088_1_2_3.jpg; without a QUERY
         the first --limit images of the test split (data/<backbone>/merged/test.parquet and the tars)
Writes   search: OUT, a picture of the query and its nearest images; both print their results
Command  python publish/demo_usage.py compare A.jpg B.jpg
         python publish/demo_usage.py search QUERY.jpg --gallery FOLDER_OR_TAR --out search.png
         python publish/demo_usage.py search
Memory   the gallery's vectors (1 kB an image), the images in flight (see generate/loop.py), and the model
"""

import argparse
import sys
from itertools import zip_longest
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import ConfigError


def parse(argv) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = arguments.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="how similar two photographs are")
    compare.add_argument("first", metavar="A", help="image, or TAR:MEMBER")
    compare.add_argument("second", metavar="B", help="image, or TAR:MEMBER")
    search = commands.add_parser("search", help="which images of a gallery show a building")
    search.add_argument("query", nargs="?", metavar="QUERY", help="image, or TAR:MEMBER (one of the test split)")
    search.add_argument("--gallery", type=Path, metavar="PATH", help="folder, list or .tar (the test split)")
    search.add_argument("--top", type=int, default=5, metavar="N", help="results to show (5)")
    search.add_argument("--limit", type=int, default=2000, metavar="N", help="images of the test split (2000)")
    search.add_argument("--out", type=Path, default=Path("search.png"), help="the picture (search.png)")
    for command, images in ((compare, "A, in pixels; repeat for B"), (search, "QUERY, in pixels")):
        help_box, help_views = f"the building in {images}", "shares to average, such as 1.0,0.35 (the model's own)"
        command.add_argument(
            "--box", type=parse_box, action="append", default=[], metavar="LEFT,TOP,RIGHT,BOTTOM", help=help_box
        )
        command.add_argument("--views", metavar="SHARE,...", help=help_views)
        command.add_argument("--model", type=Path, metavar="FOLDER", help="published model (paths.published_dir)")
        cli.config_flags(command)
    args = arguments.parse_args(argv)
    if args.command == "search" and (args.query is None) != (args.gallery is None):
        raise ConfigError("search needs both a QUERY and a --gallery, or neither: then it uses the test split")
    if args.command == "search" and min(args.top, args.limit) < 1:
        raise ConfigError("--top and --limit must be 1 or more")
    num_images = 2 if args.command == "compare" else int(args.query is not None)
    if len(args.box) > num_images:
        raise ConfigError("there are more --box than images named on the command line")
    if args.views:
        args.set.append(f"embedding_model.views=[{args.views}]")  # to be checked like the setting
    return args


def parse_box(text: str) -> list[int]:
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not LEFT,TOP,RIGHT,BOTTOM in pixels") from None
    return [left, top, right, bottom]


def main(argv=None) -> int:
    args = parse(argv)
    cfg = cli.load_config(args)
    from common import devices
    from common.imagery import tar_images
    from publish.inference import image_sources, model_record, photo_search, published_model

    folder = model_record.folder_of(cfg, args.model)
    store, query = tar_images.of_paths(cfg.paths), None
    if args.command == "compare":  # images are read before the model is loaded: mistakes show at once
        pair = [
            photo_search.Photograph(name, image_sources.read_image(name), box)
            for name, box in zip_longest((args.first, args.second), args.box)
        ]
    elif args.query is None:
        gallery = image_sources.of_split(cfg.paths.merged_dir / "test.parquet", store, args.limit)
    else:
        query = photo_search.Photograph(args.query, image_sources.read_image(args.query), *args.box)
        gallery, *others = image_sources.groups(args.gallery, store)
        if others:
            raise ConfigError(f"{args.gallery} holds the images of {1 + len(others)} tars: name one of these tars")

    device = devices.pick(cfg.infrastructure.device, for_backbone=True)
    dtype = devices.resolve_dtype(cfg.embedding_model.dtype, device)
    published = published_model.load(folder, dtype, device, cfg.embedding_model.views if args.views else None)
    if args.command == "compare":
        first, second = (photo_search.vector_of(published, image) for image in pair)
        similarity = float(first @ second)
        print(f"similarity {similarity:.3f} (1: the same direction, 0: unrelated)")
        if not args.views:  # the evaluation is of the model's own
            metrics = cfg.paths.evaluation_dir / "metrics.json"
            print(photo_search.percentiles_of(similarity, metrics, model_record.evaluation_of(folder)))
    else:
        nearest = photo_search.search(published, query, gallery, cfg.infrastructure, args.top)
        print(photo_search.table(nearest))
        photo_search.draw(nearest, args.out)
        print(f"picture: {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
