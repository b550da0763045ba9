"""All vectors in the precision that a search multiplies in, and how far its scores may be from the cosines.

The score of two rows is their cosine minus a constant that is the same for all pairs: x . (y - m) + (x . m - c),
where m is the mean of (a sample of) the unit vectors and c the mean of x . m. A backbone's vectors all lean
towards m. Subtracting it makes the numbers, and so their rounding errors, smaller.
"""

import torch
from torch.nn import functional as F

from common import devices

LOWEST = -8.0  # below every score, above the -inf of forbidden pairs
_BLOCK_ROWS = 2_048  # converted at a time, D x 24 bytes each
_MEAN_OF = 2_048  # rows; any vector would do


class SearchVectors:
    """The rows y - m in bfloat16, N x D x 2 bytes. In float32 they would take twice the memory, so they are made a
    block at a time, with m = 0."""

    def __init__(self, embeddings: torch.Tensor, dtype: torch.dtype, device: torch.device):
        n, dim = embeddings.shape
        self.embeddings, self.dtype, self.device = embeddings, dtype, device
        self.scale = torch.empty(n, device=device)  # 1 / length
        for start in range(0, n, _BLOCK_ROWS):
            raw = embeddings[start : start + _BLOCK_ROWS].to(device).float()
            self.scale[start : start + _BLOCK_ROWS] = 1 / raw.norm(dim=1).clamp(min=1e-12)
        # 8 sqrt(D) unit roundoffs: sums of D terms in float32 exceed that with probability below 1e-13 (Higham &
        # Mary 2019, theorem 2.4)
        self.error = 4 * torch.finfo(torch.float32).eps * dim**0.5  # of a score, absolute
        self.rounding = 0.0  # of a score, relative
        self.vectors: torch.Tensor | None = None
        self.shift: torch.Tensor | None = None
        if dtype != torch.float32:
            self._round(embeddings, dtype)

    def _round(self, embeddings: torch.Tensor, dtype: torch.dtype) -> None:
        """Make the vectors and bound the error: |x'y' - xy| <= |x' - x| |y'| + |x| |y' - y|, with the longest of
        all rows, plus three times the error of float32 sums."""
        # on CUDA partial sums may be rounded to bfloat16 by default, which the bound does not allow for
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        n, dim = embeddings.shape
        home = self.device if devices.fits(n * dim * dtype.itemsize, self.device) else embeddings.device
        self.vectors = torch.empty((n, dim), dtype=dtype, device=home)
        self.rounding = torch.finfo(dtype).eps / 2
        mean = self.unit(slice(0, None, -(-n // _MEAN_OF))).mean(dim=0)
        self.shift = torch.empty(n, device=self.device)
        of_unit, of_centred, length = 0.0, 0.0, 0.0
        for start in range(0, n, _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            unit = self.unit(block)
            low = (unit - mean).to(dtype)
            self.vectors[block] = low.to(home)
            self.shift[block] = unit @ mean
            of_unit = max(of_unit, _longest(unit - unit.to(dtype).float()))
            of_centred = max(of_centred, _longest(unit - mean - low.float()))
            length = max(length, _longest(low.float()))
        self.shift -= self.shift.mean()
        self.error = 1.005 * (of_unit * length + of_centred) + 3 * self.error
        self.error += self.rounding * float(self.shift.abs().max())  # the shift is rounded, too

    def unit(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """The unit vectors of some rows (a slice, or indices on the device) in float32, on the device."""
        place = rows if isinstance(rows, slice) else rows.to(self.embeddings.device)
        return self.embeddings[place].to(self.device, torch.float32, copy=True).mul_(self.scale[rows, None])

    def queries(self, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `scores` multiplies for some anchors (A,): their vectors (A, D), and what it adds (A, 1)."""
        shift = None if self.shift is None else self.shift[anchors, None].to(self.dtype)
        return self.unit(anchors).to(self.dtype), shift

    def scores(
        self, anchors: tuple[torch.Tensor, torch.Tensor | None], start: int, stop: int, step: int = 1
    ) -> torch.Tensor:
        """The scores (A, G) of `queries` with the rows start..stop, or every step-th."""
        queries, shift = anchors
        block = slice(start, stop, step)
        if self.vectors is None or shift is None:  # both or neither
            return _float32_products(queries, self.unit(block))
        return torch.addmm(shift, queries, self.vectors[block].to(self.device).T)

    def below(self, kth: torch.Tensor) -> torch.Tensor:
        """The floor (A,) of anchors whose k-th best score so far is `kth`: lower scores are not among the best k.

        A score s is within e + r |s| of the exact one, where e is the `error` and r the `rounding`. So k rows
        reach kth - e - r |kth|, and scores below that minus e + r |floor| do not. The floor is rounded too;
        r x 0.03 exceeds what r does to e.
        """
        kth = kth.clamp(min=LOWEST)  # -inf where there are fewer than k, and 0 x inf is not a number
        floor = kth - 2 * self.error - 3 * self.rounding * (kth.abs() + 0.03)
        return floor.clamp(min=LOWEST)


def _float32_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x y^T (A, G). On a CPU as a 1 x 1 convolution, which torch passes to oneDNN when it has several threads;
    matrix products go to MKL, which takes 1.4 times as long on an AMD."""
    if x.device.type != "cpu":
        return x @ y.T
    images, filters = x[None, None].permute(0, 3, 1, 2), y[:, None, None].permute(0, 3, 1, 2)  # channels last
    return F.conv2d(images, filters).permute(0, 2, 3, 1)[0, 0]


def _longest(vectors: torch.Tensor) -> float:
    return 1.001 * float(vectors.norm(dim=1).max())
