"""preprocess/tars/pairs.py. Oracle: pairs written out by hand, and every file counted."""

import pytest
from small_pairs import jpeg, label

from preprocess.tars import jpegs, labels, pairs

A, B = "88_1_1_1", "88_2_1_1"


@pytest.fixture
def judged():
    """{stem: images and labels}, paired as dataset 88 -> {file: reason} of the rejects, and the valid stems."""

    def judge(files):
        images, texts = [], []
        for offset, (name, content) in enumerate(files):
            stem, _ = pairs.split_name(name)
            if name.endswith(".jpg"):
                images.append(pairs.Image(name, stem, offset, len(content), jpegs.inspect(content)))
            else:
                texts.append(pairs.Text(name, stem, labels.parse_name(stem), labels.parse_label(content)))
        found = pairs.pair(images, texts, 88)
        assert 2 * len(found.valid) + len(found.rejects) == len(files)
        assert len(found.valid) + found.causes.total() == len(images)
        assert "partner_rejected" not in found.causes  # where the label is at fault, its reason
        return [(name, why.reason.value) for name, why in found.rejects], [image.name for image, *_ in found.valid]

    return judge


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([(f"{A}.jpg", jpeg())], [(f"{A}.jpg", "label_missing")]),
        ([(f"{A}.txt", label())], [(f"{A}.txt", "image_missing")]),
        ([(f"{A}.jpg", b""), (f"{A}.txt", b"")], [(f"{A}.jpg", "not_an_image"), (f"{A}.txt", "label_empty")]),
        (
            [(f"{A}.jpg", jpeg()), (f"{A}.txt", b"")],
            [(f"{A}.jpg", "partner_rejected"), (f"{A}.txt", "label_empty")],
        ),
        (
            [(f"{A}.jpg", b"x"), (f"{A}.txt", label())],
            [(f"{A}.jpg", "not_an_image"), (f"{A}.txt", "partner_rejected")],
        ),
        (
            [(f"{A}.jpg", jpeg()), (f"{A}.txt", label(87))],
            [(f"{A}.jpg", "partner_rejected"), (f"{A}.txt", "dataset_mismatch")],
        ),
        (  # one id, under two names: the first image stays
            [(f"{B}.txt", label()), (f"{A}.jpg", jpeg()), (f"{B}.jpg", jpeg(1)), (f"{A}.txt", label())],
            [(f"{B}.jpg", "duplicate_id"), (f"{B}.txt", "partner_rejected")],
        ),
        (  # one id, but the first image is broken: the second one stays
            [(f"{A}.jpg", b"x"), (f"{A}.txt", label()), (f"{B}.jpg", jpeg(1)), (f"{B}.txt", label())],
            [(f"{A}.jpg", "not_an_image"), (f"{A}.txt", "partner_rejected")],
        ),
        (  # one name twice
            [(f"{A}.jpg", jpeg()), (f"x/{A}.jpg", jpeg(1)), (f"{A}.txt", label())],
            [(f"x/{A}.jpg", "duplicate_id")],
        ),
        (
            [(f"{A}.jpg", jpeg()), (f"x/{A}.jpg", jpeg(1)), (f"{A}.txt", label()), (f"x/{A}.txt", label())],
            [(f"x/{A}.jpg", "duplicate_id"), (f"x/{A}.txt", "partner_rejected")],
        ),
    ],
)
def test_each_file_has_its_own_reason(judged, files, expected):
    assert judged(files)[0] == expected
