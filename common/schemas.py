"""One pyarrow schema per artefact: the contract between the stages. Comments state the units."""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

import pyarrow as pa

SPLITS = ("train", "val", "test")


class Reject(StrEnum):
    """Why a member of a tar, or another image, was rejected. The value is in the rejects file and the summary."""

    LABEL_EMPTY = "label_empty"  # the text file has no text: the dataset has no label for this image
    LABEL_MALFORMED = "label_malformed"  # not one readable `d` line of 17 numbers
    LABEL_MISSING = "label_missing"  # an image without a text file
    IMAGE_MISSING = "image_missing"  # a text file, or a row of a table of photographs, without an image
    BUILDING_MISSING = "building_missing"  # a photograph for which no building is given
    JPEG_CORRUPT = "jpeg_corrupt"  # damaged: the decoder finds an error anywhere in the file
    NOT_AN_IMAGE = "not_an_image"  # a .jpg in no known image format: an empty file, a web page, HEIC
    IMAGE_TOO_LARGE = "image_too_large"  # more than 2^27 (134 million) pixels
    JPEG_BLANK = "jpeg_blank"  # one flat colour
    NOT_FINITE = "not_finite"  # nan or inf in the label
    POSITION_OUT_OF_RANGE = "position_out_of_range"  # |latitude| > 90 or |longitude| > 180
    ANGLE_OUT_OF_RANGE = "angle_out_of_range"  # heading, pitch or roll outside its range
    DISTANCE_OUT_OF_RANGE = "distance_out_of_range"  # not in (0, 10 km]
    DUPLICATE_ID = "duplicate_id"  # an id already used by an earlier image of the tar, or of imported photographs
    DATASET_MISMATCH = "dataset_mismatch"  # the label's dataset is not the tar's
    NAME_MALFORMED = "name_malformed"  # a .jpg or .txt whose name is not four ids joined by _
    PARTNER_REJECTED = "partner_rejected"  # the good half of a pair whose other half was rejected
    CONTENT_CHANGED = "content_changed"  # the bytes differ from those that process_tar.py read
    TAR_TRUNCATED = "tar_truncated"  # the tar ends early; everything before was kept
    TAR_DAMAGED = "tar_damaged"  # bytes outside any member; everything before and after was kept
    GZIP_DAMAGED = "gzip_damaged"  # the gzip stream has a wrong checksum or length, or ends here
    VECTOR_MISSING = "vector_missing"  # embedding_model.name is a table of vectors that has none of this image
    PAIR_MALFORMED = "pair_malformed"  # a line of verpairs.txt that is not two ids, 1 or 0, and two angles
    MARKED_INVALID = "marked_invalid"  # of new data: its column named by --valid is false or empty
    VECTOR_UNUSABLE = "vector_unusable"  # missing, zero or not finite; or those of its building cancel out


class Rejected(NamedTuple):
    """Why something was rejected: a row of the rejects file without the member's name."""

    reason: Reject
    detail: str = ""


def count_reasons(rejected: Iterable[Rejected]) -> dict[str, int]:
    """The number of rejects by reason, for a footer or a summary."""
    return dict(sorted(Counter(why.reason.value for why in rejected).items()))


INTERMEDIATES = pa.schema(
    [
        (
            "dataset_id",
            pa.int32(),
        ),  # of the tar: 88 for 0088.tar; of imported photographs 1000 to 9999, by their name
        ("target_id", pa.int64()),  # a point on a facade: the "building"; unique within a dataset, as all ids
        ("patch_id", pa.int64()),  # an image
        ("street_view_id", pa.int64()),  # the panorama that the image is cut from
        ("building_id", pa.string()),  # "0088_1234": dataset, target; of imported photographs name, building
        ("streetview_image_id", pa.string()),  # "0088_567": dataset, patch; of imported photographs name, id
        ("target_lat", pa.float64()),  # degrees; NaN, as other numbers up to roll, if not known of a photograph
        ("target_lon", pa.float64()),  # degrees
        ("target_height", pa.float32()),  # m
        ("normal_x", pa.float32()),  # of the facade at the target, unit vector
        ("normal_y", pa.float32()),  # the same
        ("normal_z", pa.float32()),  # the same
        ("camera_lat", pa.float64()),  # degrees
        ("camera_lon", pa.float64()),  # degrees
        ("camera_height", pa.float32()),  # m
        ("distance", pa.float32()),  # m, horizontal, camera to target
        ("heading", pa.float32()),  # degrees, bearing camera to target: 0 = north, clockwise, -180 to 360
        ("pitch", pa.float32()),  # degrees, atan((target_height - camera_height) / distance): 0 = level, 90 = sky
        ("roll", pa.float32()),  # degrees
        ("aligned", pa.bool_()),  # the label has an `a` line: the centre was corrected
        ("width", pa.int32()),  # px
        ("height", pa.int32()),  # px
        ("tar_file", pa.string()),  # name of the tar in raw_dir; of imported photographs name/file
        ("image_path", pa.string()),  # member of the tar; of imported photographs the file, or the row of a table
        ("image_offset", pa.int64()),  # bytes from the start of the tar, as it is when inflated, to the JPEG
        ("image_size", pa.int64()),  # bytes of the JPEG
        ("content_hash", pa.uint64()),  # xxh3-64 of the JPEG's bytes
    ]
)

RESTART_POINTS = pa.schema(
    [
        ("offset", pa.int64()),  # bytes of the tar before it, as it is when inflated
        ("bit", pa.int64()),  # of the gzip file, where a deflate block begins
        ("window", pa.binary()),  # the last 32 kB of the tar before it, which the block may refer to
    ]
)

REJECTS = pa.schema(
    [
        ("member", pa.string()),  # its name in the tar; of new data the path, row or id
        ("reason", pa.string()),  # one of Reject
        ("detail", pa.string()),  # what exactly was found
    ]
)

FINGERPRINTS = pa.schema(
    [
        ("streetview_image_id", pa.string()),
        ("building_id", pa.string()),
        ("phash", pa.uint64()),  # imagehash's phash, bit 63 first
        ("dhash", pa.uint64()),  # imagehash's dhash, bit 63 first
    ]
)

SUMMARY = pa.schema(
    [
        ("split", pa.string()),  # "train", "val", "test"; "all" before there are splits
        ("dataset_id", pa.int32()),
        ("images", pa.int64()),
        ("buildings", pa.int64()),
        ("panoramas", pa.int64()),
        ("views_min", pa.int64()),  # images of a building
        ("views_median", pa.float64()),
        ("views_mean", pa.float64()),
        ("views_max", pa.int64()),
        ("distance_median", pa.float64()),  # m, horizontal, camera to target
        ("mean_lat", pa.float64()),  # degrees, of the images' targets
        ("mean_lon", pa.float64()),  # the same
    ]
)


def vector(kind: pa.DataType, length: int) -> pa.DataType:
    """A fixed-size list without nulls: Parquet reads and writes it three times as fast as a nullable one."""
    return pa.list_(pa.field("element", kind, nullable=False), length)


def embeddings(dim: int) -> pa.Schema:
    """The columns of the intermediates and the backbone's output."""
    return INTERMEDIATES.append(
        pa.field("embedding", vector(pa.float16(), dim))  # mean of the views' unit vectors, or one view's output
    )


_MERGED_COLUMNS = [
    *("building_id", "streetview_image_id", "dataset_id", "target_id", "patch_id", "street_view_id"),
    *("target_lat", "target_lon", "target_height", "camera_lat", "camera_lon", "heading", "pitch", "distance"),
]


def merged(dim: int) -> pa.Schema:
    """Rows of one split, sorted by (dataset_id, target_id, patch_id): a building's rows are contiguous."""
    fields = [INTERMEDIATES.field(name) for name in _MERGED_COLUMNS]
    fields += [pa.field("cell_id", pa.int64())]  # the map cell of the target
    fields += [INTERMEDIATES.field(name) for name in ("tar_file", "image_offset", "image_size")]
    return pa.schema([*fields, pa.field("embedding", vector(pa.float16(), dim))])


def difficulty_part(k: int) -> pa.Schema:
    """Neighbours of consecutive rows of merged/train; similarities in float32, to calibrate the bands."""
    return pa.schema(
        [("neighbor_rows", vector(pa.int32(), k)), ("neighbor_similarities", vector(pa.float32(), k))]
    )


def difficulty(k: int, bands: int) -> pa.Schema:
    """A row per row of merged/train, in the same order."""
    return pa.schema(
        [
            ("streetview_image_id", pa.string()),
            ("building_id", pa.string()),
            ("neighbor_rows", vector(pa.int32(), k)),  # rows of merged/train, most similar first, -1 = none
            ("neighbor_similarities", vector(pa.float16(), k)),  # cosine
            ("band_offsets", vector(pa.uint8(), bands + 1)),  # band b = neighbours offsets[b]:offsets[b+1]
        ]
    )


def history(bands: int) -> pa.Schema:
    """A row per epoch of a training run, from epoch 0 (before training, where what needs steps is NaN)."""
    names = ["loss", "val_map_at_r", "val_recall_at_1", "seconds", "triplets_per_second"]  # without validation
    arms = [*(f"band_{b}" for b in range(bands)), "random"]
    names += [f"share_{arm}" for arm in arms]  # of the epoch's negatives
    names += [f"reward_{arm}" for arm in arms]  # share of the arm's triplets that were semi-hard
    return pa.schema([("epoch", pa.int32()), *((name, pa.float64()) for name in names)])


def buildings(dim: int, others: Iterable[pa.Field] = ()) -> pa.Schema:
    """A row per building, sorted by `building`. `others`: columns of images with one value in each building."""
    return pa.schema(
        [
            ("building", pa.string()),  # value of the column that names buildings
            ("images", pa.int64()),
            ("spread", pa.float32()),  # 1 - length of the mean of its images' unit vectors: 0 = all equal
            ("image_ids", pa.list_(pa.string())),  # by their cosine to the building's vector, most typical first
            ("lat", pa.float64()),  # degrees, mean over its images; NaN if unknown
            ("lon", pa.float64()),  # the same
            ("split", pa.string()),  # "train", "val", "test"; "" if its vectors do not tell
            ("cluster", pa.int32()),  # from 0, the largest; -1 = none
            ("cluster_similarity", pa.float32()),  # cosine to the cluster's centre
            ("x", pa.float32()),  # of the 2-D projection; NaN if it is not among the projected
            ("y", pa.float32()),  # the same
            *others,
            ("embedding", vector(pa.float32(), dim)),  # mean of its images' unit vectors, of length 1
        ]
    )


def queries(methods: list[str]) -> pa.Schema:
    """A row per query of an evaluation: where it is, and what each method of the table found for it."""
    names = "streetview_image_id building_id dataset_id target_lat target_lon heading distance tar_file".split()
    fields = [INTERMEDIATES.field(name) for name in [*names, "image_offset", "image_size"]]
    fields.append(("cell_id", pa.int64()))  # the map cell of the target
    for method in methods:
        of_method = [
            ("rank", pa.int64()),  # of its most similar match, 1 = first; 0: it has no match
            ("map_at_r", pa.float32()),  # its average precision at R
            ("match", pa.string()),  # id of its most similar match; "": none
            ("match_cosine", pa.float32()),  # NaN: none
            ("wrong", pa.string()),  # id of the most similar image of another building outside the zone; "": none
            ("wrong_cosine", pa.float32()),  # NaN: none
        ]
        fields += [(f"{name}_{method}", kind) for name, kind in of_method]
    return pa.schema(fields)


def pairs(methods: Iterable[str]) -> pa.Schema:
    """A row per verified pair of the dataset's own test set, with the cosine by each method."""
    return pa.schema(
        [
            ("line", pa.int64()),  # of verpairs.txt, from 1
            ("first", pa.string()),  # "0006-0087241": dataset, patch
            ("second", pa.string()),  # the same
            ("same", pa.bool_()),  # both show the same target
            ("heading_difference", pa.float64()),  # degrees, between the two views; NaN if unknown
            ("pitch_difference", pa.float64()),  # the same
            *((f"cosine_{method}", pa.float32()) for method in methods),
        ]
    )
