"""The images and labels of one tar, brought together: a row for each valid pair, a reject for each other file."""

import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from common.archives import tars
from common.schemas import Reject
from preprocess.tars.jpegs import Jpeg
from preprocess.tars.labels import Ids, Label, Rejected


class Image(NamedTuple):
    name: str  # member of the tar
    stem: str  # of its name: four ids (`labels.parse_name`)
    offset: int  # bytes from the start of the tar
    size: int  # bytes
    jpeg: Jpeg | Rejected


class Text(NamedTuple):
    name: str
    stem: str
    ids: Ids  # in the name
    label: Label | Rejected


_File = TypeVar("_File", Image, Text)


class Pairs(NamedTuple):
    """Every image and label of a tar is in exactly one pair, or has a row among the rejects."""

    valid: list[tuple[Image, Jpeg, Label]]  # in the order of the images
    rejects: list[tuple[str, Rejected]]  # (member, why)
    causes: Counter  # reason -> images that were rejected for it, or because their label was
    num_renamed: int  # valid pairs whose name has other ids than the label, which is used


def split_name(name: str) -> tuple[str, str]:
    """A member's name without its folders: up to the last dot, and from there on in lower case."""
    stem, suffix = posixpath.splitext(posixpath.basename(name))
    return stem, suffix.lower()


def pair(images: Iterable[Image], texts: Iterable[Text], dataset_id: int | None) -> Pairs:
    """Pair files by stem, wherever they are in the tar. `dataset_id`: the tar's; labels of another are rejected.

    If a stem comes several times, its n-th image belongs to its n-th label. Of images with one id the first valid
    one is used.
    """
    text_of = _by_stem(texts)
    pairs = Pairs([], [], Counter(), 0)
    used_ids: set[int] = set()
    num_renamed = 0
    for key, image in _by_stem(images).items():
        text, jpeg = text_of.pop(key, None), image.jpeg
        label = _checked(text, dataset_id) if text else _alone(key[1], Reject.LABEL_MISSING)
        if isinstance(jpeg, Jpeg) and isinstance(label, Label):
            if label.patch_id not in used_ids:
                used_ids.add(label.patch_id)
                pairs.valid.append((image, jpeg, label))
                num_renamed += text is not None and label[:4] != text.ids
                continue
            jpeg = Rejected(Reject.DUPLICATE_ID, f"{label.dataset_id:04d}_{label.patch_id}")
        cause = next(why for why in (jpeg, label) if isinstance(why, Rejected))
        pairs.causes[cause.reason.value] += 1
        if text is None:
            pairs.rejects.append((image.name, cause))
            continue
        pairs.rejects.append((image.name, jpeg if isinstance(jpeg, Rejected) else _partner(text, cause)))
        pairs.rejects.append((text.name, label if isinstance(label, Rejected) else _partner(image, cause)))
    for (_, number), text in text_of.items():  # without an image
        label = _checked(text, dataset_id)
        why = label if isinstance(label, Rejected) else _alone(number, Reject.IMAGE_MISSING)
        pairs.rejects.append((text.name, why))
    return pairs._replace(num_renamed=num_renamed)


def columns(valid: list[tuple[Image, Jpeg, Label]], tar_file: str) -> dict[str, Sequence]:
    """The columns of the intermediates (see schemas.INTERMEDIATES) of at least one pair."""
    images, _, labels = zip(*valid, strict=True)
    rows = [(*label, *jpeg) for _, jpeg, label in valid]
    table = dict(zip(Label._fields + Jpeg._fields, zip(*rows, strict=True), strict=True))
    return table | {
        "building_id": [f"{label.dataset_id:04d}_{label.target_id}" for label in labels],
        "streetview_image_id": [f"{label.dataset_id:04d}_{label.patch_id}" for label in labels],
        "tar_file": [tar_file] * len(valid),
        "image_path": [tars.printable(image.name) for image in images],
        "image_offset": [image.offset for image in images],
        "image_size": [image.size for image in images],
    }


def _by_stem(files: Iterable[_File]) -> dict[tuple[str, int], _File]:
    """(stem, how many files of this stem came before) -> file."""
    counts: Counter[str] = Counter()
    numbered = {}
    for file in files:
        numbered[file.stem, counts[file.stem]] = file
        counts[file.stem] += 1
    return numbered


def _alone(number: int, missing: Reject) -> Rejected:
    """Why a file without a partner cannot be used. `number`: of files with the same stem before it."""
    return Rejected(Reject.DUPLICATE_ID if number else missing)


def _checked(text: Text, dataset_id: int | None) -> Label | Rejected:
    """The label, unless it is of another dataset than the tar."""
    if isinstance(text.label, Label):
        for where, number in (("label", text.label.dataset_id), ("name", text.ids.dataset_id)):
            if number != dataset_id:
                return Rejected(
                    Reject.DATASET_MISMATCH, f"dataset {number} in the {where}, {dataset_id} in the tar"
                )
    return text.label


def _partner(other: Image | Text, why: Rejected) -> Rejected:
    return Rejected(Reject.PARTNER_REJECTED, f"{tars.printable(other.name)}: {why.reason.value}")
