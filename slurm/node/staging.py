"""Copies of the tars that a shard reads, on the node's own disk (slurm.stage_to), while its stage runs.

The stage gets as its paths.raw_dir a folder that links to all tars, with copies in place of the links to those in
which it has work. One that does not fit remains a link, and is read from paths.raw_dir.

Writes   <slurm.stage_to>/staged-<job>-<shard>/, and removes it when the stage has ended; after a kill, when it
         starts again on the node
"""

import os
import shutil
from pathlib import Path

from common import cli
from common.archives import image_origins, tars
from slurm import chain
from slurm.node.child import run

SPARE_BYTES = 2**30  # left free on the disk


def run_on_copies(command: list[str], cfg, step_name: str, shard: int, num_shards: int) -> int | None:
    """Run a shard of a step on copies of its tars; its exit code, or None if there are no copies to run it on.

    SIGTERM and SIGUSR2 stop it as they stop the stage itself; see cli.run.
    """
    (step,) = (step for step in chain.steps_of(cfg) if step.name == step_name)
    own = read_by(step, cfg, shard, num_shards)
    disk = Path(os.path.expandvars(cfg.slurm.stage_to))
    folder = disk / f"staged-{os.environ['SLURM_JOB_ID']}-{shard}"
    if not own:
        return None
    if not disk.is_absolute():
        print(f"no copies: slurm.stage_to is {disk} on this node, not an absolute path", flush=True)
        return None
    try:
        if not link(folder, cfg.paths.raw_dir) or not copy(folder, own):
            return None
        return run([*command, "--set", f"paths.raw_dir={folder}"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_by(step, cfg, shard: int, num_shards: int) -> list[Path]:
    """The tars in which a shard of a step has work left."""
    outputs = step.stage.outputs_of(cfg, shard, num_shards) or []
    names = {name for output in outputs if not step.stage.is_current(output) for name in output.record.inputs}
    return [tar for tar in image_origins.raw_tars(cfg.paths) if tar.name in names]


def link(folder: Path, raw_dir: Path) -> bool:
    """Make `folder` anew with a link to each tar; whether that was possible."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        for tar in tars.of_shard(raw_dir, 0, 1):
            (folder / tar.name).symlink_to(tar.resolve())
    except OSError as error:
        print(f"no copies: {error}", flush=True)
        return False
    return True


def copy(folder: Path, own: list[Path]) -> int:
    """Replace the links to `own` by copies where they fit; the number of copies. Raises Stopped on a signal."""
    copies, unfinished = 0, folder / ".unfinished"
    for tar in own:
        cli.check_stop()
        size, free = tar.stat().st_size, shutil.disk_usage(folder).free
        try:
            if size + SPARE_BYTES > free:
                needed = (size + SPARE_BYTES) / 1e9
                raise OSError(f"{free / 1e9:,.1f} GB free in {folder.parent}, {needed:,.1f} GB needed")
            shutil.copyfile(tar, unfinished)
            os.replace(unfinished, folder / tar.name)
            copies += 1
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            print(f"no copy of {tar}, which is read where it is: {error}", flush=True)
    print(f"{copies} of {len(own)} tars copied to {folder}", flush=True)
    return copies
