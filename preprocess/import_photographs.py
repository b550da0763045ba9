"""List your own photographs of buildings as process_tar.py lists the dataset's, for all later stages.

SOURCE is a folder with a subfolder for each building; a CSV or Parquet table with a row for each photograph; or a
folder of datasets' save_to_disk. A table has a column `building` (or `label`), and either `path` (absolute, or
relative to the table) or `image` (encoded bytes, or Hugging Face's {bytes, path}). Other columns are optional:
`id`; `latitude` and `longitude` of the camera, `target_latitude` and `target_longitude` of the building, `heading`
of the camera, all in degrees; `panorama`, or `camera` and `date`: photographs of a building that agree in these
count as one view of it.

Photographs stay where they are; only those inside Parquet files are copied, to a tar. If they are moved, run this
again with their new place: nothing else has to be redone. An interrupted run starts over, and leaves an earlier
import as it is; so does one that rejects too much. The number of a set, 1000 to 9999, follows from its name.

Reads    SOURCE
Writes   data/intermediates/<name>.parquet: a row per valid photograph, in the order of SOURCE;
         data/intermediates_rejects/<name>.parquet: a row per rejected one, with the reason;
         data/intermediates_images/<name>.tar: copies of images inside Parquet files
Command  python preprocess/import_photographs.py PHOTOGRAPHS --name NAME
Memory   about 3 kB for each photograph, and 64 photographs
Time     the decoder's: about 2,000 images of 640 x 640 pixels a second and core, 100 of 12 megapixels
"""

import contextlib
import re
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import ConfigError, PipelineError


def main(argv=None) -> int:
    arguments = cli.parser(__doc__)
    arguments.add_argument("source", type=Path, metavar="SOURCE", help="a folder, a table or a dataset on disk")
    arguments.add_argument("--name", required=True, help="of this set of photographs, in the names of its files")
    args = arguments.parse_args(argv)
    cfg = cli.load_config(args)
    from common import files, parquet, provenance
    from common.archives.image_origins import IMPORTED
    from common.schemas import Rejected
    from preprocess.photographs import photo_columns, photo_files, photo_listing

    target = cfg.paths.intermediates_dir / f"{args.name}.parquet"
    refuse_name(cfg, args.name, target)
    listing = photo_listing.of(args.source)
    rejects = files.beside(target.parent, "rejects") / target.name
    folder = "" if listing.is_packed else str(listing.folder.resolve())
    record = provenance.record(IMPORTED, {}, listing.inputs)
    tar = photo_files.packed(cfg.paths.intermediates_dir, args.name)
    if parquet.is_done(target, record, args.redo):
        has_moved = parquet.read_provenance(target).facts["folder"] != folder
        is_whole = parquet.is_done(rejects, record, "stale") and (tar.exists() or not listing.is_packed)
        if is_whole and not has_moved:  # rejects may be those of a refused import
            return cli.nothing_to_do(IMPORTED, str(target))

    rows = photo_columns.normalised(listing.rows.to_pandas())
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(
            cli.Progress(IMPORTED, "photograph", len(rows), cfg.logging.progress_interval_s)
        )
        copy = stack.enter_context(photo_files.packing(tar)) if listing.is_packed else None
        photographs = []
        for photograph in photo_files.check(listing, rows, cfg.infrastructure.threads, copy):
            photographs.append(photograph)
            why = photograph.jpeg
            reasons = {why.reason.value: 1} if isinstance(why, Rejected) else {}
            progress.add(1, 1 - len(reasons), reasons)
        rejected = photo_files.rejects_of(rows, photographs)
        counts = photo_files.write_rejects(rejects, rejected, len(rows), record)
        if rejected:  # before the tar and the rows of an earlier run are replaced
            refuse_many(args.source, counts, cfg.data.max_reject_share, rejected[0], rejects)
    notes = photo_files.write(target, rows, photographs, record, counts, folder)
    if not listing.is_packed:
        tar.unlink(missing_ok=True)  # of an earlier import under this name
    return progress.summary("; ".join([*notes, *listing.notes]))


def refuse_many(source: Path, counts: dict, max_reject_share: float, first: tuple, rejects: Path) -> None:
    """Raise PipelineError if more than `max_reject_share` of the photographs, or all of them, are rejected.
    `first`: the name of the first of them, and why."""
    share = counts["rejects"] / counts["in"]
    if share <= max_reject_share and share < 1:
        return
    name, (reason, detail) = first
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts["rejected"].items())
    lines = [f"{source}: {share:.1%} of the photographs are rejected ({reasons})"]
    lines += [f"all are in {rejects}; the first is {name}: {reason}{', ' if detail else ''}{detail}"]
    if "building_missing" in counts["rejected"] and source.is_dir():
        lines += ["put the photographs of each building into a subfolder of its own, or give a table"]
    if "image_missing" in counts["rejected"] and source.is_file():
        lines += ["paths in a table are relative to its folder"]
    if share < 1:
        lines += ["if the rest is worth using, raise data.max_reject_share"]
    raise PipelineError("\n".join(lines))


def refuse_name(cfg, name: str, target: Path) -> None:
    """Raise ConfigError for a name that cannot be a set's, or is that of a tar, or gives another set's number."""
    from common import parquet
    from common.archives import image_origins, tars
    from preprocess.photographs import photo_columns

    if not re.fullmatch(r"[^\W\d_][\w-]*", name):
        raise ConfigError(f"--name {name}: begin with a letter, and use letters, digits, - and _ alone")
    is_tar = name in map(tars.stem, tars.listed(cfg.paths.raw_dir))
    if is_tar or (target.exists() and parquet.read_provenance(target).stage != image_origins.IMPORTED):
        raise ConfigError(f"--name {name} is the name of a tar: choose another")
    number = photo_columns.dataset_of(name)
    for path in image_origins.imported(cfg.paths.intermediates_dir):
        if path != target and photo_columns.dataset_of(path.stem) == number:
            raise ConfigError(f"--name {name}: {path.stem} already has its number, {number}; choose another")


if __name__ == "__main__":
    cli.run(main)
