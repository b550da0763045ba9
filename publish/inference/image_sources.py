"""Images wherever a user has them: a folder, a text list, a tar, or the pipeline's intermediates."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from common import parquet
from common.archives import tars
from common.archives.restart_points import RestartPoint
from common.errors import PipelineError
from common.imagery import tar_images
from common.provenance import digest_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageSource:
    """Images of one folder, list or tar, in a fixed order."""

    name: str  # of the files made from it
    names: pa.ChunkedArray | pa.Array  # of the images, in those files
    read: Callable[[int, int], Sequence[bytes | None]]  # encoded images start..stop; None: unreadable
    sizes: Callable[[int, int], list[int]]  # bytes of images start..stop, to detect changed ones

    schema: ClassVar = pa.schema([("image", pa.string())])  # of the columns beside the vectors
    settings: ClassVar = dict[str, str]()  # for the provenance
    holds_images: ClassVar = True

    def parts(self, size: int) -> Iterator[tuple[int, int]]:
        """Images start..stop of each part of `size` images."""
        for start in range(0, len(self.names), size):
            yield start, min(start + size, len(self.names))

    def identity(self, start: int, stop: int) -> dict:
        """The inputs of a part's provenance: names and sizes of its images."""
        listing = zip(self.names[start:stop].to_pylist(), self.sizes(start, stop), strict=True)
        text = "\n".join(f"{name}\t{size}" for name, size in listing)
        return {"images": f"{stop - start} images, {digest_of(text)}"}

    def names_of(self, start: int, stop: int) -> pa.ChunkedArray | pa.Array:
        return self.names[start:stop]

    def columns(self, start: int, stop: int) -> Iterator[tuple[pa.Table, bool]]:
        """The columns of a part beside the vectors, and whether they end a row group."""
        yield pa.table({"image": self.names[start:stop]}), True

    def reader(self, start: int, stop: int) -> Callable[[int, int], Sequence[bytes | None]]:
        """A function that reads encoded images of a part by their numbers in it."""
        return lambda first, last: self.read(start + first, start + last)


def groups(source: Path, store: tar_images.TarImages) -> Iterator[ImageSource]:
    """The images that `source` means. `store`: the tars of intermediates.

    Raises PipelineError if there are none.
    """
    if source.is_dir():
        tables = [path for path in sorted(source.glob("*.parquet")) if _is_intermediates(path)]
        found = (_of_intermediates(path, store) for path in tables) if tables else [_of_folder(source)]
    elif tars.is_named_so(source):
        found = [_of_tar(source)]
    elif source.is_file():
        found = [_of_list(source)]
    else:
        raise PipelineError(f"{source} does not exist: name a folder, a list, a tar or the intermediates")
    some = False
    for group in found:
        some = some or len(group.names) > 0
        yield group
    if not some:
        raise PipelineError(f"{source} holds no images ({', '.join(SUFFIXES)})")


def of_split(path: Path, store: tar_images.TarImages, limit: int) -> ImageSource:
    """The first `limit` images of a split, of whole runs of buildings, called "<building> <image>"."""
    columns = ["building_id", "streetview_image_id", "tar_file", "image_offset", "image_size"]
    rows = parquet.read(path, columns).slice(0, limit)
    names = [" ".join(pair) for pair in zip(*(rows[name].to_pylist() for name in columns[:2]), strict=True)]

    def read(start: int, stop: int) -> list[bytes]:
        return store.read(rows.slice(start, stop - start))

    return ImageSource(
        path.stem, pa.array(names, pa.string()), read, lambda a, b: rows["image_size"][a:b].to_pylist()
    )


def read_image(name: str) -> bytes:
    """The bytes of an image that is a file, or a member of a tar as TAR:MEMBER. Raises PipelineError if absent."""
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


def _of_folder(folder: Path) -> ImageSource:
    """All images below a folder, sorted, called by their paths from it."""
    paths = sorted(path for path in folder.rglob("*") if _is_image(path) and path.is_file())
    return _of_files(folder.resolve().name, [str(path.relative_to(folder)) for path in paths], paths)


def _is_image(path: Path) -> bool:
    """By its name; not the ._NAME.jpg in which macOS keeps a file's attributes."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith("._")


def _of_list(path: Path) -> ImageSource:
    """The files that the lines of a text name: absolute, or relative to the text's folder."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except UnicodeDecodeError:
        raise PipelineError(f"{path} is not a text: name a list of paths, a folder, or a .tar") from None
    names = [line for line in lines if line]
    paths = [path.parent / name for name in names]
    if names and not any(image.is_file() for image in paths):
        raise PipelineError(
            f"{path} lists {len(names):,} files and none is there: {paths[0]} for one\n"
            "write a path per line, absolute or relative to the list's own folder"
        )
    return _of_files(path.stem, names, paths)


def _of_files(name: str, names: list[str], paths: list[Path]) -> ImageSource:
    return ImageSource(
        name,
        pa.array(map(tars.printable, names), pa.string()),
        lambda start, stop: [_content(path) for path in paths[start:stop]],
        lambda start, stop: [path.stat().st_size if path.is_file() else -1 for path in paths[start:stop]],
    )


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _of_tar(path: Path) -> ImageSource:
    """The images of a tar; those that can be had if it is damaged, and that is said."""
    if not path.is_file():
        raise PipelineError(f"{path} does not exist")
    members, points = [], list[RestartPoint]()
    for member in tars.walk(path, points=points):
        if isinstance(member, tars.Damage):
            print(f"{path} is damaged: {member.detail}", file=sys.stderr)
        elif member.kind == "file" and _is_image(Path(member.name)):
            members.append(member)
    names = pa.array([tars.printable(member.name) for member in members], pa.string())
    columns = {"image_offset": [m.offset for m in members], "image_size": [m.size for m in members]}
    table = pa.table({name: pa.array(values, pa.int64()) for name, values in columns.items()})
    return _of_members(tars.stem(path), names, tar_images.Tar(path, points=points), table)


def _is_intermediates(path: Path) -> bool:
    """Or some other Parquet file beside the images. Raises PipelineError if it is damaged."""
    return parquet.has_provenance(path) and parquet.read_provenance(path).stage == "process_tar"


def _of_intermediates(path: Path, store: tar_images.TarImages) -> ImageSource:
    """The valid images of a tar of the dataset, called by their streetview_image_id."""
    rows = parquet.read(path, ["streetview_image_id", "tar_file", "image_offset", "image_size", "content_hash"])
    tar = rows["tar_file"][0].as_py() if rows.num_rows else f"{path.stem}.tar"
    return _of_members(path.stem, rows["streetview_image_id"], store.tar(tar), rows)


def _of_members(name: str, names: pa.Array | pa.ChunkedArray, tar: tar_images.Tar, rows: pa.Table) -> ImageSource:
    sizes: np.ndarray = rows["image_size"].to_numpy()
    return ImageSource(name, names, tar.reader(rows), lambda start, stop: sizes[start:stop].tolist())
