"""What embeddings are made from, small: photographs, tars of them with their intermediates, a tiny backbone."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from local_backbone import write_tiny_backbone
from PIL import Image, ImageFilter

from common import config, parquet, provenance, schemas, sections, stages
from common.archives import tars

SIZES = [(640, 640), (300, 700), (700, 300), (33, 20), (91, 91)]  # width, height: square, tall, wide, tiny, odd


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours and hard edges."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))
    image.paste((255, 0, 0), (width // 4, height // 4, width // 2, height // 2))
    return image.convert(mode)


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def photographs(count: int, seed: int = 0) -> list[bytes]:
    return [jpeg(picture(80, 80, seed=seed + n)) for n in range(count)]


def write_tar(path: Path, jpegs: list[bytes]) -> None:
    """A tar of these images as 0088/0088_<n>_0_<n // 2>.jpg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(jpegs):
            info = tarfile.TarInfo(f"{path.stem}/{path.stem}_{number}_0_{number // 2}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_intermediates(cfg: sections.Config) -> None:
    """The intermediates of every tar as process_tar has them, with zeros where nothing here reads a column."""
    for tar in sorted(cfg.paths.raw_dir.glob("*.tar")):
        members = list(tars.walk(tar, contents=True))
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
        rows |= {"content_hash": np.array([xxhash.xxh3_64_intdigest(m.content) for m in members], np.uint64)}
        target = cfg.paths.intermediates_dir / f"{tar.stem}.parquet"
        with parquet.writer(
            target, schemas.INTERMEDIATES, provenance.record("process_tar", {}, stages.ids([tar]))
        ) as out:
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
    def cfg(self) -> sections.Config:
        return config.load(None, self.overrides)

    @property
    def flags(self) -> list[str]:
        return [flag for override in self.overrides for flag in ("--set", override)]

    def part(self, name: str) -> Path:
        return self.cfg.paths.embeddings_dir / f"{name}.parquet"


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
