"""The whole chain: what depends on what, and how it is run, on Slurm or here.

Reads    config.toml; which artefacts exist, to say what is left
Writes   through the stages: everything; itself: logs/runs/<time>/run.json (job ids and commands)
Command  python slurm/submit.py              submit what is missing to Slurm
         python slurm/submit.py --dry-run    print the graph, what is left, and the sbatch lines
         python slurm/submit.py --local      the same stages in order, on this machine
         [--from STAGE] [--to STAGE] [--tune N] [--config PATH] [--set section.key=value]
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
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


def local_command(step: Step, shared: list[str]) -> list[str]:
    """The command line that does all of a step's work here: the same as the job's, without the shards."""
    return [sys.executable, "-m", step.module, *shared]


def sbatch_command(step: Step, cfg, shared: list[str], log_dir: Path, dependency: str) -> list[str]:
    """The sbatch command line of a step. `dependency`: such as "afterok:12:13", or empty."""
    resources = getattr(cfg.slurm, step.resources)
    command = ["sbatch", "--parsable", f"--job-name={step.name}", f"--chdir={ROOT}", f"--time={resources.time}"]
    log_name = f"{step.name}-%a.log" if step.tasks > 1 else f"{step.name}.log"
    command += [f"--output={log_dir / log_name}", "--open-mode=append", "--requeue"]
    command += [f"--signal=USR2@{cfg.slurm.signal_before_s}", "--kill-on-invalid-dep=yes"]
    if step.tasks > 1:
        throttle = f"%{resources.throttle}" if resources.throttle else ""
        command.append(f"--array=0-{step.tasks - 1}{throttle}")
    if dependency:
        command.append(f"--dependency={dependency}")
    command += [*cfg.slurm.sbatch, *resources.sbatch]
    return [*command, "slurm/stage.sbatch", str(cfg.slurm.max_requeues), step.module, *step.arguments, *shared]


def dependency_of(step: Step, job_ids: dict[str, str]) -> str:
    """What Slurm must wait for before it starts `step`, given the job ids of the steps submitted so far."""
    ids = [job_ids[name] for name in step.needs if name in job_ids]
    return ":".join(["aftercorr" if step.shards_match else "afterok", *ids]) if ids else ""


def progress_of(step: Step, cfg) -> tuple[int, int]:
    """How many of a step's files exist, and how many it makes in all (0 where that is not known yet).

    Whether a file that exists still matches the settings is for its stage to say, when it runs.
    """
    from common import parquet

    paths = cfg.paths
    tars = [tar.stem for tar in sorted(paths.raw_dir.glob("*.tar"))]
    intermediates = [paths.intermediates_dir / f"{tar}.parquet" for tar in tars]
    if step.name == "process_tar":
        expected = intermediates
    elif step.name == "compute_fingerprints":
        expected = [paths.fingerprints_dir / f"{tar}.parquet" for tar in tars]
    elif step.name == "generate_embeddings":
        if not all(file.exists() for file in intermediates):
            return len(list(paths.embeddings_dir.glob("*.parquet"))), 0
        parts = {f.stem: -(-parquet.num_rows(f) // cfg.data.rows_per_part) or 1 for f in intermediates}
        expected = [paths.embeddings_dir / f"{tar}-{part}.parquet" for tar in tars for part in range(parts[tar])]
    else:
        expected = {
            "merge_and_split": [paths.merged_dir / f"{split}.parquet" for split in ("train", "val", "test")],
            "summarize_ids": [paths.summary_dir / "summary.json"],
            "neighbor_parts": [],
            "compute_visual_neighbors": [paths.difficulty_dir / "difficulty_metadata.parquet"],
            "optuna_worker": [],
            "train": [paths.checkpoints_dir / cfg.training.run / "checkpoint_best.pt"],
            "evaluate": [paths.evaluation_dir / "metrics.json"],
            "convert_to_hf": [paths.published_dir / "config.json"],
        }[step.name]
    return sum(file.exists() for file in expected), len(expected)


def print_graph(steps: list[Step], cfg) -> None:
    """The chain as text: a line per step with its tasks, what it waits for, and how far it is."""
    for step in steps:
        done, total = progress_of(step, cfg)
        state = "" if not total else "done" if done == total else f"{done} of {total} files"
        tasks = f"{step.tasks} tasks" if step.tasks > 1 else "1 task"
        after = f"after {', '.join(step.needs)}" if step.needs else ""
        print(f"{step.name:26} {tasks:10} {state:18} {after}".rstrip())


def run_locally(steps: list[Step], shared: list[str]) -> int:
    """Run the steps one after the other in this place; stops at the first that fails, with its exit code."""
    for number, step in enumerate(steps, 1):
        if step.name == "neighbor_parts":
            continue  # cut into parts for a job array only: here the next step does all of it
        print(f"[{number}/{len(steps)}] {step.name}", flush=True)
        code = subprocess.run(local_command(step, shared), cwd=ROOT).returncode
        if code:
            advice = f"the chain stopped at {step.name} (exit code {code}); the same command continues there"
            print(advice, file=sys.stderr)
            return code if code > 0 else 1
    return 0


def print_results(cfg) -> None:
    """Where the results of a finished chain lie."""
    results = {
        "report": cfg.paths.evaluation_dir / "report.html",
        "figures": cfg.paths.evaluation_dir / "metrics.json",
        "model": cfg.paths.published_dir,
    }
    for name, path in results.items():
        if path.exists():
            print(f"{name:8} {path}")


def submit(steps: list[Step], cfg, shared: list[str]) -> int:
    """Submit the steps with their dependencies; the record of it is updated after each submission."""
    from common import files

    if shutil.which("sbatch") is None:
        raise PipelineError(
            "there is no sbatch here: run this on a login node,\nor run the chain here with --local"
        )
    log_dir = cfg.paths.logs_dir / "runs" / time.strftime("%Y%m%d-%H%M%S")
    log_dir.mkdir(parents=True)  # a job whose log directory is missing fails without a log
    record: dict = {"command": sys.argv, "config": shared, "jobs": {}}
    job_ids: dict[str, str] = {}
    for step in steps:
        command = sbatch_command(step, cfg, shared, log_dir, dependency_of(step, job_ids))
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if answer.returncode:
            raise PipelineError(
                f"sbatch refused {step.name}: {answer.stderr.strip()}\n"
                f"submitted before it: {' '.join(job_ids.values()) or 'nothing'} (scancel them, or let them run)"
            )
        job_ids[step.name] = answer.stdout.strip().split(";")[0]
        record["jobs"][step.name] = {"id": job_ids[step.name], "needs": step.needs, "command": command}
        files.write_text(log_dir / "run.json", json.dumps(record, indent=2))
        print(f"{step.name:26} job {job_ids[step.name]}")
    print(f"logs in {log_dir}")
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.config_flags(arguments)
    arguments.add_argument("--dry-run", action="store_true", help="print the graph, what is left, the commands")
    arguments.add_argument("--local", action="store_true", help="run the stages here, in order")
    arguments.add_argument("--from", dest="first", metavar="STAGE", help="begin with this stage")
    arguments.add_argument("--to", dest="last", metavar="STAGE", help="end with this stage")
    arguments.add_argument("--tune", type=int, default=0, metavar="N", help="N Optuna workers first")
    args = arguments.parse_args(argv)
    cfg = cli.load_config(args)
    if args.tune < 0:
        raise ConfigError("--tune takes a number of workers, 1 or more")

    steps = select(chain(cfg, args.tune), args.first, args.last)
    shared = ["--config", str(args.config.resolve())] if args.config else []
    for override in args.set:
        shared += ["--set", override]

    if args.dry_run:
        print_graph(steps, cfg)
        log_dir = cfg.paths.logs_dir / "runs" / "TIME"
        for step in steps:
            command = (
                local_command(step, shared)
                if args.local
                else sbatch_command(
                    step, cfg, shared, log_dir, dependency_of(step, {s.name: f"${s.name}" for s in steps})
                )
            )
            print(f"\n{shlex.join(command)}")
        return 0
    if args.local:
        code = run_locally(steps, shared)
        print_results(cfg)
        return code
    return submit(steps, cfg, shared)


if __name__ == "__main__":
    cli.run(main)
