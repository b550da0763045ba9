"""Images through a model, prepared ahead by threads: the one loop that every embedding stage runs.

Threads read, decode, resize and normalise chunks of images; the main thread runs the model. On CUDA a chunk goes
to the device from pinned memory once it is decoded, and is resized there, on a stream of its own while the model
computes. Nothing waits for the device before the next batch is in its queue: a batch's vectors are copied to
pinned memory behind it, and are waited for one batch later.

Memory: see `_prepared_ahead`; and the vectors of two jobs, one that is computed and one that is written.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch

from common import cli, parquet
from common.archives import tars
from common.cli import Progress
from common.imagery import tar_images
from common.imagery.decoding import Undecodable, decode
from common.schemas import Reject, Rejected, count_reasons
from common.sections import Infrastructure
from generate import batches
from generate.pixels import Preprocessing

CHUNK = 8  # images that a thread prepares at once


@dataclass(frozen=True)
class Job:
    """Images whose vectors belong together, in one file or in one row group."""

    name: Any  # whatever the caller knows it by
    count: int
    read: Callable[[int, int], Sequence[bytes | None]]  # encoded images start..stop; None: cannot be read


class Result(NamedTuple):
    """The vectors of a job's images, in order, without those that could not be decoded."""

    job: Job
    rows: np.ndarray  # (n,) int64: numbers of the images that have a vector
    vectors: np.ndarray  # (n, D)
    failed: dict[int, Rejected]  # number of an image that has none -> why


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


class _Chunk(NamedTuple):
    rows: list[int]  # numbers of the images that could be decoded
    pixels: torch.Tensor  # (len(rows), 3, H, W) on the device
    failed: dict[int, Rejected]
    ready: torch.cuda.Event | None  # when the pixels are there
    room: torch.Tensor | None  # on the CPU: the memory of the pixels, to be used again


class _Vectors(NamedTuple):
    """A batch's vectors on their way to the host."""

    host: torch.Tensor  # (n, D)
    arrived: torch.cuda.Event | None  # None: they are there

    def wait(self) -> torch.Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host


class _Batch(NamedTuple):
    job: Job
    parts: list[tuple[int, int]]  # of the job's images
    chunks: list[Future]  # of _Chunk, for each part
    is_last: bool


def embed(
    jobs: Iterable[Job],
    forward: Callable[[torch.Tensor], torch.Tensor],
    preprocessing: Preprocessing,
    device: torch.device,
    settings: Infrastructure,
    times: Times,
    progress: Progress,
) -> Iterator[Result]:
    """The vectors of each job, in order. `forward`: (N, 3, H, W) float32 -> (N, D).

    A job's batches start at its first image and end with its last, so that its vectors do not depend on what
    else is computed in this run. Each batch is counted in `progress`, with what was rejected.
    """
    size = batches.size_of(settings, forward, preprocessing.image_size, device)
    # single-threaded torch in these threads (and in later ones): all cores have an image of their own
    pool = ThreadPoolExecutor(settings.threads, initializer=torch.set_num_threads, initargs=(1,))
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    rooms: SimpleQueue[torch.Tensor] = SimpleQueue()
    prepare = lambda job, start, stop: _prepare(job, start, stop, preprocessing, device, stream, rooms)  # noqa: E731
    outputs: list[_Vectors] = []
    rows: list[int] = []
    failed: dict[int, Rejected] = {}
    try:
        times.lap()
        for batch in _prepared_ahead(jobs, pool, prepare, size, settings.threads):
            chunks = [_chunk(batch, number, prepare) for number in range(len(batch.parts))]
            times.read += times.lap()
            good = [chunk.pixels for chunk in chunks if chunk.rows]
            outputs += [_to_host(batches.forward(forward, _joined(good), size))] if good else []
            if len(outputs) > 1:  # the device works on this batch meanwhile, and never on more than two
                outputs[-2].wait()
            for chunk in chunks:
                rows += chunk.rows
                failed |= chunk.failed
                lost = count_reasons(chunk.failed.values())
                progress.add(len(chunk.rows) + len(chunk.failed), len(chunk.rows), lost)
                if chunk.room is not None:
                    rooms.put(chunk.room)
            times.compute += times.lap()
            if batch.is_last:
                matrix = torch.cat([output.wait() for output in outputs]).numpy() if outputs else np.empty((0, 0))
                times.compute += times.lap()
                yield Result(batch.job, np.array(rows, np.int64), matrix, failed)
                outputs, rows, failed = [], [], {}
                times.write += times.lap()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write_each(results: Iterator[Result], write: Callable[[Result], None]) -> None:
    """write(result) for each, in a thread of its own while the next one is computed.

    A stop signal ends it when the result that is there then is written.
    """
    with ThreadPoolExecutor(1) as pool:
        writing: Future | None = None
        try:
            for result in results:
                if writing:
                    writing.result()
                writing = pool.submit(write, result)
                cli.check_stop()
        finally:  # also of a stop, and of an error in what was computed next
            if writing:
                writing.result()


def _prepared_ahead(
    jobs: Iterable[Job], pool: ThreadPoolExecutor, prepare: Callable, size: batches.Size, threads: int
) -> Iterator[_Batch]:
    """The jobs' batches, in order, enough of them in the hands of the threads. An empty job is one empty batch.

    Memory: three batches, or two chunks a thread, of the model's input on the device (0.6 MB an image at 224
    pixels); in each thread one decoded image (1.2 MB for 640 x 640 pixels), for CUDA a chunk of them, twice.
    """
    waiting: deque[_Batch] = deque()
    for job in jobs:
        start = 0
        while start < job.count or start == job.count == 0:
            stop = min(start + size.images, job.count)
            parts = [(at, min(at + CHUNK, stop)) for at in range(start, stop, CHUNK)]
            chunks = [pool.submit(prepare, job, *part) for part in parts]
            waiting.append(_Batch(job, parts, chunks, stop == job.count))
            if len(waiting) > 2 and sum(len(batch.chunks) for batch in waiting) > 2 * threads:
                yield waiting.popleft()
            start = max(stop, 1)
    yield from waiting


def _prepare(
    job: Job,
    start: int,
    stop: int,
    preprocessing: Preprocessing,
    device: torch.device,
    stream: torch.cuda.Stream | None,
    rooms: SimpleQueue,
) -> _Chunk:
    """Images start..stop of a job, from bytes to the model's input on the device."""
    rows: list[int] = []
    failed: dict[int, Rejected] = {}

    def decoded() -> Iterator[np.ndarray]:
        for number, encoded in enumerate(_read(job, start, stop), start):
            if isinstance(encoded, Rejected):
                failed[number] = encoded
                continue
            try:
                image = decode(encoded)
            except Undecodable as error:
                failed[number] = error.why
            else:
                rows.append(number)
                yield image

    with torch.inference_mode():
        if stream is None:
            room = _room(rooms, preprocessing)
            return _Chunk(rows, preprocessing.into(room, decoded()), failed, None, room)
        with torch.cuda.stream(stream):
            pixels = preprocessing.on_cuda(decoded(), device)
            return _Chunk(rows, pixels, failed, stream.record_event(), None)


def _room(rooms: SimpleQueue, preprocessing: Preprocessing) -> torch.Tensor:
    """Memory for a chunk that the model has read already, or new."""
    try:
        return rooms.get_nowait()
    except Empty:
        return preprocessing.room(CHUNK)


def _chunk(batch: _Batch, number: int, prepare: Callable) -> _Chunk:
    """A chunk of a batch, when it is ready for the model."""
    try:
        chunk = batch.chunks[number].result()
    except torch.OutOfMemoryError as error:
        # the model had taken all of it; now, between two batches, there is room, once the frames in which it
        # happened let go of their pixels
        error.__traceback__ = None
        chunk = prepare(batch.job, *batch.parts[number])
    if chunk.ready is not None:
        current = torch.cuda.current_stream(chunk.pixels.device)
        current.wait_event(chunk.ready)
        chunk.pixels.record_stream(current)  # its memory is not given away before the model has read it
    return chunk


def _to_host(vectors: torch.Tensor) -> _Vectors:
    """Begins to copy a batch's vectors to the host, when the device has computed them."""
    if vectors.device.type == "cpu":
        return _Vectors(vectors, None)
    host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    host.copy_(vectors, non_blocking=True)
    return _Vectors(host, torch.cuda.current_stream(vectors.device).record_event())


def _read(job: Job, start: int, stop: int) -> Sequence[bytes | Rejected | None]:
    """The encoded images start..stop; in place of one why it cannot be had, where the disk does not give it any
    more, or its tar has another there now.
    """
    try:
        return job.read(start, stop)
    except tars.BadSector:  # a file system that has gone, say, is another error, and no heap of rejects
        why = Rejected(Reject.JPEG_CORRUPT, "cannot be read")
    except tar_images.ChangedTar as error:
        why = Rejected(Reject.CONTENT_CHANGED, parquet.first_line(error))
    if stop - start == 1:
        return [why]
    return [image for row in range(start, stop) for image in _read(job, row, row + 1)]


def _joined(pixels: list[torch.Tensor]) -> torch.Tensor:
    return pixels[0] if len(pixels) == 1 else torch.cat(pixels)
