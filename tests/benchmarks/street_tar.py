"""A tar as large as is wanted: some street views of 640 x 640 pixels, again and again under other ids.

Written by the benchmarks of what reads tars; no two of its labels are the same, and no image lies near its copy.
"""

import tarfile
import tempfile
from pathlib import Path

import timing  # noqa: F401  (puts the repository's root and tests/ on sys.path)
from synthetic import write_dataset

from common.archives import tars


def write(path: Path, images: int) -> None:
    """A plain tar of `images` pairs of JPEG and label."""
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), streets=3, cities=1, image_px=640, facades_per_street=4)
        members = tars.walk(next(Path(folder).glob("*.tar")), contents=True)
        contents = {member.name: bytes(member.content or b"") for member in members}
    stems = [name[:-4] for name in contents if name.endswith(".jpg") and f"{name[:-4]}.txt" in contents]
    with path.open("wb") as file:
        for n in range(images):
            stem = stems[n % len(stems)]
            fields = contents[f"{stem}.txt"].split(b" ")
            fields[3] = str(n).encode()  # the patch, an image's id
            for suffix, content in (("jpg", contents[f"{stem}.jpg"]), ("txt", b" ".join(fields))):
                info = tarfile.TarInfo(f"0088/0000088_{n:07d}_0000001_{n // 4:07d}.{suffix}")
                info.size = len(content)
                file.write(info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
        file.write(bytes(1024))


def jpegs_of(path: Path) -> list[bytes]:
    """The JPEGs of a tar, each in memory of its own."""
    members = tars.walk(path, contents=True)
    return [bytes(member.content) for member in members if member.name.endswith(".jpg")]
