"""Batches for the training loop, drawn one step ahead while the device still computes the current step.

A step's reward is known after its forward pass, and the bandit uses it before the next batch is drawn, as if
nothing ran ahead. The rest overlaps: on CUDA the next batch is drawn, and its embeddings are gathered (on the
host, into a pinned buffer, if they do not fit on the device) and copied on a stream of their own, during the
backward pass and the optimiser step. On the CPU everything runs in turn.
"""

from collections.abc import Callable

import numpy as np
import torch

from train.datasets import Batch, Sampler, TrainRows, gather


class Feed:
    """Holds at most one batch, drawn by `draw` and handed over by `take`."""

    def __init__(self, rows: TrainRows, batch_size: int, groups: int, seed: int):
        self.rows, self.sampler = rows, Sampler(rows, batch_size, groups, seed)
        self._ahead: tuple[Batch, torch.Tensor] | None = None
        self._stream = self._pinned = None
        if rows.device.type == "cuda":
            self._stream = torch.cuda.Stream(rows.device)
            torch.cuda.synchronize(rows.device)  # the tables were created on another stream
            if rows.embeddings.device != rows.device:
                shape = 3 * batch_size, rows.embeddings.shape[1]
                self._pinned = torch.empty(shape, dtype=rows.embeddings.dtype, pin_memory=True)

    @property
    def is_empty(self) -> bool:
        return self._ahead is None

    def draw(self, step: int, arms: np.ndarray) -> None:
        """Draw the batch of a step, given the arm (G,) of each group of anchors. Call it after reading the
        previous batch's reward: by then that batch has been copied out of the pinned buffer."""
        with torch.cuda.stream(self._stream):  # of None: the current one
            batch = self.sampler.draw(step, arms)
            if self._pinned is None:
                embeddings = gather(self.rows.embeddings, batch.rows)
            else:
                torch.index_select(self.rows.embeddings, 0, batch.rows.cpu(), out=self._pinned)
                embeddings = self._pinned.to(self.rows.device, non_blocking=True)
            self._ahead = batch, embeddings

    def take(self) -> tuple[Batch, torch.Tensor]:
        """The drawn batch, and the raw embeddings (3A, D) of its rows."""
        assert self._ahead is not None  # draw comes first
        (batch, embeddings), self._ahead = self._ahead, None
        if self._stream is not None:
            current = torch.cuda.current_stream(self.rows.device)
            current.wait_stream(self._stream)
            for tensor in (*vars(batch).values(), embeddings):  # else the other stream might reuse their memory
                tensor.record_stream(current)
        return batch, embeddings


def reading(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """A function that returns `tensor` as an array. It waits for its computation, not for what is queued later."""
    copy = tensor.to("cpu", non_blocking=True)  # pinned, when it comes from CUDA
    if tensor.device.type != "cuda":
        return copy.numpy
    copied = torch.cuda.current_stream(tensor.device).record_event()

    def read() -> np.ndarray:
        copied.synchronize()
        return copy.numpy()

    return read
