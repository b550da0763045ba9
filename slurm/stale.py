"""Which finished files no longer match the settings or their inputs, and what redoing them costs: for the plan.

A step whose files are stale is remade only on request (--remake); the steps after it follow.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from common import cli, provenance, stages
from common.archives import image_origins, tars
from common.errors import PipelineError, StaleArtefact
from common.provenance import Provenance
from generate import generate_embeddings
from slurm.chain import REMAKE, Step


class StaleStep(NamedTuple):
    """A step whose files are stale, and not merely because a step before it is."""

    step: Step
    reasons: list[str]
    since: str  # the date of the oldest stale file, "" if unknown
    way_to_keep: str  # "" if there is none
    followers: list[Step]  # the steps after it that have files

    @property
    def is_allowed(self) -> bool:
        """Whether it will be remade."""
        return REMAKE in self.step.operands


def find(steps: list[Step], todo: dict[str, list[int]], cfg) -> list[StaleStep]:
    """The stale steps among those with something left to do, in order."""
    roots: dict[str, StaleStep] = {}  # step -> the stale step that it is, or follows
    for step in steps:
        earlier = next((roots[name] for name in step.needs if name in roots), None)
        if earlier:
            roots[step.name] = earlier
            if records(step, cfg):
                earlier.followers.append(step)
        elif todo[step.name] and (stale := _of_step(step, cfg)):
            roots[step.name] = stale
    return [stale for name, stale in roots.items() if stale.step.name == name]


def _of_step(step: Step, cfg) -> StaleStep | None:
    reasons: list[str] = []
    since, ways = [], set()
    if step.stage.refuse_stale:
        with contextlib.suppress(OSError):
            try:
                step.stage.refuse_stale(cfg)
            except StaleArtefact as error:
                reasons.append(str(error).splitlines()[0])
            except PipelineError:
                pass  # its inputs are missing
    for path, existing, record in _pairs(step, cfg):
        if existing is None:
            reasons.append(f"{path} is damaged")
            continue
        expected = step.stage.expected(existing, record)
        if different := provenance.differences(existing, expected):
            reasons += [f"it {difference}" for difference in different]
            since.append(existing.created[:10])
            ways.add(provenance.way_to_keep(existing, expected))
    if not reasons:
        return None
    way = ways.pop() if len(ways) == 1 else ""
    return StaleStep(step, list(dict.fromkeys(reasons)), min(since, default=""), way, [])


def _pairs(step: Step, cfg) -> Iterator[tuple[Path, Provenance | None, Provenance]]:
    """(path, its record or None if it is damaged, the record that it should have) of the files of a step."""
    stage = step.stage
    outputs, is_all = stage.known_outputs(cfg)
    for output in outputs:
        if output.path.exists():
            try:
                yield output.path, stages.record_of(output.path), output.record
            except PipelineError:
                yield output.path, None, output.record
    if is_all or outputs or not stage.settings:
        return
    for path, existing in records(step, cfg).items():  # inputs are missing: what is certain without them
        try:
            expected = stage.record(cfg, existing.inputs)
            if step.name == "merge_and_split":
                existing, expected = _foreseen(existing, expected, cfg)
        except (OSError, PipelineError):  # no such backbone, no study, no tars: their stage says so
            return
        yield path, existing, expected


def _foreseen(existing: Provenance, expected: Provenance, cfg) -> tuple[Provenance, Provenance]:
    """The record of a merged file, and the one that it should have as far as the tars and [embedding_model] tell:
    of both, the settings of the embeddings, too."""
    stems = {tars.stem(tar) for tar in image_origins.of_paths(cfg.paths)}
    inputs = {name: value for name, value in existing.inputs.items() if provenance.tar_of(name) in stems}
    inputs |= {name: "" for stem in stems if (name := f"intermediates/{stem}.parquet") not in inputs}
    stage = generate_embeddings.STAGE
    then = {f"embedding_model.{key}": value for key, value in provenance.embedding_model(existing).items()}
    now = {key: value for key, value in stage.recorded_settings(cfg).items() if key in then}
    now |= {key: then[key] for key in stage.auto if now.get(key) == "auto"}
    then = {key: then[key] for key in now}
    return (
        replace(existing, config={**existing.config, **then}),
        replace(expected, config={**expected.config, **now}, inputs=inputs),
    )


def records(step: Step, cfg) -> dict[Path, Provenance]:
    """The records of the files of a step, whatever they were made with."""
    folder, found = step.stage.folder(cfg), {}
    for path in [*sorted(folder.glob("*.parquet")), *sorted(folder.glob("*.json"))]:
        with contextlib.suppress(OSError, PipelineError):  # damaged, or not ours
            record = stages.record_of(path)
            if record.stage == step.stage.name:
                found[path] = record
    return found


def explanation(found: list[StaleStep], cfg, command: str) -> str:
    """What is stale and not to be remade: why, what redoing it costs, and the ways out. `command`: this one."""
    lines = []
    for stale in found:
        made = f" (made on {stale.since})" if stale.since else ""
        more = f"; and {len(stale.reasons) - 3} more reasons" if len(stale.reasons) > 3 else ""
        lines.append(f"{stale.step.name} is stale{made}: {'; '.join(stale.reasons[:3])}{more}")
        costs = [_cost(step, cfg) for step in (stale.step, *stale.followers)]
        after = f"; after it, {', '.join(costs[1:])}" if len(costs) > 1 else ""
        lines.append(f"  redoing it, as long as it took: {costs[0]}{after}")
        if stale.way_to_keep:
            lines.append(f"  {stale.way_to_keep}")
        if stale.step.name == "train":
            lines.append(f"  to train another run beside it: {command} --set training.run=NAME")
    flags = " ".join(REMAKE if stale.step.given else f"{REMAKE} {stale.step.name}" for stale in found)
    return "\n".join([*lines, f"to redo what is stale: {command} {flags}"])


def _cost(step: Step, cfg) -> str:
    """A step, with its images and the time that its files took: "merge_and_split (1,200 images, 5.1 s)"."""
    found = list(records(step, cfg).values())
    together = max if not step.arguments else sum  # files made at once, or part after part
    parts = []
    if found and step.stage.progress is None and "out" in found[0].rows:
        parts.append(f"{together(record.rows.get('in', record.rows['out']) for record in found):,} images")
    if seconds := together(record.seconds for record in found) if found else 0:
        parts.append(cli.duration(seconds))
    return f"{step.name} ({', '.join(parts)})" if parts else step.name
