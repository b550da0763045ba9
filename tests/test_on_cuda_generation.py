"""Generation, and the published model's scripts, on a simulated CUDA device. Oracle: the same on the CPU. DINOv2's
pictures may differ by a grey level, which CUDA rounds in floats and the CPU in integers.
"""

import logging
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simulated_cuda
import torch
from embedding_setup import SIZES, Setup, cosines, jpeg, photographs, picture
from local_backbone import FAMILIES
from test_generate_embeddings_from_hf import flags, image_folder, model, written  # noqa: F401 - fixtures
from trained_model import JPEGS

from common import config, parquet
from generate import generate_embeddings, loop, pixels
from publish import demo_usage, generate_embeddings_from_hf, generate_embeddings_from_parquet

CUDA = torch.device("cuda")
PICTURES = [jpeg(picture(*size, seed=seed)) for seed in range(2) for size in SIZES] + photographs(6)


def generated(setup: Setup, *more: str) -> np.ndarray:
    assert generate_embeddings.main([*setup.flags, "--overwrite", *more]) == 0
    return parquet.to_matrix(parquet.read(setup.part("0088-0"))["embedding"]).astype(np.float32)


def write_setup(root, family: str = "dinov2", **settings) -> Setup:
    return Setup(root, {"0088": PICTURES}, family, data__rows_per_part=100, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_the_cpu(tmp_path, family):
    setup = write_setup(tmp_path, family, embedding_model__dtype="float32")
    expected = generated(setup)
    with simulated_cuda.installed() as cuda:
        ours = generated(setup)
        assert not cuda.races
    np.testing.assert_allclose(ours, expected, atol=1e-3)  # of grey levels, and float16 has 11 bits
    assert (cosines(ours, expected) > 1 - 1e-6).all()
    if family.startswith("dinov3"):  # whose resize is of floats on both
        np.testing.assert_array_equal(ours, expected)
    waits = Counter()
    for (place, kind), count in cuda.counts.waits_at.items():
        waits[place.split()[-1], kind] += count
    assert waits.pop(("<lambda>", "event.synchronize")) == -(-len(PICTURES) // 3)  # one for the vectors of a batch
    assert {function for function, _ in waits} <= {"load", "_factor_and_offset"}  # once


def test_embeddings_in_bfloat16_are_close(tmp_path):
    setup = write_setup(tmp_path)
    expected = generated(setup)
    with simulated_cuda.installed() as cuda:
        ours = generated(setup)
        assert not cuda.races
    assert parquet.read_provenance(setup.part("0088-0")).facts["dtype"] == "bfloat16"
    assert not np.array_equal(ours, expected)
    assert (cosines(ours, expected) > 0.9999).all()  # bfloat16 has 8 bits, and two layers add up


def mean_colour(x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=(2, 3))


def embed(count: int, batch_size: int | str = 16, forward=mean_colour) -> np.ndarray:
    """Images of one size through the loop on the device."""
    preprocessing = pixels.Preprocessing(
        32, None, (32, 32), "bicubic", False, 1 / 255, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2)
    )
    overrides = [f"infrastructure.embedding_batch_size={batch_size}", "infrastructure.workers=2"]
    settings = config.load(None, overrides).infrastructure
    jpegs = (JPEGS * count)[:count]
    job = loop.Job("a", count, lambda start, stop: jpegs[start:stop])
    progress = loop.GenerationProgress("test", "image")
    (result,) = loop.embed([job], forward, preprocessing, CUDA, settings, progress)
    return result.vectors


def test_a_batch_costs_no_more_kernels_and_waits(cuda):
    embed(16)  # normalisation factors are copied once
    for num_batches in (1, 5):
        cuda.reset()
        embed(num_batches * 16)
        chunks = 2 * num_batches
        # a chunk: two passes that resize, round and clip; crop, normalise. A batch: put together; the model
        assert cuda.counts.launches <= chunks * 11 + num_batches * 3
        assert cuda.counts.waits == {"event.synchronize": num_batches}
        assert cuda.counts.copies == {"to the device": chunks, "to the host": num_batches}


def hungry(x: torch.Tensor) -> torch.Tensor:
    """A model that takes a megabyte for each image."""
    return mean_colour(x) + torch.zeros((len(x), 2**18), device=x.device).sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("batch_size", "told"),
    [(16, "out of memory: continuing with batches of 8 images"), ("auto", "batches of 4 images")],
)
def test_batches_fit_the_memory_of_the_device(caplog, batch_size, told):
    with simulated_cuda.installed(total_bytes=12 * 2**20) as cuda, caplog.at_level(logging.INFO, "pipeline"):
        vectors = embed(64, batch_size, hungry)
        assert not cuda.races
    assert told in caplog.messages
    with simulated_cuda.installed():
        np.testing.assert_allclose(vectors, embed(64, 16), atol=1e-6)


@pytest.fixture
def both():
    """`both(run)`: what run() returns on the CPU and on the device."""

    def run_on_both(run):
        expected = run()
        with simulated_cuda.installed() as cuda:
            ours = run()
            assert cuda.counts.launches
            assert not cuda.races
        return ours, expected

    return run_on_both


FLOAT32 = ["--set", "embedding_model.dtype=float32"]


def test_the_published_model_gives_images_the_vectors_of_the_cpu(tmp_path, both, flags):  # noqa: F811
    image_folder(tmp_path / "images")
    command = [str(tmp_path / "images"), str(tmp_path / "out"), "--overwrite", *flags, *FLOAT32]

    def vectors():
        assert generate_embeddings_from_hf.main(command) == 0
        return written(tmp_path / "out")

    (names, ours), (expected_names, expected) = both(vectors)
    assert names == expected_names
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_the_published_head_gives_embeddings_the_vectors_of_the_cpu(tmp_path, both, flags):  # noqa: F811
    rows = np.random.default_rng(0).normal(size=(10, 32)).astype(np.float32)
    pq.write_table(pa.table({"embedding": pa.array(list(rows))}), tmp_path / "in.parquet")
    command = [str(tmp_path / "in.parquet"), str(tmp_path / "out"), "--overwrite", *flags, *FLOAT32]

    def vectors():
        assert generate_embeddings_from_parquet.main(command) == 0
        return parquet.to_matrix(parquet.read(tmp_path / "out" / "in-0.parquet")["embedding"])

    ours, expected = both(vectors)
    np.testing.assert_array_equal(ours, expected)


def test_the_demo_finds_what_it_finds_on_the_cpu(tmp_path, both, flags, capsys):  # noqa: F811
    image_folder(tmp_path / "images")
    (tmp_path / "query.jpg").write_bytes(jpeg(picture(90, 70, seed=500)))
    query, out = str(tmp_path / "query.jpg"), str(tmp_path / "found.png")
    for command in (
        ["compare", query, str(tmp_path / "images" / "a.jpg")],
        ["search", query, "--gallery", str(tmp_path / "images"), "--out", out],
    ):

        def told(command=command) -> str:
            assert demo_usage.main([*command, *flags, *FLOAT32]) == 0
            return capsys.readouterr().out

        ours, expected = both(told)
        assert ours == expected
