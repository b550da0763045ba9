"""What one tar holds: its files read and checked by several threads, counted, and written."""

from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from common import parquet, schemas
from common.archives import tars
from common.archives.restart_points import RestartPoint
from common.errors import PipelineError
from common.provenance import Provenance
from common.schemas import Reject
from preprocess.tars import jpegs, label_geometry, labels, pairs
from preprocess.tars.jpegs import Jpeg
from preprocess.tars.labels import Label, Rejected
from preprocess.tars.pairs import Image, Pairs, Text

IMAGE_SUFFIXES = (".jpg", ".jpeg")
LABEL_SUFFIX = ".txt"
_DAMAGES = (Reject.TAR_TRUNCATED, Reject.TAR_DAMAGED, Reject.GZIP_DAMAGED)
_SUFFIXES = (LABEL_SUFFIX, *IMAGE_SUFFIXES)
_WRITTEN_ROWS = 10_000  # at a time: their columns take as much memory as what they are made from
_TELL_EVERY_S = 0.2  # how far the checking is; a signal to stop waits as long
_Unchecked = tuple[str, str, int, int, memoryview | None]  # of an image: name, stem, offset, size, the JPEG


@dataclass
class TarFiles:
    """The files of a tar, in its order; directories are not among them."""

    images: list[Image] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    rejects: list[tuple[str, Rejected]] = field(default_factory=list)  # of no pair: bad names, a break
    num_members: int = 0
    num_checked: int = 0  # images whose JPEG was looked at
    num_other: int = 0  # neither images nor labels: README, index.csv
    damages: list[tars.Damage] = field(default_factory=list)
    restart_points: list[RestartPoint] = field(default_factory=list)  # of a gzip stream


class Readers:
    """Threads that read a tar and check its JPEGs; a context manager.

    They take turns at reading: whoever has checked an image reads the next. A thread that only reads would hold
    Python's lock for many images at a time, and the decoders would wait for it.
    """

    def __init__(self, threads: int):
        self._pool, self._num_threads = ThreadPoolExecutor(threads), threads

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown()

    def read(self, tar: Path, on_images: Callable[[int, int], None]) -> TarFiles:
        """All files of a tar that can be had. `on_images` is told now and then how many more images are checked,
        and up to about which byte of the file; what it raises ends the reading.
        """
        files = TarFiles()
        unchecked, turn = _images(tar, files), Lock()

        def check_images() -> None:
            while True:
                with turn:
                    image = next(unchecked, None)
                if image is None:
                    return
                name, stem, offset, size, content = image
                files.images.append(Image(name, stem, offset, size, _inspect(content)))

        checks: list[Future[None]] = []
        try:
            checks += [self._pool.submit(check_images) for _ in range(self._num_threads)]
            going_on = True
            while going_on:
                done, running = wait(checks, _TELL_EVERY_S, FIRST_EXCEPTION)
                going_on = bool(running) and not any(check.exception() for check in done)
                new = len(files.images) - files.num_checked
                files.num_checked += new
                on_images(new, _position(files))
        finally:  # the threads end, whatever has been raised
            with turn:
                unchecked.close()
            wait(checks)
        files.images.sort(key=lambda image: image.offset)
        for error in filter(None, (check.exception() for check in checks)):
            raise error
        return files


def _position(files: TarFiles) -> int:
    """About up to which byte of the file a tar has been read; of a gzip stream by its last restart point."""
    if files.restart_points:
        return files.restart_points[-1].bit // 8
    return files.images[-1].offset if files.images else 0


def _images(tar: Path, files: TarFiles) -> Generator[_Unchecked, None, None]:
    """The images of a tar; all else is noted in `files`, in passing."""
    for member in tars.walk(tar, contents=True, points=files.restart_points):
        if isinstance(member, tars.Damage):
            files.num_members += 1
            _take_damage(files, tar, member)
        elif member.kind != "directory":
            files.num_members += 1
            image = _take(files, member)
            if image:
                yield image


def _inspect(content: memoryview | None) -> Jpeg | Rejected:
    if content is None:
        return Rejected(Reject.JPEG_CORRUPT, "not a file, or far too large")
    return jpegs.inspect(content)


def _take(files: TarFiles, member: tars.Member) -> _Unchecked | None:
    """Note a member that is no image; return an image, its JPEG being unchecked."""
    name, offset, size, _, content = member
    stem, suffix = pairs.split_name(name)
    if suffix not in _SUFFIXES or stem.startswith("._"):  # what macOS adds of a file's attributes: ._NAME.jpg
        files.num_other += 1
    elif (ids := labels.parse_name(stem)) is None:
        files.rejects.append((name, Rejected(Reject.NAME_MALFORMED, labels.NAME_FORM)))
    elif suffix != LABEL_SUFFIX:
        return name, stem, offset, size, content
    elif content is None:
        files.texts.append(Text(name, stem, ids, Rejected(Reject.LABEL_MALFORMED, "not a file, or far too large")))
    else:
        files.texts.append(Text(name, stem, ids, labels.parse_label(bytes(content))))
    return None


def _take_damage(files: TarFiles, tar: Path, damage: tars.Damage) -> None:
    """Note a damage: a reject, of the file that it has cut or else of the tar itself."""
    why = Rejected(damage.reason, damage.detail)
    files.damages.append(damage)
    stem, suffix = pairs.split_name(damage.member)
    ids = labels.parse_name(stem)
    if ids is None:
        files.rejects.append((damage.member or tar.name, why))
    elif suffix in IMAGE_SUFFIXES:
        files.images.append(Image(damage.member, stem, damage.start, 0, why))
    elif suffix == LABEL_SUFFIX:
        files.texts.append(Text(damage.member, stem, ids, why))
    else:
        files.rejects.append((damage.member, why))


def dataset_of(tar: Path, files: TarFiles) -> int | None:
    """The dataset that a tar's name says, or where it is no number, the one that most of its labels say."""
    name = tars.stem(tar)
    if _is_number(name):
        return int(name)
    said = Counter(text.found.dataset_id for text in files.texts if isinstance(text.found, Label))
    return said.most_common(1)[0][0] if said else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def pair(files: TarFiles, dataset_id: int | None) -> Pairs:
    """The tar's valid pairs, and the rejects of all its files."""
    found = pairs.pair(files.images, files.texts, dataset_id)
    found.causes.update(
        why.reason.value for name, why in files.rejects if pairs.split_name(name)[1] in IMAGE_SUFFIXES
    )
    return found._replace(rejects=files.rejects + found.rejects)


def account(tar: Path, files: TarFiles, found: Pairs) -> dict:
    """Counts for the footer. Every member is an image, a label, a reject or another file: else this is a bug, and
    raises PipelineError, since other tars are not touched by it.
    """
    reasons = Counter(why.reason.value for _, why in found.rejects)
    counts = {
        "members": files.num_members,
        "images": len(found.valid),
        "labels": len(found.valid),
        "rejects": len(found.rejects),
        "other": files.num_other,
    }
    used = counts["images"] + counts["labels"] + counts["rejects"] + counts["other"]
    if used != counts["members"]:
        raise PipelineError(
            f"{tar} has {counts['members']:,} members, but {used:,} images, labels, rejects and other files: "
            "a bug in preprocess/tars/tar_files.py"
        )
    return {**counts, "rejected": dict(sorted(reasons.items())), "renamed": found.num_renamed}


def failure(tar: Path, files: TarFiles, counts: dict, max_reject_share: float) -> str:
    """Why the tar fails the stage, and what to do; empty if it does not."""
    if not files.images and not files.texts and all(why.reason in _DAMAGES for _, why in files.rejects):
        with open(tar, "rb") as file:
            what = "is a web page" if file.read(100).lstrip().startswith(b"<") else "holds no images"
        size = tar.stat().st_size
        return f"{tar} ({size:,} bytes) {what}: download it again, or move it out of the folder"
    share = counts["rejects"] / (counts["images"] + counts["labels"] + counts["rejects"])
    if share <= max_reject_share:
        return "" if counts["images"] else f"{tar} holds no valid images"
    causes = Counter(counts["rejected"])
    del causes[Reject.PARTNER_REJECTED.value]  # a partner is rejected for the other's reason
    told = ", ".join(f"{reason} {count:,}" for reason, count in causes.most_common(3))
    return (
        f"{tar}: {share:.1%} of its images and labels are rejected ({told}), more than {max_reject_share:.1%}: "
        "an assumption about the data is wrong, or data.max_reject_share is too low"
    )


def notes(tar: Path, files: TarFiles, dataset_id: int | None) -> list[str]:
    """What the summary of the run tells of a tar."""
    found = []
    if files.damages:
        # what is wrong with the gzip stream first: it may be why the tar makes no sense
        first = min(files.damages, key=lambda damage: damage.reason is not Reject.GZIP_DAMAGED)
        more = f" (and {len(files.damages) - 1:,} more, see the rejects)" if len(files.damages) > 1 else ""
        found.append(f"{tar.name} is damaged: {first.detail}{more}")
    if dataset_id is not None and not _is_number(tars.stem(tar)):
        found.append(f"{tar.name} is taken for dataset {dataset_id:04d}, as most of its labels say")
    return found


def write_rejects(path: Path, found: Pairs, made: Provenance, counts: dict) -> None:
    with parquet.writer(path, schemas.REJECTS, made) as out:
        out.append(
            {
                "member": [tars.printable(name) for name, _ in found.rejects],
                "reason": [why.reason.value for _, why in found.rejects],
                "detail": [why.detail for _, why in found.rejects],
            }
        )
        out.rows = counts


def write_intermediates(
    path: Path, found: Pairs, tar_file: str, made: Provenance, counts: dict, damages: list[tars.Damage]
) -> Counter[str]:
    """Write the valid pairs; returns how many labels disagree with their positions, as the footer says."""
    disagreements: Counter[str] = Counter()
    with parquet.writer(path, schemas.INTERMEDIATES, made) as out:
        for start in range(0, len(found.valid), _WRITTEN_ROWS):
            columns = pairs.columns(found.valid[start : start + _WRITTEN_ROWS], tar_file)
            disagreements.update(label_geometry.count_disagreements(columns))  # "+=" would drop what is 0
            out.append(columns)
        out.rows = counts
        out.facts = {"damages": [damage.detail for damage in damages], "disagreements": dict(disagreements)}
    return disagreements
