"""generate/backbone.py and pixels.py. Oracles: Hugging Face's PIL processor, PIL's resize in floats (what DINOv3's
processor does, which needs torchvision), AutoModel, and means written out.
"""

import copy
import io
import json

import huggingface_hub
import numpy as np
import pytest
import torch
from embedding_setup import SIZES, jpeg, picture
from huggingface_hub import errors as hub_errors
from local_backbone import FAMILIES, IMAGENET_MEAN, IMAGENET_STD, write_tiny_backbone
from PIL import Image
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers import AutoConfig, AutoImageProcessor, AutoModel, Dinov2Config, Dinov2WithRegistersConfig

from common.errors import PipelineError
from common.imagery.decoding import decode
from common.sections import EmbeddingModel
from generate import backbone, model_files, pixels
from publish.model.configuration_spatial_embeddings import SpatialEmbeddingsConfig
from publish.model.modeling_spatial_embeddings import FAMILIES as READINGS
from publish.model.modeling_spatial_embeddings import SpatialEmbeddingsModel, make_views, mean_of_views, pool

CPU = torch.device("cpu")


def settings(name, pooling: str = "cls", revision: str = "main", views: tuple = (1,)) -> EmbeddingModel:
    model = {"name": str(name), "revision": revision, "pooling": pooling, "views": views, "dtype": "float32"}
    return EmbeddingModel(label="auto", **model)


# ------------------------------------------------------------------------------------------------------ pooling


def test_mean_leaves_cls_and_registers_out():
    tokens = torch.tensor([[[1.0, 0], [90, 90], [2, 4], [4, 8]]])  # CLS, a register, two patches
    config = Dinov2WithRegistersConfig(hidden_size=6, num_register_tokens=1)
    assert pool(tokens, config, "cls").tolist() == [[1, 0]]
    assert pool(tokens, config, "mean").tolist() == [[3, 6]]  # with the register it would be 32, 34
    assert pool(tokens, config, "cls_mean").tolist() == [[1, 0, 3, 6]]


def test_pooling_is_done_in_float32():
    tokens = torch.cat([torch.zeros(1, 1, 1), torch.tensor([[[256.0], [1.0], [1.0], [1.0]]])], dim=1)
    # bfloat16 has no number between 64.5 and 65
    assert pool(tokens.bfloat16(), Dinov2Config(hidden_size=6), "mean").item() == 64.75


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean"])
def test_output_equals_auto_model(family, pooling, tmp_path):
    folder = write_tiny_backbone(tmp_path / family, family)
    ours = backbone.load(settings(folder, pooling), "float32", CPU)
    x = torch.randn(3, 3, *ours.preprocessing.image_size, generator=torch.Generator().manual_seed(0))
    plain = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        hidden = plain(x).last_hidden_state
    prefix = {"dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 5, "dinov3_convnext": 1}[family]
    cls, mean = hidden[:, 0], hidden[:, prefix:].mean(dim=1)
    expected = {"cls": cls, "mean": mean, "cls_mean": torch.cat([cls, mean], dim=1)}[pooling]
    assert READINGS[plain.config.model_type].num_prefix_tokens(plain.config) == prefix
    assert torch.equal(ours(x), expected)
    assert ours.dim == expected.shape[1]
    assert ours.facts["dim"] == ours.dim


# ------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pixels_equal_the_dinov2_processor_within_one_grey_level(size, mode, tmp_path):
    folder = write_tiny_backbone(tmp_path, "dinov2")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    config |= {"size": {"shortest_edge": 64}}  # as DINOv2's own: larger than the crop
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    encoded = jpeg(picture(*size, mode))
    expected = AutoImageProcessor.from_pretrained(folder)(
        Image.open(io.BytesIO(encoded)).convert("RGB"), return_tensors="pt"
    )["pixel_values"]
    ours = pixels.read_preprocessing(folder)([decode(encoded)], CPU)
    grey_level = 1 / 255 / torch.tensor(IMAGENET_STD)[:, None, None]
    assert ours.shape == expected.shape == (1, 3, 56, 56)
    assert ((ours - expected).abs() <= 1.01 * grey_level).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_of_the_datasets_images_equal_dinov2s_processor_within_one_grey_level(mode, tmp_path):
    folder = write_tiny_backbone(tmp_path, "dinov2")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    config |= {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    image = picture(640, 640).point(lambda level: 255 * (level > 128))  # overshoots everywhere
    encoded = jpeg(image.convert(mode))
    expected = AutoImageProcessor.from_pretrained(folder)(
        Image.open(io.BytesIO(encoded)).convert("RGB"), return_tensors="pt"
    )["pixel_values"]
    ours = pixels.read_preprocessing(folder)([decode(encoded)], CPU)
    grey_level = 1 / 255 / torch.tensor(IMAGENET_STD)[:, None, None]
    assert ((ours - expected).abs() <= 1.01 * grey_level).all()


# -------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("size", [640, 240])  # as the dataset's images, and smaller than the enlarged picture
@pytest.mark.parametrize("views", [[1, 0.5], [1, 0.7, 0.5, 0.35], [0.5]])
def test_views_equal_the_processors_pixels_of_pictures_cut_beforehand(size, views, tmp_path):
    folder = write_tiny_backbone(tmp_path, "dinov2")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    config |= {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    image, processor = picture(size, size), AutoImageProcessor.from_pretrained(folder)
    margins = [round(size * (1 - share) / 2) for share in views]
    cut = [image.crop((margin, margin, size - margin, size - margin)) for margin in margins]
    expected = processor(cut, return_tensors="pt")["pixel_values"]
    ours = make_views(pixels.read_preprocessing(folder, min(views))([np.array(image)], CPU), views, (224, 224))
    grey_levels = (ours - expected).abs() * 255 * torch.tensor(IMAGENET_STD)[:, None, None]
    assert ours.shape == expected.shape == (len(views), 3, 224, 224)
    assert grey_levels.mean(dim=(1, 2, 3)).max() < 0.5  # resized twice; 0.9 if a centre is half a pixel off
    assert grey_levels[-1].max() < 3  # the smallest is cut from the enlarged picture as it is


@pytest.mark.parametrize("share", [0.9, 0.75, 0.7, 0.5, 0.35, 1 / 3, 0.25])
@pytest.mark.parametrize("px", [224, 225, 56])
def test_the_smallest_view_has_the_size_that_the_model_asks_for(share, px, tmp_path):
    folder = write_tiny_backbone(tmp_path, "dinov2")
    (folder / "preprocessor_config.json").write_text(
        (folder / "preprocessor_config.json").read_text().replace("56", str(px))
    )
    height, width = pixels.read_preprocessing(folder, share).image_size
    image = torch.rand(1, 3, height, width)
    y, x = (height - px) // 2, (width - px) // 2
    assert torch.equal(make_views(image, [share], (px, px)), image[:, :, y : y + px, x : x + px])  # not resized
    assert height == width == pytest.approx(px / share, abs=1)


def test_views_are_central_and_an_images_views_follow_one_another():
    image = torch.arange(36.0).reshape(1, 1, 6, 6).expand(1, 3, 6, 6)
    views = make_views(torch.cat([image, image + 100]), [1, 1 / 3], (2, 2))
    assert torch.equal(views[1, 0], torch.tensor([[14.0, 15], [20, 21]]))
    assert torch.equal(views[3], views[1] + 100)
    assert views[0].mean() == pytest.approx(17.5)  # reduced, it keeps its mean
    assert torch.equal(make_views(image, [1], None), image)


def test_without_a_resize_there_are_no_views(tmp_path):
    folder = write_tiny_backbone(tmp_path, "dinov2")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_resize": False}))
    assert pixels.read_preprocessing(folder).image_size == [56, 56]
    with pytest.raises(PipelineError, match=r"resizes nothing.*\nset embedding_model.views to \[1.0\]"):
        pixels.read_preprocessing(folder, 0.5)


def test_unit_vectors_are_averaged_and_a_single_view_stays_as_it_is():
    vectors = torch.tensor([[3.0, 0], [0, 10], [0, 2], [0, 5]])
    assert torch.equal(mean_of_views(vectors, 2), torch.tensor([[0.5, 0.5], [0, 1]]))
    assert mean_of_views(vectors, 1) is vectors


def test_normalising_is_the_textbooks():
    means, stds = (10.0, 20.0, 30.0), (2.0, 4.0, 8.0)
    preprocessing = pixels.Preprocessing(None, (4, 5), None, "bicubic", False, 0.5, means, stds)
    images = [np.array(picture(5, 4, seed=seed)) for seed in range(2)]
    expected = (np.stack(images) * 0.5 - means) / stds
    ours = preprocessing(images, CPU)
    assert np.allclose(ours.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_batches_for_a_device_are_the_images_one_by_one(tmp_path, monkeypatch):
    """The way that images take on CUDA, with the device left out."""
    preprocessing = pixels.read_preprocessing(write_tiny_backbone(tmp_path, "dinov2"))
    images = [np.array(picture(*SIZES[0 if i < 3 else i % 3], seed=i)) for i in range(6)]
    expected, factors = preprocessing(images, CPU), pixels._factor_and_offset
    stacked = lambda images, _: torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # noqa: E731
    monkeypatch.setattr(pixels, "_to_cuda", stacked)
    monkeypatch.setattr(pixels, "_factor_and_offset", lambda *settings: factors(*settings[:4], CPU))
    assert torch.allclose(preprocessing(images, torch.device("cuda")), expected, atol=1e-5)
    assert preprocessing([], torch.device("meta")).shape == (0, 3, 56, 56)


@pytest.mark.parametrize("size", [(300, 600), (300, 601), (100, 500)])  # PIL: rows, columns, columns first
def test_the_order_of_the_two_passes_is_pils(size, tmp_path):
    """Black and white alone: each pass is cut off at 0 and 255, and the other order is 5 to 21 grey levels off."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 2, (size[1], size[0], 3), np.uint8) * 255)
    folder = write_tiny_backbone(tmp_path, "dinov2")
    expected = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    ours = pixels.read_preprocessing(folder)([np.array(image)], CPU)
    grey_level = 1 / 255 / torch.tensor(IMAGENET_STD)[:, None, None]
    assert ((ours - expected).abs() <= 1.01 * grey_level).all()


@pytest.mark.parametrize("size", SIZES[1:])
def test_the_resize_for_other_devices_equals_pils(size):
    image = picture(*size)
    expected = np.asarray(image.resize((60, 40), Image.Resampling.BICUBIC)).astype(int)
    grey_levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    ours = pixels.resize_grey_levels(grey_levels, (40, 60), "bicubic")[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() <= 1
    assert (ours == expected).mean() > 0.98  # without rounding between the two passes: 0.85 to 0.93


@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_dinov3_equal_a_resize_in_floats(size, tmp_path):
    folder = write_tiny_backbone(tmp_path, "dinov3_vit")
    encoded = jpeg(picture(*size))
    channels = Image.open(io.BytesIO(encoded)).split()
    resized = [np.asarray(c.convert("F").resize((64, 64), Image.Resampling.BILINEAR)) / 255 for c in channels]
    expected = np.stack([(c - m) / s for c, m, s in zip(resized, IMAGENET_MEAN, IMAGENET_STD, strict=True)])
    ours = pixels.read_preprocessing(folder)([decode(encoded)], CPU)[0].numpy()
    assert np.abs(ours - expected).max() < 1e-4  # rounding to grey levels would give 1e-2


def test_a_small_image_is_padded_to_the_crop_as_by_hugging_face(tmp_path):
    folder = write_tiny_backbone(tmp_path, "dinov2")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    config |= {"size": {"shortest_edge": 31}, "crop_size": {"height": 56, "width": 56}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    image = picture(31, 31)
    expected = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    ours = pixels.read_preprocessing(folder)([np.array(image)], CPU)
    assert (ours - expected).abs().max() < 1e-5  # no resize: equal but for the order of the arithmetic


def test_images_of_different_sizes_keep_their_order(tmp_path):
    preprocessing = pixels.read_preprocessing(write_tiny_backbone(tmp_path, "dinov2"))
    images = [np.array(picture(*SIZES[i % 3], seed=i)) for i in range(7)]
    together = preprocessing(images, CPU)
    assert torch.equal(together, torch.cat([preprocessing([image], CPU) for image in images]))


# ---------------------------------------------------------------------------------------- what cannot be loaded


def load_error(name, **changes) -> str:
    with pytest.raises(PipelineError) as error:
        backbone.load(settings(name, **changes), "float32", CPU)
    return str(error.value)


def test_a_folder_without_weights_or_config_or_preprocessing_is_told_apart(tmp_path):
    folder = write_tiny_backbone(tmp_path / "model", "dinov2")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    assert "no weights" in load_error(folder)
    (folder / "model.safetensors").write_bytes(b"garbage")
    assert "cannot be loaded" in load_error(folder)
    for text, told in (
        ("{", "cannot be read (Expecting property name"),
        ('{"size": {"height": 3}}', "lacks 'width'"),
        (None, "No such file"),
    ):
        (folder / "preprocessor_config.json").unlink()
        if text is not None:
            (folder / "preprocessor_config.json").write_text(text)
        assert told in load_error(folder)
    (folder / "config.json").write_text("{")
    assert "download the model again" in load_error(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in load_error(folder)


def test_preprocessing_that_keeps_every_size_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"do_resize": False, "do_center_crop": False, "do_normalize": False})
    )
    with pytest.raises(PipelineError, match="neither a crop nor an exact size"):
        pixels.read_preprocessing(tmp_path).image_size  # noqa: B018 - a property


def test_weights_of_another_model_are_refused(tmp_path):
    folder = write_tiny_backbone(tmp_path / "a", "dinov2")
    other = write_tiny_backbone(tmp_path / "b", "dinov3_convnext")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert "do not match its config.json" in load_error(folder)


def test_another_family_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    message = load_error(tmp_path)
    assert "bert" in message
    assert "dinov3_vit" in message


def test_a_model_that_is_not_cached_says_how_to_fetch_it():
    message = load_error("some/model")  # HF_HUB_OFFLINE is set for all tests
    assert "hf download some/model" in message
    assert "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (hub_errors.GatedRepoError, "accept its licence at https://huggingface.co/some/model"),
        (hub_errors.RepositoryNotFoundError, "fix embedding_model.name"),
        (hub_errors.RevisionNotFoundError, "embedding_model.revision"),
        (hub_errors.HfHubHTTPError, "the hub returned an error for some/model"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(error, advice, monkeypatch):
    import httpx

    def refuse(*_, **__):
        raise error("no", response=httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert advice in load_error("some/model")


def test_a_name_that_cannot_be_one_is_refused():
    assert "fix embedding_model.name" in load_error("some/model/too/deep")


# ----------------------------------------------------------------------------------------------------- identity


def test_a_moved_folder_is_the_same_model_and_a_changed_one_is_not(tmp_path):
    folder = write_tiny_backbone(tmp_path / "here" / "tiny", "dinov2")
    before = model_files.identity(settings(folder), "float32")
    assert before["embedding_model.name"] == "tiny"
    (tmp_path / "there").mkdir()
    moved = folder.rename(tmp_path / "there" / "tiny")
    assert model_files.identity(settings(moved), "float32") == before
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_files.identity(settings(moved), "float32") != before


def test_a_hub_model_is_known_by_name_and_revision_without_a_network():
    known = model_files.identity(settings("some/model", "mean", "v1"), "bfloat16")
    assert known == {
        "embedding_model.name": "some/model",
        "embedding_model.revision": "v1",
        "embedding_model.pooling": "mean",
        "embedding_model.views": [1.0],
        "embedding_model.dtype": "bfloat16",
    }


# --------------------------------------------------------------------------------------------- the published model


def published(folder, family: str) -> SpatialEmbeddingsModel:
    """A seeded random published model of two views, whose whole head is in use."""
    backbone_config = AutoConfig.from_pretrained(write_tiny_backbone(folder, family))
    torch.manual_seed(0)
    model = SpatialEmbeddingsModel(
        SpatialEmbeddingsConfig(backbone_config, "cls", [1.0, 0.5], [64, 64], 32, 24, 16)
    )
    nn.init.constant_(model.head.gain, 0.5)
    return model


VITS = [family for family in FAMILIES if family.startswith("dino") and "convnext" not in family]


@pytest.mark.parametrize("family", VITS)
def test_gradient_checkpointing_recomputes_the_backbone_and_gives_the_same_gradients(family, tmp_path):
    model, pixels = published(tmp_path, family).train(), torch.randn(2, 3, 128, 128)
    weight = next(module for module in model.backbone.modules() if isinstance(module, nn.Linear)).weight
    calls = []
    block = next(module for module in model.backbone.modules() if hasattr(module, "gradient_checkpointing"))
    block = next(block.children(), block)
    block.register_forward_hook(lambda *_: calls.append(1))

    def gradient() -> torch.Tensor:
        calls.clear()
        torch.manual_seed(0)  # DINOv3 draws its positions in training
        return torch.autograd.grad(model(pixels).pooler_output[:, 0].sum(), weight)[0]

    expected, once = gradient(), len(calls)
    model.gradient_checkpointing_enable()
    assert torch.allclose(gradient(), expected, atol=1e-6)
    assert len(calls) == 2 * once


def test_a_backbone_without_gradient_checkpointing_is_refused_as_transformers_does(tmp_path):
    with pytest.raises(ValueError, match="not support"):
        published(tmp_path, "dinov3_convnext").gradient_checkpointing_enable()


@pytest.mark.parametrize("family", VITS)
def test_the_input_embeddings_are_the_backbones(family, tmp_path):
    model = published(tmp_path, family)
    assert model.get_input_embeddings() is model.backbone.embeddings.patch_embeddings
    other = copy.deepcopy(model.get_input_embeddings())
    model.set_input_embeddings(other)
    assert model.backbone.embeddings.patch_embeddings is other


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation_keeps_the_vectors(family, tmp_path):
    model, pixels = published(tmp_path, family).eval(), torch.randn(2, 3, 128, 128)
    quantised = quantize_dynamic(model, {nn.Linear})
    assert not isinstance(quantised.head.linear, nn.Linear)
    with torch.inference_mode():
        cosines = (quantised(pixels).pooler_output * model(pixels).pooler_output).sum(dim=1)
    assert (cosines > 0.999).all()  # 8 bits


def test_all_parameters_but_the_mean_can_be_trained(tmp_path):
    """As in any model of transformers; the card says how to freeze the backbone."""
    model = published(tmp_path, "dinov2")
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["head.mean"]
