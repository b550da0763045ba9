"""95 % intervals from a bootstrap over cells of the map.

Images of one street are found or missed together: drawing single images would give intervals that are far too
narrow. So whole cells are drawn with replacement, and every method is averaged over the same draws, which makes
the interval of a difference a paired one.
"""

import numpy as np
from scipy import special

MIN_CELLS = 20  # with fewer, or so uneven ones, there are no intervals: they would say less than they seem to
CONFIDENCE = 0.95
_BLOCK_VALUES = 1 << 23  # values of one block of draws in `medians`: 64 MB of float64


def draw_weights(num_cells: int, draws: int, seed: int) -> np.ndarray:
    """How often each cell counts, (1 + draws, num_cells) float64: row 0 is the data itself (all 1), each other
    row a draw of `num_cells` cells with replacement. Below MIN_CELLS there is row 0 alone."""
    itself = np.ones((1, num_cells))
    if num_cells < MIN_CELLS:
        return itself
    drawn = np.random.default_rng(seed).multinomial(num_cells, np.full(num_cells, 1 / num_cells), size=draws)
    return np.concatenate([itself, drawn])


def means(values: np.ndarray, cell_of_row: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of each column of `values` (n, K) in each draw, (1 + draws, K); NaN where a draw has no row."""
    num_cells = weights.shape[1]
    sums = [np.bincount(cell_of_row, weights=column, minlength=num_cells) for column in values.T]
    rows = weights @ np.bincount(cell_of_row, minlength=num_cells)
    with np.errstate(invalid="ignore"):
        return (weights @ np.stack(sums, axis=1)) / rows[:, None]


def medians(values: np.ndarray, cell_of_row: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The median of `values` (n,) in each draw, (1 + draws,), as numpy's: the middle two are averaged."""
    distinct, position = np.unique(values, return_inverse=True)
    num_cells = weights.shape[1]
    entries, counts = np.unique(position * num_cells + cell_of_row, return_counts=True)  # sorted by value
    entry_values, entry_cells = distinct[entries // num_cells], entries % num_cells
    block = max(1, _BLOCK_VALUES // len(entries))
    return np.concatenate(
        [
            _medians_of_block(entry_values, weights[start : start + block, entry_cells] * counts)
            for start in range(0, len(weights), block)
        ]
    )


def _medians_of_block(sorted_values: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    """Medians of `sorted_values` (E,), each repeated as a row of `repeats` (draws, E) says."""
    reached = np.cumsum(repeats, axis=1)
    half = reached[:, -1:] / 2
    lower, upper = (reached >= half).argmax(axis=1), (reached > half).argmax(axis=1)
    return (sorted_values[lower] + sorted_values[upper]) / 2


def effective_cells(cell_of_row: np.ndarray) -> float:
    """How many cells of equal size tell as much as these rows' cells: (sum n)^2 / sum n^2 (Kish 1965)."""
    sizes = np.bincount(cell_of_row).astype(float)
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if len(sizes) else 0.0


def interval(estimates: np.ndarray, cells: float) -> dict[str, float | None]:
    """{"value", "low", "high"} from the estimates of one figure, (1 + draws,), the data's own first.

    Percentiles widened for few cells, Phi(-sqrt(C / (C - 1)) t(C - 1)): the expanded percentile interval of
    Hesterberg (2015), "What Teachers Should Know About the Bootstrap", section 5. He has C cells of one size; C is
    `effective_cells` here: where sizes are lognormal (sigma 1), that brings the coverage at 64 cells from 93.4 to
    94.3 %. Where crowded cells are much harder as well, it stays low: 85 %. `low` and `high` are None below
    MIN_CELLS.
    """
    value = float(estimates[0])
    if cells < MIN_CELLS or len(estimates) == 1:
        return {"value": value, "low": None, "high": None}
    t = special.stdtrit(cells - 1, (1 - CONFIDENCE) / 2)  # quantile of Student's t
    tail = special.ndtr(np.sqrt(cells / (cells - 1)) * t)
    low, high = np.nanquantile(estimates[1:], [tail, 1 - tail])
    return {"value": value, "low": float(low), "high": float(high)}


def intervals(estimates: np.ndarray, names: tuple[str, ...], cell_of_query: np.ndarray) -> dict[str, dict]:
    """The named metrics with their intervals, from estimates (1 + draws, len(names)), the data's own first."""
    cells = effective_cells(cell_of_query)
    return {name: interval(column, cells) for name, column in zip(names, estimates.T, strict=True)}


def compared(
    estimates: dict[str, np.ndarray],
    pairs: list[tuple[str, str]],
    names: tuple[str, ...],
    cell_of_query: np.ndarray,
) -> dict[str, dict]:
    """{"methods", "differences"}: `intervals` of each method's estimates, and of "a-b" for those `pairs` (a, b) of
    methods that are there."""
    return {
        "methods": {name: intervals(of_method, names, cell_of_query) for name, of_method in estimates.items()},
        "differences": {
            f"{a}-{b}": intervals(estimates[a] - estimates[b], names, cell_of_query)
            for a, b in pairs
            if a in estimates and b in estimates
        },
    }
