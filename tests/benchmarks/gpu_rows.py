"""What the checks of on_gpu.py share: the card, the sizes that it is measured at, and the rows of the table."""

import math
from dataclasses import dataclass

import timing  # puts the repository and tests/ on the path
import torch

from publish.inference import model_sizes

# Bytes that no formula counts: cuBLAS's workspaces (32 MB for each stream on a Hopper), a head and its optimiser.
UNCOUNTED = 128 * 2**20


@dataclass(frozen=True)
class Sizes:
    """How much is measured. Enough of everything for a card; or only that all of it runs."""

    vits: dict[str, tuple[int, int, int]]  # hidden size, layers, heads
    batch: int | str  # infrastructure.embedding_batch_size
    streets: int  # of photographs, about 57 each, which are decoded over and over
    rounds: int  # of each measurement, after one to warm up
    seconds: float  # that a round of generation takes, about
    product: int  # rows and columns of the product that shows what the card can do
    rows: int  # of the search, the training and the head
    anchors: int  # of the search
    steps: int  # of training
    evaluated: int  # queries, and rows of the gallery
    compared: int  # rows of which the CPU's results are computed as well; of images the 200th part


FULL = Sizes(
    vits={"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)},
    batch="auto",
    streets=2,
    rounds=3,
    seconds=1.0,
    product=8_192,
    rows=1_000_000,
    anchors=65_536,
    steps=500,
    evaluated=200_000,
    compared=6_400,
)
SMALL = Sizes(
    vits={"S": (28, 1, 1), "B": (28, 1, 2), "L": (28, 2, 2)},
    batch=2,
    streets=1,
    rounds=1,
    seconds=0.0,
    product=64,
    rows=600,
    anchors=64,
    steps=1,
    evaluated=1_500,
    compared=400,
)


@dataclass(frozen=True, eq=False)
class Gpu:
    """The card, and what is measured on it."""

    device: torch.device
    name: str
    sizes: Sizes

    @property
    def peak(self) -> tuple[str, float] | None:
        """(name, dense bfloat16 peak in TFLOP/s) of the card in model_sizes.GPUS, None if it is not there."""
        words = set(self.name.replace("-", " ").split())
        if words & {"PCIe", "PCIE", "NVL", "Laptop", "D"}:  # slower than the card of that name
            return None
        for name, (tflops, _) in model_sizes.GPUS.items():
            if set(name.split()) - {"SXM", "80", "GB"} <= words:
                return name, tflops
        return None


@dataclass(frozen=True)
class Row:
    """A figure of the card, or what a check has found."""

    what: str
    value: float | None  # None: it failed, or was skipped
    unit: str
    against: str = ""  # what it is compared with
    ratio: float | None = None  # above 1: better than that
    is_right: bool = True  # False: the command fails
    note: str = ""


def speed(what: str, taken: dict[str, list[float]], ours: str, against: str, items: int, unit: str) -> Row:
    """Ours against another way, of what `timing.seconds` gave for both."""
    found = timing.ratio(what, taken, ours, against, items=items, unit=unit)
    return Row(what, found.ours, unit, against, found.ratio)


def equality(what: str, found: float, allowed: float, unit: str) -> Row:
    """How far the card's results are from the CPU's."""
    return Row(what, float(found), unit, f"the CPU: {allowed:g} allowed", is_right=bool(found <= allowed))


def memory(what: str, peak: int, formula: float) -> Row:
    """The most memory that was allocated on the card, against what a docstring says."""
    against = f"its formula: {formula / 1e6:,.0f} MB"
    is_right = peak <= 1.05 * formula + UNCOUNTED
    return Row(f"{what}: memory", peak / 1e6, "MB", against, formula / peak, is_right)


def reset_peak() -> int:
    """Begin to measure the peak; returns the bytes in use, which it is counted from."""
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_since(before: int) -> int:
    return torch.cuda.max_memory_allocated() - before


def as_text(rows: list[Row]) -> str:
    """The table that a person reads."""
    lines = [f"{'what':82} {'found':>22} {'ratio':>7} against"]
    for row in rows:
        verdict = "" if row.is_right else "WRONG  "
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        lines.append(f"{row.what:82} {found(row):>22} {ratio:>7} {verdict}{row.against}  {row.note}".rstrip())
    return "\n".join(lines)


def found(row: Row) -> str:
    """A row's value with its unit, "failed" or "skipped"."""
    if row.value is None:
        return "skipped" if row.is_right else "failed"
    digits = f"{row.value:,.0f}" if row.value >= 100 or row.value == math.floor(row.value) else f"{row.value:.3g}"
    return f"{digits} {row.unit}"
