"""Which finished files no longer match the settings or their inputs, and what redoing them costs: for the plan.

A step whose files are stale is remade only on request (--remake); the steps after it follow.
"""

import argparse
import contextlib
import functools
from pathlib import Path
from typing import NamedTuple

from common import cli, errors, files, provenance, stages
from common.archives import image_origins, tars
from common.errors import PipelineError
from common.provenance import Provenance
from preprocess.split import merge_files
from slurm.chain import BY_TAR, REMAKE, Step, num_tars

MERGE = "merge_and_split"


class Wrong(NamedTuple):
    """What is wrong with the files of a step."""

    stale: list[tuple[Provenance, Provenance]]  # the records of its stale files, and those that they should have
    damaged: list[Path]


class StaleStep(NamedTuple):
    """A step whose files are stale or damaged, and not merely because a step before it is stale."""

    step: Step
    is_selected: bool  # else it comes before the steps that are to run
    stale: list[tuple[Provenance, Provenance]]  # see Wrong
    damaged: list[Path]
    followers: list[Step]  # the steps after it that have files

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
            wrong = _wrong(step, is_selected or MERGE in step.needs, cfg)
            if any(wrong):
                roots[step.name] = StaleStep(step, is_selected, *wrong, followers=[])
    return [stale for name, stale in roots.items() if stale.step.name == name]


def _wrong(step: Step, with_inputs: bool, cfg) -> Wrong:
    """The stale files of a step, and the damaged ones. Without `with_inputs`, only settings count."""
    stale, damaged = [], []
    stage, records = step.stage, step.stage.records(cfg)
    outputs, is_all = stage.known_outputs(cfg) if with_inputs else ([], False)
    pairs = [(records[output.path], output.record) for output in outputs if output.path in records]
    # beside its folder, by another stage, damaged, or set aside for a run that has not saved
    for output in outputs:
        former = output.path.parent / files.FORMER / output.path.name
        path = output.path if output.path.exists() else former
        if output.path not in records and path.exists():
            try:
                pairs.append((stages.record_of(path), output.record))
            except PipelineError:
                damaged.append(path)
    if not is_all and not outputs and stage.settings:
        for existing in records.values():  # what is certain without the inputs
            with contextlib.suppress(OSError, PipelineError):  # no such backbone or tars: their stage says so
                inputs = _foreseen(existing.inputs, cfg) if with_inputs and step.name == MERGE else existing.inputs
                pairs.append((existing, stage.record(cfg, inputs)))
    for existing, record in pairs:
        expected = stage.expected(existing, record)
        if provenance.differences(existing, expected):
            stale.append((existing, expected))
    return Wrong(stale, damaged)


def _foreseen(inputs: dict[str, str], cfg) -> dict[str, str]:
    """The inputs of a merge, with tars that have come and without tars that have gone."""
    stems = {tars.stem(tar) for tar in image_origins.of_paths(cfg.paths)}
    kept = {name: value for name, value in inputs.items() if provenance.tar_of(name) in stems}
    return {**{f"intermediates/{stem}.parquet": "" for stem in stems}, **kept}


def without_tars(todo: dict[str, list[int]], cfg) -> str:
    """What is wrong if a merge is to come that would refuse files whose tars are gone; empty if nothing is."""
    try:
        if todo.get(MERGE) and num_tars(cfg):
            merge_files.refuse_without_tar(cfg.paths, image_origins.of_paths(cfg.paths))
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
    sizes = {True: 0, False: 0}  # whether it has been processed -> bytes
    with contextlib.suppress(OSError, PipelineError):
        for tar in image_origins.raw_tars(cfg.paths):
            sizes[image_origins.intermediates(cfg.paths, tar).exists()] += tar.stat().st_size
    return sizes[False] / sizes[True] if sizes[True] else 0.0


def _cost(step: Step, cfg, growth: float, of_new: float = 0.0) -> str:
    """A step, with the images and the time of redoing it: "merge_and_split (1,200 images, 5.1 s)".

    Of a step that works by tar or part: of its stale files. Of any other: of all, scaled to all tars of now.
    `of_new`: instead, of new tars that have this share of the bytes of those before.
    """
    found, factor = list(step.stage.records(cfg).values()), of_new or 1.0
    if step.arguments and not of_new:
        found = [existing for existing, _ in _wrong(step, True, cfg).stale] or found
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
