"""What OCR and detector saw in products' pictures, drawn into them, to look at.

    python -m features.show CORPUS ASIN... [--output FOLDER]
    python -m features.show CORPUS --sheet [--output FOLDER]     good, doubtful and failed ones on one sheet

OCR lines are red with their text and confidence, regions blue with rank and score.
"""

import argparse
import itertools
import statistics
import sys
import textwrap
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
SHEET_COLUMNS, CELL_PX = 6, 300
FAILED_RGB = (225, 228, 232)


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


def save(corpus: str, asins: list[str], output: Path, *, sheet_too: bool = False) -> list[str]:
    """One PNG per asin in `output`; returns a sentence each. `ValueError` for an asin not in the corpus."""
    if not asins and not sheet_too:
        raise ValueError("name asins, or ask for the --sheet")
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
    return told + (save_sheet(corpus, output) if sheet_too else [])


def chosen(corpus: str) -> dict[str, list[str]]:
    """asins of the sheet's rows: lines surest on average, least sure, and no usable picture; ties by asin.

    Depends on nothing but the shards; of the failed ones, each status comes before any comes twice.
    """
    sure: list[tuple[float, str]] = []
    failed: dict[str, list[str]] = {}
    for row in ShardFolder(Path("data") / corpus / "ocr").rows():
        if row["status"] == "ok":
            sure.append((statistics.mean(line["confidence"] for line in row["lines"]), row["asin"]))
        elif row["status"] != "no_text":
            failed.setdefault(row["status"], []).append(row["asin"])
    good = [asin for _, asin in sorted(sure, key=lambda pair: (-pair[0], pair[1]))[:SHEET_COLUMNS]]
    doubtful = [asin for _, asin in sorted(sure)[:SHEET_COLUMNS] if asin not in good]
    turns = itertools.zip_longest(*(failed[status] for status in sorted(failed)))
    broken = [asin for turn in turns for asin in turn if asin is not None]
    return {"good": good, "doubtful": doubtful, "failed": broken[:SHEET_COLUMNS]}


def sheet(corpus: str) -> "Image.Image":
    """The pictures of `chosen`, drawn into, a row of each kind; a failed one is a card with its reason."""
    from PIL import Image, ImageDraw

    folders = {stage: ShardFolder(Path("data") / corpus / stage) for stage in ("images", "ocr", "regions")}
    kinds = chosen(corpus)
    height = CELL_PX + 2 * FONT_PX
    made = Image.new("RGB", (SHEET_COLUMNS * CELL_PX, len(kinds) * height), "white")
    canvas = ImageDraw.Draw(made)
    for line, (kind, asins) in enumerate(kinds.items()):
        for column, asin in enumerate(asins):
            place = (column * CELL_PX, line * height + 2 * FONT_PX)
            rows = {stage: folder.get(asin) for stage, folder in folders.items()}
            told = kind
            if rows["ocr"]["status"] == "ok":
                cell = draw(rows["images"]["image"], rows["ocr"], rows["regions"])
                cell.thumbnail((CELL_PX - 4, CELL_PX - 4), Image.Resampling.LANCZOS)
            else:
                told = rows["ocr"]["status"]
                cell = _card(rows["images"]["error"] or told)
            made.paste(cell, place)
            canvas.text((place[0] + 2, place[1] - FONT_PX - 4), f"{asin}: {told}", font=_font(), fill="black")
    return made


def _card(text: str) -> "Image.Image":
    from PIL import Image, ImageDraw

    card = Image.new("RGB", (CELL_PX - 4, CELL_PX - 4), FAILED_RGB)
    wrapped = textwrap.fill(text, (CELL_PX - 24) // (FONT_PX * 2 // 3), max_lines=CELL_PX // (2 * FONT_PX))
    ImageDraw.Draw(card).text((10, 10), wrapped, font=_font(), fill="black")
    return card


def save_sheet(corpus: str, output: Path) -> list[str]:
    output.mkdir(parents=True, exist_ok=True)
    sheet(corpus).save(output / "sheet.png")
    counts = ", ".join(f"{len(asins)} {kind}" for kind, asins in chosen(corpus).items())
    return [f"{output / 'sheet.png'}: {counts}"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m features.show", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("corpus", metavar="CORPUS", help="a corpus of params.yaml")
    parser.add_argument("asins", nargs="*", metavar="ASIN")
    parser.add_argument("--sheet", action="store_true", help="good, doubtful and failed ones on one sheet")
    parser.add_argument("--output", type=Path, default=Path(".cache/shown"), help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        told = save(arguments.corpus, arguments.asins, arguments.output, sheet_too=arguments.sheet)
    except ValueError as error:
        raise SystemExit(f"show: {error}") from error
    sys.stdout.write("\n".join(told) + "\n")


if __name__ == "__main__":
    main()
