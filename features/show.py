"""What OCR and detector saw in products' pictures, drawn into them, to look at.

    python -m features.show CORPUS ASIN... [--output FOLDER]

OCR lines are red with their text and confidence, regions blue with rank and score.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import pictures
from pipeline.shards import ShardFolder

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

LINE_RGB = (205, 30, 45)
REGION_RGB = (30, 90, 200)
MIN_LONG_SIDE_PX = 640  # smaller pictures are enlarged, so that the letters leave room
FONT_PX = 13


def draw(image: bytes, ocr: Mapping[str, Any], regions: Mapping[str, Any]) -> "Image.Image":
    """The picture with rows of `schema.OCR` and `schema.REGIONS` drawn in; RGB.

    The last region, the whole picture, is left out. Raises what the decoder raises for no picture.
    """
    from PIL import Image, ImageDraw

    picture = pictures.decode(image)
    scale = max(1.0, MIN_LONG_SIDE_PX / max(picture.size))
    width, height = (round(side * scale) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(picture)
    boxes = list(zip(regions["boxes"] or [], regions["scores"] or [], strict=True))[:-1]
    for rank, (box, score) in reversed(list(enumerate(boxes, start=1))):
        x1, y1, x2, y2 = (float(place) * scale for place in box)
        canvas.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=REGION_RGB, width=2)
        _label(canvas, (x1 + 2, y1 + 2), f"{rank}: {score:.2f}", REGION_RGB)
    for line in ocr["lines"] or []:
        places = [float(place) * scale for place in line["quad"]]
        canvas.polygon(list(zip(places[::2], places[1::2], strict=True)), outline=LINE_RGB, width=2)
        below = (min(places[::2]), max(places[1::2]) + 2)
        _label(canvas, below, f"{line['text']} ({line['confidence']:.2f})", LINE_RGB)
    return picture


def _label(
    canvas: "ImageDraw.ImageDraw", place: tuple[float, float], text: str, rgb: tuple[int, int, int]
) -> None:
    """White on `rgb`, pushed inside the picture."""
    font = _font()
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    width, height = canvas.im.size
    x = max(0, min(place[0], width - (right - left) - 4))
    y = max(0, min(place[1], height - (bottom - top) - 4))
    canvas.rectangle((x, y, x + right - left + 4, y + bottom - top + 4), fill=rgb)
    canvas.text((x + 2 - left, y + 2 - top), text, font=font, fill="white")


def _font() -> "ImageFont.FreeTypeFont":
    """DejaVu Sans as matplotlib ships it, with letters for most scripts that EasyOCR reads."""
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), FONT_PX, layout_engine=ImageFont.Layout.BASIC)


def save(corpus: str, asins: list[str], output: Path) -> list[str]:
    """One PNG per asin in `output`; returns a sentence each. `ValueError` for an asin not in the corpus."""
    folders = {stage: ShardFolder(Path("data") / corpus / stage) for stage in ("images", "ocr", "regions")}
    told = []
    for asin in asins:
        try:
            rows = {stage: folder.get(asin) for stage, folder in folders.items()}
        except KeyError:
            raise ValueError(f"{asin} is not in corpus {corpus}") from None
        if rows["images"]["status"] != "ok":
            told.append(f"{asin}: no picture ({rows['images']['status']})")
            continue
        output.mkdir(parents=True, exist_ok=True)
        draw(rows["images"]["image"], rows["ocr"], rows["regions"]).save(output / f"{asin}.png")
        texts = " | ".join(line["text"] for line in rows["ocr"]["lines"])
        told.append(f"{output / asin}.png: {rows['regions']['num_regions']} regions; text: {texts or 'none'}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m features.show", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("corpus", metavar="CORPUS", help="a corpus of params.yaml")
    parser.add_argument("asins", nargs="+", metavar="ASIN")
    parser.add_argument("--output", type=Path, default=Path(".cache/shown"), help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        told = save(arguments.corpus, arguments.asins, arguments.output)
    except ValueError as error:
        raise SystemExit(f"show: {error}") from error
    sys.stdout.write("\n".join(told) + "\n")


if __name__ == "__main__":
    main()
