"""Encoded images to upright pixels: one rule for every stage, so that all can use what process_tar accepts.

JPEGs are decoded by simplejpeg, strictly: what a browser would patch over is an error here. Pillow decodes what
simplejpeg cannot: CMYK (it does not invert Adobe's), rare chroma sampling, and other formats, whatever the file is
called. simplejpeg still checks JPEGs in CMYK or 4:4:1 for damage. It cannot read some
samplings (2 x 4, for instance); for those, Pillow detects only missing data.
"""

import io
import warnings
from pathlib import PurePath

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from common.schemas import Reject, Rejected

Encoded = bytes | memoryview
# of files that are taken for images, if only to be rejected with a reason: no Pillow reads HEIC by itself
SUFFIXES = tuple(".jpg .jpeg .jfif .png .webp .bmp .tif .tiff .gif .avif .heic .heif .hif".split())
MAX_PIXELS = 2**27  # 16,384 x 8,192, the largest panorama of Street View: 400 MB as RGB
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses more than twice this, and above it only warns:
warnings.filterwarnings("ignore", module=r"PIL\.")  # once per image is too often

Image.init()  # all formats that this Pillow knows
# without formats that have no signature, which any bytes may be taken for (TGA), or that start a program (EPS)
_RASTER = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF"]
_FORMATS = [name for name in _RASTER if name in Image.OPEN]
_JPEG_START, _SCAN_START, _APP1 = b"\xff\xd8", b"\xff\xda", b"\xff\xe1"  # markers; APP1 is EXIF's and XMP's
# simplejpeg's message about chroma sampling that it does not support, and about some damaged headers
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


def is_named_image(path: PurePath) -> bool:
    """Whether a file is an image by its name; not the ._NAME.jpg in which macOS keeps a file's attributes."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith("._")


class Undecodable(Exception):
    """The bytes are not a whole image of a permitted size; `why` is the reason for the rejects file."""

    def __init__(self, reason: Reject, detail: str):
        super().__init__(detail)
        self.why = Rejected(reason, detail)


def decode(encoded: Encoded | None, min_px: int = 0) -> np.ndarray:
    """The upright pixels as RGB, (H, W, 3) uint8; a JPEG's at the smallest scale with no side below `min_px`.

    Raises Undecodable, also for an image that could not even be read (None).
    """
    if encoded is None:
        raise Undecodable(Reject.JPEG_CORRUPT, "cannot be read")
    jpeg = _by_simplejpeg(encoded, "RGB", min_px)
    return _upright(jpeg[0], encoded) if jpeg else np.array(_by_pillow(encoded))


def decode_grey(encoded: Encoded) -> np.ndarray:
    """The upright pixels as grey levels, (H, W) uint8; of a JPEG the brightness channel. Raises Undecodable."""
    jpeg = _by_simplejpeg(encoded, "GRAY")
    return _upright(jpeg[0][:, :, 0], encoded) if jpeg else np.array(_by_pillow(encoded).convert("L"))


def survey(encoded: Encoded) -> tuple[int, int, np.ndarray]:
    """Width and height of the upright picture, and its grey levels at 1/8 scale. Raises Undecodable.

    At that scale the JPEG decoder still reads all of the file's entropy-coded data, where damage shows, but
    computes one pixel of each 8 x 8 block.
    """
    jpeg = _by_simplejpeg(encoded, "GRAY", min_px=1)
    if jpeg is None:
        image = _by_pillow(encoded)
        return image.width, image.height, np.array(image.convert("L").reduce(8))
    grey, width, height = jpeg
    return (height, width, grey) if _orientation(encoded) >= 5 else (width, height, grey)


def _by_simplejpeg(encoded: Encoded, colorspace: str, min_px: int = 0) -> tuple[np.ndarray, int, int] | None:
    """A JPEG's pixels as they are stored, (H, W, channels) uint8, and its unscaled width and height; None for what
    Pillow must decode. Raises Undecodable.
    """
    header = _strictly(simplejpeg.decode_jpeg_header, encoded) if encoded[:2] == _JPEG_START else None
    if header is None:
        return None
    height, width, colours, _ = header
    if width * height > MAX_PIXELS:
        raise Undecodable(Reject.IMAGE_TOO_LARGE, f"{width:,} x {height:,} pixels, more than {MAX_PIXELS:,}")
    if colours in ("CMYK", "YCCK"):
        return None
    pixels = _strictly(simplejpeg.decode_jpeg, encoded, colorspace, min_height=min_px, min_width=min_px)
    return None if pixels is None else (pixels, width, height)


def _strictly(read, encoded: Encoded, *args, **kwargs):
    """What a function of simplejpeg returns; None if it does not support the sampling. Raises Undecodable."""
    try:
        return read(encoded, *args, strict=True, **kwargs)
    except KeyError:  # it has no name for 4:4:1
        return None
    except ValueError as error:
        if _UNSUPPORTED_SAMPLING in str(error):
            return None
        raise Undecodable(Reject.JPEG_CORRUPT, str(error)[:200]) from None


def _upright(pixels: np.ndarray, encoded: Encoded) -> np.ndarray:
    turn = _TURNS.get(_orientation(encoded))
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def _orientation(encoded: Encoded) -> int:
    """EXIF's or XMP's, 1 to 8. (ImageOps.exif_transpose rewrites all tags, and fails if one is odd.)"""
    if encoded[:2] == _JPEG_START:  # most have neither, which shows in a tenth of the time that Pillow takes
        at = 2
        while encoded[at : at + 1] == b"\xff" and encoded[at : at + 2] not in (_SCAN_START, _APP1):
            at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
        if encoded[at : at + 2] == _SCAN_START:
            return 1
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            value = image.getexif().get(ExifTags.Base.Orientation)
            return int(value) if value in _TURNS else 1
    except Exception:  # Pillow fails on damaged tags in many ways, and the pixels are not affected
        return 1


def _by_pillow(encoded: Encoded) -> Image.Image:
    """The upright image in RGB. Raises Undecodable."""
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            if encoded[:2] == _JPEG_START:
                _strictly(simplejpeg.decode_jpeg, encoded, "GRAY", min_height=1, min_width=1)
            if image.format == "PNG":
                image.verify()  # the checksums, which decoding does not look at
                image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
            image.load()
            turn = None if image.format == "TIFF" else _TURNS.get(_orientation(encoded))  # loading turns TIFFs
            return _eight_bits(image if turn is None else image.transpose(turn)).convert("RGB")
    except (Undecodable, MemoryError):  # the latter is the machine's fault, not the file's
        raise
    except Image.DecompressionBombError as error:  # also of a frame larger than the picture that it belongs to
        raise Undecodable(Reject.IMAGE_TOO_LARGE, str(error).partition(",")[0]) from None
    except Exception as error:  # Pillow fails on damaged files in many ways
        kind = _format_by_signature(encoded)
        if not kind:
            what = f"begins with {bytes(encoded[:32])!r}" if len(encoded) else "an empty file"
            if encoded[4:8] == b"ftyp":
                what = "HEIC, or another format that cannot be read: convert it to JPEG"
            raise Undecodable(Reject.NOT_AN_IMAGE, what) from None
        what = "damaged or unknown header" if isinstance(error, UnidentifiedImageError) else str(error)
        raise Undecodable(Reject.JPEG_CORRUPT, f"{kind}: {what or type(error).__name__}"[:200]) from None


def _format_by_signature(encoded: Encoded) -> str:
    """The format of a file that begins like this; empty if it is unknown."""
    if encoded[:2] == _JPEG_START:
        return "JPEG"
    start = bytes(encoded[:16])
    return next((name for name in _FORMATS if (accepts := Image.OPEN[name][1]) and accepts(start)), "")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits as 8; Pillow would turn all above 255 into white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
