"""Image files of every kind that may be called .jpg, and damage to them."""

import base64
import io
import random
import struct
import zlib

from PIL import Image

# 48 x 32 pixels in arithmetic coding, by cjpeg: Pillow reads it and cannot write it
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hn"
    "Pk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj"
    "Y2P/yQARCAAgADADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDbWZEMm4gbr/iLi9c9zYdnQ5fqJEg2m7YhACvBcGlx"
    "qaQI5qYe0XoNCJqdmqGk3XFBFnF8Otd/udJT7PMS9hFl8mMYWlxhaf69gnQy/uNFr8nafbXLSIYuVaaE6s8ZqPCZPCMmq4xGioD/2Q=="
)
SOF = b"\xff\xc0\x00"  # the marker of a baseline frame, and the first byte of its length


def encoded(image: Image.Image, format_: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def sampled(image: Image.Image, *factors: tuple[int, int], adobe: int | None = None) -> bytes:
    """A JPEG with any sampling factors (horizontal, vertical), one pair for each channel of `image`.

    Pillow cannot write these: each channel is encoded as a grey JPEG, and their scans are put into one frame.
    `adobe`: the colour transform that Adobe's segment says, 0 = none, 2 = YCCK.
    """
    across, down = (max(factor[axis] for factor in factors) for axis in (0, 1))
    components, scans, tables = b"", b"", b""
    for number, (channel, (h, v)) in enumerate(zip(image.split(), factors, strict=True), 1):
        size = -(-image.width * h // across), -(-image.height * v // down)
        grey = encoded(channel.resize(size, Image.Resampling.BOX), quality=90)
        start = grey.index(b"\xff\xda")
        tables = grey[grey.index(b"\xff\xdb") : grey.index(SOF)] + grey[grey.index(b"\xff\xc4") : start]
        components += bytes([number, h << 4 | v, 0])
        scans += grey[start : start + 5] + bytes([number]) + grey[start + 6 : -2]
    frame = b"\x08" + struct.pack(">HHB", image.height, image.width, len(factors)) + components
    header = b"" if adobe is None else b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([adobe])
    frame = b"\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame
    return b"\xff\xd8" + header + tables + frame + scans + b"\xff\xd9"


def kinds(image: Image.Image) -> dict[str, bytes]:
    """A file of each kind, of one picture in RGB; those that Pillow alone decodes, and plain JPEGs."""
    ycc = image.convert("YCbCr")
    cmyk = Image.merge("CMYK", [*image.split(), image.convert("L")])  # with black neither full nor empty
    chroma = (1, 1), (1, 1)
    return {
        "plain": encoded(image, quality=90),
        "grey": encoded(image.convert("L")),
        "progressive": encoded(image, progressive=True),
        "restart markers": encoded(image, restart_marker_blocks=2),
        "no chroma subsampling": encoded(image, subsampling=0),
        "Adobe RGB": sampled(image, (1, 1), *chroma, adobe=0),
        "arithmetic coding": ARITHMETIC,
        "MPO": encoded(image, "MPO", save_all=True, append_images=[image.rotate(90)]),
        "4:4:1": sampled(ycc, (1, 4), *chroma),
        "2x4": sampled(ycc, (2, 4), *chroma),
        "4x2": sampled(ycc, (4, 2), *chroma),
        "1x3": sampled(ycc, (1, 3), *chroma),
        "finer chroma": sampled(ycc, (1, 1), (2, 2), (2, 1)),
        "CMYK": encoded(cmyk),
        "CMYK without Adobe's segment": sampled(cmyk, (1, 1), *chroma, (1, 1)),
        "YCCK": sampled(cmyk, (2, 2), *chroma, (2, 2), adobe=2),
        "YCCK 4:4:1": sampled(cmyk, (1, 4), *chroma, (1, 4), adobe=2),
        "YCCK 2x4": sampled(cmyk, (2, 4), *chroma, (2, 4), adobe=2),
        "PNG": encoded(image, "PNG"),
        "PNG with a palette": encoded(image.quantize(16), "PNG"),
        "PNG with transparency": encoded(image.convert("RGBA"), "PNG"),
        "WebP": encoded(image, "WEBP"),
        "GIF": encoded(image, "GIF"),
        "BMP": encoded(image, "BMP"),
        "TIFF": encoded(image, "TIFF", compression="tiff_lzw"),
    }


def claiming(content: bytes, width: int, height: int) -> bytes:
    """The same file with another size in its header, and nothing more behind it."""
    if content.startswith(b"\xff\xd8"):
        at = max(content.find(SOF), content.find(b"\xff\xc2\x00")) + 5  # baseline or progressive
        return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]
    if content.startswith(b"\x89PNG"):
        chunk = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
        return content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    if content.startswith(b"GIF"):
        return content[:6] + struct.pack("<HH", width, height) + content[10:]
    if content.startswith(b"BM"):
        return content[:18] + struct.pack("<ii", width, height) + content[26:]
    if content.startswith(b"II"):  # TIFF: tags 256 and 257, here numbers of 16 bits, made ones of 32
        for tag, pixels in ((256, width), (257, height)):
            at = content.index(struct.pack("<HHI", tag, 3, 1))
            content = content[:at] + struct.pack("<HHII", tag, 4, 1, pixels) + content[at + 12 :]
        return content
    at = content.index(b"VP8L") + 9  # WebP without loss: 14 bits each
    rest = struct.unpack("<I", content[at : at + 4])[0] >> 28 << 28
    return content[:at] + struct.pack("<I", width - 1 | height - 1 << 14 | rest) + content[at + 4 :]


def mutated(content: bytes, seed: int) -> bytes:
    """The file cut off, or with a few bytes flipped, zeroed, doubled or left out."""
    rng = random.Random(seed)
    raw = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 3])):
        at, length = rng.randrange(len(raw) + 1), rng.choice([1, 2, 16, 200])
        kind = rng.randrange(5)
        if kind == 0:
            del raw[at:]
        elif kind == 1:
            raw[at : at + length] = bytes(len(raw[at : at + length]))
        elif kind == 2:
            raw[at:at] = raw[at : at + length]
        elif kind == 3:
            del raw[at : at + length]
        elif at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
    return bytes(raw)
