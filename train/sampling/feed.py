"""Batches for the loop, drawn one step ahead while the device still computes the step in hand.

A step's reward is known as soon as its forward pass is over, and the bandit chooses with it before the next step
is drawn, as if nothing ran ahead. What overlaps is the rest: on CUDA the next batch is drawn, its embeddings are
gathered (on the host, into a pinned buffer, where they do not fit on the device) and copied on a stream of their
own, during the backward pass and the optimiser's step. On the CPU all of it happens in turn.
"""

from collections.abc import Callable

import numpy as np
import torch

from train.datasets import Batch, Sampler, TrainRows, gather


class Feed:
    """At most one batch, drawn by `draw` and handed over by `take`."""

    def __init__(self, rows: TrainRows, batch_size: int, groups: int, seed: int):
        self.rows, self.sampler = rows, Sampler(rows, batch_size, groups, seed)
        self._ahead: tuple[Batch, torch.Tensor] | None = None
        self._stream = self._pinned = None
        if rows.device.type == "cuda":
            self._stream = torch.cuda.Stream(rows.device)
            torch.cuda.synchronize(rows.device)  # the tables were made on another stream
            if rows.embeddings.device != rows.device:
                shape = 3 * batch_size, rows.embeddings.shape[1]
                self._pinned = torch.empty(shape, dtype=rows.embeddings.dtype, pin_memory=True)

    @property
    def is_empty(self) -> bool:
        return self._ahead is None

    def draw(self, step: int, arms: np.ndarray) -> None:
        """Draw the batch of a step, given the arm (G,) of each group of its anchors. Call it when the reward of
        the batch before has been read: then that batch's copy out of the pinned buffer is over, too."""
        with torch.cuda.stream(self._stream):  # of None: the current one
            batch = self.sampler.draw(step, arms)
            self._ahead = batch, self._gather(batch.rows)

    def take(self) -> tuple[Batch, torch.Tensor]:
        """The batch that was drawn, and the raw embeddings (3A, D) of its rows."""
        assert self._ahead is not None  # nothing was drawn
        (batch, embeddings), self._ahead = self._ahead, None
        if self._stream is not None:
            current = torch.cuda.current_stream(self.rows.device)
            current.wait_stream(self._stream)
            for tensor in (*vars(batch).values(), embeddings):  # their memory is the other stream's to use again
                tensor.record_stream(current)
        return batch, embeddings

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        if self._pinned is None:
            return gather(self.rows.embeddings, rows)
        torch.index_select(self.rows.embeddings, 0, rows.cpu(), out=self._pinned)
        return self._pinned.to(rows.device, non_blocking=True)


def reading(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """A function that gives `tensor` as an array. It waits for what made it, not for what is queued later."""
    copy = tensor.to("cpu", non_blocking=True)  # pinned, when it comes from CUDA
    if tensor.device.type != "cuda":
        return copy.numpy
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def read() -> np.ndarray:
        copied.synchronize()
        return copy.numpy()

    return read
