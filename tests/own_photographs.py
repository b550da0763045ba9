"""A user's photographs, in every form that import_photographs.py takes."""

import io
import json
from pathlib import Path

import pyarrow as pa
from embedding_setup import jpeg, picture
from PIL import Image


def encoded(image: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def photograph(seed: int) -> bytes:
    return jpeg(picture(64, 48, seed=seed))


HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64)
BLANK = jpeg(Image.new("RGB", (64, 48), (90, 90, 90)))


def write_folder(folder: Path) -> dict[str, bytes]:
    """Two buildings of five good photographs; the bytes of these by their names."""
    good = {
        "Rathaus Köln/1.jpg": photograph(1),
        "Rathaus Köln/2.PNG": encoded(picture(64, 48, seed=2), "PNG"),
        "Rathaus Köln/deeper/日本.webp": encoded(picture(64, 48, seed=3), "WEBP"),
        "b/1.jpg": photograph(4),
        "b/2.jpeg": photograph(5),
    }
    for name, content in good.items():
        write(folder / name, content)
    return good


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_dataset(folder: Path, splits: dict[str, list[pa.Table]]) -> None:
    """What datasets.DatasetDict.save_to_disk leaves: an Arrow stream for each table of each split."""
    for split, tables in splits.items():
        (folder / split).mkdir(parents=True)
        names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
        for name, table in zip(names, tables, strict=True):
            with pa.OSFile(str(folder / split / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(table, max_chunksize=2)
        state = {"_data_files": [{"filename": name} for name in names], "_split": split}
        (folder / split / "state.json").write_text(json.dumps(state))
        (folder / split / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
