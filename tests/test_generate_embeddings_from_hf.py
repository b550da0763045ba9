"""publish/generate_embeddings_from_hf.py. Oracle: AutoModel and AutoImageProcessor on the published folder."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from embedding_setup import cosines, jpeg, picture, write_intermediates, write_tar
from local_backbone import write_tiny_backbone
from PIL import Image
from trained_model import JPEGS, Trained
from transformers import AutoImageProcessor

from common import config, parquet
from common.errors import PipelineError, StaleArtefact
from publish.generate_embeddings_from_hf import main
from publish.hub import published_folder
from publish.model.modeling_spatial_embeddings import SpatialEmbeddingsModel


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A published folder (without the parity check, which another test has)."""
    trained = Trained(tmp_path_factory.mktemp("model"))
    path = trained.cfg.paths.checkpoints_dir / "default" / "checkpoint_best.pt"
    checkpoint = torch.load(path, weights_only=True)
    folder = trained.root / "published"
    folder.mkdir()
    published_folder.write_model(
        folder, published_folder.backbone_settings(trained.cfg, path, checkpoint), path, checkpoint
    )
    return folder


@pytest.fixture
def flags(model, tmp_path) -> list[str]:
    settings = {"paths.root": tmp_path, "data.rows_per_part": 3, "infrastructure.embedding_batch_size": 2}
    sets = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
    return ["--model", str(model), *sets]


def plain_vectors(model: Path, contents: list[bytes]) -> np.ndarray:
    processor, net = AutoImageProcessor.from_pretrained(model), SpatialEmbeddingsModel.from_pretrained(model)
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
    with torch.inference_mode():
        return net(**processor(images, return_tensors="pt")).pooler_output.numpy()


def written(out: Path) -> tuple[list[str], np.ndarray]:
    table = pa.concat_tables([parquet.read(path) for path in sorted(out.glob("*.parquet"))])
    return table["image"].to_pylist(), parquet.to_matrix(table["embedding"])


def image_folder(folder: Path) -> list[str]:
    """The JPEGs in folders of two depths, one as PNG, and two files that are no images by their names."""
    names = ["a.jpg", "b/c.JPEG", "b/d.jpg", "b/e/f.jpg", "g.jpg", "h.png", "i.jpg"]
    for name, content in zip(names, JPEGS, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("png"):
            Image.open(io.BytesIO(content)).save(folder / name)
        else:
            (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("not an image")
    (folder / "._a.jpg").write_bytes(b"\0\5\x16\7")  # as macOS leaves beside a.jpg
    return names


def test_a_folder_gives_a_vector_per_image_at_any_depth(model, flags, tmp_path):
    names = image_folder(tmp_path / "images")
    assert main([str(tmp_path / "images"), str(tmp_path / "out"), *flags]) == 0
    found, vectors = written(tmp_path / "out")
    assert found == names
    assert vectors.dtype == np.float32
    assert (cosines(vectors, plain_vectors(model, JPEGS)) > 0.9999).all()
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        f"images-{i}.parquet" for i in range(3)
    ]


def test_a_list_a_tar_and_intermediates_give_the_same_vectors(model, flags, tmp_path):
    expected = plain_vectors(model, JPEGS)
    names = image_folder(tmp_path / "images")
    absolute = str(tmp_path / "images" / names[0])
    (tmp_path / "list.txt").write_text("\n".join([absolute, "", *(f"images/{name}" for name in names[1:])]))
    write_tar(tmp_path / "data" / "raw" / "0088.tar", JPEGS)
    cfg = config.load(None, [f"paths.root={tmp_path}"])
    write_intermediates(cfg)
    sources = {
        "list.txt": [absolute, *(f"images/{name}" for name in names[1:])],
        "data/raw/0088.tar": [f"0088/0088_{n}_0_{n // 2}.jpg" for n in range(7)],
        "data/intermediates": [f"0088_{n}" for n in range(7)],
    }
    for number, (source, images) in enumerate(sources.items()):
        out = tmp_path / f"out{number}"
        assert main([str(tmp_path / source), str(out), *flags]) == 0
        found, vectors = written(out)
        assert found == images
        assert (cosines(vectors, expected) > 0.9999).all()


def test_a_second_run_does_nothing_and_a_missing_part_alone_is_made(flags, tmp_path, capsys):
    image_folder(tmp_path / "images")
    command = [str(tmp_path / "images"), str(tmp_path / "out"), *flags]
    main(command)
    _, whole = written(tmp_path / "out")
    capsys.readouterr()
    main(command)
    assert "nothing to do, 3 files up to date" in capsys.readouterr().out
    (tmp_path / "out" / "images-1.parquet").unlink()
    main(command)
    assert "3 images in, 3 out" in capsys.readouterr().out
    assert np.array_equal(written(tmp_path / "out")[1], whole)


def test_vectors_of_images_that_have_gone_are_refused_whatever_the_folder_is_called(flags, tmp_path):
    folder = tmp_path / "Holiday [2020]"
    image_folder(folder)
    arguments = [str(folder), str(tmp_path / "out"), *flags]
    assert main(arguments) == 0  # 3 parts
    for name in ("g.jpg", "h.png", "i.jpg"):
        (folder / name).unlink()
    (tmp_path / "out" / f"{folder.name}-1.parquet").unlink()  # of other images now
    with pytest.raises(StaleArtefact, match=r"-2\.parquet is left from another division"):
        main(arguments)


def test_images_that_cannot_be_decoded_or_have_gone_are_rejects(model, flags, tmp_path, capsys):
    for number, content in enumerate(JPEGS[:3]):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    (tmp_path / "half.jpg").write_bytes(JPEGS[3][:700])
    (tmp_path / "list.txt").write_text("0.jpg\nhalf.jpg\n1.jpg\ngone.jpg\n2.jpg\n")
    assert main([str(tmp_path / "list.txt"), str(tmp_path / "out"), *flags]) == 0
    assert "5 images in, 3 out, 2 rejected" in capsys.readouterr().out
    found, vectors = written(tmp_path / "out")
    assert found == ["0.jpg", "1.jpg", "2.jpg"]
    assert (cosines(vectors, plain_vectors(model, JPEGS[:3])) > 0.9999).all()
    rejects = [parquet.read(tmp_path / "out_rejects" / f"list-{part}.parquet").to_pylist() for part in (0, 1)]
    assert [reject["member"] for part in rejects for reject in part] == ["half.jpg", "gone.jpg"]


def test_an_image_that_was_replaced_makes_its_part_stale(flags, tmp_path):
    image_folder(tmp_path / "images")
    command = [str(tmp_path / "images"), str(tmp_path / "out"), *flags]
    main(command)
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg(picture(50, 60)))
    with pytest.raises(StaleArtefact, match=r"images-0\.parquet was made from an earlier version of images"):
        main(command)
    assert main([*command, "--remake"]) == 0


def test_a_damaged_tar_gives_what_stands_before_the_damage(flags, tmp_path, capsys):
    write_tar(tmp_path / "t.tar", JPEGS)
    os.truncate(tmp_path / "t.tar", (tmp_path / "t.tar").stat().st_size // 2)
    assert main([str(tmp_path / "t.tar"), str(tmp_path / "out"), *flags]) == 0
    assert "t.tar is damaged: " in capsys.readouterr().err
    assert 0 < len(written(tmp_path / "out")[0]) < 7


def test_a_damaged_file_among_intermediates_is_an_error_and_is_not_passed_over(flags, tmp_path):
    cfg = config.load(None, [f"paths.root={tmp_path}"])
    for stem in ("0088", "0089"):
        write_tar(tmp_path / "data" / "raw" / f"{stem}.tar", JPEGS)
    write_intermediates(cfg)
    os.truncate(cfg.paths.intermediates_dir / "0088.parquet", 1_000)
    with pytest.raises(PipelineError, match=r"0088\.parquet is damaged"):
        main([str(cfg.paths.intermediates_dir), str(tmp_path / "out"), *flags])


def test_names_that_are_not_utf_8_are_written_with_escapes(flags, tmp_path):
    image_folder(tmp_path / "images")
    os.rename(tmp_path / "images" / "a.jpg", os.fsencode(tmp_path / "images") + b"/caf\xe9.jpg")
    assert main([str(tmp_path / "images"), str(tmp_path / "out"), *flags]) == 0
    assert "caf\\xe9.jpg" in written(tmp_path / "out")[0]


@pytest.mark.parametrize("source", ["nothing", "empty", "list.txt", "photo.jpg", "gone.txt"])
def test_a_source_without_images_is_one_clear_error(source, flags, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("\n")
    (tmp_path / "photo.jpg").write_bytes(JPEGS[0])
    (tmp_path / "gone.txt").write_text("elsewhere/photo.jpg\n")
    with pytest.raises(
        PipelineError, match=f"{source}.*(does not exist|holds no images|not a text|none of which exists)"
    ):
        main([str(tmp_path / source), str(tmp_path / "out"), *flags])


def test_a_folder_that_holds_no_published_model_is_refused(flags, tmp_path):
    image_folder(tmp_path / "images")
    command = [str(tmp_path / "images"), str(tmp_path / "out"), *flags[2:]]
    with pytest.raises(PipelineError, match=r"published/default holds no published model.*\n.*convert_to_hf"):
        main(command)
    backbone = write_tiny_backbone(tmp_path / "tiny", "dinov2")
    with pytest.raises(PipelineError, match="model of type dinov2"):
        main([*command, "--model", str(backbone)])


def test_a_published_model_without_weights_is_refused(model, flags, tmp_path):
    image_folder(tmp_path / "images")
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    with pytest.raises(PipelineError, match="no weights"):
        main([str(tmp_path / "images"), str(tmp_path / "out"), *flags, "--model", str(bare)])
