"""The dataset's own test set of pairs, each verified by three people: its list and its images, read in place.

It is test_matching.tar, plain or gzip, whole or damaged, or a folder with its content:

    verTest/verpairs.txt    a pair a line: two ids, 1 if both show the same target or else 0, and the relative
                            heading and pitch in degrees
    data/<id>_i.jpg         whole images
    data/<id>_p.jpg         their patches

An id such as 0006-0087241 is a dataset and a patch: these images are in the tars of the datasets, too.
"""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import schemas
from common.archives import tars
from common.archives.restart_points import RestartPoint
from common.errors import PipelineError
from common.imagery import tar_images
from common.provenance import digest_of, identity

LISTING = "verpairs.txt"
_ID = r"[0-9]{1,4}-[0-9]{1,18}"
_LINE = re.compile(rf"({_ID})\s+({_ID})\s+([01])\s+(\S+)\s+(\S+)")
_ANY_ID = re.compile(rf"(?<![0-9]){_ID}(?![0-9])")
log = logging.getLogger("pipeline")


class PairFiles:
    """The files of the test set, by their names without folders. Several threads may read."""

    def __init__(self, path: Path):
        """Lists the folder, or walks the tar once, and logs where it is damaged."""
        self.path, self.damages = path, list[tars.Damage]()
        self.places: dict[
            str, tuple[int, int]
        ] = {}  # offset and size in the tar; of a folder's files only the order
        self._files = _files_in(path) if path.is_dir() else {}
        if self._files:
            self.places = {name: (number, 0) for number, name in enumerate(self._files)}
            return
        points: list[RestartPoint] = []
        for member in tars.walk(path, points=points):
            if isinstance(member, tars.Damage):
                log.warning("%s is damaged: %s", path, member.detail)
                self.damages.append(member)
            elif member.kind == "file":
                self.places.setdefault(Path(member.name).name, (member.offset, member.size))
        self._tar = tar_images.Tar(path, points=points)

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """The content of these files; None for one that is not there."""
        if self._files:
            return [self._files[name].read_bytes() if name in self._files else None for name in names]
        there = sorted({*names} & self.places.keys(), key=self.places.__getitem__)  # in the order of the tar
        offsets, sizes = ([self.places[name][part] for name in there] for part in (0, 1))
        content = dict(zip(there, self._tar.read(offsets, sizes), strict=True))
        return [content.get(name) for name in names]


def text_of(path: Path) -> str:
    """The list of pairs, of a tar of the test set or as a text file of its own. Raises PipelineError."""
    return listed_in(PairFiles(path)) if tars.is_named_so(path) else path.read_bytes().decode(errors="replace")


def identity_of(path: Path) -> str:
    """What records know the test set, or its list alone, by, wherever it is: a tar by its size and ends, a folder
    by the names and sizes of its files, a text file by its content. Raises PipelineError if there is none."""
    if path.is_dir() and (files := _files_in(path)):
        listed = (f"{name}\t{file.stat().st_size}" for name, file in files.items())
        return f"{len(files)} files, {digest_of(*listed)[:16]}"
    if not path.is_file():
        raise PipelineError(
            f"{path} {'is an empty folder' if path.is_dir() else 'does not exist'}\n"
            "name the published test_matching.tar, or a folder with its content"
        )
    return identity(path) if tars.is_named_so(path) else digest_of(path.read_bytes())


def _files_in(folder: Path) -> dict[str, Path]:
    """All files below a folder, by name."""
    return {file.name: file for file in sorted(folder.rglob("*"), reverse=True) if file.is_file()}


def listed_in(files: PairFiles) -> str:
    """The list of pairs among the files of the test set. Raises PipelineError if it is not there."""
    (content,) = files.read([LISTING])
    if content is None:
        damage = "".join(f"; it is damaged: {damage.detail}" for damage in files.damages[:1])
        raise PipelineError(f"{files.path} holds no {LISTING}{damage}\nit is in verTest/ of test_matching.tar")
    return content.decode(errors="replace")


def parse(text: str) -> tuple[pa.Table, dict[int, str]]:
    """The pairs of a list (`schemas.pairs`), and its lines that are none, number -> text, except empty ones."""
    rows, malformed = [], {}
    for number, line in enumerate(text.split("\n"), 1):
        fields = _LINE.fullmatch(line.strip())
        angles = _angles(fields[4], fields[5]) if fields else None
        if fields and angles:
            rows.append((number, fields[1], fields[2], fields[3] == "1", *angles))
        elif line.strip():
            malformed[number] = line.strip()
    schema = schemas.pairs([])
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.Table.from_arrays(list(map(pa.array, columns, schema.types)), schema=schema), malformed


def _angles(heading: str, pitch: str) -> tuple[float, float] | None:
    try:
        angles = float(heading), float(pitch)
    except ValueError:
        return None
    return None if any(map(math.isinf, angles)) else angles


def split_id(name: str) -> tuple[int, int]:
    """Dataset and patch of an id: (6, 87241) of 0006-0087241."""
    dataset, _, patch = name.partition("-")
    return int(dataset), int(patch)


def patches_of(names: Sequence[str]) -> dict[int, np.ndarray]:
    """The patches of these ids by their dataset, (n,) int64 each, ascending."""
    patches = defaultdict(set)
    for dataset, patch in map(split_id, names):
        patches[dataset].add(patch)
    return {dataset: np.array(sorted(found), np.int64) for dataset, found in sorted(patches.items())}


def ids_in(text: str) -> list[str]:
    """Every id in a text, sorted, also those in lines that are no pairs."""
    return sorted(set(_ANY_ID.findall(text)))


def is_listed(patches: dict[int, np.ndarray], dataset_id: np.ndarray, patch_id: np.ndarray) -> np.ndarray:
    """(N,) bool: which of N images are among these `patches_of` ids."""
    listed = np.zeros(len(patch_id), bool)
    for dataset, of_dataset in patches.items():
        rows = np.flatnonzero(dataset_id == dataset)
        listed[rows] = np.isin(patch_id[rows], of_dataset)
    return listed
