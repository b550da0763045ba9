"""common/imagery/decoding.py, and that all stages decode by its rule. Oracle: Pillow, with
ImageOps.exif_transpose.
"""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile

import imagehash
import numpy as np
import pytest
import xxhash
from embedding_setup import SIZES, Setup, cosines, jpeg, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from image_kinds import claiming, encoded, kinds, mutated
from PIL import Image, ImageOps
from small_pairs import label

from common import parquet
from common.imagery import pictures
from common.imagery.decoding import Undecodable, decode, decode_grey, survey
from common.schemas import Reject
from generate import generate_embeddings
from preprocess import compute_fingerprints, process_tar
from preprocess.duplicates import fingerprints
from preprocess.tars import jpegs

KINDS = kinds(picture(48, 32))
# JPEGs that only Pillow can read; and arithmetic coding, where any bytes have a meaning
LENIENT = {"2x4", "4x2", "1x3", "finer chroma", "YCCK 2x4", "arithmetic coding"}
ROTATED = {5, 6, 7, 8}  # orientations that exchange width and height


def by_pillow(content: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")


def turned(orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(40, 24), exif=exif, **options)


def behind_icc(content: bytes, size: int) -> bytes:
    """A JPEG with an ICC profile of `size` bytes before all its other segments."""
    chunks = [bytes(size)[at : at + 65_000] for at in range(0, size, 65_000)]
    segments = b""
    for number, chunk in enumerate(chunks, 1):
        body = b"ICC_PROFILE\0" + bytes([number, len(chunks)]) + chunk
        segments += b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body
    return content[:2] + segments + content[2:]


def why(content: bytes | None, decoder=decode) -> tuple[str, str]:
    with pytest.raises(Undecodable) as error:
        decoder(content)
    return error.value.why.reason.value, error.value.why.detail


# -------------------------------------------------------------------------------------------------- every kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_pillows_pixels(kind):
    content, expected = KINDS[kind], by_pillow(KINDS[kind])
    assert np.array_equal(decode(content), np.asarray(expected))
    grey = np.asarray(expected.convert("L")).astype(int)
    assert np.abs(decode_grey(content) - grey).mean() < 1  # a JPEG's own brightness is rounded once, not twice
    width, height, blocks = survey(memoryview(content))  # as process_tar has it
    assert (width, height) == expected.size
    assert blocks.shape[:2] == (4, 6)
    assert np.abs(blocks.reshape(4, 6) - grey.reshape(4, 8, 6, 8).mean((1, 3))).max() < 3


@pytest.mark.parametrize("size", [*SIZES, (1, 1), (7, 9)])
def test_any_size_is_decoded(size):
    for content in (jpeg(picture(*size)), encoded(picture(*size), "PNG")):
        assert np.array_equal(decode(content), np.asarray(by_pillow(content)))
        assert survey(content)[:2] == size


def test_a_smaller_scale_keeps_both_sides_long_enough_and_never_enlarges():
    assert decode(jpeg(picture(640, 480)), min_px=160).shape == (180, 240, 3)  # 3/8
    assert decode(jpeg(picture(48, 32)), min_px=160).shape == (32, 48, 3)
    assert decode(encoded(picture(640, 480), "PNG"), min_px=160).shape == (480, 640, 3)


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_grey_levels_of_16_bits_are_not_all_white(format_):
    grey = np.asarray(picture(40, 30, "L"))
    content = encoded(Image.fromarray(grey.astype(np.uint16) * 257), format_)
    assert np.array_equal(decode(content), np.stack([grey] * 3, axis=2))
    assert np.array_equal(decode_grey(content), grey)


# ------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("icc_bytes", [0, 5_000, 70_000])
@pytest.mark.parametrize("orientation", range(10))  # 1..8 are defined
def test_a_turned_photograph_is_upright_wherever_its_tag_stands(orientation, icc_bytes):
    content = behind_icc(turned(orientation), icc_bytes)
    expected = by_pillow(content)
    assert expected.size == ((24, 40) if orientation in ROTATED else (40, 24))  # else this tests nothing
    assert np.array_equal(decode(content), np.asarray(expected))
    assert np.abs(decode_grey(content) - np.asarray(expected.convert("L")).astype(int)).mean() < 1
    assert survey(content)[:2] == expected.size
    assert decode(content).flags.c_contiguous  # a view turned by strides would break the resize
    assert decode_grey(content).flags.c_contiguous


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "WEBP", "MPO"])
@pytest.mark.parametrize("orientation", range(10))
def test_other_formats_are_turned_upright_too(format_, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(40, 24), format_, exif=exif)
    assert np.array_equal(decode(content), np.asarray(by_pillow(content)))
    assert survey(content)[:2] == by_pillow(content).size


def test_an_orientation_that_xmp_alone_has_counts():
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    plain = jpeg(picture(40, 24))
    content = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + plain[2:]
    assert by_pillow(content).size == (24, 40)
    assert np.array_equal(decode(content), np.asarray(by_pillow(content)))


def test_a_whole_photograph_with_an_odd_tag_is_used():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0  # its resolution, a fraction
    content = jpeg(picture(40, 30), exif=exif)
    odd = content.replace(b"\x01\x1a\0\5", b"\x01\x1a\0\2")  # it claims to be a text
    with pytest.raises(TypeError):  # else this tests nothing
        ImageOps.exif_transpose(Image.open(io.BytesIO(odd)))
    assert np.array_equal(decode(odd), decode(content))
    garbled = content.replace(b"Exif\0\0MM", b"Exif\0\0??")
    assert np.array_equal(decode(garbled), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


# ------------------------------------------------------------------------------------------ what is no image


@pytest.mark.parametrize("decoder", [decode, decode_grey, survey])
def test_what_is_not_an_image_is_said_to_be_what_it_is(decoder):
    assert why(b"", decoder) == ("not_an_image", "an empty file")
    page = b"\n<!DOCTYPE html><html><title>404"
    assert why(page, decoder) == ("not_an_image", f"begins with {page!r}")
    assert why(b'{"error": 1}', decoder) == ("not_an_image", """begins with b'{"error": 1}'""")
    assert why(bytes(5_000), decoder) == ("not_an_image", f"begins with {bytes(32)!r}")
    for seed in range(200):
        assert why(np.random.default_rng(seed).bytes(500), decoder)[0] == "not_an_image"
    for format_ in ("TGA", "EPS"):  # without a signature: any bytes may be one; and Ghostscript would be started
        assert why(encoded(picture(48, 32), format_), decoder)[0] == "not_an_image"


def test_an_image_that_could_not_be_read_has_a_reason():
    assert why(None) == ("jpeg_corrupt", "cannot be read")


@pytest.mark.parametrize("decoder", [decode, decode_grey, survey])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "MPO"])  # which is whole after its first image
def test_a_file_that_is_cut_off_is_corrupt(kind, decoder):
    content = KINDS[kind]
    for share in (0.3, 0.6, 0.95):
        assert why(content[: int(share * len(content))], decoder)[0] == "jpeg_corrupt"


@pytest.mark.parametrize("cut", [2, 3, 20, 100, 2_000])
def test_what_begins_as_a_jpeg_and_does_not_decode_is_corrupt(cut):
    assert why(jpeg(picture(300, 300))[:cut])[0] == "jpeg_corrupt"
    assert why(b"\xff\xd8" + np.random.default_rng(cut).bytes(cut))[0] == "jpeg_corrupt"


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if v.startswith(b"\xff\xd8") and k not in LENIENT])
def test_damage_that_pillow_would_paint_over_is_refused(kind):
    """Also in CMYK and 4:4:1, whose pixels are Pillow's, and behind EXIF."""
    content = kinds(picture(160, 160))[kind]
    at = content.index(b"\xff\xda") + 300
    spoilt = content[:at] + bytes(60) + content[at + 60 :]
    Image.open(io.BytesIO(spoilt)).convert("RGB")  # raises nothing: else this tests nothing
    with_exif = turned(6)
    exif = with_exif[with_exif.index(b"\xff\xe1") : with_exif.index(b"\xff\xdb")]
    for damaged in (spoilt, spoilt[:2] + exif + spoilt[2:]):
        for decoder in (decode, decode_grey, survey):
            assert why(damaged, decoder)[0] == "jpeg_corrupt"


def test_a_png_is_checked_by_its_checksums():
    content = bytearray(encoded(picture(64, 48), "PNG"))
    content[content.index(b"IDAT") + 2_000] ^= 1
    spoilt = bytearray(encoded(picture(64, 48), "PNG"))
    end = spoilt.index(b"IEND") - 8  # the chunk's checksum
    spoilt[end] ^= 1
    Image.open(io.BytesIO(bytes(spoilt))).load()  # raises nothing: else this tests nothing
    assert why(bytes(spoilt))[0] == why(bytes(content))[0] == "jpeg_corrupt"


# ------------------------------------------------------------------------------------------------- the limit

_CLAIMS = """
import json, resource, sys, warnings
warnings.simplefilter("always")
from common.imagery import decoding, pictures
from image_kinds import claiming, encoded, kinds
from embedding_setup import picture

files = kinds(picture(48, 32))
files["WebP"] = encoded(picture(48, 32), "WEBP", lossless=True)
del files["arithmetic coding"]
bombs = {k: claiming(v, *((16_383,) * 2 if k == "WebP" else (65_500,) * 2)) for k, v in files.items()}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
said = {}
for kind, bomb in bombs.items():
    for decode in (decoding.decode, decoding.decode_grey, decoding.survey):
        try:
            decode(bomb)
        except decoding.Undecodable as error:
            said.setdefault(kind, set()).add(error.why.reason.value)
    assert pictures.small(bomb) is None
grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
try:
    decoding.survey(claiming(files["PNG"], 16_384, 8_192))  # within the limit, and Pillow would warn
except decoding.Undecodable as error:
    said["large PNG"] = [error.why.reason.value]
print(json.dumps([{kind: sorted(reasons) for kind, reasons in said.items()}, grown_mb]))
"""


def test_a_header_that_claims_too_many_pixels_is_refused_before_any_is_decoded():
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", _CLAIMS], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings of Pillow's
    said, grown_mb = json.loads(done.stdout)
    assert said.pop("large PNG") == ["jpeg_corrupt"]  # its pixels are missing
    assert said == {kind: ["image_too_large"] for kind in KINDS if kind != "arithmetic coding"}
    assert grown_mb < 30  # decoded, the least of them has 268 MB


def test_the_largest_panorama_is_within_the_limit_and_one_row_more_is_not():
    assert why(claiming(KINDS["plain"], 16_384, 8_192), survey)[0] == "jpeg_corrupt"  # the data are missing
    reason, detail = why(claiming(KINDS["plain"], 16_384, 8_193), survey)
    assert (reason, detail) == ("image_too_large", "16,384 x 8,193 pixels, more than 134,217,728")
    for kind in ("2x4", "PNG"):
        assert why(claiming(KINDS[kind], 16_384, 8_193), survey)[0] == "image_too_large"


# ------------------------------------------------------------------------------------------- any bytes at all


def outcome(decoder, content: bytes):
    """A reason, or height and width. Anything else than Undecodable is a failure of the test."""
    try:
        found = decoder(content)
    except Undecodable as error:
        return error.why.reason
    return (found[1], found[0]) if decoder is survey else found.shape[:2]


def refuse_or_agree(content: bytes) -> None:
    """What process_tar accepts, the stages after it decode, at the size that process_tar says."""
    seen = {outcome(decoder, content) for decoder in (survey, decode, decode_grey)}
    assert len(seen) == 1
    inspected = jpegs.inspect(memoryview(content))
    assert isinstance(next(iter(seen)), Reject) <= (getattr(inspected, "reason", None) in seen)
    assert (pictures.small(content) is None) == isinstance(next(iter(seen)), Reject)


_STARTS = [b"", *sorted({content[:n] for content in KINDS.values() for n in (2, 4, 12, 60)})]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(_STARTS), st.binary(max_size=300))
def test_any_bytes_are_refused_or_decoded_by_all_stages(start, rest):
    refuse_or_agree(start + rest)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 2**32))
def test_mutated_images_are_refused_or_decoded_by_all_stages(kind, seed):
    refuse_or_agree(mutated(KINDS[kind], seed))


# ------------------------------------------------------------------------------------------------ all stages


def write_pairs(path, images: list[bytes], others: dict[str, bytes]) -> None:
    files = dict(others)
    for n, content in enumerate(images):
        stem = f"{path.stem}_{n}_1_{n}"
        files |= {f"{stem}.jpg": content, f"{stem}.txt": label(int(path.stem), n, n)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_every_image_that_process_tar_accepts_has_a_fingerprint_and_the_embedding_of_its_upright_pixels(tmp_path):
    setup = Setup(tmp_path, {}, data__max_reject_share=1, data__fingerprint="exact", data__rows_per_part=100)
    good = [*KINDS.values(), turned(6), behind_icc(turned(8), 5_000), behind_icc(turned(3), 70_000)]
    bad = [b"", b"<html>404</html>", good[0][:-200], claiming(good[0], 65_500, 65_500)]
    raw = setup.cfg.paths.raw_dir
    write_pairs(raw / "0088.tar", good + bad, {"._0088_0_1_0.jpg": b"\0\5\x16\7", "cover.jpg": good[0]})
    write_pairs(raw / "0089.tar", [encoded(by_pillow(content), "PNG") for content in good], {})  # the same pixels
    assert process_tar.main(setup.flags) == 0
    assert compute_fingerprints.main(setup.flags) == 0
    assert generate_embeddings.main(setup.flags) == 0

    rows = parquet.read(setup.cfg.paths.intermediates_dir / "0088.parquet")
    assert rows["patch_id"].to_pylist() == list(range(len(good)))
    assert rows["content_hash"].to_pylist() == [xxhash.xxh3_64_intdigest(content) for content in good]
    sizes = list(zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True))
    assert sizes == [by_pillow(content).size for content in good]
    counts = parquet.read_provenance(setup.cfg.paths.intermediates_dir / "0088.parquet").rows
    reasons = {"image_too_large": 1, "jpeg_corrupt": 1, "name_malformed": 1, "not_an_image": 2}
    assert counts["rejected"] == {**reasons, "partner_rejected": 4}
    assert counts["other"] == 1  # macOS's
    assert counts["members"] == 2 * (len(good) + len(bad)) + 2
    rejects = parquet.read(setup.root / "data/intermediates_rejects/0088.parquet").to_pylist()
    [detail] = [reject["detail"] for reject in rejects if reject["member"] == "cover.jpg"]
    assert "<DatasetID>_<PatchID>_<StreetViewID>_<TargetID>" in detail

    hashes = parquet.read(setup.cfg.paths.fingerprints_dir / "0088-0.parquet")
    for name in ("phash", "dhash"):
        expected = [int(str(getattr(imagehash, name)(by_pillow(content))), 16) for content in good]
        assert hashes[name].to_pylist() == expected
    fast = fingerprints.hash_images(good, "fast")
    for name, column in zip(("phash", "dhash"), fast, strict=True):
        apart = np.bitwise_count(column ^ hashes[name].to_numpy())
        assert apart.max() <= 6  # of 64, in pictures of 48 x 32 pixels; of another orientation: 20 and more
    ours, expected = (
        parquet.to_matrix(parquet.read(setup.part(f"{stem}-0"))["embedding"]) for stem in ("0088", "0089")
    )
    assert len(ours) == len(good)
    assert cosines(ours, expected).min() > 0.99999


def test_the_reason_of_an_image_that_generation_cannot_use_is_in_its_rejects_and_counts(tmp_path, capsys):
    images = [jpeg(picture(48, 32)), b"<html>", claiming(KINDS["plain"], 65_500, 65_500), KINDS["plain"][:-200]]
    setup = Setup(tmp_path, {"0088": images}, data__max_reject_share=1)
    assert generate_embeddings.main(setup.flags) == 0
    assert "1 out, 3 rejected (image_too_large 1, not_an_image 1, jpeg_corrupt 1)" in capsys.readouterr().out
    rejects = parquet.read(setup.cfg.paths.embeddings_dir.with_name("embeddings_rejects") / "0088-0.parquet")
    assert rejects["reason"].to_pylist() == ["not_an_image", "image_too_large", "jpeg_corrupt"]
    counts = parquet.read_provenance(setup.part("0088-0")).rows
    assert counts == {"in": 4, "out": 1, "image_too_large": 1, "jpeg_corrupt": 1, "not_an_image": 1}
