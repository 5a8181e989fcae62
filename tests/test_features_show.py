import json
import sys

import numpy as np
import pytest
from image_shards import encoded, write_images
from PIL import Image

from features import show
from pipeline import schema
from pipeline.disk import sha256_of

PICTURE = encoded(Image.new("RGB", (320, 160), "white"))
OCR = {
    "asin": "B000000001",
    "status": "ok",
    "lines": [{"text": "SOAP", "confidence": 0.93, "quad": [40.0, 20, 120, 20, 120, 50, 40, 50]}],
}
REGIONS = {
    "asin": "B000000001",
    "status": "ok",
    "boxes": [[200.0, 40, 300, 140], [0.0, 0, 320, 160]],
    "scores": [0.5, 1.0],
    "num_regions": 2,
    "features": None,
    "grid": None,
}


def places_of(image: Image.Image, rgb: tuple[int, int, int]) -> np.ndarray:
    """(x1, y1, x2, y2) around all pixels of one colour."""
    y, x = np.nonzero((np.asarray(image) == rgb).all(axis=2))
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def test_quads_and_boxes_are_drawn_where_they_are_in_an_enlarged_picture():
    drawn = show.draw(PICTURE, OCR, REGIONS)
    assert drawn.size == (640, 320)  # twice the size
    assert np.abs(places_of(drawn, show.REGION_RGB) - (400, 80, 600, 280)).max() <= 2
    left, top, right, _ = places_of(drawn, show.LINE_RGB)
    assert np.abs(np.subtract((left, top, right), (80, 40, 240))).max() <= 2


def test_nothing_seen_leaves_the_picture_as_it_is():
    nothing = {**REGIONS, "boxes": [], "scores": []}
    drawn = show.draw(PICTURE, {**OCR, "lines": []}, nothing)
    assert drawn.getextrema() == ((255, 255),) * 3


def test_a_label_at_the_edge_stays_inside_the_picture():
    at_the_corner = {
        **OCR,
        "lines": [{**OCR["lines"][0], "quad": [300.0, 150, 320, 150, 320, 160, 300, 160]}],
    }
    drawn = show.draw(PICTURE, at_the_corner, {**REGIONS, "boxes": [], "scores": []})
    _, _, right, bottom = places_of(drawn, show.LINE_RGB)
    assert right <= 640
    assert bottom <= 320
    assert (np.asarray(drawn) == 255).all(axis=2)[-25:, -90:].any()  # white letters


def write_stage(folder, rows, of_schema) -> None:
    folder.mkdir()
    path = folder / "00000.parquet"
    schema.write_parquet(rows, of_schema, path)
    shard = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    shard |= {"rows": len(rows), "first": rows[0]["asin"], "last": rows[-1]["asin"]}
    (folder / "manifest.json").write_text(json.dumps({"rows": len(rows), "shards": [shard]}))


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data" / "toy" / "images", {"B000000001": PICTURE, "B000000002": None})
    none = {"asin": "B000000002", "status": "missing"}
    write_stage(tmp_path / "data" / "toy" / "ocr", [OCR, {**none, "lines": []}], schema.OCR)
    empty = {"boxes": [], "scores": [], "num_regions": 0, "features": None, "grid": None}
    write_stage(
        tmp_path / "data" / "toy" / "regions", [REGIONS, {**none, **empty}], schema.region_schema(width=2048)
    )
    return tmp_path


def test_the_command_writes_a_png_per_product_and_says_where_none_is(corpus, monkeypatch, capsys):
    command = ["show", "toy", "B000000001", "B000000002", "--output", str(corpus / "out")]
    monkeypatch.setattr(sys, "argv", command)
    show.main()
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("B000000001.png: 2 regions; text: SOAP")
    assert told[1] == "B000000002: no picture (missing)"
    with Image.open(corpus / "out" / "B000000001.png") as image:
        assert image.size == (640, 320)


def test_an_unknown_product_is_an_error_that_names_it(corpus, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["show", "toy", "B000000009"])
    with pytest.raises(SystemExit, match="show: B000000009 is not in corpus toy"):
        show.main()


def test_a_command_that_asks_for_nothing_says_what_to_ask_for(corpus, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["show", "toy"])
    with pytest.raises(SystemExit, match="show: name asins, or ask for the --sheet"):
        show.main()


@pytest.fixture
def many(tmp_path, monkeypatch):
    """Eight products whose lines are read with rising confidence, and three without a usable picture."""
    monkeypatch.chdir(tmp_path)
    asins = [f"B{number:09d}" for number in range(11)]
    lost = dict(zip(asins[8:], ("missing", "missing", "kills_worker"), strict=True))
    pictures = {asin: None if lost.get(asin) == "missing" else PICTURE for asin in asins}
    write_images(tmp_path / "data" / "toy" / "images", pictures)
    lines = [[{**OCR["lines"][0], "confidence": 0.1 * number}] for number in range(8)]
    ocr = [{"asin": a, "status": "ok", "lines": of} for a, of in zip(asins, lines, strict=False)]
    ocr += [{"asin": asin, "status": status, "lines": []} for asin, status in lost.items()]
    write_stage(tmp_path / "data" / "toy" / "ocr", ocr, schema.OCR)
    regions = [{**REGIONS, "asin": asin} for asin in asins]
    write_stage(tmp_path / "data" / "toy" / "regions", regions, schema.region_schema(width=2048))
    return asins


def test_the_sheet_shows_the_surest_the_least_sure_and_the_failed(many, tmp_path, monkeypatch, capsys):
    assert show.chosen("toy") == {
        "good": many[7:1:-1],
        "doubtful": many[:2],  # the others are good already
        "failed": [many[10], many[8], many[9]],  # each status before any twice
    }
    monkeypatch.setattr(sys, "argv", ["show", "toy", "--sheet", "--output", str(tmp_path / "out")])
    show.main()
    assert capsys.readouterr().out.endswith("sheet.png: 6 good, 2 doubtful, 3 failed\n")
    with Image.open(tmp_path / "out" / "sheet.png") as image:
        cells = np.asarray(image)
    assert cells.shape[1] == show.SHEET_COLUMNS * show.CELL_PX
    height = cells.shape[0] // 3
    middle = height // 2 + 2 * show.FONT_PX
    assert tuple(cells[2 * height + middle, 10]) == show.FAILED_RGB
    assert tuple(cells[2 * height + middle, 3 * show.CELL_PX + 10]) == (255, 255, 255)
    assert (cells[:height] == show.LINE_RGB).all(axis=2).any()
    card = cells[2 * height + 2 * show.FONT_PX : 3 * height, : show.CELL_PX - 4]
    assert (card < 60).any(), "no reason is written into it"
