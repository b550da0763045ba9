"""All vectors in the precision that a search multiplies in, and how far its scores may be from the cosines.

The score of two rows is their cosine less a constant, one for all pairs: x . (y - m) + (x . m - c), where m is
the mean of (some of) the unit vectors, and c that of x . m. A backbone's vectors all lean the way of m. Without it
the numbers are smaller, and so is what rounding does to them.
"""

import torch
from torch.nn import functional as F

from common import devices

LOWEST = -8.0  # below every score, above the -inf of forbidden pairs
_BLOCK_ROWS = 2_048  # converted at a time, D x 24 bytes each
_MEAN_OF = 2_048  # rows; any vector would do


def tolerance(dim: int) -> float:
    """Cosines nearer to each other than this may stand in the wrong order in float32: 8 sqrt(D) times its unit
    roundoff, which sums of D terms exceed with probability below 1e-13 (Higham & Mary 2019, theorem 2.4)."""
    return 4 * float(torch.finfo(torch.float32).eps) * dim**0.5


class SearchVectors:
    """The rows y - m in bfloat16, N x D x 2 bytes; or for float32 made a block at a time, with m = 0, for they
    would take twice the room."""

    def __init__(self, embeddings: torch.Tensor, dtype: torch.dtype, device: torch.device):
        n, dim = embeddings.shape
        self.embeddings, self.dtype, self.device = embeddings, dtype, device
        self.scale = torch.empty(n, device=device)  # 1 / length
        for start in range(0, n, _BLOCK_ROWS):
            raw = embeddings[start : start + _BLOCK_ROWS].to(device).float()
            self.scale[start : start + _BLOCK_ROWS] = 1 / raw.norm(dim=1).clamp(min=1e-12)
        self._block = torch.empty((0, dim), device=device)
        self.tolerance = tolerance(dim)
        self.vectors: torch.Tensor | None = None
        self.shift: torch.Tensor | None = None
        self.rounding = 0.0  # of a score, relative
        self.error = self.tolerance  # of a score, further to that
        if dtype != torch.float32:
            self._round(embeddings, dtype)

    def _round(self, embeddings: torch.Tensor, dtype: torch.dtype) -> None:
        """By |x'y' - xy| <= |x' - x| |y'| + |x| |y' - y|, with the longest of all rows, and twice or three times
        what float32's sums do."""
        # on CUDA partial sums may be rounded to bfloat16 by default, which the bound does not allow for
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        n, dim = embeddings.shape
        here = self.device if devices.fits(n * dim * dtype.itemsize, self.device) else embeddings.device
        self.vectors = torch.empty((n, dim), dtype=dtype, device=here)
        self.rounding = torch.finfo(dtype).eps / 2
        self.mean = self.unit(slice(0, None, -(-n // _MEAN_OF))).mean(dim=0)
        self.shift = torch.empty(n, device=self.device)
        of_unit, of_centred, length = 0.0, 0.0, 0.0
        for start in range(0, n, _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            unit = self.unit(block)
            low = (unit - self.mean).to(dtype)
            self.vectors[block] = low.to(here)
            self.shift[block] = unit @ self.mean
            of_unit = max(of_unit, _longest(unit - unit.to(dtype).float()))
            of_centred = max(of_centred, _longest(unit - self.mean - low.float()))
            length = max(length, _longest(low.float()))
        self.shift -= self.shift.mean()
        self.error = 1.005 * (of_unit * length + of_centred) + 3 * self.tolerance
        self.error += self.rounding * float(self.shift.abs().max())  # the shift is rounded, too

    def unit(self, which: slice | torch.Tensor) -> torch.Tensor:
        """The unit vectors of some rows (a slice, or numbers on the device) in float32, on the device."""
        if isinstance(which, slice):
            rows = self.embeddings[which]
        else:  # a seventh of the time of embeddings[which], on a CPU
            rows = self.embeddings.index_select(0, which.to(self.embeddings.device))
        return rows.to(self.device, torch.float32, copy=True).mul_(self.scale[which, None])

    def _unit_block(self, which: slice) -> torch.Tensor:
        """The same of a slice, until the next call: in memory that the kernel need not clear each time."""
        rows = self.embeddings[which]
        if len(rows) > len(self._block):
            self._block = torch.empty(rows.shape, device=self.device)
        return self._block[: len(rows)].copy_(rows).mul_(self.scale[which, None])

    def scores(
        self, anchors: tuple[torch.Tensor, torch.Tensor | None], start: int, stop: int, step: int = 1
    ) -> torch.Tensor:
        """The scores (A, G) of `queries` with the rows start..stop, or every step-th, and -inf for up to 7 more
        columns: whole words of 8."""
        queries, shift = anchors
        block, padding = slice(start, stop, step), -len(range(start, stop, step)) % 8
        if self.vectors is None or shift is None:  # both or neither
            scores = _float32_products(queries, self._unit_block(block))
        else:
            scores = torch.addmm(shift, queries, self.vectors[block].to(self.device).T)
        return F.pad(scores, (0, padding), value=-torch.inf) if padding else scores

    def queries(self, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `scores` multiplies for some anchors (A,): their vectors (A, D), and what is added (A, 1)."""
        shift = None if self.shift is None else self.shift[anchors, None].to(self.dtype)
        return self.unit(anchors).to(self.dtype), shift

    def below(self, kth: torch.Tensor) -> torch.Tensor:
        """The floor (A,) of anchors whose k-th best score so far is `kth`: what scores less is not of the best k.

        A score s is within e + r |s| of the exact one, where e is the `error` and r the `rounding`. So k rows
        reach kth - e - r |kth|, and what scores less than that minus e + r |floor| does not. The floor is rounded
        too; r x 0.03 is more than what r does to e.
        """
        kth = kth.clamp(min=LOWEST)  # -inf where fewer than k are known, and 0 x inf is not a number
        floor = kth - 2 * self.error - 3 * self.rounding * (kth.abs() + 0.03)
        return floor.clamp(min=LOWEST)


def _float32_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x y^T (A, G). On a CPU as a convolution of one pixel, which torch gives to oneDNN where it has several
    threads: what it gives to MKL, as it does products, takes 1.4 times as long on an AMD."""
    if x.device.type != "cpu":
        return x @ y.T
    images, filters = x[None, None].permute(0, 3, 1, 2), y[:, None, None].permute(0, 3, 1, 2)  # channels last
    return F.conv2d(images, filters).permute(0, 2, 3, 1)[0, 0]


def _longest(vectors: torch.Tensor) -> float:
    return 1.001 * float(vectors.norm(dim=1).max())
