"""What one tar holds: its files read and checked by several threads, counted, and written."""

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common import parquet, schemas, tars
from common.provenance import Provenance
from common.schemas import Reject
from preprocess import jpegs, labels, pairs
from preprocess.labels import Rejected
from preprocess.pairs import Image, Pairs, Text

IMAGE_SUFFIXES = (".jpg", ".jpeg")
LABEL_SUFFIX = ".txt"
_BATCH_IMAGES = 32  # handed to a thread at once
_BATCH_BYTES = 16 * 2**20


@dataclass
class TarFiles:
    """The files of a tar, in its order; directories are not among them."""

    images: list[Image] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    rejects: list[tuple[str, Rejected]] = field(default_factory=list)  # of no pair: bad names, a break
    num_members: int = 0
    num_checked: int = 0  # images whose JPEG was looked at
    num_other: int = 0  # neither images nor labels: README, index.csv
    damage: str = ""


class Readers:
    """Threads that check JPEGs while the tar is being read; a context manager."""

    def __init__(self, threads: int):
        self._pool, self._max_waiting = ThreadPoolExecutor(threads), 2 * threads

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, tar: Path, on_images: Callable[[int, int], None]) -> TarFiles:
        """All files of a tar, up to where it is damaged. `on_images` is told how many more images are checked, and
        up to which byte of the tar.
        """
        files = TarFiles()
        batch: list[tuple] = []  # (name, offset, size, JPEG) of images
        batch_bytes = 0
        waiting: deque[tuple[list[tuple], Future]] = deque()

        def collect() -> None:
            places, future = waiting.popleft()
            files.images += [Image(*place, found) for place, found in zip(places, future.result(), strict=True)]
            files.num_checked += len(places)
            if places:
                on_images(len(places), places[-1][1] + places[-1][2])

        def submit() -> None:
            future = self._pool.submit(_inspect_all, [content for *_, content in batch])
            waiting.append(([place for *place, _ in batch], future))
            batch.clear()
            if len(waiting) > self._max_waiting:
                collect()

        try:
            for member in tars.walk(tar, contents=True):
                if member.kind == "directory":
                    continue
                files.num_members += 1
                if _take(files, member):
                    batch.append((member.name, member.offset, member.size, member.content))
                    batch_bytes += len(member.content or b"")
                    if len(batch) == _BATCH_IMAGES or batch_bytes > _BATCH_BYTES:
                        submit()
                        batch_bytes = 0
        except tars.Damage as damage:
            broken = damage
        else:
            broken = None
        submit()
        while waiting:
            collect()
        if broken:
            _take_broken(files, tar, broken)
        return files


def _inspect_all(contents: list[bytes | None]) -> list[jpegs.Jpeg | Rejected]:
    absent = Rejected(Reject.JPEG_CORRUPT, "not a file, or far too large")
    return [absent if content is None else jpegs.inspect(content) for content in contents]


def _take(files: TarFiles, member: tars.Member) -> bool:
    """Note a member that is no image; True for an image, whose JPEG is to be checked."""
    suffix = _suffix(member.name)
    if suffix not in (*IMAGE_SUFFIXES, LABEL_SUFFIX):
        files.num_other += 1
    elif labels.parse_name(pairs.stem_of(member.name)) is None:
        files.rejects.append((member.name, Rejected(Reject.NAME_MALFORMED)))
    elif suffix in IMAGE_SUFFIXES:
        return True
    elif member.content is None:
        files.texts.append(Text(member.name, Rejected(Reject.LABEL_MALFORMED, "not a file, or far too large")))
    else:
        files.texts.append(Text(member.name, labels.parse_label(member.content)))
    return False


def _take_broken(files: TarFiles, tar: Path, damage: tars.Damage) -> None:
    """Note where the tar breaks: a reject, of the member that is cut off there or else of the tar itself."""
    why = Rejected(Reject.TAR_TRUNCATED, str(damage))
    files.damage = str(damage)
    files.num_members += 1
    suffix = _suffix(damage.member)
    if not damage.member or labels.parse_name(pairs.stem_of(damage.member)) is None:
        files.rejects.append((damage.member or tar.name, why))
    elif suffix in IMAGE_SUFFIXES:
        files.images.append(Image(damage.member, damage.offset, 0, why))
    elif suffix == LABEL_SUFFIX:
        files.texts.append(Text(damage.member, why))
    else:
        files.rejects.append((damage.member, why))


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > name.rfind("/") else ""


def pair(files: TarFiles, tar: Path) -> Pairs:
    """The tar's valid pairs, and the rejects of all its files."""
    dataset_id = int(tar.stem) if tar.stem.isascii() and tar.stem.isdigit() else None
    found = pairs.pair(files.images, files.texts, dataset_id)
    found.causes.update(why.reason.value for name, why in files.rejects if _suffix(name) in IMAGE_SUFFIXES)
    return found._replace(rejects=files.rejects + found.rejects)


def account(files: TarFiles, found: Pairs) -> dict:
    """Counts for the footer. Every member is an image, a label, a reject or another file: else this is a bug."""
    reasons = Counter(why.reason.value for _, why in found.rejects)
    counts = {
        "members": files.num_members,
        "images": len(found.valid),
        "labels": len(found.valid),
        "rejects": len(found.rejects),
        "other": files.num_other,
        "rejected": dict(sorted(reasons.items())),
        "renamed": found.num_renamed,
    }
    used = counts["images"] + counts["labels"] + counts["rejects"] + counts["other"]
    if used != counts["members"]:
        raise AssertionError(f"{counts['members']} members, but {used} images, labels, rejects and other files")
    return counts


def failure(tar: Path, files: TarFiles, counts: dict, max_reject_share: float) -> str:
    """Why the tar fails the stage, and what to do; empty if it does not."""
    if (
        not files.images
        and not files.texts
        and all(why.reason is Reject.TAR_TRUNCATED for _, why in files.rejects)
    ):
        size = tar.stat().st_size
        return f"{tar} ({size:,} bytes) holds no images: download it again, or move it out of the folder"
    share = counts["rejects"] / (counts["images"] + counts["labels"] + counts["rejects"])
    if share <= max_reject_share:
        return "" if counts["images"] else f"{tar} holds no valid images"
    causes = Counter(counts["rejected"])
    del causes[Reject.PARTNER_REJECTED.value]  # a partner is rejected for the other's reason
    told = ", ".join(f"{reason} {count:,}" for reason, count in causes.most_common(3))
    return f"{tar}: {share:.1%} of its images and labels are rejected ({told}), more than {max_reject_share:.1%}"


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
    path: Path, found: Pairs, tar_file: str, made: Provenance, counts: dict, damage: str
) -> None:
    with parquet.writer(path, schemas.INTERMEDIATES, made) as out:
        out.append(pairs.columns(found.valid, tar_file))
        out.rows = counts
        out.facts = {"damage": damage}
