"""Timing ours against a named baseline, interleaved, in one run: what all benchmarks share.

A benchmark is a file bench_<topic>.py with a function `measure()` that returns a list of Ratio, and ends with
`timing.main(__doc__, measure)`. By hand: `python tests/benchmarks/bench_tars.py [--json PATH]`; all of them, and
the table of docs/benchmarks.md: `make bench`.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, for the synthetic tars

from common import cli

cli.collect_seldom()  # as every script; for the baselines as well


@dataclass(frozen=True)
class Ratio:
    """How much faster ours is than a baseline: the median over rounds, with the least and the greatest."""

    what: str  # what is done, with its size: "index a tar of 40,000 members"
    baseline: str  # the other way, by name: "tarfile"
    ours: float  # of ours, in `unit`, by the median time
    unit: str  # "members/s", or "s" where there is no natural rate
    ratio: float  # baseline's time / our time
    low: float
    high: float
    target: float | None  # the least ratio that is wanted


def seconds(
    ways: dict[str, Callable[[], object]], rounds: int = 5, warm_up: bool = True
) -> dict[str, list[float]]:
    """Wall time of each way, `rounds` times, the ways in turn within a round so that all meet the same machine."""
    if warm_up:
        for way in ways.values():
            way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - started)
    return taken


def ratio(
    what: str,
    taken: dict[str, list[float]],
    ours: str,
    baseline: str,
    *,
    items: int = 0,
    unit: str = "s",
    target: float | None = None,
) -> Ratio:
    """The Ratio of two of the ways in what `seconds` gave. `items`: how many of `unit` one call handles, for a
    rate; without it `ours` is in seconds."""
    ratios = [slow / fast for slow, fast in zip(taken[baseline], taken[ours], strict=True)]
    median = statistics.median(taken[ours])
    value = items / median if items else median
    return Ratio(what, baseline, value, unit, statistics.median(ratios), min(ratios), max(ratios), target)


def machine() -> str:
    """Processor, cores that this process may use, and versions: what a figure is worth nothing without."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
        widest = [name for name in ("avx512_bf16", "avx512f", "avx2") if name in text]
        model = ", ".join([*names[:1], *widest[:1]]) or model
    return f"{model}, {cores()} cores, Python {platform.python_version()}"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def as_text(ratios: list[Ratio]) -> str:
    """The table that a person reads."""
    lines = [f"{'what':58} {'ours':>18} {'against':24} {'ratio':>6} {'range':>13} {'target':>6}"]
    for row in ratios:
        target = "" if row.target is None else f"{row.target:g}{'' if row.ratio >= row.target else ' !'}"
        ours = f"{row.ours:,.3g}" if row.ours < 100 else f"{row.ours:,.0f}"
        measured = f"{row.ratio:6.2f} {f'{row.low:.2f}-{row.high:.2f}':>13} {target:>6}"
        lines.append(f"{row.what:58} {ours + ' ' + row.unit:>18} {row.baseline:24} {measured}")
    return "\n".join(lines)


def main(doc: str, measure: Callable[[], list[Ratio]]) -> None:
    """A benchmark's command line: prints the table, and writes the same as JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    ratios = measure()
    print(machine())
    print(as_text(ratios))
    if args.json:
        found = {"machine": machine(), "ratios": [asdict(row) for row in ratios]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
