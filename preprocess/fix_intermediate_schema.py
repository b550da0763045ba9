"""Bring intermediates of an older or foreign writer to the columns and types that the later stages read.

Changed are the widths of numbers, large strings, dictionaries, the order of columns, ids in another notation;
added are columns that others determine; dropped are other columns and pandas' metadata. A file that lacks more
than that, contradicts itself or its name, or has numbers that may have been rounded stays as it is and is named:
run process_tar.py on its tar.

Reads    data/intermediates/*.parquet
Writes   the same files, where something is to be changed; with none of their rows changed otherwise;
         data/intermediates_rejects/<tar>.parquet, empty, of files that process_tar.py did not make
Command  python preprocess/fix_intermediate_schema.py [--check]
Memory   twice the largest file: 600 bytes for each image of it
"""

import argparse
import glob
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import PipelineError


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.config_flags(parser)
    parser.add_argument("--check", action="store_true", help="only report; exit code 1 if a file is to be changed")
    args = parser.parse_args(argv)
    cfg = cli.load_config(args)
    from common import parquet
    from preprocess.tars import schema_fixes

    paths = sorted(cfg.paths.intermediates_dir.glob("*.parquet"))
    if not paths:
        raise PipelineError(f"{cfg.paths.intermediates_dir} holds no files: run preprocess/process_tar.py first")
    num_changed, unfixable = 0, []
    for path in paths:
        cli.check_stop()
        try:
            table = parquet.read(path)
            fixed, changes = schema_fixes.fix(table, path.stem)
            made, foreign = provenance_of(path, _tar_of(cfg.paths.raw_dir, path.stem))
        except (schema_fixes.Unfixable, PipelineError) as error:
            unfixable.append(f"{path} {error}".replace(f"{path} {path}", f"{path}"))
            continue
        changes += ["records its tar"] if foreign else []
        if not changes:
            continue
        num_changed += 1
        print(f"{path}: {'would change' if args.check else 'changed'}: {'; '.join(changes)}")
        if not args.check:
            write(path, fixed, made, foreign, changes)
    what = "to change" if args.check else "changed"
    print(f"fix_intermediate_schema: {len(paths):,} files, {num_changed:,} {what}")
    if unfixable:
        raise PipelineError("\n".join([*unfixable, "run preprocess/process_tar.py --overwrite on their tars"]))
    return int(args.check and num_changed > 0)


def _tar_of(raw_dir: Path, stem: str) -> Path:
    """The tar with that name; where there is none, what it should be called."""
    from common.archives import tars

    candidates = sorted(raw_dir.glob(f"{glob.escape(stem)}.*"))
    named = [path for path in candidates if tars.is_named_so(path) and tars.stem(path) == stem]
    return named[0] if named else raw_dir / f"{stem}.tar"


def provenance_of(path: Path, tar: Path):
    """The file's record and whether it is new: a foreign file is recorded as made from the tar that is there."""
    from common import parquet, provenance
    from preprocess.tars.schema_fixes import Unfixable

    if parquet.has_provenance(path):
        return parquet.read_provenance(path), False
    if not tar.exists():
        raise Unfixable(f"does not say what it was made from, and {tar} does not exist")
    return provenance.record("process_tar", {}, {tar.name: provenance.identity(tar)}), True


def write(path: Path, fixed, made, foreign: bool, changes: list[str]) -> None:
    """Replace the file; of a foreign one, say in its rejects that nothing is known of rejected files."""
    from common import files, parquet, schemas

    rejects = files.beside(path.parent, "rejects") / path.name
    if foreign and not rejects.exists():
        with parquet.writer(rejects, schemas.REJECTS, made) as out:
            out.facts = {"unknown": "the intermediates were not made by process_tar.py"}
    rows = {name: count for name, count in made.rows.items() if name != "out"}
    with parquet.writer(path, schemas.INTERMEDIATES, made) as out:
        out.append(fixed)
        out.rows, out.facts = rows, {"schema_fixed": changes}
        if out.num_rows != parquet.num_rows(path):
            raise AssertionError(f"{path}: {out.num_rows} rows would replace {parquet.num_rows(path)}")


if __name__ == "__main__":
    cli.run(main, resumable=True)
