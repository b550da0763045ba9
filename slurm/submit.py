"""Run the whole chain, on Slurm or on this machine; or new data through a published model.

Reads    config.toml; the records in the artefacts: finished work is skipped, down to single shards
Writes   logs/runs/<time>/{run.json,config.toml}: the jobs and their settings; everything else through the stages
Command  python slurm/submit.py              submit what is missing to Slurm (follow it with slurm/status.py)
         python slurm/submit.py --dry-run    print the graph, what is left, and the command lines
         python slurm/submit.py --local      run the same stages in order on this machine [--jobs N at once]
         [--from STAGE] [--to STAGE] [--only STAGE] [--tune N] [--config PATH] [--set section.key=value]
         python slurm/submit.py --remake merge_and_split    redo it, and what depends on it, where files no longer
         match the settings or the tars; without this, stale files are explained, and nothing runs
         python slurm/submit.py --prefetch   fetch the backbone for compute nodes without a network
         python slurm/submit.py --embed INPUT OUT [--model FOLDER]    vectors of photographs or tables, as a job
         array; with the flags of publish/generate_embeddings_from_parquet.py if INPUT is Parquet files
         python slurm/submit.py --cancel RUN, or --continue RUN after an interrupted submission
         python slurm/submit.py --wait       where a limit on submitted jobs is in the way: the rest as jobs end
"""

import argparse
import functools
import shlex
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, errors
from common.errors import ConfigError, StaleArtefact


def print_plan(
    steps: list, todo: dict[str, list[int]], stale_steps: list, commands: list, cfg, on_slurm: bool
) -> None:
    """Print a line per step, with what is left of it and what it waits for; then the command lines."""
    from slurm import chain, jobs

    complete = chain.complete(steps, todo, cfg)
    states = {step.name: f"follows {stale.step.name}" for stale in stale_steps for step in stale.followers}
    for stale in stale_steps:
        step, states[stale.step.name] = stale.step, "damaged" if stale.is_damaged else "stale"
        if step.tasks > 1 and step in steps:
            states[step.name] += f" ({len(todo[step.name])} of {step.tasks} tasks)"
        if stale.is_allowed:
            states[step.name] += ", to be remade"
    for step in steps:
        left = todo[step.name]
        if step.name in states:
            state = states[step.name]
        elif step.name in complete:
            state = "complete, would be redone"
        elif step.tasks == 1:
            state = "to do" if left else "done"
        elif left:
            state = f"{len(left)} of {step.tasks} tasks to do ({jobs.ranges(left)})"
        else:
            state = f"{step.tasks} tasks done"
        after = f"after {', '.join(step.needs)}" if step.needs else ""
        notes = [chain.idle_note(step, cfg), chain.idle_gpus(step, cfg) if on_slurm else ""]
        print(" ".join(filter(None, [f"{step.name:26} {state:34}", after, *notes])).rstrip())
    for command in commands:
        print(f"\n{shlex.join(command)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.config_flags(arguments)
    arguments.add_argument("--dry-run", action="store_true", help="print the graph, what is left, the commands")
    arguments.add_argument("--from", dest="first", metavar="STAGE", help="start at this stage")
    arguments.add_argument("--to", dest="last", metavar="STAGE", help="stop after this stage")
    arguments.add_argument("--only", metavar="STAGE", help="run only this stage")
    remake = "redo the stale files of this stage and of all that depend on it; repeatable"
    arguments.add_argument("--remake", action="append", nargs="?", default=[], metavar="STAGE", help=remake)
    arguments.add_argument("--tune", type=int, default=0, metavar="N", help="tune first, with N Optuna workers")
    arguments.add_argument("--jobs", type=int, default=1, metavar="N", help="with --local: commands at once (1)")
    wait = "at a limit on submitted jobs: wait, and submit the rest as jobs end"
    arguments.add_argument("--wait", action="store_true", help=wait)
    embed = "new data through the published model; takes the flags of the script for it"
    arguments.add_argument("--embed", nargs=2, default=[], metavar=("INPUT", "OUT"), help=embed)
    where = arguments.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="run the stages on this machine")
    fetch = "fetch the backbone, and check that jobs will find it"
    where.add_argument("--prefetch", action="store_true", help=fetch)
    where.add_argument("--continue", dest="rest", metavar="RUN", help="finish an interrupted submission")
    where.add_argument("--cancel", metavar="RUN", help="cancel the run in logs/runs/RUN")
    args, more = arguments.parse_known_args(argv)
    if more and not args.embed:
        arguments.error(f"unrecognized arguments: {' '.join(more)}")
    if args.remake and (None in args.remake) != bool(args.embed):
        raise ConfigError("--remake needs the name of a stage, but none with --embed")
    if args.embed:
        args.embed += more
        if args.remake:
            args.embed, args.remake = [*args.embed, "--remake"], []
    if args.tune < 0:
        raise ConfigError("--tune must be 1 or more")
    if args.jobs < 1 or (args.jobs > 1 and not args.local):
        raise ConfigError("--jobs must be 1 or more and belongs to --local; for Slurm set slurm.<stage>.throttle")
    of_chain, elsewhere = (
        args.only or args.first or args.last or args.tune or args.remake,
        args.prefetch or args.rest or args.cancel,
    )
    if (of_chain or args.dry_run) and elsewhere:
        flags = "--only, --from, --to, --tune, --remake and --dry-run"
        raise ConfigError(f"{flags} do not apply to --prefetch, --continue or --cancel")
    if args.wait and (args.local or args.prefetch or args.cancel or args.dry_run):
        raise ConfigError("--wait does not apply to --local, --prefetch, --cancel or --dry-run")
    if args.embed and (of_chain or elsewhere):
        raise ConfigError("--embed runs no stage of the chain: it can be combined with --local and --dry-run only")
    if args.only and (args.first or args.last):
        raise ConfigError("--only cannot be combined with --from or --to")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    cfg = cli.load_config(args)
    from common.layout import former_layout
    from slurm import chain, jobs, local, runs, stale

    if args.prefetch:
        return local.prefetch(cfg, errors.settings_flags(args))
    if args.rest:
        rest = functools.partial(jobs.continue_run, args.rest, args, cfg.paths.logs_dir)
        return jobs.submit_all(rest, args, cfg.paths.logs_dir)
    if args.cancel:
        folder = runs.find(cfg.paths.logs_dir, args.cancel)
        print(f"run {folder.name}: {runs.cancel(folder)} jobs cancelled")
        return 0

    former_layout.refuse(cfg)
    if args.local:  # one process with all cores: the neighbour search is cut for job arrays only
        cfg = cfg.model_copy(update={"slurm": cfg.slurm.model_copy(update={"difficulty_shards": 1})})
    embed = [chain.embedding_module(Path(args.embed[0])), *args.embed] if args.embed else []
    whole = chain.remaking(chain.steps_of(cfg, args.tune, embed=embed), args.remake)
    steps = chain.select(whole, args.only or args.first, args.only or args.last)
    chain.refuse_output_dim(steps, cfg)
    for step in steps:
        step.refuse_inputs(cfg)
    todo = chain.missing(steps, cfg)
    stale_steps = stale.find(chain.needed(whole, steps), todo, cfg)
    given = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--dry-run"]
    reasons = [stale.without_tars(todo, cfg), stale.explanation(stale_steps, steps, cfg, given)]
    why = "\n".join(filter(None, reasons))
    commands = local.commands(steps, todo, errors.settings_flags(args), args.jobs)
    if args.dry_run:
        lines = [line for _, line in commands] if args.local else jobs.planned(steps, todo, cfg)
        print_plan(steps, todo, stale_steps, lines, cfg, on_slurm=not args.local)
        if why:
            print(f"\n{why}")
        return 0
    if why:
        raise StaleArtefact(why)
    chain.refuse_purged(steps, todo, cfg)
    if args.local:
        return local.run_chain(steps, commands, cfg, args.jobs)
    return jobs.submit_all(functools.partial(jobs.submit, steps, todo, cfg, args), args, cfg.paths.logs_dir)


if __name__ == "__main__":
    cli.run(main)
