"""Image bytes to a verdict and to pixels: what `images` accepts, `ocr` and `regions` can decode.

A picture is upright (EXIF orientation applied), RGB, transparent parts over white, the first frame
of an animation. Widths, heights, boxes and quads are in its pixels.
"""

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
END_MARKS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82", b"GI": b";"}  # by how a file begins
ORIENTATION = 0x0112  # the EXIF tag; values 2 to 8 are turned or mirrored
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

SIDEWAYS = {UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`status` is `ok`, or the reason why these bytes are no usable picture; pixels where the header told."""

    status: str
    error: str | None = None
    width: int | None = None
    height: int | None = None


def inspect(data: bytes, *, max_pixels: int, min_px: int) -> Verdict:
    """The header is checked first, then the whole picture is decoded.

    The header tells the status `not_image`, `too_many_pixels` or `placeholder` (a side shorter than `min_px`:
    shops answer with such dots instead of 404). A picture that cannot be read is `truncated` where its end
    mark lacks, else `corrupt`: mostly only decoding shows it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes and of EXIF, see decode
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
    except Image.DecompressionBombError:
        return Verdict("too_many_pixels", f"more than {max_pixels} pixels")
    except UnidentifiedImageError:
        return Verdict("not_image", f"not {', '.join(FORMATS)}: begins with {data[:16]!r}")
    except Exception as error:  # noqa: BLE001 - a decoder may raise anything on hostile bytes
        return _broken(error, data)
    if width * height > max_pixels:
        return Verdict("too_many_pixels", f"{width} x {height}, more than {max_pixels} pixels", width, height)
    if min(width, height) < min_px:
        return Verdict("placeholder", f"{width} x {height}, a side under {min_px} px", width, height)
    try:
        width, height = _decoded_size(image, data)
    except Exception as error:  # noqa: BLE001 - as above
        return _broken(error, data, width, height)
    return Verdict("ok", None, width, height)


def _decoded_size(image: Image.Image, data: bytes) -> tuple[int, int]:
    """Width and height upright, after all of the bytes were decoded.

    Of an ordinary JPEG every coefficient is read and only the brightness of an eighth of the pixels made:
    nothing behind the coefficients can fail.
    """
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return decode(data).size
    width, height = image.size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.draft("L", (max(1, width // 8), max(1, height // 8)))
        image.load()
        turned = UPRIGHT.get(_orientation(image))
    return (height, width) if turned in SIDEWAYS else (width, height)


def decode(data: bytes) -> Image.Image:
    """The picture, mode RGB. For bytes that passed `inspect`; others raise what the decoder raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes (max_pixels decides) and of EXIF that cannot be read
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        turn = UPRIGHT.get(_orientation(image))
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip instead of scale
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    upright = image if turn is None else image.transpose(turn)
    return upright.convert("RGB")


def decode_grey(data: bytes) -> np.ndarray:
    """Brightness of the same upright pixels, (height, width) uint8: a JPEG's own, else ITU-R 601 of the RGB.

    A JPEG's own is what its file stores; from its RGB, strong colours would come out up to 26 off.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "JPEG":
            image.draft("L", image.size)
            image.load()
        turn = UPRIGHT.get(_orientation(image))
    if image.mode == "L" and image.format == "JPEG":
        return np.asarray(image if turn is None else image.transpose(turn))
    red, green, blue = np.moveaxis(np.asarray(decode(data), dtype=np.uint32), 2, 0)
    return ((red * 4899 + green * 9617 + blue * 1868 + 8192) >> 14).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """1 (upright) also where the EXIF block cannot be read: it says nothing then."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1


def _broken(error: Exception, data: bytes, width: int | None = None, height: int | None = None) -> Verdict:
    if data.startswith(b"RIFF"):
        cut_short = len(data) < 8 + int.from_bytes(data[4:8], "little")
    else:
        cut_short = not data.rstrip(b"\0\r\n ").endswith(END_MARKS.get(data[:2], b""))
    status = "truncated" if cut_short else "corrupt"
    return Verdict(status, f"{type(error).__name__}: {error}", width, height)
