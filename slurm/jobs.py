"""The steps of the chain as Slurm jobs: their sbatch command lines, dependencies and submission.

A job does what was submitted, however long it waits and however often it is requeued: it reads its settings from
logs/runs/<time>/config.toml, which is written once. Editing the user's file affects later runs only.
"""

import argparse
import os
import re
import shutil
from pathlib import Path

from common import config, files
from common.errors import PipelineError
from common.sections import Config
from slurm import chain, runs
from slurm.runs import ROOT

PASSWORD = re.compile("://[^/@]*:[^/@]*@")  # in a URL


def sbatch_command(step, tasks: list[int], cfg: Config, folder: Path, dependency: str) -> list[str]:
    """The sbatch command line for these tasks of a step of the run in `folder`.

    `dependency`: such as "afterok:12:13", or empty.
    """
    resources = step.resources_in(cfg)
    command = ["sbatch", "--parsable", f"--time={resources.time}", "--requeue"]
    command += [f"--signal=USR2@{cfg.slurm.signal_before_s}", *cfg.slurm.sbatch, *resources.sbatch]
    # these override the user's flags: status.py and the next submit.py find jobs and logs by them
    command += [f"--job-name={step.name}", f"--chdir={ROOT}", f"--output={log_of(step, folder)}"]
    command += ["--open-mode=append", "--kill-on-invalid-dep=yes"]
    if step.tasks > 1:
        throttle = f"%{resources.throttle}" if resources.throttle else ""
        command.append(f"--array={ranges(tasks)}{throttle}")
    if dependency:
        command.append(f"--dependency={dependency}")
    command += [f"{ROOT}/slurm/stage.sbatch", str(ROOT), str(cfg.slurm.max_requeues), step.script, *step.arguments]
    return [*command, "--config", str(folder / "config.toml")]


def log_of(step, folder: Path) -> Path:
    """The log of a step; Slurm replaces %a by the number of an array's task."""
    return folder / (f"{step.name}-%a.log" if step.tasks > 1 else f"{step.name}.log")


def ranges(tasks: list[int]) -> str:
    """Increasing numbers in sbatch's notation: "0-3,7"."""
    spans: list[list[int]] = []
    for task in tasks:
        if spans and spans[-1][1] == task - 1:
            spans[-1][1] = task
        else:
            spans.append([task, task])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def dependency_of(step, todo: dict[str, list[int]], job_ids: dict[str, str]) -> str:
    """The --dependency of `step`, given the job ids of the steps that it may wait for.

    aftercorr pairs tasks by number. How it treats a number that the other array lacks is undocumented, so it is
    used only between arrays of the same numbers.
    """
    needs = [name for name in step.needs if name in job_ids]
    if not needs:
        return ""
    paired = step.shards_match and step.tasks > 1 and all(todo[name] == todo[step.name] for name in needs)
    return ":".join(["aftercorr" if paired else "afterok", *(job_ids[name] for name in needs)])


def planned(steps: list, todo: dict[str, list[int]], cfg: Config) -> list[list[str]]:
    """The sbatch command lines of the steps that are left, with step names in place of job ids."""
    folder, left = cfg.paths.logs_dir / "runs" / "TIME", [step for step in steps if todo[step.name]]
    job_ids = {step.name: f"${step.name}" for step in left}
    return [
        sbatch_command(step, todo[step.name], cfg, folder, dependency_of(step, todo, job_ids)) for step in left
    ]


# ------------------------------------------------------------------------------------------------ submission


def submit(steps: list, todo: dict[str, list[int]], cfg: Config, args: argparse.Namespace) -> int:
    """Submit the remaining tasks, with their dependencies, as a new run."""
    if shutil.which("sbatch") is None:
        raise PipelineError(f"sbatch not found: {runs.WITHOUT_CLUSTER}")
    left = [step for step in steps if todo[step.name]]
    if not left:
        print(f"nothing to do: {', '.join(step.name for step in steps)} done")
        return 0
    widest, limit = max(step.tasks for step in left), runs.max_array_size()
    if widest > limit:
        raise PipelineError(
            f"an array of {widest} tasks is too large: this cluster allows {limit} (MaxArraySize)\n"
            "lower slurm.num_shards, slurm.difficulty_shards or --tune; a shard may take any number of tars"
        )
    with runs.lock(cfg.paths.logs_dir):
        entries = {step.name: entry_of(step, todo[step.name], cfg, args.tune) for step in left}
        reads = {path for entry in entries.values() for path in entry["reads"]}
        writes = {entry["target"] for entry in entries.values()}
        runs.refuse_busy(cfg.paths.logs_dir, reads, writes)
        folder = runs.create(cfg.paths.logs_dir)
        freeze(cfg, folder / "config.toml")
        record = {"owner": os.getuid(), "tune": args.tune}
        record |= {"config": args.config and str(args.config.resolve()), "set": args.set}
        record |= {"continue_with": continuation(args), "done_before": [s.name for s in steps if s not in left]}
        record["steps"] = {step.name: {**entries[step.name], "log": str(log_of(step, folder))} for step in left}
        runs.save(folder, record)
        return submit_rest(folder, record, left, cfg, {})


def freeze(cfg: Config, path: Path) -> None:
    """Write all settings, readable by the owner only if the URL of the study's database has a password."""
    mask = os.umask(0)
    os.umask(mask | 0o077 if PASSWORD.search(cfg.tuning.study_storage) else mask)
    try:
        files.write_text(path, config.to_toml(cfg))
    finally:
        os.umask(mask)


def entry_of(step, tasks: list[int], cfg: Config, tune: int) -> dict:
    """A step in the record of a run, before it is submitted."""
    return {
        "job": None,  # its id, once submitted
        "tasks": tasks,
        "of": step.tasks,
        "needs": step.needs,
        "reads": [chain.folder_of(name, cfg, tune) for name in step.needs],
        "target": str(step.stage.folder(cfg)),
        "command": [],
    }


def submit_rest(folder: Path, record: dict, steps: list, cfg: Config, job_ids: dict[str, str]) -> int:
    """Submit the steps of a record that have no job yet. `job_ids`: of the steps that they may wait for."""
    todo = {name: entry["tasks"] for name, entry in record["steps"].items()}
    for step in steps:
        entry = record["steps"][step.name]
        if entry["job"]:
            continue
        dependency = dependency_of(step, todo, job_ids)
        entry["command"] = sbatch_command(step, entry["tasks"], cfg, folder, dependency)
        try:
            entry["job"] = job_ids[step.name] = sbatch(entry["command"])
        except PipelineError as error:
            run = runs.handle(folder, record)
            raise PipelineError(
                f"{step.name} was not submitted: {error}\n"
                f"fix this, then submit the rest with slurm/submit.py --continue {run},\n"
                f"or cancel the submitted jobs with --cancel {run}"
            ) from None
        runs.save(folder, record)
        shards = f", shards {ranges(entry['tasks'])} of {step.tasks}" if step.tasks > 1 else ""
        print(f"{step.name:26} job {job_ids[step.name]}{shards}", flush=True)
    print(f"run {folder.name}: logs in {folder}; follow it with slurm/status.py")
    return 0


def sbatch(command: list[str]) -> str:
    """Run sbatch; returns the job id. Its other output, such as a site's notices, goes to stderr."""
    answer = runs.ask(*command, show_warnings=True)
    match = re.search(r"^(\d+)(;.*)?$", answer, re.MULTILINE)  # with several clusters: id;cluster
    if match is None:
        raise PipelineError(f"sbatch printed no job id: {answer.strip()}")
    return match[1]


def continue_run(name: str, args: argparse.Namespace, logs_dir: Path) -> int:
    """Submit the rest of an interrupted submission with its settings, but with today's resources: they may be what
    sbatch refused."""
    folder = runs.find(logs_dir, name)
    with runs.lock(folder.parents[1]):
        record = runs.load(folder)
        runs.adopt(folder, record)
        cfg = config.load(folder / "config.toml")
        today = config.load(record["config"] and Path(record["config"]), [*record["set"], *args.set]).slurm
        cut = {name: getattr(cfg.slurm, name) for name in ("num_shards", "difficulty_shards")}
        cfg = cfg.model_copy(update={"slurm": today.model_copy(update=cut)})
        steps = [step for step in chain.steps_of(cfg, record["tune"]) if step.name in record["steps"]]
        live = runs.live_steps(record, runs.queue(record["owner"]))
        left = chain.missing(steps, cfg)
        for name, job in runs.job_ids(record).items():
            if name not in live and left[name]:
                log = record["steps"][name]["log"]
                raise PipelineError(
                    f"{name} (job {job}) of that run ended unfinished: see {log}\n"
                    f"slurm/submit.py --cancel {runs.handle(folder, record)}, then submit again"
                )
        rest = [record["steps"][step.name] for step in steps if not record["steps"][step.name]["job"]]
        reads, writes = {path for entry in rest for path in entry["reads"]}, {entry["target"] for entry in rest}
        runs.refuse_busy(logs_dir, reads, writes, but=folder)
        return submit_rest(folder, record, steps, cfg, live)


def settings_flags(args: argparse.Namespace) -> list[str]:
    """The --config and --set flags of this call."""
    flags = ["--config", str(args.config.resolve())] if args.config else []
    return [*flags, *(word for override in args.set for word in ("--set", override))]


def continuation(args: argparse.Namespace) -> list[str]:
    """The arguments with which submit.py continues this run."""
    selection = {"--only": args.only, "--from": args.first, "--to": args.last, "--tune": args.tune or None}
    return [*settings_flags(args), *(str(x) for flag, x in selection.items() if x is not None for x in (flag, x))]
