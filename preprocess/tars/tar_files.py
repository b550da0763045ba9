"""What one tar holds: its files read and checked by several threads, counted, and written."""

from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from common import parquet, schemas
from common.archives import tars
from common.archives.restart_points import RestartPoint
from common.errors import PipelineError
from common.provenance import Provenance
from common.schemas import Reject, count_reasons
from preprocess.tars import jpegs, label_geometry, labels, pairs
from preprocess.tars.labels import Label, Rejected
from preprocess.tars.pairs import Image, Pairs, Text

IMAGE_SUFFIXES = (".jpg", ".jpeg")
LABEL_SUFFIX = ".txt"
_DAMAGES = (Reject.TAR_TRUNCATED, Reject.TAR_DAMAGED, Reject.GZIP_DAMAGED)
_NO_JPEG = Rejected(Reject.JPEG_CORRUPT, "not a file, or far too large")
_NO_LABEL = Rejected(Reject.LABEL_MALFORMED, "not a file, or far too large")
_WRITTEN_ROWS = 10_000  # at a time: their columns take as much memory as what they are made from
_REPORT_EVERY_S = 0.2  # the progress of checking; a signal to stop waits as long
_Unchecked = tuple[tars.Member, str]  # an image and its stem


@dataclass
class TarFiles:
    """The files of a tar, in its order; directories are not among them."""

    images: list[Image] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    rejects: list[tuple[str, Rejected]] = field(default_factory=list)  # in no pair: malformed names, damages
    num_members: int = 0
    num_checked: int = 0  # images whose JPEG was checked
    num_other: int = 0  # neither images nor labels: README, index.csv
    damages: list[tars.Damage] = field(default_factory=list)
    restart_points: list[RestartPoint] = field(default_factory=list)  # of a gzip stream


def read(tar: Path, threads: int, on_images: Callable[[int, int], None]) -> TarFiles:
    """All readable files of a tar. `on_images` is regularly called with how many more images have been checked,
    and up to about which byte of the inflated tar; what it raises ends the reading.

    The threads take turns reading: whoever has checked an image reads the next. A thread that only reads would
    hold Python's lock for many images at a time, and the decoders would wait for it.
    """
    files, turn = TarFiles(), Lock()
    unchecked = _images(tar, files)

    def check_images() -> None:
        while True:
            with turn:
                image = next(unchecked, None)
            if image is None:
                return
            member, stem = image
            jpeg = _NO_JPEG if member.content is None else jpegs.inspect(member.content)
            files.images.append(Image(member.name, stem, member.offset, member.size, jpeg))

    with ThreadPoolExecutor(threads) as pool:
        running = {pool.submit(check_images) for _ in range(threads)}
        try:
            while running:
                done, running = wait(running, _REPORT_EVERY_S, FIRST_EXCEPTION)
                for check in done:
                    check.result()  # raises what it has raised
                new = len(files.images) - files.num_checked
                files.num_checked += new
                on_images(new, files.images[-1].offset if files.images else 0)
        finally:  # whatever has been raised, the threads end
            with turn:
                unchecked.close()
    files.images.sort(key=lambda image: image.offset)
    return files


def _images(tar: Path, files: TarFiles) -> Generator[_Unchecked, None, None]:
    """The images of a tar; everything else is added to `files` in passing."""
    for member in tars.walk(tar, contents=True, points=files.restart_points):
        if isinstance(member, tars.Damage):
            files.num_members += 1
            _add_damage(files, tar, member)
        elif member.kind != "directory":
            files.num_members += 1
            image = _add(files, member)
            if image:
                yield image


def _add(files: TarFiles, member: tars.Member) -> _Unchecked | None:
    """Add a member that is no image to `files`; return one that is, its JPEG being unchecked."""
    stem, suffix = pairs.split_name(member.name)
    if suffix not in (LABEL_SUFFIX, *IMAGE_SUFFIXES) or stem.startswith("._"):  # macOS: attributes of a file
        files.num_other += 1
    elif (ids := labels.parse_name(stem)) is None:
        files.rejects.append((member.name, Rejected(Reject.NAME_MALFORMED, labels.NAME_FORM)))
    elif suffix != LABEL_SUFFIX:
        return member, stem
    else:
        label = _NO_LABEL if member.content is None else labels.parse_label(member.content)
        files.texts.append(Text(member.name, stem, ids, label))
    return None


def _add_damage(files: TarFiles, tar: Path, damage: tars.Damage) -> None:
    """Add a damage: a reject, of the file that it has cut or else of the tar itself."""
    why = Rejected(damage.reason, damage.detail)
    files.damages.append(damage)
    stem, suffix = pairs.split_name(damage.member)
    ids = labels.parse_name(stem)
    if ids and suffix in IMAGE_SUFFIXES:
        files.images.append(Image(damage.member, stem, damage.start, 0, why))
    elif ids and suffix == LABEL_SUFFIX:
        files.texts.append(Text(damage.member, stem, ids, why))
    else:
        files.rejects.append((damage.member or tar.name, why))


def dataset_of(tar: Path, files: TarFiles) -> int | None:
    """The dataset in a tar's name or, if that is not a number, the most frequent one among its labels."""
    name = tars.stem(tar)
    if _is_number(name):
        return int(name)
    counts = Counter(text.label.dataset_id for text in files.texts if isinstance(text.label, Label))
    return counts.most_common(1)[0][0] if counts else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def pair(files: TarFiles, dataset_id: int | None) -> Pairs:
    """The tar's valid pairs, and the rejects of all its files."""
    paired = pairs.pair(files.images, files.texts, dataset_id)
    paired.causes.update(
        why.reason.value for name, why in files.rejects if pairs.split_name(name)[1] in IMAGE_SUFFIXES
    )
    return paired._replace(rejects=files.rejects + paired.rejects)


def account(tar: Path, files: TarFiles, paired: Pairs) -> dict:
    """Counts for the footer. Every member is an image, a label, a reject or another file: if not, this is a bug,
    and raises PipelineError, since other tars are not affected.
    """
    num_pairs, num_rejects = len(paired.valid), len(paired.rejects)
    counts = {"images": num_pairs, "labels": num_pairs, "rejects": num_rejects, "other": files.num_other}
    if sum(counts.values()) != files.num_members:
        raise PipelineError(
            f"{tar} has {files.num_members:,} members, but {sum(counts.values()):,} images, labels, rejects and "
            "other files: a bug in preprocess/tars/tar_files.py"
        )
    reasons = count_reasons(why for _, why in paired.rejects)
    return {"members": files.num_members, **counts, "rejected": reasons, "renamed": paired.num_renamed}


def failure(tar: Path, files: TarFiles, counts: dict, max_reject_share: float) -> str:
    """Why the tar fails the stage, and what to do; empty if it does not."""
    if not files.images and not files.texts and all(why.reason in _DAMAGES for _, why in files.rejects):
        with open(tar, "rb") as file:
            what = "is a web page" if file.read(100).lstrip().startswith(b"<") else "holds no images"
        return f"{tar} ({tar.stat().st_size:,} bytes) {what}: download it again, or move it out of the folder"
    share = counts["rejects"] / (counts["images"] + counts["labels"] + counts["rejects"])
    if share <= max_reject_share:
        return "" if counts["images"] else f"{tar} holds no valid images"
    causes = Counter(counts["rejected"])
    del causes[Reject.PARTNER_REJECTED.value]  # a partner is rejected for the other's reason
    listed = ", ".join(f"{reason} {count:,}" for reason, count in causes.most_common(3))
    return (
        f"{tar}: {share:.1%} of its images and labels are rejected ({listed}), more than {max_reject_share:.1%}: "
        "an assumption about the data is wrong, or data.max_reject_share is too low"
    )


def notes(tar: Path, files: TarFiles, dataset_id: int | None) -> list[str]:
    """What the summary of the run reports about a tar."""
    lines = []
    if files.damages:
        # what is wrong with the gzip stream first: it may be why the tar makes no sense
        first = min(files.damages, key=lambda damage: damage.reason is not Reject.GZIP_DAMAGED)
        more = f" (and {len(files.damages) - 1:,} more, see the rejects)" if len(files.damages) > 1 else ""
        lines.append(f"{tar.name} is damaged: {first.detail}{more}")
    if dataset_id is not None and not _is_number(tars.stem(tar)):
        lines.append(f"{tar.name} is assumed to be dataset {dataset_id:04d}, as in most of its labels")
    return lines


def write_rejects(path: Path, paired: Pairs, record: Provenance, counts: dict) -> None:
    with parquet.writer(path, schemas.REJECTS, record) as out:
        out.append(
            {
                "member": [tars.printable(name) for name, _ in paired.rejects],
                "reason": [why.reason.value for _, why in paired.rejects],
                "detail": [why.detail for _, why in paired.rejects],
            }
        )
        out.rows = counts


def write_intermediates(
    path: Path, paired: Pairs, tar_file: str, record: Provenance, counts: dict, damages: list[tars.Damage]
) -> Counter[str]:
    """Write the valid pairs; returns how many labels disagree with their positions, as the footer states."""
    disagreements: Counter[str] = Counter()
    with parquet.writer(path, schemas.INTERMEDIATES, record) as out:
        for start in range(0, len(paired.valid), _WRITTEN_ROWS):
            columns = pairs.columns(paired.valid[start : start + _WRITTEN_ROWS], tar_file)
            disagreements.update(label_geometry.count_disagreements(columns))  # "+=" would drop zeros
            out.append(columns)
        out.rows = counts
        out.facts = {"damages": [damage.detail for damage in damages], "disagreements": dict(disagreements)}
    return disagreements
