"""The images and labels of one tar, brought together: a row for each valid pair, a reject for each other file."""

from collections import Counter, defaultdict
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
    found: Jpeg | Rejected


class Text(NamedTuple):
    name: str
    stem: str
    ids: Ids  # that the name says
    found: Label | Rejected


_File = TypeVar("_File", Image, Text)


class Pairs(NamedTuple):
    """Every image and label of a tar is in exactly one pair, or has a row among the rejects."""

    valid: list[tuple[Image, Jpeg, Label]]  # in the order of the images
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
    text_of = _by_stem(texts)
    pairs = Pairs([], [], Counter(), 0)
    seen: set[int] = set()
    renamed = 0
    for key, image in _by_stem(images).items():
        text, jpeg = text_of.pop(key, None), image.found
        if text is None:
            why = jpeg if isinstance(jpeg, Rejected) else _alone(key[1], Reject.LABEL_MISSING)
            pairs.rejects.append((image.name, why))
            pairs.causes[why.reason.value] += 1
            continue
        label = _checked(text, dataset_id)
        if isinstance(jpeg, Rejected):
            cause = why_image = jpeg
            why_text = label if isinstance(label, Rejected) else _partner(image, jpeg)
        elif isinstance(label, Rejected):
            cause = why_text = label
            why_image = _partner(text, label)
        elif label.patch_id in seen:
            cause = why_image = Rejected(Reject.DUPLICATE_ID, f"{label.dataset_id:04d}_{label.patch_id}")
            why_text = _partner(image, why_image)
        else:
            seen.add(label.patch_id)
            pairs.valid.append((image, jpeg, label))
            renamed += label[:4] != text.ids
            continue
        pairs.rejects.extend([(image.name, why_image), (text.name, why_text)])
        pairs.causes[cause.reason.value] += 1
    for key, text in text_of.items():  # those that are left have no image
        label = _checked(text, dataset_id)
        why = label if isinstance(label, Rejected) else _alone(key[1], Reject.IMAGE_MISSING)
        pairs.rejects.append((text.name, why))
    return pairs._replace(num_renamed=renamed)


def columns(valid: list[tuple[Image, Jpeg, Label]], tar_file: str) -> dict[str, Sequence]:
    """The columns of the intermediates (see schemas.INTERMEDIATES)."""
    images, labels = [image for image, _, _ in valid], [label for _, _, label in valid]
    table = _transposed(labels, Label._fields) | _transposed([jpeg for _, jpeg, _ in valid], Jpeg._fields)
    table["building_id"] = [f"{label.dataset_id:04d}_{label.target_id}" for label in labels]
    table["streetview_image_id"] = [f"{label.dataset_id:04d}_{label.patch_id}" for label in labels]
    table["tar_file"] = [tar_file] * len(valid)
    table["image_path"] = [tars.printable(image.name) for image in images]
    table["image_offset"] = [image.offset for image in images]
    table["image_size"] = [image.size for image in images]
    return table


def _transposed(rows: Sequence[tuple], names: tuple[str, ...]) -> dict[str, Sequence]:
    """A column for each field, which has a name, of the tuples in `rows`."""
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return dict(zip(names, columns, strict=True))


def _by_stem(files: Iterable[_File]) -> dict[tuple[str, int], _File]:
    """(stem, how many files of this stem came before) -> file."""
    counts: defaultdict[str, int] = defaultdict(int)
    found = {}
    for file in files:
        number = counts[file.stem]
        found[file.stem, number] = file
        counts[file.stem] = number + 1
    return found


def _alone(number: int, missing: Reject) -> Rejected:
    """Why a file without a partner cannot be used. `number`: of files with the same stem before it."""
    return Rejected(Reject.DUPLICATE_ID if number else missing)


def _checked(text: Text, dataset_id: int | None) -> Label | Rejected:
    """The label, unless it is of another dataset than the tar."""
    if isinstance(text.found, Rejected):
        return text.found
    for where, found in (("label", text.found.dataset_id), ("name", text.ids.dataset_id)):
        if found != dataset_id:
            return Rejected(Reject.DATASET_MISMATCH, f"dataset {found} in the {where}, {dataset_id} in the tar")
    return text.found


def _partner(other: Image | Text, why: Rejected) -> Rejected:
    return Rejected(Reject.PARTNER_REJECTED, f"{tars.printable(other.name)}: {why.reason.value}")
