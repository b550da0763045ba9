"""generate/generate_embeddings.py and embedding_parts.py. Oracle: AutoModel and Hugging Face's processor, run
image by image. The tars are small; their intermediates are those of embedding_setup.py.
"""

import dataclasses
import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import ROOT
from embedding_setup import SIZES, Setup, cosines, jpeg, photographs, picture, write_tar
from local_backbone import FAMILIES, write_tiny_backbone
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from common import cli, parquet
from common.errors import PipelineError, StaleArtefact
from generate import backbone, pixels
from generate.generate_embeddings import main


@pytest.fixture
def setup(tmp_path) -> Setup:
    """Two tars of 12 and 4 images in parts of 5, and one without images."""
    return Setup(tmp_path, {"0088": photographs(12), "0089": photographs(4, seed=100), "0090": []})


def plain_embeddings(folder: Path, jpegs: list[bytes], pooling: str, share: float = 1) -> np.ndarray:
    """Hugging Face's way, one image after the other, of the central `share` of its sides.

    Its DINOv3 processor needs torchvision, so pixels for that family come from PIL in floats.
    """
    model = AutoModel.from_pretrained(folder).eval()
    size = pixels.read_preprocessing(folder).image_size
    outputs = []
    for content in jpegs:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        x, y = (round(side * (1 - share) / 2) for side in image.size)
        image = image.crop((x, y, image.width - x, image.height - y))
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean"])
def test_embeddings_equal_hugging_faces_on_images_of_all_sorts(family, pooling, tmp_path):
    images = [picture(*size, mode, seed=7) for size in SIZES for mode in ("RGB", "L", "CMYK")]
    jpegs = [jpeg(image) for image in images]
    settings = {"embedding_model__pooling": pooling, "embedding_model__views": [1.0], "data__rows_per_part": 100}
    setup = Setup(tmp_path, {"0088": jpegs}, family, **settings)
    assert main(setup.flags) == 0
    written = parquet.read(setup.part("0088-0"))
    ours = parquet.to_matrix(written["embedding"])
    expected = plain_embeddings(tmp_path / "tiny", jpegs, pooling)
    assert ours.shape == expected.shape
    assert (cosines(ours, expected) > 0.9999).all()
    assert np.allclose(ours, expected, atol=0.05)  # not normalised: the lengths agree too


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("views", [[1.0, 0.5], [1.0, 0.7, 0.5, 0.35], [0.5]])
def test_views_equal_hugging_faces_of_pictures_cut_beforehand(family, views, tmp_path):
    sizes = [(640, 640), (400, 800), (800, 400), (80, 40), (240, 240)]  # their shares are whole pixels
    jpegs = [jpeg(picture(*size, seed=7)) for size in sizes]
    setup = Setup(tmp_path, {"0088": jpegs}, family, embedding_model__views=views, data__rows_per_part=100)
    assert main(setup.flags) == 0
    ours = parquet.to_matrix(parquet.read(setup.part("0088-0"))["embedding"])
    plain = [plain_embeddings(tmp_path / "tiny", jpegs, "cls", share) for share in views]
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in plain]
    expected = np.mean(unit if len(views) > 1 else plain, axis=0)
    assert (1 - cosines(ours, expected) < 1e-3).all()
    lengths = np.linalg.norm(ours.astype(np.float32), axis=1) / np.linalg.norm(expected, axis=1)
    assert np.allclose(lengths, 1, atol=5e-3)


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
    plain = [plain_embeddings(setup.root / "tiny", photographs(12), "cls", share) for share in (1, 0.5)]
    expected = sum(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in plain)
    assert (cosines(ours, expected) > 0.999).all()
    assert parquet.num_rows(setup.part("0090-0")) == 0
    line = (
        "16 images in, 16 out; .*; 2 views of each; computing .*%, waiting for images .*%, writing .*% of the time"
    )
    assert re.search(line, capsys.readouterr().out)


def test_the_footer_tells_what_made_the_file(setup):
    main(setup.flags)
    made = parquet.read_provenance(setup.part("0088-1"))
    assert made.config["embedding_model.name"] == "tiny"
    assert made.config["embedding_model.dtype"] == "float32"
    assert made.config["embedding_model.views"] == [1, 0.5]
    assert made.facts == {
        "model": "tiny",
        "revision": None,
        "pooling": "cls",
        "dtype": "float32",
        "image_size": [56, 56],
        "dim": 32,
    }
    assert set(made.inputs) == {"0088.tar", "0088.parquet"}
    assert made.rows == {"in": 5, "out": 5}


def test_a_second_run_does_nothing_and_does_not_import_transformers(setup):
    main(setup.flags)
    code = "import sys; from generate.generate_embeddings import main; main(sys.argv[1:]); "
    code += "assert 'transformers' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, *setup.flags], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "nothing to do, 5 files up to date" in done.stdout


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


def test_a_changed_tar_is_told_once_with_the_commands(setup):
    write_tar(setup.root / "data" / "raw" / "0088.tar", photographs(7, seed=50))
    with pytest.raises(PipelineError) as error:
        main(setup.flags)
    told = r"\S*0088\.tar has other images than when process_tar\.py read it\n"
    told += r".* preprocess/process_tar\.py .*--overwrite\n.* slurm/submit\.py .*--remake generate_embeddings"
    assert re.fullmatch(told, str(error.value))


def test_an_image_that_cannot_be_decoded_is_a_reject_and_counted(tmp_path, capsys):
    images = photographs(7)
    setup = Setup(tmp_path, {"0088": [*images[:6], images[6][:400] + bytes(300) + images[6][700:]]})
    for more in ([], ["--overwrite"]):  # the other parts are made
        with pytest.raises(
            PipelineError, match=r"1 of the 2 images from row 5 on of .*0088\.tar can no longer be decoded"
        ):
            main([*setup.flags, *more])
        assert setup.part("0088-0").exists()
        assert not setup.part("0088-1").exists()
    capsys.readouterr()
    assert main([*setup.flags, "--overwrite", "--set", "data.max_reject_share=0.5"]) == 0
    assert "7 images in, 6 out, 1 rejected (jpeg_corrupt 1)" in capsys.readouterr().out
    assert parquet.num_rows(setup.part("0088-1")) == 1
    rejects = parquet.read(
        setup.cfg.paths.embeddings_dir.with_name("embeddings_rejects") / "0088-1.parquet"
    ).to_pylist()
    assert [(r["member"], r["reason"]) for r in rejects] == [("0088/0088_6_0_3.jpg", "jpeg_corrupt")]
    assert rejects[0]["detail"]
    assert not (setup.cfg.paths.embeddings_dir.with_name("embeddings_rejects") / "0088-0.parquet").exists()


def test_a_part_whose_images_are_all_damaged_has_no_rows(tmp_path):
    setup = Setup(tmp_path, {"0088": [content[:500] for content in photographs(3)]})
    assert main([*setup.flags, "--set", "data.max_reject_share=1"]) == 0
    assert parquet.num_rows(setup.part("0088-0")) == 0
    assert parquet.num_rows(setup.cfg.paths.embeddings_dir.with_name("embeddings_rejects") / "0088-0.parquet") == 3
    assert parquet.read(setup.part("0088-0")).schema.field("embedding").type.list_size == 32


def test_another_model_in_the_same_folder_is_refused_and_overwrite_redoes_it(setup):
    main(setup.flags)
    write_tiny_backbone(setup.root / "tiny", "dinov2_with_registers")
    with pytest.raises(StaleArtefact, match=r"embedding_model\.weights"):
        main(setup.flags)
    assert main([*setup.flags, "--overwrite"]) == 0
    assert main(setup.flags) == 0


def test_other_views_are_refused_and_files_older_than_views_are_those_of_the_whole_image(setup):
    setup.overrides.append("embedding_model.label=one")  # by default they are in other folders
    whole = [*setup.flags, "--set", "embedding_model.views=[1.0]"]
    main(whole)
    told = r"embedding_model.views = \[1.0\] \(now \[1.0, 0.5\](.|\n)*--set embedding_model.label=NAME"
    with pytest.raises(StaleArtefact, match=told):
        main(setup.flags)
    part = setup.part("0089-0")
    made = parquet.read_provenance(part)
    older = {key: value for key, value in made.config.items() if key != "embedding_model.views"}
    rows = parquet.read(part)
    with parquet.writer(part, rows.schema.remove_metadata(), dataclasses.replace(made, config=older)) as out:
        out.append(rows)
        out.facts = made.facts
    written = part.stat().st_mtime_ns
    assert main(whole) == 0
    assert part.stat().st_mtime_ns == written
    assert main([*setup.flags, "--overwrite"]) == 0
    assert parquet.read_provenance(part).config["embedding_model.views"] == [1, 0.5]


def test_larger_parts_leave_no_part_of_the_old_division(setup):
    main(setup.flags)
    larger = [*setup.flags, "--set", "data.rows_per_part=10"]
    with pytest.raises(StaleArtefact, match=r"rows_per_part = 5 \(now 10"):
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
        main([*setup.flags, "--set", "embedding_model.views=[1.0]"])  # unit vectors do not overflow
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
from generate import backbone, embedding_parts, loop  # once, here: each run below is a fork of this process
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


def test_a_compiled_model_gives_the_same_embeddings(setup, monkeypatch):
    compiling = torch.nn.Module.compile  # the model is traced; making machine code of it takes half a minute
    compiled_models = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compiled_models.append(self) or compiling(self, backend="eager")
    )
    monkeypatch.setattr(shutil, "which", lambda name: name)
    main(setup.flags)
    plain = parquet.to_matrix(parquet.read(setup.part("0088-0"))["embedding"])
    main([*setup.flags, "--set", "infrastructure.compile=true", "--overwrite"])
    compiled = parquet.to_matrix(parquet.read(setup.part("0088-0"))["embedding"])
    assert (cosines(compiled, plain) > 0.9999).all()
    assert len(compiled_models) == 1


def test_compiling_without_a_compiler_is_a_clear_error(setup, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(PipelineError, match=r"infrastructure\.compile"):
        main([*setup.flags, "--set", "infrastructure.compile=true"])
