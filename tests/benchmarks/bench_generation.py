"""Embedding generation: the loop against the model alone, against decoding alone, and against the usual way.

On the CPU: a ViT-S/14-sized random model at 224 pixels against its forward pass on tensors that are there already;
then a "model" that only takes a few pixels, so that the loop's own cost shows, against decoding the JPEGs and
dropping them, against that with resizing and normalising, and against extracted files through PIL, Hugging Face's
processor and a DataLoader of as many workers. Ours is all that the stage does: JPEGs by offset from a tar to
finished Parquet files. Of a GPU: see on_gpu.py.

Against decoding alone 0.8 is wanted and not to be had on a CPU without other pixels than Hugging Face's. Of a core
(AMD EPYC, AVX2 paths, nothing else running), microseconds for an image of 640 x 640 px and a single view:

    decoding (simplejpeg, strict)                                   780 to 830
    reading it from the tar, and looking at its header               25
    resizing what the crop keeps, torch uint8, 570 rows to 226      290 (in the cache) to 350 (as it comes)
    normalising, into memory that is there                           35

so that 825 / (825 + 350 + 35) = 0.68 is the most, and 825 / (825 + 290) = 0.74 if the resize were all. What was
tried instead, and how far it is from Hugging Face's pixels (one grey level is allowed):

    libjpeg's fast cosine transform    saves 5 % of decoding        4 grey levels, 27 % of the pixels more than one
    its plain upsampling of colours    saves 11 %                   10 grey levels
    decoding at 5/8                    60 % slower                  16 grey levels
    decoding at 4/8                    saves 33 %                   17 grey levels
    columns before rows                no faster                    15 grey levels, in black and white
    four channels instead of three     no faster
    eight images in one call           no faster: ten megabytes leave the cache

On CUDA the device resizes, and a core does nothing but read, decode and stack: see model_sizes.IMAGES_PER_CORE.

Command  python tests/benchmarks/bench_generation.py
"""

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import timing  # puts the repository and tests/ on the path
import torch
from local_backbone import write_preprocessor
from PIL import Image
from synthetic import write_dataset
from torch.utils.data import DataLoader, Dataset
from transformers import AutoImageProcessor, AutoModel, Dinov2Config

from common import config, devices, sections
from common.archives import tar_parts
from common.imagery import tar_images
from common.imagery.decoding import decode
from generate import backbone, embedding_parts, generate_embeddings, loop
from generate.model_files import PREPROCESSING
from generate.pixels import picture_side, read_config, read_preprocessing
from preprocess import process_tar

PX = 224
VIT_S = (384, 12, 6)  # hidden size, layers, heads
MODEL_IMAGES = 32  # for the ViT-S on the CPU
FREE_IMAGES = 1000  # for the model of no cost
CPU = torch.device("cpu")


class Files(Dataset):
    """The usual way: an image is a file, opened by PIL and prepared by Hugging Face's processor."""

    def __init__(self, paths: list[Path], processor):
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        image = Image.open(self.paths[row]).convert("RGB")
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


def write_vit(folder: Path, shape: tuple[int, int, int]) -> Path:
    """A random ViT/14 of DINOv2's form, with DINOv2's own preprocessing (shortest edge 256, crop 224). `shape`:
    hidden size, layers, heads."""
    hidden, layers, heads = shape
    settings = Dinov2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, image_size=518, patch_size=14
    )
    torch.manual_seed(0)
    AutoModel.from_config(settings).save_pretrained(folder)
    write_preprocessor(folder, "dinov2", PX)
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"shortest_edge": 224', '"shortest_edge": 256'))
    return folder


def settings(root: Path, model: Path, *more: str) -> sections.Config:
    return config.load(None, [f"paths.root={root}", f"embedding_model.name={model}", *more])


def run_loop(cfg: sections.Config, todo: list[tar_parts.TarPart], forward, preprocessing) -> None:
    """All that the stage does for these parts, from the tar to the Parquet files."""
    progress = loop.GenerationProgress("benchmark", "image", None, 3600)
    with progress:
        for result in loop.embed(
            embedding_parts.jobs(todo, tar_images.of_paths(cfg.paths)),
            forward,
            preprocessing,
            CPU,
            cfg.infrastructure,
            progress,
        ):
            failure = embedding_parts.write(result, {"dim": result.vectors.shape[1]}, 0.0)
            assert not failure, failure


def parts_of(cfg: sections.Config, images: int) -> list[tar_parts.TarPart]:
    """One part of the first `images` images."""
    tar = next(cfg.paths.raw_dir.glob("*.tar"))
    (part,) = tar_parts.of_tar(cfg, generate_embeddings.STAGE, tar, {"model": "benchmark"})
    return [tar_parts.TarPart(part.tar, part.source, 0, min(images, part.count), part.target, part.record)]


def against_the_model(cfg: sections.Config, images: int, rounds: int) -> dict:
    """Seconds of the loop, and of the same model on the tensors of as many views."""
    model = backbone.load(cfg.embedding_model, devices.resolve_dtype("auto", CPU), CPU)
    todo = parts_of(cfg, images)
    count, batch = todo[0].count, 8
    num_views = len(cfg.embedding_model.views)
    pixels = torch.rand(batch * num_views, 3, PX, PX).to(model.model.dtype)

    @torch.inference_mode()
    def bare() -> None:
        for start in range(0, count, batch):
            model.model(pixels[: num_views * min(batch, count - start)])

    ways = {
        "loop": lambda: run_loop(cfg, todo, lambda x: model(x).half(), model.preprocessing),
        "bare forward": bare,
    }
    return timing.seconds(ways, rounds)


class Repeated(tar_parts.TarPart):
    """A part of a tar's rows over and over: what a part costs once is for thousands of images, not for 300."""

    def rows(self) -> pa.Table:
        there = super().rows()
        times = -(-self.count // there.num_rows)
        return pa.concat_tables([there] * times).slice(0, self.count).combine_chunks()


def almost_free(cfg: sections.Config, folder: Path, rounds: int = 5) -> tuple[dict, int]:
    """(seconds of each way with a "model" that takes a few pixels, number of images)."""
    (part,) = parts_of(cfg, 10**6)
    todo = [Repeated(part.tar, part.source, 0, FREE_IMAGES, part.target, part.record)]
    count, threads = FREE_IMAGES, cfg.infrastructure.threads
    rows, model, share = todo[0].rows(), Path(cfg.embedding_model.name), min(cfg.embedding_model.views)
    preprocessing = read_preprocessing(model, share)
    encoded = tar_images.Tar(todo[0].tar).reader(rows)
    files = extracted(todo[0].tar, rows, folder)
    (folder / PREPROCESSING).write_text(json.dumps(read_config(model, share)))  # as in a published model
    processor = AutoImageProcessor.from_pretrained(folder)
    loader = DataLoader(Files(files, processor), batch_size=64, num_workers=threads, persistent_workers=True)

    def few_pixels(pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, :, ::32, ::32].flatten(1).half()

    def in_threads(work) -> None:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(work, at, min(at + loop.CHUNK, count)) for at in range(0, count, loop.CHUNK)]:
                done.result()

    def decode_only(start, stop) -> None:
        for jpeg in encoded(start, stop):
            decode(jpeg)

    def prepare_only(start, stop) -> None:
        with torch.inference_mode():
            preprocessing((decode(jpeg) for jpeg in encoded(start, stop)), CPU)

    def usual() -> None:
        for pixels in loader:
            few_pixels(pixels)

    ways = {
        "loop": lambda: run_loop(cfg, todo, few_pixels, preprocessing),
        "decoding alone": lambda: in_threads(decode_only),
        "decoding, preparing": lambda: in_threads(prepare_only),
        "files, PIL, HF, DataLoader": usual,
    }
    return timing.seconds(ways, rounds), count


def extracted(tar: Path, rows, folder: Path) -> list[Path]:
    """The images as files, as `tar -x` leaves them."""
    folder.mkdir()
    files = []
    read = tar_images.Tar(tar).reader(rows)
    for row, path in enumerate(rows["image_path"].to_pylist()):
        files.append(folder / Path(path).name)
        files[-1].write_bytes(read(row, row + 1)[0])
    return files


def measure() -> list[timing.Ratio]:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_dataset(root / "data" / "raw", streets=5, cities=1, compress=False)
        cfg = settings(root, write_vit(root / "S", VIT_S), "infrastructure.device=cpu")
        process_tar.main(["--set", f"paths.root={root}"])
        taken = against_the_model(cfg, images=MODEL_IMAGES, rounds=5)
        free, count = almost_free(cfg, root / "files")
        side = picture_side(PX, min(cfg.embedding_model.views))
        what = f"{count} JPEGs of 640 x 640 px to {side} px, a model of no cost"
        return [
            timing.ratio(
                f"ViT-S/14, {len(cfg.embedding_model.views)} views of {PX} px, {MODEL_IMAGES} images",
                taken,
                "loop",
                "bare forward",
                items=MODEL_IMAGES,
                unit="images/s",
                target=0.9,
            ),
            timing.ratio(what, free, "loop", "decoding alone", items=count, unit="images/s", target=0.8),
            timing.ratio(what, free, "loop", "decoding, preparing", items=count, unit="images/s", target=0.9),
            timing.ratio(what, free, "loop", "files, PIL, HF, DataLoader", items=count, unit="images/s", target=3),
        ]


if __name__ == "__main__":
    timing.main(__doc__, measure)
