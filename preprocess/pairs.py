"""The images and labels of one tar, brought together: a row for each valid pair, a reject for each other file."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from common import tars
from common.schemas import Reject
from preprocess.jpegs import Jpeg
from preprocess.labels import Ids, Label, Rejected


class Image(NamedTuple):
    name: str  # member of the tar
    stem: str  # of its name: four ids (`labels.parse_name`)
    offset: int  # bytes from the start of the tar
    size: int  # bytes
    found: Jpeg | Rejected


class Text(NamedTuple):
    name: str
    stem: str
    ids: Ids  # that the name says
    found: Label | Rejected


class Pairs(NamedTuple):
    """Every image and label of a tar is in exactly one pair, or has a row among the rejects."""

    valid: list[tuple[Image, Text]]  # in the order of the images
    rejects: list[tuple[str, Rejected]]  # (member, why)
    causes: Counter  # reason -> images that were rejected for it, or since their label was
    num_renamed: int  # valid pairs whose name has other ids than the label, which counts


def split_name(name: str) -> tuple[str, str]:
    """A member's name without its folders: what stands before the last dot, and from there on in lower case."""
    base = name[name.rfind("/") + 1 :]
    dot = base.rfind(".")
    return (base, "") if dot < 0 else (base[:dot], base[dot:].lower())


def pair(images: Iterable[Image], texts: Iterable[Text], dataset_id: int | None) -> Pairs:
    """Pair files by stem, wherever they lie in the tar. `dataset_id`: the tar's; labels of another are rejected.

    Where a stem comes several times, its n-th image belongs to its n-th label. Of images with one id the first
    one that is valid stays.
    """
    image_of, text_of = _by_stem(images), _by_stem(texts)
    pairs = Pairs([], [], Counter(), 0)
    seen: set[int] = set()
    renamed = 0
    for key in [*image_of, *(key for key in text_of if key not in image_of)]:
        image, text = image_of.get(key), text_of.get(key)
        why_image, why_text = _judge(image, text, key[1], dataset_id)
        if not why_image and not why_text:
            label = text.found
            if label.patch_id in seen:
                why_image = Rejected(Reject.DUPLICATE_ID, f"{label.dataset_id:04d}_{label.patch_id}")
                why_text = _partner(image, why_image)
            else:
                seen.add(label.patch_id)
                pairs.valid.append((image, text))
                renamed += label[:4] != text.ids
        if why_image:
            pairs.rejects.append((image.name, why_image))
            own = why_image.reason is not Reject.PARTNER_REJECTED
            pairs.causes[(why_image if own else why_text).reason.value] += 1
        if why_text:
            pairs.rejects.append((text.name, why_text))
    return pairs._replace(num_renamed=renamed)


def columns(valid: list[tuple[Image, Text]], tar_file: str) -> dict[str, Sequence]:
    """The columns of the intermediates (see schemas.INTERMEDIATES)."""
    images, labels = [image for image, _ in valid], [text.found for _, text in valid]
    table = _transposed(labels, Label) | _transposed([image.found for image in images], Jpeg)
    table["building_id"] = [f"{label.dataset_id:04d}_{label.target_id}" for label in labels]
    table["streetview_image_id"] = [f"{label.dataset_id:04d}_{label.patch_id}" for label in labels]
    table["tar_file"] = [tar_file] * len(valid)
    table["image_path"] = [tars.printable(image.name) for image in images]
    table["image_offset"] = [image.offset for image in images]
    table["image_size"] = [image.size for image in images]
    return table


def _transposed(rows: list[tuple], kind: type) -> dict[str, Sequence]:
    """A column for each field of the named tuples in `rows`."""
    columns = zip(*rows, strict=True) if rows else [()] * len(kind._fields)
    return dict(zip(kind._fields, columns, strict=True))


def _by_stem(files: Iterable) -> dict[tuple[str, int], Image | Text]:
    """(stem, how many files of this stem came before) -> file."""
    counts: defaultdict[str, int] = defaultdict(int)
    found = {}
    for file in files:
        number = counts[file.stem]
        found[file.stem, number] = file
        counts[file.stem] = number + 1
    return found


def _judge(
    image: Image | None, text: Text | None, number: int, dataset_id: int | None
) -> tuple[Rejected | None, Rejected | None]:
    """Why the image and why the label cannot be used; None for one that can, or that is not there.

    `number`: of files with the same stem before these.
    """
    why_image = image.found if image and isinstance(image.found, Rejected) else None
    why_text = text and _wrong_with(text, dataset_id)
    if text is None and not why_image:
        why_image = Rejected(Reject.DUPLICATE_ID if number else Reject.LABEL_MISSING)
    if image is None and not why_text:
        why_text = Rejected(Reject.DUPLICATE_ID if number else Reject.IMAGE_MISSING)
    if image and text:
        if why_text and not why_image:
            why_image = _partner(text, why_text)
        elif why_image and not why_text:
            why_text = _partner(image, why_image)
    return why_image, why_text


def _wrong_with(text: Text, dataset_id: int | None) -> Rejected | None:
    if isinstance(text.found, Rejected):
        return text.found
    for where, found in (("label", text.found.dataset_id), ("name", text.ids.dataset_id)):
        if found != dataset_id:
            return Rejected(Reject.DATASET_MISMATCH, f"dataset {found} in the {where}, {dataset_id} in the tar")
    return None


def _partner(other: Image | Text, why: Rejected) -> Rejected:
    return Rejected(Reject.PARTNER_REJECTED, f"{tars.printable(other.name)}: {why.reason.value}")
