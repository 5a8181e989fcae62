"""Images as they come from the internet, whole and broken: the table that the picture stages are held to."""

import io
import struct
import zlib

import numpy as np
from image_shards import encoded
from PIL import Image

RNG = np.random.default_rng(4)
PICTURE = Image.fromarray(RNG.integers(0, 255, (90, 120, 3), dtype=np.uint8)).resize((240, 180))
MAX_PIXELS = 40_000_000


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(PICTURE, "JPEG", exif=exif)


def _flipped(at: float) -> bytes:
    data = bytearray(encoded(PICTURE, "JPEG"))
    for byte in range(int(len(data) * at), int(len(data) * at) + 40):
        data[byte] ^= 0xFF
    return bytes(data)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, rows: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _bomb() -> bytes:
    """9000 x 9000 pixels in some 80 kB."""
    return _png(9000, 9000, zlib.compress(bytes(9001 * 9000), 9))


def _animated() -> bytes:
    frames = [Image.new("RGB", (60, 40), rgb) for rgb in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _palette_with_alpha() -> bytes:
    image = PICTURE.quantize(16)
    return encoded(image, "PNG", transparency=3)


def _sixteen_bits() -> bytes:
    grey = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    return encoded(Image.fromarray(grey), "PNG")


# name: (bytes, status of `images`, upright width and height where it is ok)
TABLE: dict[str, tuple[bytes, str, tuple[int, int] | None]] = {
    "whole": (encoded(PICTURE, "JPEG"), "ok", (240, 180)),
    "half a JPEG": (encoded(PICTURE, "JPEG")[:9000], "truncated", None),
    "half a PNG": (encoded(PICTURE)[:9000], "truncated", None),
    "flipped bytes in a PNG": (
        encoded(PICTURE)[:4000] + b"\xff" * 40 + encoded(PICTURE)[4040:],
        "corrupt",
        None,
    ),
    "flipped bytes in a JPEG": (_flipped(0.5), "ok", (240, 180)),  # decodes to other pixels: nothing tells
    "CMYK": (encoded(PICTURE.convert("CMYK"), "JPEG"), "ok", (240, 180)),
    "16 bits": (_sixteen_bits(), "ok", (64, 48)),
    "palette with alpha": (_palette_with_alpha(), "ok", (240, 180)),
    "EXIF rotation": (_turned(), "ok", (180, 240)),
    "zero width": (_png(0, 40, zlib.compress(b"")), "not_image", None),
    "empty": (b"", "not_image", None),
    "bomb": (_bomb(), "too_many_pixels", None),
    "animated": (_animated(), "ok", (60, 40)),
    "text": (b"<html>not found</html>", "not_image", None),
}
