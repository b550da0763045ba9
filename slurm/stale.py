"""Which finished files no longer match the settings or their inputs, and what redoing them costs: for the plan.

A step whose files are stale is remade only on request (--remake); the steps after it follow.
"""

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common import cli, errors, provenance, stages
from common.archives import image_origins, tars
from common.errors import PipelineError
from common.provenance import Provenance
from preprocess.split import merge_files
from slurm.chain import BY_TAR, REMAKE, Step

MERGE = "merge_and_split"


@dataclass
class StaleStep:
    """A step whose files are stale or damaged, and not merely because a step before it is stale."""

    step: Step
    is_selected: bool  # else it comes before the steps that are to run
    stale: list[tuple[Provenance, Provenance]]  # the records of its stale files, and those that they should have
    damaged: list[Path]
    followers: list[Step] = field(default_factory=list)  # the steps after it that have files

    @property
    def is_allowed(self) -> bool:
        """Whether it will be remade."""
        return self.is_selected and REMAKE in self.step.operands

    @property
    def is_damaged(self) -> bool:
        """Whether nothing but damage is wrong."""
        return not self.stale

    def as_text(self) -> str:
        """What is wrong with it, since when."""
        if self.is_damaged:
            return f"{self.step.name} has damaged files: {provenance.some([str(path) for path in self.damaged])}"
        differences = (f"it {reason}" for pair in self.stale for reason in provenance.differences(*pair))
        reasons = list(dict.fromkeys([*differences, *(f"{path} is damaged" for path in self.damaged)]))
        more = f"; and {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
        since = min(existing.created[:10] for existing, _ in self.stale)
        made = f" (made on {since})" if since else ""
        return f"{self.step.name} is stale{made}: {'; '.join(reasons[:3])}{more}"


def find(steps: list[Step], todo: dict[str, list[int]], cfg) -> list[StaleStep]:
    """The stale ones of the steps, in order. Those without an entry in `todo` are not to run; of them, it does not
    matter whether the tars are still the same."""
    roots: dict[str, StaleStep] = {}  # step -> the stale step that it is, or follows
    for step in steps:
        earlier = next((roots[name] for name in step.needs if name in roots), None)
        if earlier:
            roots[step.name] = earlier
            if step.stage.records(cfg):
                earlier.followers.append(step)
        elif todo.get(step.name) != []:
            is_selected = step.name in todo
            stale, damaged = _wrong(step, is_selected or MERGE in step.needs, cfg)
            if stale or damaged:
                roots[step.name] = StaleStep(step, is_selected, stale, damaged)
    return [stale for name, stale in roots.items() if stale.step.name == name]


def _wrong(step: Step, with_inputs: bool, cfg) -> tuple[list[tuple[Provenance, Provenance]], list[Path]]:
    """(the records of the stale files of a step, each with the one that it should have; the damaged files)."""
    stale, damaged = [], []
    for path, existing, record in _pairs(step, with_inputs, cfg):
        if existing is None:
            damaged.append(path)
        elif provenance.differences(existing, expected := step.stage.expected(existing, record)):
            stale.append((existing, expected))
    return stale, damaged


def _pairs(step: Step, with_inputs: bool, cfg) -> Iterator[tuple[Path, Provenance | None, Provenance]]:
    """(path, its record or None if it is damaged, the record that it should have) of the files of a step."""
    stage, records = step.stage, step.stage.records(cfg)
    outputs, is_all = stage.known_outputs(cfg) if with_inputs else ([], False)
    for output in outputs:
        if output.path in records:
            yield output.path, records[output.path], output.record
        elif output.path.exists() and not stage.existing:
            try:
                yield output.path, stages.record_of(output.path), output.record
            except PipelineError:
                yield output.path, None, output.record
    if is_all or outputs or not stage.settings:
        return
    for path, existing in records.items():  # what is certain without the inputs
        try:
            inputs = _foreseen(existing.inputs, cfg) if with_inputs and step.name == MERGE else existing.inputs
            yield path, existing, stage.record(cfg, inputs)
        except (OSError, PipelineError):  # no such backbone, no study, no tars: their stage says so
            return


def _foreseen(inputs: dict[str, str], cfg) -> dict[str, str]:
    """The inputs of a merge, with tars that have come and without tars that have gone."""
    stems = {tars.stem(tar) for tar in image_origins.of_paths(cfg.paths)}
    kept = {name: value for name, value in inputs.items() if provenance.tar_of(name) in stems}
    return {**{f"intermediates/{stem}.parquet": "" for stem in stems}, **kept}


def without_tars(todo: dict[str, list[int]], cfg) -> str:
    """What is wrong if a merge is to come that would refuse files whose tars are gone; empty if nothing is."""
    try:
        listing = image_origins.of_paths(cfg.paths) if todo.get(MERGE) else []
    except (OSError, PipelineError):  # there are no tars: the first stage says so
        return ""
    try:
        if listing:
            merge_files.refuse_without_tar(cfg.paths, listing)
    except PipelineError as error:
        return str(error)
    return ""


def explanation(found: list[StaleStep], steps: list[Step], cfg, given: list[str]) -> str:
    """What is stale and not to be remade: why, what redoing it costs, and the ways out; empty if nothing is.
    `steps`: those that are to run; `given`: the arguments of this call."""
    refused, lines = [stale for stale in found if not stale.is_allowed], []
    command = functools.partial(errors.command_line, "slurm/submit.py", *given)
    growth = _growth(cfg)
    for stale in refused:
        lines.append(stale.as_text())
        costs = [_cost(step, cfg, growth) for step in (stale.step, *stale.followers)]
        is_merge = growth and stale.step.name == MERGE
        new = [_cost(step, cfg, 0, growth) for step in steps if is_merge and step.name in BY_TAR]
        first = f"{', '.join(new)} for the new tars; then " if new else ""
        after = f"; after it, {', '.join(costs[1:])}" if len(costs) > 1 else ""
        lines.append(f"  redoing it, at the rate of the last time: {first}{costs[0]}{after}")
        ways = {tuple(provenance.ways_out(*pair, command)) for pair in stale.stale}
        if len(ways) == 1 and not stale.damaged:
            lines += [f"  {way}" for way in ways.pop()]
    if not refused:
        return ""
    words = _widened(given, refused[0].step, steps[-1]) if not refused[0].is_selected else given
    for stale in refused:
        if REMAKE not in stale.step.operands:
            words = [*words, REMAKE] if stale.step.given else [*words, REMAKE, stale.step.name]
    what = "what is damaged" if all(stale.is_damaged for stale in refused) else "what is stale"
    return "\n".join([*lines, f"to redo {what}: {errors.command_line('slurm/submit.py', *words)}"])


def _widened(given: list[str], first: Step, last: Step) -> list[str]:
    """The arguments of a call, so that it starts at an earlier step."""
    selection = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--from", "--to", "--only"):
        selection.add_argument(flag)
    return [*selection.parse_known_args(given)[1], "--from", first.name, "--to", last.name]


def _growth(cfg) -> float:
    """The bytes of the tars that have not been processed yet, as a share of those that have."""
    new = done = 0
    try:
        listing = image_origins.raw_tars(cfg.paths)
    except (OSError, PipelineError):
        return 0.0
    for tar in listing:
        if (cfg.paths.intermediates_dir / f"{tars.stem(tar)}.parquet").exists():
            done += tar.stat().st_size
        else:
            new += tar.stat().st_size
    return new / done if done else 0.0


def _cost(step: Step, cfg, growth: float, of_new: float = 0.0) -> str:
    """A step, with the images and the time of redoing it: "merge_and_split (1,200 images, 5.1 s)".

    Of a step that works by tar or part: of its stale files. Of any other: of all, scaled to all tars of now.
    `of_new`: instead, of new tars that have this share of the bytes of those before.
    """
    found, factor = list(step.stage.records(cfg).values()), of_new or 1.0
    if step.arguments and not of_new:
        found = [existing for existing, _ in _wrong(step, True, cfg)[0]] or found
    elif not of_new:
        factor += growth
    if not found:
        return step.name
    together = sum if step.arguments else max  # part after part, or files made at once
    parts = []
    if step.stage.existing:
        parts.append(f"{found[0].rows['out']:,} trials")
    elif step.stage.progress is None and "out" in found[0].rows:
        images = together(record.rows.get("in", record.rows["out"]) for record in found)
        parts.append(f"{images * factor:,.0f} images")
    if seconds := together(record.seconds for record in found):
        parts.append(cli.duration(seconds * factor))
    return f"{step.name} ({', '.join(parts)})" if parts else step.name
