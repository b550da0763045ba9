"""Bring intermediates of an older or foreign writer to the columns and types that the later stages read.

It fixes widths of numbers, large strings, dictionaries and the order of columns. It adds columns that others
determine, and drops unknown columns and pandas' metadata. A file that lacks anything else,
contradicts itself or its name, or has numbers that may have been rounded is reported and left unchanged: run
process_tar.py on its tar.

Reads    data/intermediates/*.parquet
Writes   the same files, if they need a change, with the same rows;
         data/intermediates_rejects/<tar>.parquet, empty, for files that process_tar.py did not make
Command  python preprocess/fix_intermediate_schema.py [--check]
Memory   twice the largest file: 600 bytes per image
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, errors
from common.errors import PipelineError


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.config_flags(parser)
    parser.add_argument("--check", action="store_true", help="only report; exit code 1 if a file needs a change")
    args = parser.parse_args(argv)
    cfg = cli.load_config(args)
    from common import parquet
    from common.archives import image_origins
    from preprocess.tars import schema_fixes

    imported = image_origins.imported(cfg.paths.intermediates_dir)  # always of this version
    paths = sorted({*cfg.paths.intermediates_dir.glob("*.parquet")} - {*imported})
    if not paths:
        raise PipelineError(f"{cfg.paths.intermediates_dir} holds no files: run preprocess/process_tar.py first")
    num_changed, unfixable = 0, []
    for path in paths:
        cli.check_stop()
        try:
            fixed, changes = schema_fixes.fix(parquet.read(path), path.stem)
            record, is_foreign = schema_fixes.source_of(path, cfg.paths.raw_dir)
        except (schema_fixes.Unfixable, PipelineError) as error:  # the latter names the file
            unfixable.append(f"{error}" if isinstance(error, PipelineError) else f"{path} {error}")
            continue
        changes += ["records its tar"] if is_foreign else []
        if not changes:
            continue
        num_changed += 1
        print(f"{path}: {'would change' if args.check else 'changed'}: {'; '.join(changes)}")
        if not args.check:
            schema_fixes.replace(path, fixed, record, is_foreign, changes)
    what = "to change" if args.check else "changed"
    print(f"fix_intermediate_schema: {len(paths):,} files, {num_changed:,} {what}")
    if unfixable:
        again = errors.command("preprocess/process_tar.py", "--overwrite")
        raise PipelineError("\n".join([*unfixable, f"read their tars again: {again}"]))
    return int(args.check and num_changed > 0)


if __name__ == "__main__":
    cli.run(main, resumable=True)
