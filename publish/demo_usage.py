"""The published model at work: how similar two photographs are, and which of many show the building in one.

The model looks most closely at the centre. If the building is elsewhere, give its --box; if it fills the frame,
--views 1.0 uses the whole picture only. Which results show the query's building is said where labels tell, those
of the pipeline's own images or --labels: a CSV or Parquet table with the columns `image` and `building`.

Reads    the published model; images: files, or members of a tar as 0088.tar:0088/0088_1_2_3.jpg; without a QUERY
         the first --limit images of the test split (data/<backbone>/merged/test.parquet and the tars); for --index
         what build_index.py has written
Writes   search: OUT, a picture of the query and its nearest images; both print their results
Command  python publish/demo_usage.py compare A.jpg B.jpg
         python publish/demo_usage.py search QUERY.jpg --gallery FOLDER_OR_TAR --out search.png
         python publish/demo_usage.py search QUERY.jpg --gallery FOLDER_OF_VECTORS [--where dataset_id=88]
         python publish/demo_usage.py search QUERY.jpg --index [FOLDER] [--where dataset_id=88] [--images FOLDER]
         python publish/demo_usage.py search
Memory   the model, and the gallery's vectors: of images D x 4 bytes each, and the images in flight (see
         generate/loop.py); of a folder of vectors D x 2; an index is read from the disk
"""

import argparse
import sys
from itertools import zip_longest
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import ConfigError, PipelineError

OWN_INDEX = Path()  # --index without a FOLDER


def parse(argv) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = arguments.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="how similar two photographs are")
    compare.add_argument("first", metavar="A", help="image, or TAR:MEMBER")
    compare.add_argument("second", metavar="B", help="image, or TAR:MEMBER")
    search = commands.add_parser("search", help="which images of a gallery show a building")
    search.add_argument("query", nargs="?", metavar="QUERY", help="image, or TAR:MEMBER (one of the test split)")
    search.add_argument("--gallery", type=Path, metavar="PATH", help="folder, list, .tar or vectors (test split)")
    search.add_argument(
        "--index", type=Path, nargs="?", const=OWN_INDEX, metavar="FOLDER", help="an index (paths.index_dir)"
    )
    search.add_argument(
        "--where",
        type=parse_condition,
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="only such rows of the index; repeatable",
    )
    search.add_argument("--images", type=Path, metavar="FOLDER", help="of the files that the index names")
    search.add_argument("--labels", type=Path, metavar="TABLE", help="columns image and building, for verdicts")
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
    if args.command == "search":
        check_search(args)
    num_images = 2 if args.command == "compare" else int(args.query is not None)
    if len(args.box) > num_images:
        raise ConfigError("there are more --box than images named on the command line")
    if args.views:
        args.set.append(f"embedding_model.views=[{args.views}]")  # to be checked like the setting
    return args


def check_search(args: argparse.Namespace) -> None:
    """Raise ConfigError for arguments of `search` that do not go together."""
    if args.gallery is not None and args.index is not None:
        raise ConfigError("search takes a --gallery or an --index, not both")
    if args.query is None and args.index not in (None, OWN_INDEX):
        raise ConfigError(
            f"there is no QUERY: {args.index} was taken for the index's folder. Write the QUERY before --index."
        )
    if (args.query is None) != (args.gallery is None and args.index is None):
        raise ConfigError(
            "search needs a QUERY and a --gallery, or neither: then it uses the test split; or QUERY and --index"
        )
    if args.query is None and args.labels:
        raise ConfigError("--labels is for a QUERY: images of the test split have labels of their own")
    if args.images and not args.images.is_dir():
        raise ConfigError(f"--images {args.images} is not a folder")
    if min(args.top, args.limit) < 1:
        raise ConfigError("--top and --limit must be 1 or more")


def parse_condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not (column and equals):
        raise argparse.ArgumentTypeError(f"{text} is not COLUMN=VALUE")
    return column, value


def parse_box(text: str) -> list[int]:
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not LEFT,TOP,RIGHT,BOTTOM in pixels") from None
    return [left, top, right, bottom]


def main(argv=None) -> int:
    args = parse(argv)
    cfg = cli.load_config(args)
    return compare(args, cfg) if args.command == "compare" else search(args, cfg)


def compare(args, cfg) -> int:
    from publish.inference import image_sources, model_record, photo_search

    folder = model_record.folder_of(cfg, args.model)
    pair = [  # images are read before the model is loaded: mistakes show at once
        photo_search.Photograph(name, image_sources.read_image(name), box)
        for name, box in zip_longest((args.first, args.second), args.box)
    ]
    published = load(folder, args, cfg)
    first, second = (photo_search.vector_of(published, image) for image in pair)
    similarity = float(first @ second)
    print(f"similarity {similarity:.3f} (1: the same direction, 0: unrelated)")
    if not args.views:  # the evaluation is of the model's own
        metrics = cfg.paths.evaluation_dir / "metrics.json"
        print(photo_search.percentiles_of(similarity, metrics, model_record.evaluation_of(folder)))
    return 0


def search(args, cfg) -> int:
    from common.imagery import tar_images
    from publish.inference import image_labels, image_sources, model_record, photo_search
    from publish.retrieval import index_search

    folder, store = model_record.folder_of(cfg, args.model), tar_images.of_paths(cfg.paths)
    labels = image_labels.of_table(args.labels) if args.labels else None
    query = query_of(args, cfg, labels)
    index = index_of(args, cfg, folder)
    if index is not None:
        mask = index.where(args.where) if args.where else None
        folders = (cfg.paths.vectors_dir, cfg.paths.merged_dir)
        tables = [path for place in folders for path in sorted(place.glob("*.parquet"))]
        images = index_search.RowImages(store, args.images, tables)
        published = load(folder, args, cfg)
        nearest = index_search.nearest(published, query, index, mask, images, labels, args.top)
    else:
        if query is None:
            gallery = image_sources.of_split(cfg.paths.merged_dir / "test.parquet", store, args.limit)
        else:
            gallery = gallery_of(args, cfg, store, labels)
        published = load(folder, args, cfg)
        nearest = photo_search.search(published, query, gallery, cfg.infrastructure, args.top)
    print(photo_search.table(nearest))
    if any(image.encoded is not None for image, _ in nearest.results):
        photo_search.draw(nearest, args.out)
        print(f"picture: {args.out}")
    else:
        print("no picture: the images are not here (--images FOLDER says where files named by the index are)")
    return 0


def load(folder: Path, args, cfg):
    """The published model, on the device and with the views that the arguments say."""
    from common import devices
    from publish.inference import published_model

    device = devices.pick(cfg.infrastructure.device, for_backbone=True)
    dtype = devices.resolve_dtype(cfg.embedding_model.dtype, device)
    return published_model.load(folder, dtype, device, cfg.embedding_model.views if args.views else None)


def query_of(args, cfg, labels: dict[str, str] | None):
    """The photograph to search for; None without a QUERY. Raises PipelineError if --labels lacks it."""
    from publish.inference import image_labels, image_sources, photo_search

    if args.query is None:
        return None
    if labels is None:
        building = image_labels.of_member(args.query, cfg.paths.intermediates_dir)
    else:
        building = image_labels.of_query(labels, args.query, args.images or args.gallery)
        if building is None:
            raise PipelineError(f"{args.labels} has no row for the query: add one with {args.query} as its image")
    box = args.box[0] if args.box else None
    return photo_search.Photograph(args.query, image_sources.read_image(args.query), box, building)


def index_of(args, cfg, folder: Path):
    """The index, or the vectors, to search; None if the gallery is one of images. Raises StaleArtefact if another
    model than that in `folder` made them."""
    from generate import model_files
    from publish.retrieval import embedding_tables, vector_index

    if args.index is not None:
        index = vector_index.open(cfg.paths.index_dir if args.index == OWN_INDEX else args.index)
    elif args.gallery is not None and embedding_tables.paths_at(args.gallery):
        index = vector_index.of_tables(embedding_tables.tables_at(args.gallery))
    else:
        if args.where or args.images:
            raise ConfigError("--where and --images are for an index, or a gallery of vectors")
        return None
    dim = model_files.read_json(folder / "config.json")["output_dim"]
    vector_index.refuse_other_model(index, model_files.weights_digest(folder), dim, folder)
    if index.model == embedding_tables.UNKNOWN:
        print(f"{index.name} does not say which model made its vectors; their dimension, {dim}, is this model's")
    return index


def gallery_of(args, cfg, store, labels: dict[str, str] | None):
    """The images of --gallery, with their buildings where labels say so."""
    from common.archives import tars
    from publish.inference import image_labels, image_sources

    gallery, *others = image_sources.groups(args.gallery, store)
    if others:
        raise ConfigError(f"{args.gallery} holds the images of {1 + len(others)} tars: name one of these tars")
    if labels is None and tars.is_named_so(args.gallery):
        labels = image_labels.of_tar(args.gallery, cfg.paths.intermediates_dir)
    return gallery if labels is None else gallery.labelled(labels)


if __name__ == "__main__":
    cli.run(main)
