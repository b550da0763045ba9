"""publish/estimate_model_size.py. Oracles: real models' parameters and files, and arithmetic done by hand."""

import json
import re

import pytest
import simulated_cuda
import torch
from local_backbone import FAMILIES, write_preprocessor, write_tiny_backbone
from transformers import AutoModel, Dinov2Config

from common import config
from common.errors import ConfigError, PipelineError
from generate import backbone
from publish.estimate_model_size import main
from publish.inference import model_sizes


@pytest.fixture
def estimate(capsys):
    def estimate(*arguments) -> dict:
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return estimate


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_bytes_are_those_of_the_real_model(family, estimate, tmp_path):
    folder = write_tiny_backbone(tmp_path, family)
    plain = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()  # it must do without
    found = estimate("--backbone", folder, "--set", "training_model.output_dim=16")
    parts = {name: count for name, count in found["parameters"].items() if name != "head"}
    real = sum(parameter.numel() for parameter in plain.parameters())
    assert sum(parts.values()) == real
    assert found["total_parameters"] == real + found["parameters"]["head"]
    assert found["weight_bytes"]["float32"] == 4 * found["total_parameters"]
    assert found["embedding_dim"] == 32


def test_the_arithmetic_of_a_vit_is_that_of_its_matrix_products(estimate, tmp_path):
    width, layers, tokens, mlp = 64, 3, 1 + 4 * 4, 4 * 64
    Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, image_size=56, patch_size=14
    ).save_pretrained(tmp_path)
    write_preprocessor(tmp_path, "dinov2", 56)
    head = ("--set", "training_model.output_dim=32", "--set", "training_model.hidden_dim=48")
    one_view, found = (
        estimate("--backbone", tmp_path, *head, "--set", f"embedding_model.views={views}")
        for views in ([1.0], [1.0, 0.5])
    )
    patches = 2 * 16 * (3 * 14 * 14) * width
    block = 2 * tokens * (4 * width * width + 2 * width * mlp) + 2 * 2 * tokens * tokens * width
    projection = 2 * (width * 32 + width * 48 + 48 * 32)
    assert one_view["flops_per_image"] == patches + layers * block + projection
    assert found["flops_per_image"] == 2 * (patches + layers * block) + projection
    assert one_view["image_size"] == found["image_size"] == [56, 56]


def test_dinov2_base_has_the_published_figures(estimate, tmp_path):
    Dinov2Config(image_size=518).save_pretrained(tmp_path)
    write_preprocessor(tmp_path, "dinov2", 224)
    found = estimate("--backbone", tmp_path, "--images", 1_000_000, "--set", "embedding_model.views=[1.0]")
    assert found["total_parameters"] - found["parameters"]["head"] == 86_580_480  # "86 M"
    assert found["flops_per_image"] / 1e9 == pytest.approx(46.3, rel=0.01)  # 257 tokens of 86 M, both ways
    assert found["embedding_bytes"] == 1_000_000 * 768 * 2
    card = found["gpus"]["H100 SXM"]
    assert card["gpu_hours"] == pytest.approx(1_000_000 / card["images_per_second"] / 3600, abs=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_of_a_vit_is_what_a_pass_takes_on_a_device(estimate, tmp_path, dtype):
    settings = Dinov2Config(hidden_size=96, num_hidden_layers=3, num_attention_heads=3, patch_size=14)
    AutoModel.from_config(settings).save_pretrained(tmp_path)
    write_preprocessor(tmp_path, "dinov2", 224)
    cfg = config.load(None, [f"embedding_model.name={tmp_path}"])
    found = estimate("--backbone", tmp_path)
    by_batch, head = found["memory_bytes"][dtype], found["parameters"]["head"] * model_sizes.BYTES[dtype]
    with simulated_cuda.installed() as cuda:
        model, peaks = backbone.load(cfg.embedding_model, dtype, torch.device("cuda")), []
        for images in (1, 5):
            pixels = torch.zeros((images, 3, *model.preprocessing.image_size), device="cuda")
            torch.cuda.reset_peak_memory_stats()
            model(pixels)
            peaks.append(cuda.peak)
            del pixels
        del model
    assert (by_batch["256"] - by_batch["64"]) / 192 == pytest.approx((peaks[1] - peaks[0]) / 4, rel=0.02)
    assert by_batch["1"] - head == pytest.approx(peaks[0], rel=0.02)


def test_the_cores_feed_each_card_and_slurm_is_asked_for_enough(tmp_path, capsys):
    Dinov2Config(image_size=518).save_pretrained(tmp_path)
    write_preprocessor(tmp_path, "dinov2", 224)

    def text(*settings) -> str:
        flags = [part for setting in settings for part in ("--set", setting)]
        assert main(["--backbone", str(tmp_path), *flags]) == 0
        return capsys.readouterr().out

    rates = {"A100 SXM 80 GB": 2357, "H100 SXM": 7472}  # of one view; 760 a core, and a core for the main thread
    table = text("embedding_model.views=[1.0]", 'slurm.generate_embeddings.sbatch=["-c", "6"]')
    for name, rate in rates.items():
        assert re.search(rf"^{name} +{rate:,} +[\d.]+ +{-(-rate // 760) + 1} ", table, re.M)
    assert "asks for 6 cores, and would let these GPUs wait for images: RTX PRO 6000, H100 SXM, H200\n" in table
    assert "asks for" not in text()  # the defaults fit one another


@pytest.mark.parametrize(
    ("all_jobs", "stage", "cores"),
    [
        (
            '["--cpus-per-task=4"]',
            '["--gres=gpu:1", "--cpus-per-task=12"]',
            12,
        ),  # the last one counts, as in sbatch
        ('["-c4"]', '["--gres=gpu:1"]', 4),
        ('["--cpus-per-task", "7"]', "[]", 7),
        ('["--account=abc-c3"]', '["--gres=gpu:1"]', None),
    ],
)
def test_the_cores_of_a_task_are_read_from_its_flags(all_jobs, stage, cores):
    cfg = config.load(None, [f"slurm.sbatch={all_jobs}", f"slurm.generate_embeddings.sbatch={stage}"])
    assert model_sizes.slurm_cores(cfg) == cores


def test_more_pixels_and_more_images_in_a_batch_take_more_memory(estimate, tmp_path):
    folder = write_tiny_backbone(tmp_path, "dinov3_vit")
    small, large = estimate("--backbone", folder), estimate("--backbone", folder, "--image-size", 128)
    assert large["flops_per_image"] > 3.9 * small["flops_per_image"]
    by_batch = list(small["memory_bytes"]["bfloat16"].values())
    assert by_batch == sorted(by_batch)
    assert large["memory_bytes"]["bfloat16"]["64"] > by_batch[1]


def test_the_activations_are_those_of_the_widest_layer():
    config = Dinov2Config(
        hidden_size=256, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    _, largest = model_sizes.measure(AutoModel.from_config(config).eval(), torch.zeros(1, 3, 56, 56))
    assert largest == 2 * 17 * (4 * 256)  # into and out of the MLP's activation function, 17 tokens


def test_the_tables_tell_the_same_figures(tmp_path, capsys):
    folder = write_tiny_backbone(tmp_path, "dinov3_convnext")
    assert main(["--backbone", str(folder)]) == 0
    text = capsys.readouterr().out
    assert ", 2 views of 64 x 64 px -> 32 dimensions" in text
    assert "25,000,000 images: 1.60 GB of embeddings" in text
    assert "H200" in text


def test_what_cannot_be_estimated_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(PipelineError, match="bert"):
        main(["--backbone", str(tmp_path)])
    with pytest.raises(PipelineError, match="hf download some/model"):
        main(["--backbone", "some/model"])
    with pytest.raises(ConfigError, match="at least 1"):
        main(["--images", "0"])
