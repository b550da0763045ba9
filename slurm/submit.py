"""The whole chain: what depends on what, and how it is run, on Slurm or here.

Reads    config.toml; the records in the artefacts: what is done is left out, down to single shards
Writes   through the stages: everything; itself: logs/runs/<time>/run.json (steps, job ids, commands)
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
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import ConfigError, PipelineError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """One stage of the chain: a command, how many tasks it is cut into, and what must be done before it."""

    name: str
    module: str
    needs: tuple[str, ...] = ()
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
    neighbors = "difficulty.compute_visual_neighbors"

    steps = [
        Step("process_tar", "preprocess.process_tar", (), shards, arguments=by_tar),
        Step("compute_fingerprints", "preprocess.compute_fingerprints", ("process_tar",), shards, True, by_tar),
        Step("generate_embeddings", "generate.generate_embeddings", ("process_tar",), shards, True, by_tar),
        Step("merge_and_split", "preprocess.merge_and_split", ("compute_fingerprints", "generate_embeddings")),
        Step("summarize_ids", "preprocess.summarize_ids", ("merge_and_split",)),
    ]
    if difficulty_shards > 1:
        by_anchor = ("--num-shards", str(difficulty_shards))
        steps += [
            Step("neighbor_parts", neighbors, ("merge_and_split",), difficulty_shards, arguments=by_anchor),
            Step("compute_visual_neighbors", neighbors, ("neighbor_parts",), arguments=(*by_anchor, "--finish")),
        ]
    else:
        steps += [Step("compute_visual_neighbors", neighbors, ("merge_and_split",))]
    if tune:
        steps += [
            Step("optuna_worker", "train.optuna_worker", ("compute_visual_neighbors",), tune),
            Step("train", "train.fetch_best_and_train", ("optuna_worker",)),
        ]
    else:
        steps += [Step("train", "train.train", ("compute_visual_neighbors",))]
    return [
        *steps,
        Step("evaluate", "train.evaluate", ("train",)),
        Step("convert_to_hf", "publish.convert_to_hf", ("evaluate",)),
    ]


def select(steps: list[Step], first: str | None, last: str | None) -> list[Step]:
    """The steps from `first` to `last`, both included. Raises ConfigError for a name that is not a step's."""
    names = [step.name for step in steps]
    for name in (first, last):
        if name is not None and name not in names:
            raise ConfigError(f"there is no stage {name}; the stages are {', '.join(names)}")
    begin = names.index(first) if first else 0
    end = names.index(last) if last else len(names) - 1
    if begin > end:
        raise ConfigError(f"--from {first} comes after --to {last}")
    return steps[begin : end + 1]


# ------------------------------------------------------------------------------------------------ commands


def local_command(step: Step, shared: list[str]) -> list[str]:
    """The command line that does all of a step's work here: the same as the job's, without the shards."""
    return [sys.executable, str(ROOT / step.script), *shared]


def sbatch_command(
    step: Step, tasks: list[int], cfg, shared: list[str], log_dir: Path, dependency: str
) -> list[str]:
    """The sbatch command line for these tasks of a step. `dependency`: such as "afterok:12:13", or empty."""
    resources = getattr(cfg.slurm, step.resources)
    command = ["sbatch", "--parsable", f"--job-name={step.name}", f"--chdir={ROOT}", f"--time={resources.time}"]
    command += [f"--output={log_of(step, log_dir)}", "--open-mode=append", "--requeue"]
    command += [f"--signal=USR2@{cfg.slurm.signal_before_s}", "--kill-on-invalid-dep=yes"]
    if step.tasks > 1:
        throttle = f"%{resources.throttle}" if resources.throttle else ""
        command.append(f"--array={ranges(tasks)}{throttle}")
    if dependency:
        command.append(f"--dependency={dependency}")
    command += [*cfg.slurm.sbatch, *resources.sbatch, f"{ROOT}/slurm/stage.sbatch"]
    return [*command, str(ROOT), str(cfg.slurm.max_requeues), step.script, *step.arguments, *shared]


def log_of(step: Step, log_dir: Path) -> Path:
    """The log of a step; of an array's task where Slurm puts the task's number for %a."""
    return log_dir / (f"{step.name}-%a.log" if step.tasks > 1 else f"{step.name}.log")


def ranges(tasks: list[int]) -> str:
    """Increasing numbers as sbatch writes them: "0-3,7"."""
    runs: list[list[int]] = []
    for task in tasks:
        if runs and runs[-1][1] == task - 1:
            runs[-1][1] = task
        else:
            runs.append([task, task])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def dependency_of(step: Step, todo: dict[str, list[int]], job_ids: dict[str, str]) -> str:
    """What Slurm must wait for before it starts `step`, given the job ids of the steps that it may wait for.

    aftercorr pairs tasks by their number. What it does with a number that the other array has not is not
    documented: it is used where both have the same.
    """
    needs = [name for name in step.needs if name in job_ids]
    if not needs:
        return ""
    paired = step.shards_match and step.tasks > 1 and all(todo[name] == todo[step.name] for name in needs)
    return ":".join(["aftercorr" if paired else "afterok", *(job_ids[name] for name in needs)])


# ------------------------------------------------------------------------------------------------ on Slurm


def submit(steps: list[Step], todo: dict[str, list[int]], cfg, args: argparse.Namespace) -> int:
    """Submit the tasks that are left, with their dependencies, as a new run."""
    from slurm import artefacts, runs

    if shutil.which("sbatch") is None:
        raise PipelineError(
            "there is no sbatch here: run this on a login node,\nor run the chain here with --local"
        )
    left = [step for step in steps if todo[step.name]]
    if not left:
        print(f"nothing to do: {', '.join(step.name for step in steps)} done")
        return 0
    widest, limit = max(step.tasks for step in left), runs.max_array_size()
    if widest > limit:
        raise PipelineError(
            f"an array of {widest} tasks is too wide: this cluster takes {limit} (MaxArraySize)\n"
            "lower slurm.num_shards, slurm.difficulty_shards or --tune; a shard may take any number of tars"
        )
    touched = {name for step in left for name in (step.name, *step.needs)}
    targets = {str(artefacts.target_of(step, cfg)) for step in chain(cfg, args.tune) if step.name in touched}
    runs.refuse_busy(cfg.paths.logs_dir, targets)

    folder = runs.create(cfg.paths.logs_dir)
    record: dict = {"continue_with": continuation(args), "done_before": [s.name for s in steps if s not in left]}
    record |= {"config": args.config and str(args.config.resolve()), "set": args.set, "tune": args.tune}
    record["steps"] = {
        step.name: {
            "job": None,  # its id, once submitted
            "tasks": todo[step.name],
            "of": step.tasks,
            "needs": step.needs,
            "target": str(artefacts.target_of(step, cfg)),
            "log": str(log_of(step, folder)),
            "command": [],
        }
        for step in left
    }
    runs.save(folder, record)
    return submit_rest(folder, record, left, cfg, args, {})


def submit_rest(folder: Path, record: dict, steps: list[Step], cfg, args, job_ids: dict[str, str]) -> int:
    """Submit the steps of a record that have no job yet; `job_ids`: of those whose jobs they may wait for."""
    from slurm import runs

    todo = {name: entry["tasks"] for name, entry in record["steps"].items()}
    for step in steps:
        entry = record["steps"][step.name]
        if entry["job"]:
            continue
        dependency = dependency_of(step, todo, job_ids)
        entry["command"] = sbatch_command(step, entry["tasks"], cfg, shared_flags(args), folder, dependency)
        try:
            entry["job"] = job_ids[step.name] = runs.ask(*entry["command"]).strip().split(";")[0]
        except PipelineError as error:
            raise PipelineError(
                f"{step.name} was not submitted: {error}\n"
                f"mend that, then submit the rest with slurm/submit.py --continue {folder.name},\n"
                f"or end what is submitted with --cancel {folder.name}"
            ) from None
        runs.save(folder, record)
        shards = f", shards {ranges(entry['tasks'])} of {step.tasks}" if step.tasks > 1 else ""
        print(f"{step.name:26} job {job_ids[step.name]}{shards}", flush=True)
    print(f"run {folder.name}: logs in {folder}; slurm/status.py tells how it goes")
    return 0


def continue_run(name: str, args: argparse.Namespace, logs_dir: Path) -> int:
    """Submit the steps of a run that were not submitted, with the settings that it was submitted with."""
    from common import config
    from slurm import artefacts, runs

    folder = runs.find(logs_dir, name)
    record = runs.load(folder)
    runs.adopt(folder, record)
    args.config, args.set, args.tune = record["config"] and Path(record["config"]), record["set"], record["tune"]
    cfg = config.load(args.config, args.set)
    steps = [step for step in chain(cfg, args.tune) if step.name in record["steps"]]
    live = runs.live_steps(record, runs.queue())
    left = artefacts.missing(steps, cfg)
    for name, job in runs.job_ids(record).items():
        if name not in live and left[name]:
            raise PipelineError(
                f"{name} (job {job}) of that run has ended without finishing: see {record['steps'][name]['log']}\n"
                f"slurm/submit.py --cancel {folder.name}, then submit again"
            )
    return submit_rest(folder, record, steps, cfg, args, live)


# ------------------------------------------------------------------------------------------------ command line


def everything(steps: list[Step]) -> dict[str, list[int]]:
    """All tasks of all steps: what --overwrite does again."""
    return {step.name: list(range(step.tasks)) for step in steps}


def planned(steps: list[Step], todo: dict[str, list[int]], cfg, args) -> list[list[str]]:
    """The sbatch command lines of what is left, with the steps' names for the job ids."""
    log_dir, left = cfg.paths.logs_dir / "runs" / "TIME", [step for step in steps if todo[step.name]]
    job_ids = {step.name: f"${step.name}" for step in left}
    return [
        sbatch_command(step, todo[step.name], cfg, shared_flags(args), log_dir, dependency_of(step, todo, job_ids))
        for step in left
    ]


def print_plan(steps: list[Step], todo: dict[str, list[int]], commands: list[list[str]]) -> None:
    """The chain as text, a line per step with what is left of it and what it waits for; then the command lines."""
    for step in steps:
        left = todo[step.name]
        state = "to do" if left else "done"
        if step.tasks > 1:
            state = (
                f"{len(left)} of {step.tasks} tasks to do ({ranges(left)})" if left else f"{step.tasks} tasks done"
            )
        after = f"after {', '.join(step.needs)}" if step.needs else ""
        print(f"{step.name:26} {state:34} {after}".rstrip())
    for command in commands:
        print(f"\n{shlex.join(command)}")


def settings_flags(args: argparse.Namespace) -> list[str]:
    """--config and --set, as they were given."""
    flags = ["--config", str(args.config.resolve())] if args.config else []
    return [*flags, *(word for override in args.set for word in ("--set", override))]


def shared_flags(args: argparse.Namespace) -> list[str]:
    """The flags that every stage is given."""
    return [*settings_flags(args), *(["--overwrite"] if args.overwrite else [])]


def continuation(args: argparse.Namespace) -> list[str]:
    """The arguments with which submit.py goes on where this run leaves off."""
    selection = {"--only": args.only, "--from": args.first, "--to": args.last, "--tune": args.tune or None}
    return [*settings_flags(args), *(str(x) for flag, x in selection.items() if x is not None for x in (flag, x))]


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
    if args.only and (args.first or args.last):
        raise ConfigError("--only names one stage: leave out --from and --to")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    cfg = cli.load_config(args)
    from slurm import artefacts, local, runs

    if args.prefetch:
        return local.prefetch(cfg, settings_flags(args))
    if args.rest:
        return continue_run(args.rest, args, cfg.paths.logs_dir)
    if args.cancel:
        folder = runs.find(cfg.paths.logs_dir, args.cancel)
        print(f"run {folder.name}: {runs.cancel(folder)} jobs cancelled")
        return 0

    if args.local:  # the neighbour search is cut for job arrays only: here one process has all cores
        cfg = cfg.model_copy(update={"slurm": cfg.slurm.model_copy(update={"difficulty_shards": 1})})
    steps = select(chain(cfg, args.tune), args.only or args.first, args.only or args.last)
    if args.overwrite and not args.local:  # a job that is requeued would begin again and again
        folders = " ".join(str(artefacts.target_of(step, cfg)) for step in steps)
        raise ConfigError(f"--overwrite belongs to --local; on Slurm remove what is to be made again:\n{folders}")
    todo = everything(steps) if args.overwrite else artefacts.missing(steps, cfg)
    here = local.commands(steps, todo, shared_flags(args), args.jobs)
    if args.dry_run:
        jobs = [] if args.local else planned(steps, todo, cfg, args)
        print_plan(steps, todo, [command for _, command in here] if args.local else jobs)
        return 0
    if args.local:
        if not here:
            print(f"nothing to do: {', '.join(step.name for step in steps)} done")
        code = local.run(here, args.jobs)
        if code == 0 and steps[-1].name == "convert_to_hf":
            local.print_results(cfg)
        return code
    return submit(steps, todo, cfg, args)


if __name__ == "__main__":
    cli.run(main)
