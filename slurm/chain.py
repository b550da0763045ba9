"""The chain: its steps, what each needs, and what is left of it, down to single shards.

A step is a stage (see common/stages.py) with the number of tasks that its work is cut into. New data through a
published model is a chain of one step.
"""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import vector_files
from common.errors import ConfigError, PipelineError
from common.sections import suggestion
from common.stages import Stage

# in sbatch's flags, the number of GPUs of a job on one node: "--gres=gpu:h100:4"
GPUS = re.compile(r" (?:--gres[ =](?:\S*,)?gpu:|--gpus(?:-per-node)?[ =]|-G *)(?:[\w.]+:)?(\d+)(?![\w.])")
BY_TAR = ("process_tar", "compute_fingerprints", "generate_embeddings")  # steps whose tasks are shards of the tars
REMAKE = "--remake"  # a stage's flag


@dataclass(frozen=True)
class Step:
    """One step: a command, the number of tasks that it is cut into, and the steps that must be done before it."""

    name: str
    module: str
    needs: tuple[str, ...] = ()  # all steps whose files it reads
    tasks: int = 1  # more than 1: a job array; task i takes shard i
    shards_match: bool = False  # shard i needs only shard i of what it needs: aftercorr instead of afterok
    arguments: tuple[str, ...] = ()
    declaration: str = "STAGE"  # the stage's name in the module
    operands: tuple[str, ...] = ()  # the script's further arguments, also where the work is not cut
    given: Stage | None = None  # the stage, if it depends on them: the module declares none

    @property
    def resources(self) -> str:
        """The table of [slurm] with this step's resources: its module's own name; all that embeds has the same."""
        return self.module.split(".")[-1] if self.given is None else "generate_embeddings"

    @property
    def script(self) -> str:
        return self.module.replace(".", "/") + ".py"

    @property
    def stage(self) -> Stage:
        """The stage's declaration. Raises PipelineError if its script has none, or does not exist."""
        if self.given:
            return self.given
        try:
            return getattr(importlib.import_module(self.module), self.declaration)
        except ModuleNotFoundError as error:
            if error.name != self.module:
                raise
            raise PipelineError(f"{self.script} does not exist, but slurm/chain.py lists it") from None
        except AttributeError:
            raise PipelineError(f"{self.script} has no {self.declaration}: see CONTRIBUTING.md") from None

    def resources_in(self, cfg):
        """The stage's table of [slurm]. Raises ConfigError if there is none."""
        if not hasattr(cfg.slurm, self.resources):
            raise ConfigError(f"there is no [slurm.{self.resources}], with the resources of {self.script}")
        return getattr(cfg.slurm, self.resources)

    def sbatch_flags(self, cfg) -> str:
        """The user's flags for sbatch, those of all jobs first, each with a blank before it."""
        return "".join(f" {flag}" for flag in [*cfg.slurm.sbatch, *self.resources_in(cfg).sbatch])

    def tasks_per_job(self, cfg) -> int:
        """n, how many of its tasks one job runs: array index i runs tasks i * n to i * n + n - 1."""

        def last(flag: str) -> int:  # 0 if it is not given
            return int([0, *re.findall(rf" (?:{flag})(\d+)", self.sbatch_flags(cfg))][-1])

        given = last("--ntasks[ =]|-n *") or last("--ntasks-per-node[ =]") * max(1, last("--nodes[ =]|-N *"))
        return min(given or 1, self.tasks)

    def is_done(self, cfg, task: int) -> bool:
        """Whether a task has nothing left to do."""
        return self.stage.is_done(cfg, task, self.tasks)

    def refuse_inputs(self, cfg) -> None:
        """Raise PipelineError if an input that no step makes is missing, or cannot be used."""
        if self.given:
            self.given.outputs(cfg, 0, self.tasks)


def shards_of(cfg) -> dict[str, int]:
    """Step -> the number of tasks that it is cut into, of those that can be cut."""
    return dict.fromkeys((*BY_TAR, "embed"), cfg.slurm.num_shards) | {
        "neighbor_parts": cfg.slurm.difficulty_shards
    }


def steps_of(cfg, tune: int = 0, shards: dict[str, int] | None = None, embed: Sequence[str] = ()) -> list[Step]:
    """The steps in the order in which they run. `tune`: how many Optuna workers choose the settings first.
    `shards`: see `shards_of`, if other than those of `cfg`. `embed`: instead of the chain, see `embed_step`."""
    shards = shards_of(cfg) | (shards or {})
    if embed:
        return [embed_step(cfg, shards["embed"], *embed)]
    difficulty_shards = shards["neighbor_parts"]
    merge, neighbors = "merge_and_split", "difficulty.compute_visual_neighbors"

    def by_tar(module: str, *needs: str) -> Step:
        name = module.split(".")[-1]
        alike = bool(needs) and all(shards[need] == shards[name] for need in needs)
        return Step(name, module, needs, shards[name], alike, ("--num-shards", str(shards[name])))

    steps = [
        by_tar("preprocess.process_tar"),
        by_tar("preprocess.compute_fingerprints", "process_tar"),
        by_tar("generate.generate_embeddings", "process_tar"),
        Step(merge, "preprocess.merge_and_split", ("process_tar", "compute_fingerprints", "generate_embeddings")),
        Step("summarize_ids", "preprocess.summarize_ids", (merge,)),
    ]
    if difficulty_shards > 1:
        by_anchor = ("--num-shards", str(difficulty_shards))
        gather = (*by_anchor, "--finish")
        steps += [
            Step("neighbor_parts", neighbors, (merge,), difficulty_shards, False, by_anchor, "PARTS"),
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


def steps_of_record(record: dict, cfg) -> list[Step]:
    """The steps that the record of a run was made from."""
    steps = steps_of(cfg, record["tune"], record.get("shards"), record.get("embed", ()))
    return remaking(steps, record.get("remake", ()))


def remaking(steps: list[Step], names: Sequence[str]) -> list[Step]:
    """The steps, with --remake for those named and for all that depend on them. Raises ConfigError."""
    other_names = {"neighbor_parts": "compute_visual_neighbors", "fetch_best_and_train": "train"}
    chosen = {other_names.get(name, name) for name in names}
    _refuse_unknown(steps, sorted(chosen))
    if "compute_visual_neighbors" in chosen:
        chosen.add("neighbor_parts")
    for step in steps:
        if chosen.intersection(step.needs):
            chosen.add(step.name)
    return [replace(step, operands=(*step.operands, REMAKE)) if step.name in chosen else step for step in steps]


def embed_step(cfg, num_shards: int, module: str, *words: str) -> Step:
    """New data through a published model, by a module that `embedding_module` names. `words`: its arguments."""
    from publish.inference import vector_stage

    script = importlib.import_module(module)
    args = script.parse(words)
    if args.shard or args.num_shards > 1:
        raise ConfigError("--embed makes slurm.num_shards shards: set that instead of --shard and --num-shards")
    if args.redo == "all":  # a requeued job would start over each time
        raise ConfigError(f"--embed takes --remake instead of --overwrite; or remove what to redo: {args.out}")
    stage = vector_stage.stage_of(module.split(".")[-1], script.sources, args, cfg)
    return Step(
        "embed",
        module,
        tasks=num_shards,
        arguments=("--num-shards", str(num_shards)),
        operands=vector_stage.words_of(args),
        given=stage,
    )


def embedding_module(source: Path) -> str:
    """The script for new data: that for tables if they are Parquet files, else that for images.

    Raises PipelineError if there is nothing at `source`.
    """
    if not source.exists():
        raise PipelineError(f"{source} does not exist")
    is_table = source.suffix == ".parquet" or any(source.glob("*.parquet"))
    return f"publish.generate_embeddings_from_{'parquet' if is_table else 'hf'}"


def select(steps: list[Step], first: str | None, last: str | None) -> list[Step]:
    """The steps from `first` to `last`, both included, a neighbour search with its parts. Raises ConfigError."""
    names = [step.name for step in steps]
    _refuse_unknown(steps, [name for name in (first, last) if name is not None])
    if first == "compute_visual_neighbors" and "neighbor_parts" in names:
        first = "neighbor_parts"
    begin = names.index(first) if first else 0
    end = names.index(last) if last else len(names) - 1
    if begin > end:
        raise ConfigError(f"--from {first} comes after --to {last}")
    return steps[begin : end + 1]


def needed(steps: list[Step], selected: list[Step]) -> list[Step]:
    """The selected steps and all before them whose files they depend on, in order."""
    names = {step.name for step in selected}
    for step in reversed(steps):
        if step.name in names:
            names.update(step.needs)
    return [step for step in steps if step.name in names]


def _refuse_unknown(steps: list[Step], names: Sequence[str]) -> None:
    known = [step.name for step in steps]
    for name in names:
        if name not in known:
            tune = " (optuna_worker needs --tune N)" if "optuna_worker" not in known else ""
            close = suggestion(name, known)
            raise ConfigError(f"there is no stage {name}{close}; the stages are {', '.join(known)}{tune}")


def missing(steps: list[Step], cfg) -> dict[str, list[int]]:
    """Step -> its unfinished tasks, including those whose input is about to be rewritten. `steps`: in order."""
    todo: dict[str, list[int]] = {}
    for step in steps:
        rewritten = {task for name in step.needs for task in todo.get(name, ())}
        if rewritten and not step.shards_match:
            todo[step.name] = list(range(step.tasks))
            continue
        period = (num_tars(cfg) if rewritten else 0) or step.tasks  # tasks so far apart take the same tar
        todo[step.name] = [
            task
            for task in range(step.tasks)
            if task in rewritten or task % period in rewritten or not step.is_done(cfg, task)
        ]
    return todo


def complete(steps: list[Step], todo: dict[str, list[int]], cfg) -> list[str]:
    """The steps whose tasks in `todo` are all done, and only to be redone because what they need is."""
    return [s.name for s in steps if todo[s.name] and all(s.is_done(cfg, task) for task in todo[s.name])]


def refuse_output_dim(steps: list[Step], cfg) -> None:
    """Raise ConfigError if a head is to be trained with more dimensions than the backbone's embeddings have."""
    from generate import model_files

    width = model_files.embedding_width(cfg.embedding_model)
    output_dim = cfg.training_model.output_dim
    if width and output_dim > width and any(step.name in ("train", "optuna_worker") for step in steps):
        model = cfg.embedding_model
        pooling = "" if vector_files(model.name) else f' with pooling = "{model.pooling}"'
        raise ConfigError(
            f"training_model.output_dim = {output_dim} exceeds the {width} dimensions of the embeddings of "
            f"{model.name}{pooling}\nset it to {width} or less: --set training_model.output_dim={width}"
        )


def refuse_purged(steps: list[Step], todo: dict[str, list[int]], cfg) -> None:
    """Raise PipelineError if complete steps would be redone from tars that have been removed."""
    if (names := complete(steps, todo, cfg)) and not num_tars(cfg):
        raise PipelineError(
            f"{cfg.paths.raw_dir} has no tars to redo these steps from, which are complete: {', '.join(names)}\n"
            f"restore the tars, or work on what is there with --from {names[0]}"
        )


def idle_note(step: Step, cfg) -> str:
    """How many of a step's tasks have no work, if any do or may."""
    if step.tasks == 1 or step.stage.existing:
        return ""
    outputs = [step.stage.outputs_of(cfg, task, step.tasks) for task in range(step.tasks)]
    if None in outputs:  # known once its inputs exist
        return "(some tasks may have no work)" if num_tars(cfg) < step.tasks else ""
    return f"({outputs.count([])} of the tasks have no work)" if [] in outputs else ""


def idle_gpus(step: Step, cfg) -> str:
    """What to do about GPUs that its jobs ask for and have no task for; empty if there are none."""
    asked = GPUS.findall(step.sbatch_flags(cfg))
    gpus, tasks = int(asked[-1]) if asked else 0, step.tasks_per_job(cfg)
    if gpus <= tasks or step.tasks <= tasks:
        return ""
    return f"(uses {tasks} of the {gpus} GPUs of each job: add --ntasks={gpus} to slurm.{step.resources}.sbatch)"


def num_tars(cfg) -> int:
    """The number of tars and of imported sets, 0 without a folder. Raises PipelineError for a tar that
    process_tar.py refuses."""
    from common.archives import image_origins

    raw_dir, imported = cfg.paths.raw_dir, image_origins.imported(cfg.paths.intermediates_dir)
    return (
        len(image_origins.of_paths(cfg.paths)) if imported or (raw_dir.is_dir() and any(raw_dir.iterdir())) else 0
    )
