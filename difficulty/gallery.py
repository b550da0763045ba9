"""All vectors in the precision that a search multiplies in, and how far its scores may be from the cosines.

The score of an anchor x and a row y is x . (y - m): the cosine less x . m, which is the same for all rows, so that
an anchor's rows stand in the order of their cosines. m is the mean of (some of) the unit vectors. A backbone's
vectors all lean its way, and without it the numbers are smaller, and so is what rounding does to them.
"""

import torch

from common import devices

LOWEST = -4.0  # below every score (-2), above the -inf of forbidden pairs
_BLOCK_ROWS = 8_192  # converted at a time
_MEAN_OF = 8_192  # rows; any vector would do


def tolerance(dim: int) -> float:
    """Cosines nearer to each other than this may stand in the wrong order in float32: 8 sqrt(D) times its unit
    roundoff, which sums of D terms exceed with probability below 1e-13 (Higham & Mary 2019, theorem 2.4)."""
    return 4 * float(torch.finfo(torch.float32).eps) * dim**0.5


class Gallery:
    """The rows y - m in bfloat16, N x D x 2 bytes; or for float32 made a block at a time, with m = 0, for they
    would take twice the room."""

    def __init__(self, embeddings: torch.Tensor, dtype: torch.dtype, device: torch.device):
        n, dim = embeddings.shape
        self.embeddings, self.dtype, self.device = embeddings, dtype, device
        self.scale = torch.empty(n, device=device)  # 1 / length
        for start in range(0, n, _BLOCK_ROWS):
            raw = embeddings[start : start + _BLOCK_ROWS].to(device).float()
            self.scale[start : start + _BLOCK_ROWS] = 1 / raw.norm(dim=1).clamp(min=1e-12)
        self.tolerance = tolerance(dim)
        self.vectors = None
        self.rounding = 0.0  # of a score, relative
        self.error, self.length = 0.0, 1.0  # greatest of all rows: what rounding took off (a length), and length
        if dtype != torch.float32:
            self._round(embeddings, dtype)

    def _round(self, embeddings: torch.Tensor, dtype: torch.dtype) -> None:
        n, dim = embeddings.shape
        here = self.device if devices.fits(n * dim * dtype.itemsize, self.device) else embeddings.device
        self.vectors = torch.empty((n, dim), dtype=dtype, device=here)
        self.rounding = torch.finfo(dtype).eps / 2
        self.mean = self.unit(slice(0, None, -(-n // _MEAN_OF))).mean(dim=0)
        for start in range(0, n, _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            centred = self.unit(block) - self.mean
            low = centred.to(dtype)
            self.vectors[block] = low.to(here)
            self.error = max(self.error, _longest(centred - low.float()))
            self.length = max(self.length, _longest(low.float()))

    def unit(self, which: slice | torch.Tensor) -> torch.Tensor:
        """The unit vectors of some rows (a slice, or numbers on the device) in float32, on the device."""
        rows = which if isinstance(which, slice) else which.to(self.embeddings.device)
        return self.embeddings[rows].to(self.device).float() * self.scale[which, None]

    def block(self, start: int, stop: int) -> torch.Tensor:
        """What the anchors of `queries` are multiplied with, (stop - start, D)."""
        block = slice(start, stop)
        return self.unit(block) if self.vectors is None else self.vectors[block].to(self.device)

    def queries(self, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors (A, D) of some anchors, and how far their scores may be from the exact ones, (A,): by
        |x'y' - xy| <= |x' - x| |y'| + |x| |y' - y|, and twice or three times that of float32's sums."""
        unit = self.unit(anchors)
        low = unit.to(self.dtype)
        own = (unit - low.float()).norm(dim=1)
        return low, 1.005 * (own * self.length + self.error) + 3 * self.tolerance

    def below(self, kth: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """The floor (A,) of anchors whose k-th best score so far is `kth`: what scores less is not of the best k.

        A score s is within e + r |s| of the exact one, where e is the `error` that `queries` gave and r the
        rounding of a product. So k rows reach kth - e - r |kth|, and what scores less than that minus
        e + r |floor| does not. The floor is rounded too; 0.03 is more than 3 e, which all this is multiplied by.
        """
        kth = kth.clamp(min=LOWEST)  # -inf where fewer than k are known, and 0 x inf is not a number
        floor = kth - 2 * error - 3 * self.rounding * (kth.abs() + 0.03)
        return floor.clamp(min=LOWEST)


def _longest(vectors: torch.Tensor) -> float:
    return 1.001 * float(vectors.norm(dim=1).max())
