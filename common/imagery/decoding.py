"""Encoded images to upright pixels: one rule for every stage, so that what process_tar accepts the others can use.

JPEGs are decoded by simplejpeg, strictly: what a browser would patch over is an error here. Pillow decodes what
simplejpeg cannot: CMYK (it does not invert Adobe's), rare chroma sampling, and other formats, whatever the file is
called. simplejpeg still checks JPEGs in CMYK or 4:4:1 for damage. Those sampled 2 x 4, say, it cannot read at all:
of their damage Pillow notices missing data alone.
"""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from common.schemas import Reject, Rejected

Encoded = bytes | memoryview
MAX_PIXELS = 2**27  # 16,384 x 8,192, the largest panorama of Street View: 400 MB as RGB
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses more than twice this, and above it only warns:
warnings.filterwarnings("ignore", module=r"PIL\.")  # once per image is too often

Image.init()  # all formats that this Pillow knows
# without formats that have no signature, which any bytes may be taken for (TGA), or that start a program (EPS)
_RASTER = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF"]
_FORMATS = [name for name in _RASTER if name in Image.OPEN]
_JPEG_START, _SCAN_START = b"\xff\xd8", b"\xff\xda"
# of the segments before the scan: frames, tables, JFIF, ICC, comments; all but APP1 (0xE1), for EXIF and XMP
_SEGMENTS_WITHOUT_EXIF = frozenset([*range(0xC0, 0xD0), 0xDB, 0xDD, 0xE0, *range(0xE2, 0xF0), 0xFE])
# what simplejpeg says of chroma sampling that it does not support, and of some damaged headers
_UNSUPPORTED_SAMPLING = "Could not determine subsampling level"
_TURNS = {  # EXIF's orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Undecodable(Exception):
    """The bytes are not a whole image of a permitted size; `why` is what the rejects file says of it."""

    def __init__(self, reason: Reject, detail: str):
        super().__init__(detail)
        self.why = Rejected(reason, detail)


def decode(encoded: Encoded | None, min_px: int = 0) -> np.ndarray:
    """The upright pixels as RGB, (H, W, 3) uint8; a JPEG's at the smallest scale with no side below `min_px`.

    Raises Undecodable, also for an image that could not even be read (None).
    """
    if encoded is None:
        raise Undecodable(Reject.JPEG_CORRUPT, "cannot be read")
    pixels = _by_simplejpeg(encoded, "RGB", min_px)
    return np.array(_by_pillow(encoded)) if pixels is None else pixels


def decode_grey(encoded: Encoded) -> np.ndarray:
    """The upright pixels as grey levels, (H, W) uint8; of a JPEG the brightness channel. Raises Undecodable."""
    grey = _by_simplejpeg(encoded, "GRAY")
    return np.array(_by_pillow(encoded).convert("L")) if grey is None else grey[:, :, 0]


def survey(encoded: Encoded) -> tuple[int, int, np.ndarray]:
    """Width and height of the upright picture, and its grey levels at 1/8 scale. Raises Undecodable.

    At that scale the decoder of JPEGs still reads all of the file's entropy-coded data, where damage shows, but
    computes one pixel of each 8 x 8 block.
    """
    size = _size_for_simplejpeg(encoded)
    grey = _strictly(encoded, "GRAY", min_px=1) if size else None
    if size is None or grey is None:
        image = _by_pillow(encoded)
        return image.width, image.height, np.array(image.convert("L").reduce(8))
    width, height = size
    return (height, width, grey) if _orientation_of_jpeg(encoded) >= 5 else (width, height, grey)


def _by_simplejpeg(encoded: Encoded, colorspace: str, min_px: int = 0) -> np.ndarray | None:
    """The upright pixels, (H, W, channels) uint8; None for what Pillow must decode. Raises Undecodable."""
    pixels = _strictly(encoded, colorspace, min_px) if _size_for_simplejpeg(encoded) else None
    turn = None if pixels is None else _TURNS.get(_orientation_of_jpeg(encoded))
    if pixels is None or turn is None:
        return pixels
    turned = Image.fromarray(pixels.squeeze(axis=2) if colorspace == "GRAY" else pixels).transpose(turn)
    return np.array(turned).reshape(turned.height, turned.width, -1)


def _size_for_simplejpeg(encoded: Encoded) -> tuple[int, int] | None:
    """Width and height in a JPEG's header; None for what Pillow must decode. Raises Undecodable."""
    if encoded[:2] != _JPEG_START:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded, strict=True)
    except KeyError:  # it has no name for 4:4:1
        return None
    except ValueError as error:
        _refuse_damage(error)
        return None
    if width * height > MAX_PIXELS:
        raise Undecodable(Reject.IMAGE_TOO_LARGE, f"{width:,} x {height:,} pixels, more than {MAX_PIXELS:,}")
    return None if colours in ("CMYK", "YCCK") else (width, height)


def _strictly(encoded: Encoded, colorspace: str, min_px: int) -> np.ndarray | None:
    """A JPEG's pixels as they are stored; None if simplejpeg does not support its sampling. Raises Undecodable."""
    try:
        return simplejpeg.decode_jpeg(encoded, colorspace, min_height=min_px, min_width=min_px, strict=True)
    except ValueError as error:
        _refuse_damage(error)
        return None


def _refuse_damage(error: ValueError) -> None:
    """Raises Undecodable unless simplejpeg's error is that it does not support the chroma sampling."""
    if _UNSUPPORTED_SAMPLING not in str(error):
        raise Undecodable(Reject.JPEG_CORRUPT, str(error)[:200]) from None


def _orientation_of_jpeg(encoded: Encoded) -> int:
    """EXIF's orientation, 1 to 8. Pillow, which takes 25 us, is asked only if there is something to read."""
    at, last = len(_JPEG_START), len(encoded) - 4
    while at <= last and encoded[at] == 0xFF and encoded[at + 1] in _SEGMENTS_WITHOUT_EXIF:
        at += 2 + (encoded[at + 2] << 8 | encoded[at + 3])
    if encoded[at : at + 2] == _SCAN_START:
        return 1
    try:
        with Image.open(io.BytesIO(encoded), formats=["JPEG"]) as image:
            return _orientation(image)
    except Exception:  # an odd header, though simplejpeg can read it
        return 1


def _by_pillow(encoded: Encoded) -> Image.Image:
    """The upright image in RGB. Raises Undecodable."""
    with _opened(encoded) as image:
        if encoded[:2] == _JPEG_START:
            _strictly(encoded, "GRAY", min_px=1)
        try:
            if image.format == "PNG":
                image.verify()  # the checksums, which decoding does not look at
                image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
            image.load()  # TIFFs are turned by that
            turn = _TURNS.get(_orientation(image))
            return _eight_bits(image if turn is None else image.transpose(turn)).convert("RGB")
        except MemoryError:  # the machine's fault, not the file's
            raise
        except Image.DecompressionBombError as error:  # of a frame larger than the picture that it belongs to
            raise Undecodable(Reject.IMAGE_TOO_LARGE, str(error).partition(",")[0]) from None
        except Exception as error:  # whatever a damaged file makes Pillow's readers stumble over
            detail = f"{image.format}: {error or type(error).__name__}"[:200]
            raise Undecodable(Reject.JPEG_CORRUPT, detail) from None


def _opened(encoded: Encoded) -> Image.Image:
    """The image, its header being read. Raises Undecodable if it is none, or too large."""
    try:
        return Image.open(io.BytesIO(encoded), formats=_FORMATS)
    except MemoryError:  # the machine's fault, not the file's
        raise
    except Image.DecompressionBombError as error:
        raise Undecodable(Reject.IMAGE_TOO_LARGE, str(error).partition(",")[0]) from None
    except UnidentifiedImageError:  # its text is that of an object in memory
        kind = _format_by_signature(encoded)
        if not kind:
            raise Undecodable(Reject.NOT_AN_IMAGE, _description(encoded)) from None
        detail = f"begins as {kind}, with a header that is damaged or of an unknown kind"
        raise Undecodable(Reject.JPEG_CORRUPT, detail) from None
    except Exception as error:  # whatever a damaged header makes Pillow's readers stumble over
        raise Undecodable(Reject.JPEG_CORRUPT, f"{error or type(error).__name__}"[:200]) from None


def _format_by_signature(encoded: Encoded) -> str:
    """The format that the first bytes are of; empty if of none that is known."""
    if encoded[:2] == _JPEG_START:
        return "JPEG"
    start = bytes(encoded[:16])
    return next((name for name in _FORMATS if (accepts := Image.OPEN[name][1]) and accepts(start)), "")


def _description(encoded: Encoded) -> str:
    """What is there in the place of an image, by its first bytes."""
    if not len(encoded):
        return "an empty file"
    start = bytes(encoded[:32])
    is_text = all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start)
    kind = "HTML or XML" if start.lstrip()[:1] == b"<" else "text" if is_text else "no known format"
    return f"{kind}: begins with {start!r}"


def _orientation(image: Image.Image) -> int:
    """EXIF's or XMP's, 1 to 8. (ImageOps.exif_transpose writes all tags anew, and fails where one is odd.)"""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
        return int(value) if value in _TURNS else 1
    except Exception:  # whatever damaged tags make Pillow's reader stumble over: the pixels are not affected
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits as 8; Pillow would turn all above 255 into white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
