"""generate/generate_embeddings.py, parts.py and loop.py. Oracle: AutoModel and Hugging Face's processor, run image
by image. The tars are small, and their intermediates are written here, with only the columns' types to go by.
"""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import ROOT
from local_backbone import FAMILIES, write_tiny_backbone
from PIL import Image
from test_backbone import SIZES, jpeg, picture
from transformers import AutoImageProcessor, AutoModel

from common import cli, config, parquet, provenance, schemas, tars
from common.errors import PipelineError, StaleArtefact
from generate import backbone, batches, loop, parts, pixels
from generate.generate_embeddings import main


def write_tar(path: Path, jpegs: list[bytes]) -> None:
    """A tar of these images as 0088/0088_<n>_0_<n // 2>.jpg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(jpegs):
            info = tarfile.TarInfo(f"{path.stem}/{path.stem}_{number}_0_{number // 2}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_intermediates(cfg: config.Config) -> None:
    """The intermediates of every tar as process_tar has them, with zeros where nothing here reads a column."""
    for tar in sorted(cfg.paths.raw_dir.glob("*.tar")):
        members = list(tars.walk(tar))
        ids = np.array([[int(i) for i in Path(m.name).stem.split("_")] for m in members]).reshape(-1, 4)
        empty = [""] * len(members)
        rows = {
            f.name: empty if pa.types.is_string(f.type) else np.zeros(len(members)) for f in schemas.INTERMEDIATES
        }
        rows |= {"aligned": np.zeros(len(members), bool), "tar_file": [tar.name] * len(members)}
        rows |= {"dataset_id": ids[:, 0], "patch_id": ids[:, 1], "target_id": ids[:, 3]}
        rows |= {"building_id": [f"{d:04d}_{t}" for d, t in ids[:, [0, 3]]]}
        rows |= {"streetview_image_id": [f"{d:04d}_{p}" for d, p in ids[:, [0, 1]]]}
        rows |= {"image_path": [m.name for m in members]}
        rows |= {"image_offset": [m.offset for m in members], "image_size": [m.size for m in members]}
        target = cfg.paths.intermediates_dir / f"{tar.stem}.parquet"
        with parquet.writer(target, schemas.INTERMEDIATES, provenance.record("process_tar", {}, [tar])) as out:
            table = pa.table({name: pa.array(column) for name, column in rows.items()})
            out.append(table.cast(schemas.INTERMEDIATES))


class Setup:
    """A folder with raw tars, their intermediates and a tiny backbone; `flags` makes a command use it."""

    def __init__(self, root: Path, jpegs: dict[str, list[bytes]], family: str = "dinov2", **settings):
        self.root = root
        write_tiny_backbone(root / "tiny", family)
        settings = {
            "paths__root": root,
            "embedding_model__name": root / "tiny",
            "data__rows_per_part": 5,
            "infrastructure__embedding_batch_size": 3,
            "infrastructure__workers": 2,
            **settings,
        }
        self.overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        for stem, content in jpegs.items():
            write_tar(root / "data" / "raw" / f"{stem}.tar", content)
        write_intermediates(self.cfg)

    @property
    def cfg(self) -> config.Config:
        return config.load(None, self.overrides)

    @property
    def flags(self) -> list[str]:
        return [flag for override in self.overrides for flag in ("--set", override)]

    def part(self, name: str) -> Path:
        return self.cfg.paths.embeddings_dir / f"{name}.parquet"


def photographs(count: int, seed: int = 0) -> list[bytes]:
    return [jpeg(picture(80, 80, seed=seed + n)) for n in range(count)]


@pytest.fixture
def setup(tmp_path) -> Setup:
    """Two tars of 12 and 4 images in parts of 5, and one without images."""
    return Setup(tmp_path, {"0088": photographs(12), "0089": photographs(4, seed=100), "0090": []})


def plain_embeddings(folder: Path, jpegs: list[bytes], pooling: str) -> np.ndarray:
    """Hugging Face's way, one image after the other; its DINOv3 processor needs torchvision, so pixels for that
    family come from PIL in floats.
    """
    model = AutoModel.from_pretrained(folder).eval()
    size = pixels.read_preprocessing(folder).image_size
    outputs = []
    for content in jpegs:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        if model.config.model_type.startswith("dinov3"):
            resized = [c.convert("F").resize(size, Image.Resampling.BILINEAR) for c in image.split()]
            x = torch.from_numpy(np.stack(resized)) / 255
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            x = ((x - mean[:, None, None]) / std[:, None, None])[None]
        else:
            x = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            tokens = model(x).last_hidden_state[0]
        patches = tokens[1 + getattr(model.config, "num_register_tokens", 0) :]
        both = torch.cat([tokens[0], patches.mean(dim=0)])
        outputs.append({"cls": tokens[0], "mean": patches.mean(dim=0), "cls_mean": both}[pooling].numpy())
    return np.stack(outputs)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean"])
def test_embeddings_equal_hugging_faces_on_images_of_all_sorts(family, pooling, tmp_path):
    images = [picture(*size, mode, seed=7) for size in SIZES for mode in ("RGB", "L", "CMYK")]
    jpegs = [jpeg(image) for image in images]
    setup = Setup(tmp_path, {"0088": jpegs}, family, embedding_model__pooling=pooling, data__rows_per_part=100)
    assert main(setup.flags) == 0
    written = parquet.read(setup.part("0088-0"))
    ours = parquet.to_matrix(written["embedding"])
    expected = plain_embeddings(tmp_path / "tiny", jpegs, pooling)
    assert ours.shape == expected.shape
    assert (cosines(ours, expected) > 0.9999).all()
    assert np.allclose(ours, expected, atol=0.05)  # not normalised: the lengths agree too


def test_parts_hold_the_rows_of_the_intermediates_in_order(setup, capsys):
    assert main(setup.flags) == 0
    assert sorted(p.stem for p in setup.cfg.paths.embeddings_dir.glob("*.parquet")) == [
        *("0088-0", "0088-1", "0088-2"),
        "0089-0",
        "0090-0",
    ]
    written = pa.concat_tables([parquet.read(setup.part(f"0088-{p}")) for p in range(3)])
    intermediates = parquet.read(setup.cfg.paths.intermediates_dir / "0088.parquet")
    assert written.drop(["embedding"]).equals(intermediates)
    ours = parquet.to_matrix(written["embedding"])
    assert (cosines(ours, plain_embeddings(setup.root / "tiny", photographs(12), "cls")) > 0.9999).all()
    assert parquet.num_rows(setup.part("0090-0")) == 0
    assert "16 images in, 16 out" in capsys.readouterr().out


def test_the_footer_tells_what_made_the_file(setup):
    main(setup.flags)
    made = parquet.read_provenance(setup.part("0088-1"))
    assert made.config["embedding_model.name"] == "tiny"
    assert made.config["embedding_model.dtype"] == "float32"
    assert made.facts == {
        "model": "tiny",
        "revision": None,
        "pooling": "cls",
        "dtype": "float32",
        "image_size": [56, 56],
        "dim": 32,
    }
    assert set(made.inputs) == {"0088.tar", "0088.parquet"}
    assert made.rows == {"in": 5, "out": 5, "jpeg_corrupt": 0}


def test_a_second_run_does_nothing_and_does_not_load_the_model(setup, monkeypatch, capsys):
    main(setup.flags)
    monkeypatch.setattr(backbone, "load", None)
    assert main(setup.flags) == 0
    assert "nothing to do, 5 files up to date" in capsys.readouterr().out


def test_only_what_is_missing_is_made(setup, capsys):
    main(setup.flags)
    whole = parquet.read(setup.part("0088-1"))
    setup.part("0088-1").unlink()
    others = {p: p.stat().st_mtime_ns for p in setup.cfg.paths.embeddings_dir.glob("*.parquet")}
    capsys.readouterr()
    main(setup.flags)
    assert "5 images in, 5 out" in capsys.readouterr().out
    assert parquet.read(setup.part("0088-1")).equals(whole)  # bit for bit
    assert {p: p.stat().st_mtime_ns for p in others} == others


def test_shards_divide_the_tars(setup):
    main([*setup.flags, "--shard", "1", "--num-shards", "2"])
    assert [p.stem for p in setup.cfg.paths.embeddings_dir.glob("*.parquet")] == ["0089-0"]


def test_an_image_that_was_damaged_since_is_a_reject_and_counted(tmp_path, capsys):
    setup = Setup(tmp_path, {"0088": photographs(7)})
    rows = parquet.read(setup.cfg.paths.intermediates_dir / "0088.parquet")
    with (setup.cfg.paths.raw_dir / "0088.tar").open("r+b") as tar:  # same size: the tar is still the same input
        tar.seek(rows["image_offset"][6].as_py() + 400)
        tar.write(bytes(300))
    assert main(setup.flags) == 0
    assert "7 images in, 6 out, 1 rejected (jpeg_corrupt 1)" in capsys.readouterr().out
    assert parquet.num_rows(setup.part("0088-1")) == 1
    rejects = parquet.read(setup.cfg.paths.embeddings_dir / "rejects" / "0088-1.parquet").to_pylist()
    assert [(r["member"], r["reason"]) for r in rejects] == [("0088/0088_6_0_3.jpg", "jpeg_corrupt")]
    assert rejects[0]["detail"]
    assert not (setup.cfg.paths.embeddings_dir / "rejects" / "0088-0.parquet").exists()


def test_a_part_whose_images_are_all_damaged_has_no_rows(tmp_path):
    setup = Setup(tmp_path, {"0088": [content[:500] for content in photographs(3)]})
    assert main(setup.flags) == 0
    assert parquet.num_rows(setup.part("0088-0")) == 0
    assert parquet.num_rows(setup.cfg.paths.embeddings_dir / "rejects" / "0088-0.parquet") == 3
    assert parquet.read(setup.part("0088-0")).schema.field("embedding").type.list_size == 32


def test_another_model_in_the_same_folder_is_refused_and_overwrite_redoes_it(setup):
    main(setup.flags)
    write_tiny_backbone(setup.root / "tiny", "dinov2_with_registers")
    with pytest.raises(StaleArtefact, match=r"embedding_model\.weights"):
        main(setup.flags)
    assert main([*setup.flags, "--overwrite"]) == 0
    assert main(setup.flags) == 0


def test_larger_parts_leave_no_part_of_the_old_division(setup):
    main(setup.flags)
    larger = [*setup.flags, "--set", "data.rows_per_part=10"]
    with pytest.raises(StaleArtefact, match=r"rows_per_part = 5; this run says 10"):
        main(larger)
    main([*larger, "--overwrite"])
    assert not setup.part("0088-2").exists()  # its rows stand in 0088-1 now
    assert parquet.num_rows(setup.part("0088-1")) == 2


def test_a_surplus_part_alone_is_refused(setup):
    main(setup.flags)
    setup.part("0088-2").rename(setup.part("0088-7"))
    with pytest.raises(StaleArtefact, match="0088-7"):
        main(setup.flags)


def test_an_embedding_that_is_not_finite_names_the_image(setup, monkeypatch):
    load = backbone.load

    def overflowing(*arguments):
        model = load(*arguments)
        with torch.no_grad():
            model.model.layernorm.weight.fill_(1e6)  # float16 ends at 65,504
        return model

    monkeypatch.setattr(backbone, "load", overflowing)
    with pytest.raises(PipelineError, match=r"0088/0088_0_0_0\.jpg.*not finite"):
        main(setup.flags)
    assert not setup.part("0088-0").exists()


def test_missing_intermediates_name_their_stage(setup):
    (setup.cfg.paths.intermediates_dir / "0089.parquet").unlink()
    with pytest.raises(PipelineError, match=r"0089\.parquet does not exist: run preprocess/process_tar\.py"):
        main(setup.flags)


def test_a_stop_signal_ends_after_the_part_under_way(setup, monkeypatch):
    monkeypatch.setattr(cli, "_stop_signal", signal.SIGTERM)
    assert cli.exit_code_of(lambda: main(setup.flags)) == cli.EXIT_STOPPED
    assert [p.stem for p in setup.cfg.paths.embeddings_dir.glob("*.parquet")] == ["0088-0"]


RUN_AND_KILL = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
folder, flags = Path(sys.argv[2]), sys.argv[3:]
import torch, transformers
from generate import backbone, loop, parts  # once, here: each run below is a fork of this process
from generate.generate_embeddings import main

rng = random.Random(0)
for _ in range(20):
    present = len(list(folder.glob("0088-*.parquet")))
    wanted, delay_s = present + rng.randrange(3), rng.uniform(0, 0.02)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(flags))
    ended = lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    while len(list(folder.glob("0088-*.parquet"))) < wanted and not ended():
        time.sleep(0.001)
    time.sleep(delay_s)  # a random moment of the part under way
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(os.WIFSIGNALED(status), len(list(folder.glob("0088-*.parquet"))))
"""


def test_a_run_killed_twenty_times_ends_with_the_same_bits(tmp_path):
    """Each kill at a random moment of loading, computing or writing."""
    setup = Setup(tmp_path, {"0088": photographs(80)}, data__rows_per_part=1)
    folder = setup.cfg.paths.embeddings_dir
    main(setup.flags)
    undisturbed = {path.name: parquet.read(path) for path in folder.glob("*.parquet")}
    shutil.rmtree(folder)
    folder.mkdir()
    command = [sys.executable, "-c", RUN_AND_KILL, str(ROOT), str(folder), *setup.flags]
    killed = subprocess.run(command, capture_output=True, text=True)
    lines = killed.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["True"] * 20, killed.stderr  # none had ended by itself
    assert 0 < int(lines[-1].split()[1]) < 80
    main(setup.flags)
    assert {path.name for path in folder.iterdir()} == set(undisturbed)  # no temporary file
    assert all(parquet.read(folder / name).equals(table) for name, table in undisturbed.items())


# --------------------------------------------------------------------------------------------------- the loop


def mean_colour(x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=(2, 3))


def embed_all(jobs: list[loop.Job], forward=mean_colour, batch_size: int | str = 4) -> list[loop.Result]:
    """Jobs through the loop with a "model" that gives an image's mean colour."""
    preprocessing = pixels.Preprocessing(None, (8, 8), None, "bilinear", False, 1.0, (0.0,) * 3, (1.0,) * 3)
    overrides = [f"infrastructure.embedding_batch_size={batch_size}", "infrastructure.workers=2"]
    settings = config.load(None, overrides).infrastructure
    progress = cli.Progress("test", "image")
    found = list(loop.embed(jobs, forward, preprocessing, torch.device("cpu"), settings, loop.Times(), progress))
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

    class Arrival:
        def __init__(self, number: int):
            self.number = number

        def synchronize(self) -> None:
            order.append(f"wait {self.number}")

    def to_host(vectors):
        number = sum(entry.startswith("queue") for entry in order)
        order.append(f"queue {number}")
        return loop._Vectors(vectors, Arrival(number))

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
    assert list(result.failed) == [1, 3, 5]


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


# -------------------------------------------------------------------------------------------------- batch sizes


def short_of_memory(most: int):
    """A "model" that runs out of memory above `most` images, and the sizes of the batches that it was given."""
    seen = []

    def forward(x):
        seen.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return mean_colour(x)

    return forward, seen


def test_out_of_memory_halves_the_batches_and_goes_on_and_says_so(caplog):
    forward, seen = short_of_memory(5)
    (result,) = embed_all([job("a", [flat(v) for v in range(80)])], forward, batch_size=16)
    assert result.vectors[:, 0].tolist() == list(range(80))  # none twice, none lost
    assert seen[:3] == [16, 8, 4]
    assert set(seen[2:]) == {4}  # and it stays there
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory: going on with batches of {images} images" for images in (8, 4)
    ]


def test_a_model_too_large_for_one_image_is_a_clear_error():
    with pytest.raises(PipelineError, match="does not suffice for the model and one image"):
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
    return loop.Job("a", 10, parts.jpegs_of(path, pa.table(rows)))


def test_a_place_that_the_disk_cannot_read_costs_its_own_image_only(tmp_path, monkeypatch):
    (result,) = embed_all([read_with_errors(tmp_path / "0088.tar", monkeypatch, errno.EIO, range(9, 10))])
    assert result.rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert result.failed == {3: "cannot be read"}


def test_a_file_system_that_has_gone_is_an_error_and_not_a_heap_of_rejects(tmp_path, monkeypatch):
    with pytest.raises(PipelineError, match=r"0088\.tar cannot be read: Stale file handle"):
        embed_all([read_with_errors(tmp_path / "0088.tar", monkeypatch, errno.ESTALE, range(9, 10))])


def test_a_compiled_model_gives_the_same_embeddings(setup, monkeypatch):
    compiling = torch.nn.Module.compile  # the model is traced; making machine code of it takes half a minute
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiling(self, backend="eager"))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    main([*setup.flags, "--set", "infrastructure.compile=true", "--set", "data.rows_per_part=100"])
    compiled = parquet.to_matrix(parquet.read(setup.part("0088-0"))["embedding"])
    assert (cosines(compiled, plain_embeddings(setup.root / "tiny", photographs(12), "cls")) > 0.9999).all()


def test_compiling_without_a_compiler_is_a_clear_error(setup, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(PipelineError, match=r"infrastructure\.compile"):
        main([*setup.flags, "--set", "infrastructure.compile=true"])
