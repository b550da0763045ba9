"""Images in a folder, a text list, a tar, or the pipeline's intermediates."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from common import parquet
from common.archives import image_origins, tars
from common.archives.restart_points import RestartPoint
from common.errors import PipelineError
from common.imagery import tar_images
from common.imagery.decoding import SUFFIXES, is_named_image
from common.provenance import digest_of
from publish.inference.vector_tables import LOCATION

_LISTING = ("process_tar", image_origins.IMPORTED)  # stages that write intermediates


@dataclass(frozen=True)
class ImageSource:
    """Images of one folder, list or tar, in a fixed order."""

    name: str  # of the files made from it
    images: pa.Table  # `image`: what each is called there; `image_size`: its bytes, to detect changed ones; where
    # it is known `building`: which one it shows
    read: Callable[[int, int], Sequence[bytes | None]]  # encoded images start..stop; None: unreadable

    schema: ClassVar = pa.schema([("image", pa.string())])  # of the columns beside the vectors
    settings: ClassVar = dict[str, str]()  # for the provenance
    holds_images: ClassVar = True

    def parts(self, size: int) -> Iterator[tuple[int, int]]:
        """Images start..stop of each part of `size` images."""
        for start in range(0, len(self.images), size):
            yield start, min(start + size, len(self.images))

    def identity(self, start: int, stop: int) -> dict:
        """The inputs of a part's provenance: names and sizes of its images."""
        text = "\n".join(f"{row['image']}\t{row['image_size']}" for row in self.images[start:stop].to_pylist())
        return {"images": f"{stop - start} images, {digest_of(text)}"}

    def names_of(self, start: int, stop: int) -> pa.ChunkedArray:
        return self.images["image"][start:stop]

    def columns(self, start: int, stop: int) -> list[pa.Table]:
        """The columns of a part beside the vectors."""
        return [self.images[start:stop].select(["image"])]

    def reader(self, start: int, stop: int) -> Callable[[int, int], Sequence[bytes | None]]:
        """A function that reads encoded images of a part by their numbers in it."""
        return lambda first, last: self.read(start + first, start + last)

    def labelled(self, labels: dict[str, str]) -> "ImageSource":
        """These images with the buildings that `labels` gives for their names."""
        others = [name for name in self.images.column_names if name != "building"]
        buildings = pa.array(map(labels.get, self.images["image"].to_pylist()), pa.string())
        return replace(self, images=self.images.select(others).append_column("building", buildings))


def groups(source: Path, store: tar_images.TarImages) -> Iterator[ImageSource]:
    """The images at `source`. `store`: the tars of intermediates. Raises PipelineError if there are none."""
    if source.is_dir():
        ours = [path for path in sorted(source.glob("*.parquet")) if parquet.has_provenance(path)]
        tables = [path for path in ours if parquet.read_provenance(path).stage in _LISTING]
        groups = (_of_intermediates(path, store) for path in tables) if tables else [_of_folder(source)]
    elif tars.is_named_so(source):
        groups = [_of_tar(source)]
    elif source.is_file():
        groups = [_of_list(source)]
    else:
        raise PipelineError(f"{source} does not exist: name a folder, a list, a tar or the intermediates")
    num_images = 0
    for group in groups:
        num_images += len(group.images)
        yield group
    if not num_images:
        raise PipelineError(f"{source} holds no images ({', '.join(SUFFIXES)})")


def of_split(path: Path, store: tar_images.TarImages, limit: int) -> ImageSource:
    """The first `limit` images of a split, which is sorted by building, named "<building> <image>"; with a column
    `building`."""
    columns = ["building_id", "streetview_image_id", "tar_file", "image_offset", "image_size"]
    rows = parquet.read(path, columns).slice(0, limit)
    names = pc.binary_join_element_wise(rows["building_id"], rows["streetview_image_id"], " ")
    images = (
        rows.select(["image_size"]).append_column("image", names).append_column("building", rows["building_id"])
    )
    return ImageSource(path.stem, images, lambda start, stop: store.read(rows[start:stop]))


def read_image(name: str) -> bytes:
    """The bytes of an image: a file, or a member of a tar as TAR:MEMBER. Raises PipelineError if it is absent."""
    tar, colon, member_name = name.rpartition(":")
    if colon and tars.is_named_so(Path(tar)):
        damages = []
        for member in tars.walk(Path(tar), contents=True):
            if isinstance(member, tars.Damage):
                damages.append(member.detail)
            elif member.name == member_name and member.content is not None:
                return bytes(member.content)
        raise PipelineError("; ".join([f"{tar} has no member {member_name}", *damages]))
    content = _content(Path(name))
    if content is None:
        raise PipelineError(f"{name} cannot be read: name an image, or a member of a tar as TAR:MEMBER")
    return content


def read_row(row: dict, store: tar_images.TarImages, folder: Path | None) -> bytes | None:
    """The image of a row of a table: out of `store` if its columns say where, else the file below `folder` that
    its column `image`, or the first of `image_ids`, names; None if there is none. Raises like TarImages.read."""
    if row.keys() >= LOCATION:
        return store.read(pa.Table.from_pylist([{name: row[name] for name in sorted(LOCATION)}]))[0]
    names = [name for name in (row.get("image"), *(row.get("image_ids") or [])) if isinstance(name, str)]
    return _content(folder / names[0]) if folder and names else None


def find_rows(paths: Iterable[Path], image_ids: Iterable[str], columns: Sequence[str]) -> dict[str, dict]:
    """These columns of the images with these streetview_image_ids, by id; only those that the files have."""
    found, missing = dict[str, dict](), set(image_ids)
    for path in paths:
        if not missing or not path.exists():
            continue
        if not {"streetview_image_id", *columns} <= set(parquet.open_file(path).schema_arrow.names):
            continue
        for batch in parquet.batches(path, ["streetview_image_id", *columns]):
            here = pc.is_in(batch["streetview_image_id"], pa.array(missing, pa.string()))
            found |= {row["streetview_image_id"]: row for row in batch.filter(here).to_pylist()}
        missing -= found.keys()
    return found


def _of_folder(folder: Path) -> ImageSource:
    """All images below a folder, sorted, named by their relative paths."""
    paths = sorted(path for path in folder.rglob("*") if is_named_image(path) and path.is_file())
    return _of_files(folder.resolve().name, [str(path.relative_to(folder)) for path in paths], paths)


def _of_list(path: Path) -> ImageSource:
    """The files listed in a text file: absolute, or relative to its folder."""
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise PipelineError(f"{path} is not a text file: name a list of paths, a folder, or a .tar") from None
    paths = [path.parent / name for name in names]
    if names and not any(image.is_file() for image in paths):
        raise PipelineError(
            f"{path} lists {len(names):,} files, none of which exists, such as {paths[0]}\n"
            "write a path per line, absolute or relative to the list's own folder"
        )
    return _of_files(path.stem, names, paths)


def _of_files(name: str, names: list[str], paths: list[Path]) -> ImageSource:
    sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
    images = _table(map(tars.printable, names), sizes)
    return ImageSource(name, images, lambda start, stop: [_content(path) for path in paths[start:stop]])


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _of_tar(path: Path) -> ImageSource:
    """The images of a tar; of a damaged one those that can be recovered, with a warning."""
    if not path.is_file():
        raise PipelineError(f"{path} does not exist")
    members, points = [], list[RestartPoint]()
    for member in tars.walk(path, points=points):
        if isinstance(member, tars.Damage):
            print(f"{path} is damaged: {member.detail}", file=sys.stderr)
        elif member.kind == "file" and is_named_image(Path(member.name)):
            members.append(member)
    images = _table((tars.printable(member.name) for member in members), [member.size for member in members])
    rows = images.append_column("image_offset", pa.array([member.offset for member in members], pa.int64()))
    return ImageSource(tars.stem(path), images, tar_images.Tar(path, points=points).reader(rows))


def _table(names: Iterable[str], sizes: list[int]) -> pa.Table:
    return pa.table({"image": pa.array(names, pa.string()), "image_size": pa.array(sizes, pa.int64())})


def _of_intermediates(path: Path, store: tar_images.TarImages) -> ImageSource:
    """The valid images of a tar of the dataset, or of an imported set, named by their streetview_image_id; with a
    column `building`."""
    names = {"streetview_image_id": "image", "image_size": "image_size", "building_id": "building"}
    rows = parquet.read(path, [*names, "tar_file", "image_offset", "content_hash"])
    images = rows.select([*names]).rename_columns([*names.values()])
    return ImageSource(path.stem, images, store.reader(rows))
