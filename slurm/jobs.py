"""The steps of the chain as jobs of Slurm: their sbatch command lines and dependencies, and their submission.

A job must do what was submitted, however long it waits and however often it is queued again: its settings are
those of logs/runs/<time>/config.toml, which is written once. Editing the user's file changes later runs alone.
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
    resources = getattr(cfg.slurm, step.resources)
    command = ["sbatch", "--parsable", f"--time={resources.time}", "--requeue"]
    command += [f"--signal=USR2@{cfg.slurm.signal_before_s}", *cfg.slurm.sbatch, *resources.sbatch]
    # what follows wins over the user's flags: status.py and the next submit.py find jobs and logs by it
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
    """The log of a step; of an array's task where Slurm puts the task's number for %a."""
    return folder / (f"{step.name}-%a.log" if step.tasks > 1 else f"{step.name}.log")


def ranges(tasks: list[int]) -> str:
    """Increasing numbers as sbatch writes them: "0-3,7"."""
    spans: list[list[int]] = []
    for task in tasks:
        if spans and spans[-1][1] == task - 1:
            spans[-1][1] = task
        else:
            spans.append([task, task])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def dependency_of(step, todo: dict[str, list[int]], job_ids: dict[str, str]) -> str:
    """What Slurm must wait for before it starts `step`, given the job ids of the steps that it may wait for.

    aftercorr pairs tasks by their number. What it does with a number that the other array has not is not
    documented: it is used where both have the same.
    """
    needs = [name for name in step.needs if name in job_ids]
    if not needs:
        return ""
    paired = step.shards_match and step.tasks > 1 and all(todo[name] == todo[step.name] for name in needs)
    return ":".join(["aftercorr" if paired else "afterok", *(job_ids[name] for name in needs)])


def planned(steps: list, todo: dict[str, list[int]], cfg: Config) -> list[list[str]]:
    """The sbatch command lines of what is left, with the steps' names for the job ids."""
    folder, left = cfg.paths.logs_dir / "runs" / "TIME", [step for step in steps if todo[step.name]]
    job_ids = {step.name: f"${step.name}" for step in left}
    return [
        sbatch_command(step, todo[step.name], cfg, folder, dependency_of(step, todo, job_ids)) for step in left
    ]


# ------------------------------------------------------------------------------------------------ submission


def submit(steps: list, todo: dict[str, list[int]], cfg: Config, args: argparse.Namespace) -> int:
    """Submit the tasks that are left, with their dependencies, as a new run."""
    if shutil.which("sbatch") is None:
        raise PipelineError(f"there is no sbatch here: {runs.WITHOUT_CLUSTER}")
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
    """Write all settings; for nobody else to read where the URL of the study's database has a password."""
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
    """Submit the steps of a record that have no job yet; `job_ids`: of those whose jobs they may wait for."""
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
                f"mend that, then submit the rest with slurm/submit.py --continue {run},\n"
                f"or end what is submitted with --cancel {run}"
            ) from None
        runs.save(folder, record)
        shards = f", shards {ranges(entry['tasks'])} of {step.tasks}" if step.tasks > 1 else ""
        print(f"{step.name:26} job {job_ids[step.name]}{shards}", flush=True)
    print(f"run {folder.name}: logs in {folder}; slurm/status.py tells how it goes")
    return 0


def sbatch(command: list[str]) -> str:
    """The id of the job that sbatch makes. What it says besides, of a site's rules for instance, is passed on."""
    answer = runs.ask(*command, show_warnings=True)
    made = re.search(r"^(\d+)(;.*)?$", answer, re.MULTILINE)  # with several clusters: id;cluster
    if made is None:
        raise PipelineError(f"sbatch names no job: {answer.strip()}")
    return made[1]


def continue_run(name: str, args: argparse.Namespace, logs_dir: Path) -> int:
    """Submit the steps of a run that were not submitted, with the settings that it was submitted with, but the
    resources of today: they may be what sbatch refused."""
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
                    f"{name} (job {job}) of that run has ended without finishing: see {log}\n"
                    f"slurm/submit.py --cancel {runs.handle(folder, record)}, then submit again"
                )
        rest = [record["steps"][step.name] for step in steps if not record["steps"][step.name]["job"]]
        reads, writes = {path for entry in rest for path in entry["reads"]}, {entry["target"] for entry in rest}
        runs.refuse_busy(logs_dir, reads, writes, but=folder)
        return submit_rest(folder, record, steps, cfg, live)


def settings_flags(args: argparse.Namespace) -> list[str]:
    """--config and --set, as they were given."""
    flags = ["--config", str(args.config.resolve())] if args.config else []
    return [*flags, *(word for override in args.set for word in ("--set", override))]


def continuation(args: argparse.Namespace) -> list[str]:
    """The arguments with which submit.py goes on where this run leaves off."""
    selection = {"--only": args.only, "--from": args.first, "--to": args.last, "--tune": args.tune or None}
    return [*settings_flags(args), *(str(x) for flag, x in selection.items() if x is not None for x in (flag, x))]
