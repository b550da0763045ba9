"""Images through a model, prepared ahead by threads: what every embedding script runs.

Threads read, decode, resize and normalise chunks of images; the main thread runs the model. CUDA resizes decoded
chunks on a stream of its own while the model computes, and the host waits for a batch's vectors only when the next
batch is queued.

Memory: see `_prepared_ahead`; and the vectors of two jobs, one being computed and one being written.
"""

import contextlib
import functools
import os
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from common import cli
from common.archives import tars
from common.errors import PipelineError
from common.imagery import tar_images
from common.imagery.decoding import Undecodable, decode
from common.schemas import Reject, Rejected, count_reasons
from common.sections import Config, Infrastructure
from generate import batches
from generate.pixels import Preprocessing

CHUNK = 8  # images that a thread prepares at once
WAITING = "waiting for images"
TOLERATED_WAIT = 0.2  # of the time, before the summary gives advice
Parts = list[tuple[int, int, Future]]  # of a job's images: start, stop, and the future of their _Chunk


@dataclass(frozen=True)
class Job:
    """Images whose vectors belong together, in one file."""

    name: Any  # identifies the job to the caller
    count: int
    read: Callable[[int, int], Sequence[bytes | Rejected | None]]  # encoded images start..stop; None: unreadable


class Result(NamedTuple):
    """The vectors of a job's images, in order, without those that could not be decoded."""

    job: Job
    rows: np.ndarray  # (n,) int64: numbers of the images that have a vector
    vectors: np.ndarray  # (n, D)
    failed: dict[int, Rejected]  # number of each image without a vector -> reason


class GenerationProgress(cli.Progress):
    """Progress, and how the main thread's time is spent."""

    def __init__(self, *args):
        super().__init__(*args)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._since = time.monotonic()

    def lap(self, kind: str) -> None:
        """Attribute the time since the last call to `kind`: "waiting for images", "computing", ..."""
        now = time.monotonic()
        self._seconds[kind] += now - self._since
        self._since = now

    def summary(self, note: str = "") -> int:
        total = max(sum(self._seconds.values()), 1e-9)
        shares = {kind: seconds / total for kind, seconds in self._seconds.items()}
        spent = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
        advice = ": more cores, or a faster disk, would help" if shares.get(WAITING, 0) > TOLERATED_WAIT else ""
        return super().summary(f"{note}{spent} of the time{advice}")


@contextlib.contextmanager
def run(
    stage: str, unit: str, total: int, model: torch.nn.Module, cfg: Config, note: str = ""
) -> Iterator[GenerationProgress]:
    """Progress of `model`, compiled if infrastructure.compile says so, over `total` rows; at last a summary."""
    if cfg.infrastructure.compile:
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
            advice = "load or install one (g++), or set infrastructure.compile to false"
            raise PipelineError(f"infrastructure.compile needs a C++ compiler, and none is on the PATH\n{advice}")
        model.compile()
    progress = GenerationProgress(stage, unit, total, cfg.logging.progress_interval_s)
    with progress:
        yield progress
    progress.summary(note)


class _Chunk(NamedTuple):
    rows: list[int]  # numbers of the images that could be decoded
    pixels: torch.Tensor  # (len(rows), 3, H, W), see Preprocessing
    failed: dict[int, Rejected]
    ready: torch.cuda.Event | None  # set on the device when the pixels are complete


def embed(
    jobs: Iterable[Job],
    forward: batches.Forward,
    preprocessing: Preprocessing,
    device: torch.device,
    settings: Infrastructure,
    progress: GenerationProgress,
) -> Iterator[Result]:
    """The vectors of each job, in order. `forward`: (N, 3, H, W) float32 -> (N, D).

    No batch spans two jobs, so that vectors do not depend on what else is computed in this run.
    """
    size = batches.size_of(settings, forward, preprocessing.image_size, device)
    # single-threaded torch in these threads (and in later ones): each core works on an image of its own
    pool = ThreadPoolExecutor(settings.threads, initializer=torch.set_num_threads, initargs=(1,))
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    prepare = functools.partial(_prepare, preprocessing, device, stream)
    outputs: list[Callable[[], torch.Tensor]] = []  # each waits for a batch's vectors
    rows: list[int] = []
    failed: dict[int, Rejected] = {}
    try:
        progress.lap("computing")
        for job, parts, is_last in _prepared_ahead(jobs, pool, prepare, size, settings.threads):
            chunks = [_ready(prepare, job, *part) for part in parts]
            progress.lap(WAITING)
            pixels = [chunk.pixels for chunk in chunks if chunk.rows]
            if pixels:
                together = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
                outputs.append(_to_host(batches.forward(forward, together.to(device), size)))
            if len(outputs) > 1:  # meanwhile the device works on this batch: never on more than two
                outputs[-2]()
            for chunk in chunks:
                rows += chunk.rows
                failed |= chunk.failed
                rejected = count_reasons(chunk.failed.values())
                progress.add(len(chunk.rows) + len(chunk.failed), len(chunk.rows), rejected)
            progress.lap("computing")
            if is_last:
                vectors = torch.cat([output() for output in outputs]).numpy() if outputs else np.empty((0, 0))
                progress.lap("computing")
                yield Result(job, np.array(rows, np.int64), vectors, failed)
                outputs, rows, failed = [], [], {}
                progress.lap("writing")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write_each(results: Iterator[Result], write: Callable[[Result], str | None]) -> list[str]:
    """write(result) for each, in a thread while the next one is computed; returns its messages. The result at hand
    is written even if a stop signal or an error ends the run.
    """
    writing: list[Future] = []
    with ThreadPoolExecutor(1) as pool:
        try:
            for result in results:
                if writing:
                    writing[-1].result()
                writing.append(pool.submit(write, result))
                cli.check_stop()
        finally:
            messages = [future.result() for future in writing]
    return [message for message in messages if message]


def _prepared_ahead(
    jobs: Iterable[Job], pool: ThreadPoolExecutor, prepare: Callable, size: batches.Size, threads: int
) -> Iterator[tuple[Job, Parts, bool]]:
    """Batches in order, with enough of them in the pool: a job, some of its parts, and whether they are its last.

    Memory: three batches, or two chunks per thread, of the pictures that views are made from, on CUDA or the host
    (for views down to 0.5 of a 224-pixel backbone, 448 pixels: 2.4 MB); in each thread one decoded image (1.2 MB
    for 640 x 640 pixels), for CUDA a chunk of them, twice.
    """
    waiting: deque[tuple[Job, Parts, bool]] = deque()
    for job in jobs:
        step = size.images
        for start in range(0, max(job.count, 1), step):  # an empty job is one empty batch
            stop = min(start + step, job.count)
            parts = [(at, min(at + CHUNK, stop)) for at in range(start, stop, CHUNK)]
            waiting.append((job, [(*part, pool.submit(prepare, job, *part)) for part in parts], stop == job.count))
            if len(waiting) > 2 and sum(len(parts) for _, parts, _ in waiting) > 2 * threads:
                yield waiting.popleft()
    yield from waiting


def _prepare(preprocessing, device, stream: torch.cuda.Stream | None, job: Job, start: int, stop: int) -> _Chunk:
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

    with torch.inference_mode(), torch.cuda.stream(stream):  # type: ignore[arg-type]  # None: the CPU
        pixels = preprocessing(decoded(), device)
        return _Chunk(rows, pixels, failed, stream.record_event() if stream else None)


def _ready(prepare: Callable, job: Job, start: int, stop: int, future: Future) -> _Chunk:
    """A chunk, once the model may read it."""
    try:
        chunk = future.result()
    except torch.OutOfMemoryError as error:
        error.__traceback__ = None  # its frames hold pixels; without them there is room now, between two batches
        chunk = prepare(job, start, stop)
    if chunk.ready is not None:
        current = torch.cuda.current_stream(chunk.pixels.device)
        current.wait_event(chunk.ready)
        chunk.pixels.record_stream(current)  # its memory is not reused before the model has read it
    return chunk


def _to_host(vectors: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start copying a batch's vectors to the host; returns a function that waits for them."""
    if vectors.device.type != "cuda":
        vectors = vectors.cpu()
        return lambda: vectors
    host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    host.copy_(vectors, non_blocking=True)
    arrived = torch.cuda.current_stream(vectors.device).record_event()
    return lambda: arrived.synchronize() or host


def _read(job: Job, start: int, stop: int) -> Sequence[bytes | Rejected | None]:
    """The encoded images start..stop; a Rejected in place of one that cannot be read, or that has changed."""
    try:
        return job.read(start, stop)
    except tars.BadSector:  # if the whole file system is gone, fail instead of rejecting every image
        why = Rejected(Reject.JPEG_CORRUPT, "cannot be read")
    except tar_images.ChangedTar as error:
        why = Rejected(Reject.CONTENT_CHANGED, str(error))
    if stop - start == 1:
        return [why]
    return [image for row in range(start, stop) for image in _read(job, row, row + 1)]
