"""The whole chain: what depends on what, and how it is run, on Slurm or here.

Reads    config.toml; the records in the artefacts: what is done is left out, down to single shards
Writes   through the stages: everything; itself: logs/runs/<time>/{run.json,config.toml} (jobs, their settings)
Command  python slurm/submit.py              submit what is missing to Slurm (slurm/status.py tells how it goes)
         python slurm/submit.py --dry-run    print the graph, what is left, and the command lines
         python slurm/submit.py --local      the same stages in order, on this machine [--jobs N at once]
         [--from STAGE] [--to STAGE] [--only STAGE] [--tune N] [--config PATH] [--set section.key=value]
         python slurm/submit.py --local --from merge_and_split --overwrite    with tars or settings that are new
         python slurm/submit.py --prefetch   fetch the backbone for compute nodes without a network
         python slurm/submit.py --cancel RUN, or --continue RUN where a submission broke off
"""

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import ConfigError


@dataclass(frozen=True)
class Step:
    """One stage of the chain: a command, how many tasks it is cut into, and what must be done before it."""

    name: str
    module: str
    needs: tuple[str, ...] = ()  # all steps whose files it reads
    tasks: int = 1  # more than 1: a job array whose task i takes shard i
    shards_match: bool = False  # shard i needs only shard i of what it needs: aftercorr instead of afterok
    arguments: tuple[str, ...] = ()

    @property
    def resources(self) -> str:
        """The table of [slurm] with this step's resources: its module's own name."""
        return self.module.split(".")[-1]

    @property
    def script(self) -> str:
        return self.module.replace(".", "/") + ".py"


def chain(cfg, tune: int = 0) -> list[Step]:
    """The steps in an order in which they can run. `tune`: how many Optuna workers choose the settings first."""
    shards, difficulty_shards = cfg.slurm.num_shards, cfg.slurm.difficulty_shards
    by_tar = ("--num-shards", str(shards))
    merge, neighbors = "merge_and_split", "difficulty.compute_visual_neighbors"

    steps = [
        Step("process_tar", "preprocess.process_tar", (), shards, arguments=by_tar),
        Step("compute_fingerprints", "preprocess.compute_fingerprints", ("process_tar",), shards, True, by_tar),
        Step("generate_embeddings", "generate.generate_embeddings", ("process_tar",), shards, True, by_tar),
        Step(merge, "preprocess.merge_and_split", ("process_tar", "compute_fingerprints", "generate_embeddings")),
        Step("summarize_ids", "preprocess.summarize_ids", (merge,)),
    ]
    if difficulty_shards > 1:
        by_anchor = ("--num-shards", str(difficulty_shards))
        gather = (*by_anchor, "--finish")
        steps += [
            Step("neighbor_parts", neighbors, (merge,), difficulty_shards, arguments=by_anchor),
            Step("compute_visual_neighbors", neighbors, (merge, "neighbor_parts"), arguments=gather),
        ]
    else:
        steps += [Step("compute_visual_neighbors", neighbors, (merge,))]
    trained_on = (merge, "compute_visual_neighbors")
    if tune:
        steps += [
            Step("optuna_worker", "train.optuna_worker", trained_on, tune),
            Step("train", "train.fetch_best_and_train", (*trained_on, "optuna_worker")),
        ]
    else:
        steps += [Step("train", "train.train", trained_on)]
    return [
        *steps,
        Step("evaluate", "train.evaluate", (merge, "train")),
        Step("convert_to_hf", "publish.convert_to_hf", (merge, "train", "evaluate")),
    ]


def select(steps: list[Step], first: str | None, last: str | None) -> list[Step]:
    """The steps from `first` to `last`, both included. Raises ConfigError for a name that is not a step's.

    A search that is cut into parts begins with these.
    """
    names = [step.name for step in steps]
    for name in (first, last):
        if name is not None and name not in names:
            tune = " (optuna_worker: with --tune N)" if "optuna_worker" not in names else ""
            raise ConfigError(f"there is no stage {name}; the stages are {', '.join(names)}{tune}")
    if first == "compute_visual_neighbors" and "neighbor_parts" in names:
        first = "neighbor_parts"
    begin = names.index(first) if first else 0
    end = names.index(last) if last else len(names) - 1
    if begin > end:
        raise ConfigError(f"--from {first} comes after --to {last}")
    return steps[begin : end + 1]


# ------------------------------------------------------------------------------------------------ command line


def work_notes(steps: list[Step], cfg) -> dict[str, str]:
    """Step -> how many of its tasks have no work, in words, where that is so or may be."""
    from slurm import artefacts

    notes = {}
    for step in steps:
        divides = step.tasks > 1 and step.name != "optuna_worker"
        busy = artefacts.num_busy(step, cfg) if divides else step.tasks
        if busy is None:
            notes[step.name] = "(some tasks may have no work)" if artefacts.num_tars(cfg) < step.tasks else ""
        else:
            notes[step.name] = f"({step.tasks - busy} of the tasks have no work)" if busy < step.tasks else ""
    return notes


def print_plan(
    steps: list[Step], todo: dict[str, list[int]], commands: list[list[str]], notes: dict[str, str]
) -> None:
    """The chain as text, a line per step with what is left of it and what it waits for; then the command lines."""
    from slurm import jobs

    for step in steps:
        left = todo[step.name]
        state = "to do" if left else "done"
        if step.tasks > 1:
            state = (
                f"{len(left)} of {step.tasks} tasks to do ({jobs.ranges(left)})"
                if left
                else f"{step.tasks} tasks done"
            )
        after = f"after {', '.join(step.needs)}" if step.needs else ""
        print(" ".join(filter(None, [f"{step.name:26} {state:34}", after, notes[step.name]])).rstrip())
    for command in commands:
        print(f"\n{shlex.join(command)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.config_flags(arguments)
    arguments.add_argument("--dry-run", action="store_true", help="print the graph, what is left, the commands")
    arguments.add_argument("--from", dest="first", metavar="STAGE", help="begin with this stage")
    arguments.add_argument("--to", dest="last", metavar="STAGE", help="end with this stage")
    arguments.add_argument("--only", metavar="STAGE", help="this stage alone")
    arguments.add_argument(
        "--overwrite", action="store_true", help="with --local and --from or --only: make that again"
    )
    arguments.add_argument("--tune", type=int, default=0, metavar="N", help="N Optuna workers first")
    arguments.add_argument("--jobs", type=int, default=1, metavar="N", help="with --local: so many at once (1)")
    where = arguments.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="run the stages here, in order")
    where.add_argument(
        "--prefetch", action="store_true", help="fetch the backbone, and look for it as the jobs do"
    )
    where.add_argument("--continue", dest="rest", metavar="RUN", help="submit the rest of a run")
    where.add_argument("--cancel", metavar="RUN", help="end a run: logs/runs/RUN")
    args = arguments.parse_args(argv)
    if args.tune < 0:
        raise ConfigError("--tune takes a number of workers, 1 or more")
    if args.jobs < 1 or (args.jobs > 1 and not args.local):
        raise ConfigError(
            "--jobs takes a number, 1 or more, and belongs to --local; Slurm's is slurm.<stage>.throttle"
        )
    if args.overwrite and not (args.only or args.first):
        raise ConfigError(
            "--overwrite makes stages again: say from which one on with --from, or which with --only"
        )
    if args.dry_run and (args.prefetch or args.rest or args.cancel):
        raise ConfigError("--dry-run shows what would be submitted, or run with --local: nothing else has one")
    if (args.prefetch or args.rest or args.cancel) and (args.only or args.first or args.last or args.tune):
        raise ConfigError("--only, --from, --to and --tune choose what is submitted: leave them out here")
    if args.only and (args.first or args.last):
        raise ConfigError("--only names one stage: leave out --from and --to")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    cfg = cli.load_config(args)
    from slurm import artefacts, jobs, local, runs

    if args.prefetch:
        return local.prefetch(cfg, jobs.settings_flags(args))
    if args.rest:
        return jobs.continue_run(args.rest, args, cfg.paths.logs_dir, chain)
    if args.cancel:
        folder = runs.find(cfg.paths.logs_dir, args.cancel)
        print(f"run {folder.name}: {runs.cancel(folder)} jobs cancelled")
        return 0

    if args.local:  # the neighbour search is cut for job arrays only: here one process has all cores
        cfg = cfg.model_copy(update={"slurm": cfg.slurm.model_copy(update={"difficulty_shards": 1})})
    steps = select(chain(cfg, args.tune), args.only or args.first, args.only or args.last)
    if args.overwrite and not args.local:  # a job that is requeued would begin again and again
        folders = " ".join(str(artefacts.target_of(step.name, cfg)) for step in steps)
        raise ConfigError(f"--overwrite belongs to --local; on Slurm remove what is to be made again:\n{folders}")
    todo = (
        {step.name: list(range(step.tasks)) for step in steps} if args.overwrite else artefacts.missing(steps, cfg)
    )
    if args.local:
        flags = [*jobs.settings_flags(args), *["--overwrite"][: args.overwrite]]
        commands = local.commands(steps, todo, flags, args.jobs)
        if args.dry_run:
            print_plan(steps, todo, [command for _, command in commands], work_notes(steps, cfg))
            return 0
        return local.run_chain(steps, commands, cfg, args.jobs)
    if args.dry_run:
        print_plan(steps, todo, jobs.planned(steps, todo, cfg), work_notes(steps, cfg))
        return 0
    return jobs.submit(steps, todo, cfg, args)


if __name__ == "__main__":
    cli.run(main)
