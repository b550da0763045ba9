"""generate/loop.py and batches.py. Oracle: planted colours, which a "model" gives back as the mean of an image."""

import errno
import io
import os
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from embedding_setup import write_tar
from PIL import Image

from common import config
from common.archives import tars
from common.errors import PipelineError
from common.imagery import tar_images
from common.schemas import Reject
from generate import batches, loop, pixels

CPU = torch.device("cpu")


def mean_colour(x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=(2, 3))


def embed_all(
    jobs: list[loop.Job], forward=mean_colour, batch_size: int | str = 4, device: torch.device = CPU
) -> list[loop.Result]:
    """Jobs through the loop with a "model" that gives an image's mean colour."""
    preprocessing = pixels.Preprocessing(None, (8, 8), None, "bilinear", False, 1.0, (0.0,) * 3, (1.0,) * 3)
    overrides = [f"infrastructure.embedding_batch_size={batch_size}", "infrastructure.workers=2"]
    settings = config.load(None, overrides).infrastructure
    progress = loop.GenerationProgress("test", "image")
    found = list(loop.embed(jobs, forward, preprocessing, device, settings, progress))
    assert progress.rows_in == sum(job.count for job in jobs)
    return found


def flat(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def job(name: str, images: list[bytes | None]) -> loop.Job:
    return loop.Job(name, len(images), lambda start, stop: images[start:stop])


def test_jobs_come_back_in_order_with_their_own_vectors():
    sizes = [0, 1, 30, 4, 5, 0, 9]
    numbers = iter(range(256))
    planted = [[next(numbers) for _ in range(size)] for size in sizes]
    results = embed_all([job(str(i), [flat(v) for v in values]) for i, values in enumerate(planted)])
    assert [result.job.name for result in results] == [str(i) for i in range(len(sizes))]
    assert [result.vectors[:, 0].tolist() if len(result.rows) else [] for result in results] == planted


def test_vectors_are_waited_for_when_the_next_batch_is_in_the_devices_queue(monkeypatch):
    order = []

    def to_host(vectors):
        number = sum(entry.startswith("queue") for entry in order)
        order.append(f"queue {number}")
        return lambda: order.append(f"wait {number}") or vectors

    monkeypatch.setattr(loop, "_to_host", to_host)
    (result,) = embed_all([job("a", [flat(v) for v in range(10)])])
    assert order[:5] == ["queue 0", "queue 1", "wait 0", "queue 2", "wait 1"]  # else the device idles in between
    assert result.vectors[:, 0].tolist() == list(range(10))


def results_of(count: int):
    for number in range(count):
        yield loop.Result(job(str(number), []), np.empty(0), np.empty((0, 0)), {})


def test_results_are_written_while_the_next_is_computed():
    written, computed = [], threading.Event()

    def results():
        yield from results_of(1)
        computed.set()  # deadlocks if the first must be written before the second is asked for
        yield from results_of(1)

    def write(result):
        assert computed.wait(timeout=60)
        written.append(result.job.name)

    loop.write_each(results(), write)
    assert written == ["0", "0"]


def test_an_error_in_writing_is_raised_and_ends_the_run():
    written = []

    def write(result):
        written.append(result.job.name)
        if len(written) == 2:
            raise PipelineError("the disk is full")

    with pytest.raises(PipelineError, match="the disk is full"):
        loop.write_each(results_of(10), write)
    assert written == ["0", "1"]


def test_what_is_computed_is_written_although_the_next_fails():
    def results():
        yield from results_of(1)
        raise PipelineError("the tar has gone")

    written = []
    with pytest.raises(PipelineError, match="the tar has gone"):
        loop.write_each(results(), lambda result: time.sleep(0.1) or written.append(result.job.name))
    assert written == ["0"]


def test_unreadable_images_are_left_out_and_numbered():
    (result,) = embed_all([job("a", [flat(1), None, flat(3), b"not an image", flat(5), b""])])
    assert result.rows.tolist() == [0, 2, 4]
    assert result.vectors[:, 0].tolist() == [1, 3, 5]
    reasons = {number: why.reason.value for number, why in result.failed.items()}
    assert reasons == {1: "jpeg_corrupt", 3: "not_an_image", 5: "not_an_image"}


def test_a_batch_never_spans_two_jobs():
    seen = []

    def forward(x):
        seen.append(len(x))
        return mean_colour(x)

    embed_all([job("a", [flat(1)] * 5), job("b", [flat(2)] * 5)], forward)
    assert seen == [4, 1, 4, 1]  # else a part's bits would depend on what else the run computes


def test_an_error_while_reading_is_raised_and_threads_end():
    def broken(start, stop):
        raise PipelineError("the tar has gone")

    with pytest.raises(PipelineError, match="the tar has gone"):
        embed_all([loop.Job("a", 3, broken)])


# ----------------------------------------------------------------------------------------------------- batch sizes


OF_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
OF_MPS = RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.00 GB)")


def short_of_memory(most: int, error: Exception = OF_CUDA):
    """A "model" that runs out of memory above `most` images, and the sizes of the batches that it was given."""
    seen = []

    def forward(x):
        seen.append(len(x))
        if len(x) > most:
            raise error
        return mean_colour(x)

    return forward, seen


@pytest.mark.parametrize("error", [OF_CUDA, OF_MPS, MemoryError()])
def test_out_of_memory_halves_the_batches_and_goes_on_and_says_so(caplog, error):
    forward, seen = short_of_memory(5, error)
    (result,) = embed_all([job("a", [flat(v) for v in range(80)])], forward, batch_size=16)
    assert result.vectors[:, 0].tolist() == list(range(80))  # none twice, none lost
    assert seen[:3] == [16, 8, 4]
    assert set(seen[2:]) == {4}  # and it stays there
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory: continuing with batches of {images} images" for images in (8, 4)
    ]


def test_an_error_of_another_kind_ends_the_run():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        embed_all(
            [job("a", [flat(1)] * 3)], short_of_memory(0, RuntimeError("CUDA error: an illegal memory access"))[0]
        )


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices_are_given_batches_that_the_cpu_has_prepared(kind, monkeypatch):
    """With the copy to the device left out, which must be the only thing that is done with it."""
    to, moved, seen = torch.Tensor.to, [], []

    def leave_out(tensor, *arguments, **more):
        if arguments != (torch.device(kind),):
            return to(tensor, *arguments, **more)
        moved.append(len(tensor))
        return tensor

    def forward(x):
        seen.append(len(x))
        return mean_colour(x)

    monkeypatch.setattr(torch.Tensor, "to", leave_out)
    (result,) = embed_all([job("a", [flat(v) for v in range(80)])], forward, "auto", torch.device(kind))
    assert result.vectors[:, 0].tolist() == list(range(80))
    assert moved == seen == [32, 32, 16]


def test_a_model_too_large_for_one_image_is_a_clear_error():
    with pytest.raises(PipelineError, match="out of memory: the model and one image do not fit"):
        embed_all([job("a", [flat(1)] * 3)], short_of_memory(0)[0])


def test_images_whose_preparation_ran_out_of_memory_are_prepared_again(monkeypatch):
    """On CUDA the threads that prepare images compete with the model for its memory."""
    prepare, failures = loop._prepare, iter([torch.OutOfMemoryError("CUDA out of memory.")] * 3)

    def failing(*arguments):
        for error in failures:
            raise error
        return prepare(*arguments)

    monkeypatch.setattr(loop, "_prepare", failing)
    monkeypatch.setattr(loop, "CHUNK", 64)  # a batch is a chunk; each of the three first attempts fails once
    results = embed_all([job(name, [flat(1), flat(2)]) for name in "abcd"])
    assert [result.vectors[:, 0].tolist() for result in results] == [[1, 2]] * 4


def test_the_memory_of_pixels_is_not_used_again_before_the_model_has_read_them():
    def slow(x):
        time.sleep(0.01)  # the threads are done with all that they may prepare by now
        return x[:, :, 0, 0]

    values = [list(range(start, start + 24)) for start in range(0, 240, 24)]
    results = embed_all([job("a", [flat(v) for v in part]) for part in values], slow)
    assert [result.vectors[:, 0].tolist() for result in results] == values


@pytest.mark.parametrize(("budget", "images"), [(10_000, 64), (6_400, 64), (6_399, 32), (1, 1), (10**9, 512)])
def test_auto_takes_the_largest_batch_within_its_share_of_the_memory(budget, images):
    tried = []
    assert batches.largest(lambda n: tried.append(n) or 100 * n, budget) == images
    assert max(tried) * 100 <= max(budget, 100)  # nothing that might not fit was tried


def test_auto_on_the_cpu_is_a_fixed_size():
    seen = []
    embed_all([job("a", [flat(1)] * 20)], lambda x: seen.append(len(x)) or mean_colour(x), batch_size="auto")
    assert seen == [8, 8, 4]


def read_with_errors(path: Path, monkeypatch, number: int, bad: range) -> loop.Job:
    """A job of ten images in a tar, of which a read that touches the bytes `bad` of image 3 fails."""
    write_tar(path, [flat(v) for v in range(10)])
    members = list(tars.walk(path))
    rows = {"image_offset": [m.offset for m in members], "image_size": [m.size for m in members]}
    real, start = os.pread, members[3].offset

    def pread(descriptor, size, offset):
        if offset < start + bad.stop and offset + size > start + bad.start:
            raise OSError(number, os.strerror(number))
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    return loop.Job("a", 10, tar_images.Tar(path).reader(pa.table(rows)))


def test_a_place_that_the_disk_cannot_read_costs_its_own_image_only(tmp_path, monkeypatch):
    (result,) = embed_all([read_with_errors(tmp_path / "0088.tar", monkeypatch, errno.EIO, range(9, 10))])
    assert result.rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert result.failed == {3: (Reject.JPEG_CORRUPT, "cannot be read")}


def test_a_file_system_that_has_gone_is_an_error_and_not_a_heap_of_rejects(tmp_path, monkeypatch):
    with pytest.raises(PipelineError, match=r"0088\.tar cannot be read: Stale file handle"):
        embed_all([read_with_errors(tmp_path / "0088.tar", monkeypatch, errno.ESTALE, range(9, 10))])


@pytest.mark.parametrize(("waiting_s", "advice"), [(70, ": more cores, or a faster disk, would help"), (10, "")])
def test_the_summary_says_what_was_waited_for(waiting_s, advice, monkeypatch, capsys):
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    now = 0
    progress = loop.GenerationProgress("stage", "image")
    for now, kind in ((waiting_s, loop.WAITING), (100, "computing")):  # noqa: B007 - the clock reads it
        progress.lap(kind)
    progress.summary()
    shares = f"waiting for images {waiting_s}%, computing {100 - waiting_s}% of the time"
    assert capsys.readouterr().out.endswith(f"; {shares}{advice}\n")
