"""The steps of the chain as Slurm jobs: their sbatch command lines, dependencies and submission.

A job does what was submitted, however long it waits and however often it is requeued: it reads its settings from
logs/runs/<time>/config.toml, which is written once. Editing the user's file affects later runs only.
"""

import argparse
import functools
import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import config, errors
from common.errors import PipelineError
from common.sections import Config
from slurm import chain, fates, runs
from slurm.runs import ROOT

SUBMIT_LIMIT = re.compile(r"\w+Submit\w*Job\w*")  # AssocMaxSubmitJobLimit, QOSMaxSubmitJobPerUserLimit, ...
AWAY = re.compile("[Uu]nable to contact slurm controller|[Tt]imed out")  # what clients say while it restarts
WAIT_S = 60


class LimitReached(PipelineError):
    """Slurm takes no more jobs of this user at present. Arguments: the message, and what names the run."""

    def __str__(self) -> str:
        return self.args[0]


def sbatch_command(step, todo: dict, job_ids: dict, per_job: dict, cfg: Config, folder: Path) -> list[str]:
    """The sbatch command line of a step of the run in `folder`, for its tasks in `todo`; see `dependency_of`."""
    resources = step.resources_in(cfg)
    command = ["sbatch", "--parsable", f"--time={resources.time}", "--requeue"]
    command += [f"--signal=USR2@{cfg.slurm.signal_before_s}", *cfg.slurm.sbatch, *resources.sbatch]
    # these override the user's flags: status.py and the next submit.py find jobs and logs by them
    command += [f"--job-name={step.name}", f"--chdir={ROOT}", f"--output={log_of(step, folder)}"]
    command += ["--open-mode=append", "--kill-on-invalid-dep=yes", f"--ntasks={per_job[step.name]}"]
    if step.tasks > 1:
        throttle = f"%{resources.throttle}" if resources.throttle else ""
        indices = sorted({task // per_job[step.name] for task in todo[step.name]})
        command.append(f"--array={ranges(indices)}{throttle}")
    if dependency := dependency_of(step, todo, job_ids, per_job):
        command.append(f"--dependency={dependency}")
    command += [f"{ROOT}/slurm/stage.sbatch", str(ROOT), str(cfg.slurm.max_requeues), step.script]
    return [*command, *step.operands, *step.arguments, "--config", str(folder / "config.toml")]


def log_of(step, folder: Path) -> Path:
    """The log of a step; Slurm replaces %a by the index of an array's job."""
    return folder / (f"{step.name}-%a.log" if step.tasks > 1 else f"{step.name}.log")


def ranges(tasks: list[int]) -> str:
    """Increasing numbers in sbatch's notation: "0-3,7"."""
    # consecutive numbers are equally far from their indices
    spans = [list(span) for _, span in itertools.groupby(tasks, key=lambda task: task - tasks.index(task))]
    return ",".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


def dependency_of(step, todo: dict[str, list[int]], job_ids: dict[str, str], per_job: dict[str, int]) -> str:
    """The --dependency of `step`, given the job ids of the steps that it may wait for. `per_job`: tasks to a job.

    aftercorr pairs jobs by index. How it treats an index that the other array lacks is undocumented, so it is
    used only between arrays of the same tasks, as many to a job.
    """
    needs = [name for name in step.needs if name in job_ids]
    if not needs:
        return ""
    alike = all((todo[name], per_job[name]) == (todo[step.name], per_job[step.name]) for name in needs)
    paired = step.shards_match and step.tasks > 1 and alike
    return ":".join(["aftercorr" if paired else "afterok", *(job_ids[name] for name in needs)])


def planned(steps: list, todo: dict[str, list[int]], cfg: Config) -> list[list[str]]:
    """The sbatch command lines of the steps that are left, with step names in place of job ids."""
    folder, left = cfg.paths.logs_dir / "runs" / "TIME", [step for step in steps if todo[step.name]]
    job_ids = {step.name: f"${step.name}" for step in left}
    per_job = {step.name: step.tasks_per_job(cfg) for step in left}
    return [sbatch_command(step, todo, job_ids, per_job, cfg, folder) for step in left]


def submit(steps: list, todo: dict[str, list[int]], cfg: Config, args: argparse.Namespace) -> int:
    """Submit the remaining tasks, with their dependencies, as a new run."""
    if shutil.which("sbatch") is None:
        raise PipelineError(f"sbatch not found: {runs.WITHOUT_CLUSTER}")
    left = [step for step in steps if todo[step.name]]
    if not left:
        print(f"nothing to do: {', '.join(step.name for step in steps)} done")
        return 0
    refuse_wide(left, cfg)
    selection = {"--only": args.only, "--from": args.first, "--to": args.last, "--tune": args.tune}
    selected = [word for flag, value in selection.items() if value for word in (flag, str(value))]
    selected += [word for name in args.remake for word in (chain.REMAKE, name)]
    if args.embed:
        selected = ["--embed", *steps[0].operands]
    entries = functools.partial(entries_of, left, chain.steps_of(cfg, args.tune), todo, cfg)
    with runs.lock(cfg.paths.logs_dir):
        runs.refuse_busy(cfg.paths.logs_dir, entries(Path()).values())
        folder = runs.create(cfg.paths.logs_dir)
        (folder / "config.toml").write_text(config.to_toml(cfg), encoding="utf-8")
        record = {
            "owner": os.getuid(),
            "tune": args.tune,
            "remake": args.remake,
            "embed": args.embed and [steps[0].module, *steps[0].operands],  # see chain.embed_step
            "config": args.config and str(args.config.resolve()),
            "set": args.set,
            "continue_with": [*errors.settings_flags(args), *selected],
            "done_before": [step.name for step in steps if not todo[step.name]],
            "steps": entries(folder),
        }
        runs.save(folder, record)
        return submit_rest(folder, record, left, cfg, {})


def refuse_wide(steps: list, cfg: Config) -> None:
    """Raise PipelineError if the cluster does not take arrays as wide as these steps'."""
    widest, limit = max(-(-step.tasks // step.tasks_per_job(cfg)) for step in steps), runs.max_array_size()
    if widest > limit:
        raise PipelineError(
            f"an array of {widest} tasks is too large: this cluster allows {limit} (MaxArraySize)\n"
            "lower slurm.num_shards, slurm.difficulty_shards or --tune; a shard may take any number of tars"
        )


def entries_of(steps: list, chain_steps: list, todo: dict, cfg: Config, folder: Path) -> dict[str, dict]:
    """Steps of the chain as the record of the run in `folder` lists them before they are submitted."""
    # without links: refuse_busy compares them with those of other runs
    folders = {step.name: str(step.stage.folder(cfg).resolve()) for step in [*chain_steps, *steps]}
    return {
        step.name: {
            "job": None,  # its id, once submitted
            "tasks": todo[step.name],
            "tasks_per_job": step.tasks_per_job(cfg),
            "reads": [*(folders[name] for name in step.needs), *map(str, step.stage.reads)],
            "target": folders[step.name],
            "log": str(log_of(step, folder)),
        }
        for step in steps
    }


def submit_rest(folder: Path, record: dict, steps: list, cfg: Config, job_ids: dict[str, str]) -> int:
    """Submit the steps of a record that have no job yet. `job_ids`: of the steps that they may wait for."""
    todo = {name: entry["tasks"] for name, entry in record["steps"].items()}
    per_job = {name: fates.tasks_per_job(entry) for name, entry in record["steps"].items()}
    for step in steps:
        entry = record["steps"][step.name]
        if entry["job"]:
            continue
        entry["command"] = sbatch_command(step, todo, job_ids, per_job, cfg, folder)
        try:
            entry["job"] = job_ids[step.name] = sbatch(entry["command"])
        except PipelineError as error:
            run, limit = runs.handle(folder, record), SUBMIT_LIMIT.search(str(error))
            advice = "fix this"
            if limit:
                advice = (
                    f"{limit[0]}: no more jobs of yours may be in the queue, and each task of an array is one\n"
                    "lower slurm.num_shards or slurm.difficulty_shards, or add --wait, to submit as jobs end"
                )
            message = (
                f"{step.name} was not submitted: {error}\n"
                f"{advice}, then submit the rest with slurm/submit.py --continue {run},\n"
                f"or cancel the submitted jobs with --cancel {run}"
            )
            raise (LimitReached(message, run) if limit else PipelineError(message)) from None
        runs.save(folder, record)
        shards = f", shards {ranges(entry['tasks'])} of {step.tasks}" if step.tasks > 1 else ""
        together = f", {per_job[step.name]} to a job" if per_job[step.name] > 1 else ""
        note = chain.idle_gpus(step, cfg)
        print(f"{step.name:26} job {job_ids[step.name]}{shards}{together} {note}".rstrip(), flush=True)
    print(f"run {folder.name}: logs in {folder}; follow it with slurm/status.py")
    return 0


def sbatch(command: list[str]) -> str:
    """Run sbatch; returns the job id. Its other output, such as a site's notices, goes to stderr."""
    answer = runs.ask(*command, show_warnings=True)
    match = re.search(r"^(\d+)(;.*)?$", answer, re.MULTILINE)  # with several clusters: id;cluster
    if match is None:
        raise PipelineError(f"sbatch printed no job id: {answer.strip()}")
    return match[1]


def submit_all(submission: Callable[[], int], args: argparse.Namespace, logs_dir: Path) -> int:
    """Call `submission`. With --wait, continue its run until all is submitted, whenever jobs of this user may have
    ended; a controller that is away for a while does not end that."""
    waits = False
    while True:
        try:
            return submission()
        except LimitReached as error:
            queue = runs.queue(os.getuid()) or {}
            if not args.wait or not any(job.is_live for job in queue.values()):
                raise
            waits, message = True, error.args[0]
            submission = functools.partial(continue_run, error.args[1], args, logs_dir)
        except PipelineError as error:
            if not (waits and AWAY.search(str(error))):
                raise
            message = str(error)
        print(f"{message.splitlines()[0]}; trying again every {WAIT_S} s", file=sys.stderr, flush=True)
        time.sleep(WAIT_S)


def continue_run(name: str, args: argparse.Namespace, logs_dir: Path) -> int:
    """Submit the rest of an interrupted submission with its settings, but with today's resources: they may be what
    sbatch refused."""
    folder = runs.find(logs_dir, name)
    with runs.lock(folder.parents[1]):
        record = runs.load(folder)
        runs.adopt(folder, record)
        cfg = config.load(folder / "config.toml")
        today = config.load(record["config"] and Path(record["config"]), [*record["set"], *args.set]).slurm
        before, cfg = cfg, cfg.model_copy(update={"slurm": today})
        divide_anew(record, before, cfg, folder)
        steps = [step for step in chain.steps_of_record(record, cfg) if step.name in record["steps"]]
        live = runs.live_steps(record, runs.queue(record["owner"]))
        left = chain.missing(steps, cfg)
        for name, job in runs.job_ids(record).items():
            if name not in live and left[name]:
                log = record["steps"][name]["log"]
                raise PipelineError(
                    f"{name} (job {job}) of that run ended unfinished: see {log}\n"
                    f"slurm/submit.py --cancel {runs.handle(folder, record)}, then submit again"
                )
        rest = [entry for entry in record["steps"].values() if not entry["job"]]
        runs.refuse_busy(logs_dir, rest, but=folder)
        waiting = [step for step in steps if not record["steps"][step.name]["job"]]
        if waiting:
            refuse_wide(waiting, cfg)
        for step in waiting:  # today's, like all resources of what is yet to be submitted
            record["steps"][step.name]["tasks_per_job"] = step.tasks_per_job(cfg)
        runs.save(folder, record)
        return submit_rest(folder, record, steps, cfg, live)


def divide_anew(record: dict, before: Config, cfg: Config, folder: Path) -> None:
    """Divide in the record what has not been submitted as `cfg` says now. `before`: the run's settings."""
    submitted = runs.job_ids(record)
    shards = chain.shards_of(before) | record.get("shards", {})
    fixed = {"neighbor_parts" if name == "compute_visual_neighbors" else name for name in submitted}
    record["shards"] = {
        name: shards[name] if name in fixed else count for name, count in chain.shards_of(cfg).items()
    }
    if record["shards"] == shards:
        return
    names = {*record["steps"], *(["neighbor_parts"] if "compute_visual_neighbors" in record["steps"] else [])}
    steps = chain.steps_of_record(record, cfg)
    chosen = [step for step in steps if step.name in names]
    entries = entries_of(chosen, steps, chain.missing(chosen, cfg), cfg, folder)
    entries |= {name: record["steps"][name] for name in submitted}
    record["done_before"] += [name for name, entry in entries.items() if not entry["tasks"]]
    record["steps"] = {name: entry for name, entry in entries.items() if entry["tasks"]}
