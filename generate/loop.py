"""Images through a model, decoded ahead by threads: the one loop that every embedding stage runs.

Memory: AHEAD + 1 batches of decoded images (64 of 640 x 640: 79 MB each) and the vectors of one job.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from common.cli import Progress
from common.schemas import Reject
from generate.pixels import Preprocessing, Undecodable, decode

AHEAD = 3  # batches being read and decoded while one is computed
_CHUNK = 8  # images read and decoded by one call of a thread


class Job(NamedTuple):
    """Images whose vectors belong together, in one file or in one row group."""

    name: Any  # whatever the caller knows it by
    count: int
    read: Callable[[int, int], list[bytes | None]]  # encoded images start..stop; None: cannot be read


class Result(NamedTuple):
    """The vectors of a job's images, in order, without those that could not be decoded."""

    job: Job
    rows: np.ndarray  # (n,) int64: numbers of the images that have a vector
    vectors: np.ndarray  # (n, D)
    failed: dict[int, str]  # number of an image that has none -> why


@dataclass
class Times:
    """Seconds that the main thread spent waiting for images, computing, and writing: which one limits the rate."""

    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    _since: float = field(default_factory=time.monotonic)

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.monotonic()
        elapsed, self._since = now - self._since, now
        return elapsed

    def __str__(self) -> str:
        total = max(self.read + self.compute + self.write, 1e-9)
        shares = [f"{kind} {getattr(self, kind) / total:.0%}" for kind in ("read", "compute", "write")]
        return f"{', '.join(shares)} of the time"


class _Batch(NamedTuple):
    job: Job
    start: int
    images: list[Future]  # of chunks: list[array | text of the error]
    is_last: bool


def embed(
    jobs: Iterable[Job],
    forward: Callable[[torch.Tensor], torch.Tensor],
    preprocessing: Preprocessing,
    device: torch.device,
    batch_size: int,
    threads: int,
    times: Times,
    progress: Progress,
) -> Iterator[Result]:
    """The vectors of each job, in order. `forward`: (N, 3, H, W) float32 -> (N, D).

    A job's batches start at its first image and end with its last, so that its vectors do not depend on what
    else is computed in this run. Each batch is counted in `progress`, with what was rejected.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        outputs, rows, failed = [], [], {}
        times.lap()
        for batch in _decoded_ahead(jobs, pool, batch_size):
            images = [image for chunk in batch.images for image in chunk.result()]
            times.read += times.lap()
            good = [i for i, image in enumerate(images) if isinstance(image, np.ndarray)]
            failed.update({batch.start + i: images[i] for i in set(range(len(images))).difference(good)})
            rows += [batch.start + i for i in good]
            vectors = forward(preprocessing([images[i] for i in good], device)) if good else None
            if outputs:  # waits for the batch before, while the device works on this one
                outputs[-1] = outputs[-1].cpu()
            if vectors is not None:
                outputs.append(vectors)
            lost = len(images) - len(good)
            progress.add(len(images), len(good), {Reject.JPEG_CORRUPT.value: lost} if lost else {})
            times.compute += times.lap()
            if batch.is_last:
                matrix = torch.cat([output.cpu() for output in outputs]).numpy() if outputs else np.empty((0, 0))
                times.compute += times.lap()
                yield Result(batch.job, np.array(rows, np.int64), matrix, dict(sorted(failed.items())))
                outputs, rows, failed = [], [], {}
                times.write += times.lap()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decoded_ahead(jobs: Iterable[Job], pool: ThreadPoolExecutor, batch_size: int) -> Iterator[_Batch]:
    """The jobs' batches, in order, AHEAD of them in the hands of the threads. An empty job is one empty batch."""
    waiting: deque[_Batch] = deque()
    for job in jobs:
        for start in range(0, max(job.count, 1), batch_size):
            stop = min(start + batch_size, job.count)
            chunks = [(at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK)]
            images = [pool.submit(_load, job, *chunk) for chunk in chunks]
            waiting.append(_Batch(job, start, images, stop == job.count))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
    yield from waiting


def _load(job: Job, start: int, stop: int) -> list[np.ndarray | str]:
    """Read and decode images: (H, W, 3) uint8, or the text of what is wrong with one."""
    images: list[np.ndarray | str] = []
    for encoded in job.read(start, stop):
        try:
            images.append(decode(encoded) if encoded is not None else "cannot be read")
        except Undecodable as error:
            images.append(str(error))
    return images
