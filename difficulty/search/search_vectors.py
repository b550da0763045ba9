"""The vectors that a search multiplies, a tile at a time, and exact cosines of chosen pairs of rows.

Nothing but the embeddings and their lengths is held. Embeddings on the host travel to a CUDA device as they are,
through two pinned buffers, while the tile before is in use.

Memory: N x 8 bytes; per row of a tile D x 8 on a CPU, D x 4 if they travel (and as much on the host, pinned);
before the first tile 8,192 x D x 12.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from common import cli

DECIMALS = 12  # of cosines: those that differ only by rounding (of parallel vectors, say) are ties
_BLOCK_ROWS = 8_192  # whose lengths are computed at a time
_PAIRS = 256  # compared at a time on a CPU: they fit a core's cache, and take a fifth of the time of 6,000


class SearchVectors:
    """N embeddings (N, D), float16 or float32, on `device` or on the host, for a search on `device`."""

    def __init__(self, embeddings: torch.Tensor, device: torch.device):
        self.embeddings, self.device = embeddings, device
        self.inverse_length = torch.empty(len(embeddings), dtype=torch.float64, device=device)  # 0 of the vector 0
        for start, block in self._blocks(_BLOCK_ROWS):
            length = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64)
            self.inverse_length[start : start + len(block)] = torch.where(length > 0, 1 / length, 0.0)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """The embeddings (n, D) of some rows (n,), on the device."""
        return self.embeddings.index_select(0, rows.to(self.embeddings.device)).to(self.device)

    def tiles(self, size: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(first row, embeddings (n, D), inverse lengths (n,) float32) of `size` rows after another, on the
        device. Raises Stopped on a signal, between two of them."""
        for start, block in self._blocks(size):
            cli.check_stop()
            yield start, block, self.inverse_length[start : start + len(block)].float()

    def cosines(self, anchors: torch.Tensor, rows: torch.Tensor, memory_mb: float) -> torch.Tensor:
        """Cosines (P,) float64, to DECIMALS, of pairs of rows. Pairs of equal vectors have equal cosines."""
        # products of two float16 numbers are exact in float32
        wide = torch.float32 if self.embeddings.dtype == torch.float16 else torch.float64
        at_once = int(max(1, memory_mb * 2**20 // (28 * self.embeddings.shape[1])))
        at_once = min(at_once, _PAIRS) if self.device.type == "cpu" else at_once
        cosines = torch.empty(len(rows), dtype=torch.float64, device=self.device)
        for start in range(0, len(rows), at_once):
            some = slice(start, start + at_once)
            products = self.take(anchors[some]).to(wide).mul_(self.take(rows[some]))
            torch.sum(products, dim=1, dtype=torch.float64, out=cosines[some])
        return cosines.mul_(self.inverse_length[anchors] * self.inverse_length[rows]).round_(decimals=DECIMALS)

    def _blocks(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, raw embeddings (n, D) on the device) of `size` rows after another."""
        if self.embeddings.device.type != self.device.type:
            yield from _travelling(self.embeddings, size, self.device)
            return
        for start in range(0, len(self.embeddings), size):
            yield start, self.embeddings[start : start + size]


def products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x y^T (A, G) float32. On CUDA by the units for float16, whose products are exact in float32. On a CPU as a
    1 x 1 convolution, which torch passes to oneDNN when it has several threads; matrix products go to MKL, which
    takes 1.4 times as long on an AMD."""
    if x.device.type == "cuda":
        return torch.mm(x, y.T, out_dtype=torch.float32) if x.dtype == torch.float16 else x @ y.T
    x, y = x.float(), y.float()
    images, filters = x[None, None].permute(0, 3, 1, 2), y[:, None, None].permute(0, 3, 1, 2)  # channels last
    return F.conv2d(images, filters).permute(0, 2, 3, 1)[0, 0]


def error_of(dim: int) -> float:
    """How far a cosine by `products` may be from the exact one: 8 sqrt(D) unit roundoffs (eps / 2), which a sum of
    D terms in float32 exceeds with probability below 1e-13 (Higham & Mary 2019, theorem 2.4); or D / 2 of them,
    since the float16 units of a GPU add 4 terms (V100) to 16 (H100) at a time and cut off what float32 does not
    hold (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores")."""
    return torch.finfo(torch.float32).eps * max(4 * dim**0.5, dim / 4)


def near(dim: int) -> float:
    """2 sqrt(D) unit roundoffs: the errors of `products` usually do not exceed it."""
    return torch.finfo(torch.float32).eps * dim**0.5


def _travelling(embeddings: torch.Tensor, size: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows on the CUDA device), the next ones on their way. A pinned buffer is filled again when its
    copy has arrived, which is the only time that the host waits."""
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    shape, starts = (min(size, len(embeddings)), embeddings.shape[1]), range(0, len(embeddings), size)
    buffers = [torch.empty(shape, dtype=embeddings.dtype, pin_memory=True) for _ in range(2)]
    arrived = [torch.cuda.Event() for _ in buffers]

    def send(number: int) -> torch.Tensor:
        rows = embeddings[starts[number] : starts[number] + size]
        arrived[number % 2].synchronize()
        pinned = buffers[number % 2][: len(rows)].copy_(rows)
        with torch.cuda.stream(stream):
            block = pinned.to(device, non_blocking=True)
            arrived[number % 2].record(stream)
        return block

    ahead = [send(0)]
    for number, start in enumerate(starts):
        if number + 1 < len(starts):
            ahead.append(send(number + 1))
        block = ahead.pop(0)
        current.wait_event(arrived[number % 2])  # not for the stream, on which the next rows travel
        block.record_stream(current)
        yield start, block
