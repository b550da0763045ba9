"""Images wherever a user has them: a folder, a text list, a tar, or the pipeline's intermediates."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import parquet, tars
from common.errors import PipelineError
from common.provenance import digest_of
from generate.parts import jpegs_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Group:
    """Images of one folder, list or tar, in a fixed order."""

    name: str  # of the files made from it
    names: pa.ChunkedArray | pa.Array  # what each image is called in them
    read: Callable[[int, int], list[bytes | None]]  # encoded images start..stop; None: cannot be read
    sizes: Callable[[int, int], list[int]]  # bytes of images start..stop, to tell changed ones

    def identity(self, start: int, stop: int) -> dict:
        """What images start..stop are known by: names and sizes."""
        listing = zip(self.names[start:stop].to_pylist(), self.sizes(start, stop), strict=True)
        text = "\n".join(f"{name}\t{size}" for name, size in listing)
        return {"images": f"{stop - start} images, {digest_of(text)}"}


def groups(source: Path, raw_dir: Path) -> Iterator[Group]:
    """The images that `source` means. `raw_dir`: where the tars of intermediates lie.

    Raises PipelineError if there are none.
    """
    if source.is_dir():
        tables = [path for path in sorted(source.glob("*.parquet")) if _is_intermediates(path)]
        found = (_of_intermediates(path, raw_dir) for path in tables) if tables else [_of_folder(source)]
    elif source.suffix == ".tar":
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


def of_split(path: Path, raw_dir: Path, limit: int) -> Group:
    """The first `limit` images of a split, of whole runs of buildings, called "<building> <image>"."""
    columns = ["building_id", "streetview_image_id", "tar_file", "image_offset", "image_size"]
    rows = parquet.read(path, columns).slice(0, limit)
    names = [" ".join(pair) for pair in zip(*(rows[name].to_pylist() for name in columns[:2]), strict=True)]

    def read(start: int, stop: int) -> list[bytes | None]:
        return read_images(raw_dir, rows.slice(start, stop - start))

    return Group(path.stem, pa.array(names, pa.string()), read, lambda a, b: rows["image_size"][a:b].to_pylist())


def read_images(raw_dir: Path, rows: pa.Table) -> list[bytes | None]:
    """The encoded images of rows with tar_file, image_offset and image_size, tar by tar."""
    names = np.array(rows["tar_file"].to_pylist())
    offsets, sizes = (rows[name].to_numpy() for name in ("image_offset", "image_size"))
    encoded: list[bytes | None] = [None] * len(names)
    for name in dict.fromkeys(names.tolist()):
        positions = np.flatnonzero(names == name)
        for position, content in zip(
            positions, tars.read_members(raw_dir / name, offsets[positions], sizes[positions]), strict=True
        ):
            encoded[position] = content
    return encoded


def read_image(name: str) -> bytes:
    """The bytes of an image that is a file, or a member of a tar as TAR:MEMBER. Raises PipelineError if absent."""
    tar, colon, member_name = name.rpartition(":")
    if colon and tar.endswith(".tar"):
        try:
            for member in tars.walk(Path(tar)):
                if member.name == member_name:
                    return tars.read_members(Path(tar), [member.offset], [member.size])[0]
        except tars.Damage as damage:
            raise PipelineError(f"{tar} has no member {member_name} before its damage ({damage})") from None
        raise PipelineError(f"{tar} has no member {member_name}")
    content = _content(Path(name))
    if content is None:
        raise PipelineError(f"{name} cannot be read: name an image, or a member of a tar as TAR:MEMBER")
    return content


def _of_folder(folder: Path) -> Group:
    """All images below a folder, sorted, called by their paths from it."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return _of_files(folder.resolve().name, [str(path.relative_to(folder)) for path in paths], paths)


def _of_list(path: Path) -> Group:
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


def _of_files(name: str, names: list[str], paths: list[Path]) -> Group:
    return Group(
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


def _of_tar(path: Path) -> Group:
    """The images of a tar; those before the damage if it is damaged, and that is said."""
    if not path.is_file():
        raise PipelineError(f"{path} does not exist")
    members = []
    try:
        for member in tars.walk(path):
            if member.kind == "file" and Path(member.name).suffix.lower() in SUFFIXES:
                members.append(member)
    except tars.Damage as damage:
        print(f"{path}: {damage}; the {len(members):,} images before that are used", file=sys.stderr)
    names = pa.array([tars.printable(member.name) for member in members], pa.string())
    columns = {"image_offset": [m.offset for m in members], "image_size": [m.size for m in members]}
    table = pa.table({name: pa.array(values, pa.int64()) for name, values in columns.items()})
    return _of_members(path.stem, names, path, table)


def _is_intermediates(path: Path) -> bool:
    """Or some other Parquet file beside the images. Raises PipelineError if it is damaged."""
    return parquet.has_provenance(path) and parquet.read_provenance(path).stage == "process_tar"


def _of_intermediates(path: Path, raw_dir: Path) -> Group:
    """The valid images of a tar of the dataset, called by their streetview_image_id."""
    rows = parquet.read(path, ["streetview_image_id", "tar_file", "image_offset", "image_size"])
    tar = rows["tar_file"][0].as_py() if rows.num_rows else f"{path.stem}.tar"
    return _of_members(path.stem, rows["streetview_image_id"], raw_dir / tar, rows)


def _of_members(name: str, names: pa.Array | pa.ChunkedArray, tar: Path, rows: pa.Table) -> Group:
    sizes: np.ndarray = rows["image_size"].to_numpy()
    return Group(name, names, jpegs_of(tar, rows), lambda start, stop: sizes[start:stop].tolist())
