import functools
import pickle
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import SHARED_DATA, copy_project, new_workspace
from image_shards import encoded, write_images
from PIL import Image, ImageDraw, ImageFont

from features import ocr
from pipeline import schema, shards

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"


@pytest.fixture(scope="session")
def label() -> tuple[Image.Image, dict[str, tuple[int, int, int, int]]]:
    """A label of three words, two of them in one row, and the boxes their ink fills."""
    image = Image.new("RGB", (400, 240), "white")
    canvas = ImageDraw.Draw(image)
    font = ImageFont.truetype(str(FONT), 34)
    boxes = {}
    for place, word in (((30, 30), "ORGANIC"), ((30, 110), "COTTON"), ((270, 112), "SOAP")):
        canvas.text(place, word, font=font, fill=(20, 20, 20))
        boxes[word] = canvas.textbbox(place, word, font=font)
    return image, boxes


@pytest.fixture(scope="session")
def settings() -> ocr.Settings:
    return ocr.Settings(canvas_px=400, threads=1)


@pytest.fixture(scope="session")
def reader(settings: ocr.Settings):
    torch.set_num_threads(settings.threads)
    return ocr.open_reader(settings)


@pytest.fixture(scope="session")
def process(reader, settings: ocr.Settings):
    return functools.partial(ocr.read_rows, reader, settings)


def row(image: bytes | None, status: str = "ok", asin: str = "B000000001") -> dict[str, object]:
    return {"asin": asin, "status": status, "sha256": None, "image": image}


def box_of(quad: list[float]) -> tuple[float, float, float, float]:
    return min(quad[::2]), min(quad[1::2]), max(quad[::2]), max(quad[1::2])


def test_a_drawn_label_is_read_in_reading_order_at_its_place(process, label):
    image, boxes = label
    [read] = process([row(encoded(image))])
    assert read["status"] == "ok"
    assert [line["text"] for line in read["lines"]] == ["ORGANIC", "COTTON", "SOAP"]
    for line in read["lines"]:
        assert 0.5 < line["confidence"] <= 1
        assert np.abs(np.subtract(box_of(line["quad"]), boxes[line["text"]])).max() <= 9  # EasyOCR's margin
        assert line["quad"][0] < line["quad"][2]  # the first corner is the left one of the upper side
        assert line["quad"][1] < line["quad"][5]


def test_a_picture_shrunk_to_find_text_still_gives_quads_in_its_own_pixels(process, label):
    image, boxes = label
    double = image.resize((800, 480), Image.Resampling.BICUBIC)
    [read] = process([row(encoded(double))])
    assert [line["text"] for line in read["lines"]] == ["ORGANIC", "COTTON", "SOAP"]
    for line in read["lines"]:
        doubled = 2 * np.array(boxes[line["text"]])
        assert np.abs(box_of(line["quad"]) - doubled).max() <= 18


def test_text_on_a_turned_photograph_is_read_upright(process, label):
    image, boxes = label
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    lying = encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)
    [read] = process([row(lying)])
    assert [line["text"] for line in read["lines"]] == ["ORGANIC", "COTTON", "SOAP"]
    assert np.abs(np.subtract(box_of(read["lines"][0]["quad"]), boxes["ORGANIC"])).max() <= 9


@pytest.mark.parametrize(
    ("image", "status", "expected"),
    [
        (None, "missing", "missing"),
        (None, "truncated", "truncated"),
        (encoded(Image.new("RGB", (64, 64), "white")), "ok", "no_text"),
        (encoded(Image.new("L", (2000, 2), 255)), "ok", "no_text"),
        (encoded(Image.effect_noise((64, 64), 80), "JPEG")[:700], "ok", "undecodable"),
        (b"no picture at all", "ok", "undecodable"),
    ],
)
def test_a_picture_without_lines_is_a_row_with_a_reason(process, image, status, expected):
    [read] = process([row(image, status)])
    assert read == {"asin": "B000000001", "status": expected, "lines": []}
    pa.Table.from_pylist([read], schema=schema.OCR)


def test_the_same_pictures_give_the_same_bytes_whatever_came_before(process, label, tmp_path):
    picture = row(encoded(label[0]))
    first, _, again = process([picture, row(encoded(label[0].rotate(180))), picture])
    for name, made in (("first", first), ("again", again)):
        schema.write_parquet([made], schema.OCR, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()


def test_a_line_less_sure_than_asked_for_is_left_out(settings, reader, label):
    everything = ocr.read_lines(reader, np.asarray(label[0]), settings)
    bar = sorted(line.confidence for line in everything)[1]
    strict = settings.model_copy(update={"min_confidence": bar})
    kept = ocr.read_lines(reader, np.asarray(label[0]), strict)
    assert kept == [line for line in everything if line.confidence >= bar]
    assert len(kept) == 2


def test_text_is_composed_unicode_without_blank_lines():
    class Reader:
        def detect(self, *_: object, **__: object) -> tuple[list[list[int]], list[list[int]]]:
            return [[]], [[]]

        def recognize(self, *_: object, **__: object) -> list[tuple[list[list[int]], str, float]]:
            quad = [[-3, 0], [40, 0], [40, 10], [-3, 10]]
            return [(quad, "Cafe\u0301 ", 0.9), (quad, "  ", 0.8)]

    [line] = ocr.read_lines(Reader(), np.zeros((30, 30, 3), np.uint8), ocr.Settings())  # type: ignore[arg-type]
    assert line.text == "Caf\u00e9"
    assert line.quad == (0, 0, 30, 0, 30, 10, 0, 10)  # inside the picture


def test_reading_order_goes_row_by_row():
    def line(text: str, x: float, y: float, height: float = 20) -> ocr.Line:
        return ocr.Line(text, 1.0, (x, y, x + 50, y, x + 50, y + height, x, y + height))

    lines = [line("d", 10, 60), line("b", 200, 4), line("c", 300, 0), line("a", 10, 8), line("e", 100, 64)]
    assert "".join(found.text for found in ocr.reading_order(lines)) == "abcde"
    assert ocr.reading_order(lines[::-1]) == ocr.reading_order(lines)


def test_the_reader_is_float_craft_from_the_packaged_weights(reader):
    kinds = {type(module).__name__ for module in (*reader.detector.modules(), *reader.recognizer.modules())}
    assert {"CRAFT", "LSTM", "Linear"} <= kinds
    assert not any("Quantized" in kind or "Dynamic" in kind for kind in kinds)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"languages": ("xx",)}, "EasyOCR does not know xx"),
        ({"recognizer": "martian_g2"}, "ocr.recognizer must be one of .*zh_sim_g2"),
        ({"recognizer": "zh_sim_g2", "languages": ("ch_sim", "en")}, r"zh_sim_g2.pth is not in"),
        ({"device": "cuda"}, "torch sees no GPU"),
    ],
)
def test_a_reader_that_cannot_be_had_is_an_error_that_says_why(changed, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        ocr.open_reader(ocr.Settings(**changed))


def test_altered_weights_are_refused(tmp_path):
    for name, path in ocr.weight_files(ocr.Settings()).items():
        shutil.copy(path, tmp_path / name)
    with (tmp_path / "english_g2.pth").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"ocr.weights: MD5 mismatch .*english_g2.pth"):
        ocr.open_reader(ocr.Settings(weights=str(tmp_path)))


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched-by-a-pickle"),)


def test_weights_that_hold_code_are_not_run_even_with_the_right_checksum(tmp_path, monkeypatch):
    import easyocr.easyocr

    for name, path in ocr.weight_files(ocr.Settings()).items():
        shutil.copy(path, tmp_path / name)
    evil = tmp_path / "craft_mlt_25k.pth"
    torch.save({"module.weight": Evil()}, evil)
    detectors = {"craft": {"filename": evil.name, "md5sum": easyocr.easyocr.calculate_md5(evil)}}
    monkeypatch.setattr(easyocr.easyocr, "detection_models", detectors)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        ocr.open_reader(ocr.Settings(weights=str(tmp_path)))
    assert not (tmp_path / "touched-by-a-pickle").exists()


def test_weights_count_by_content_and_not_by_place(tmp_path, monkeypatch):
    for name, path in ocr.weight_files(ocr.Settings()).items():
        shutil.copy(path, tmp_path / name)
    monkeypatch.setattr(shards, "ShardFolder", lambda path: path)
    monkeypatch.setattr(shards, "chunks_of_folder", lambda folder, size: [])
    packaged = ocr.job("sample", ocr.Settings()).made_with()
    assert packaged["weights"].keys() == {"craft_mlt_25k.pth", "english_g2.pth"}
    assert ocr.job("sample", ocr.Settings(weights=str(tmp_path))).made_with() == packaged
    (tmp_path / "english_g2.pth").write_bytes(b"other")
    assert ocr.job("sample", ocr.Settings(weights=str(tmp_path))).made_with() != packaged


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="no ../shared/data")
def test_a_real_pack_shot_tells_its_flavour(reader, settings):
    picture = (SHARED_DATA / "packshots" / "images" / "R000127406.jpg").read_bytes()
    sharper = settings.model_copy(update={"canvas_px": 640})
    [read] = ocr.read_rows(reader, sharper, [row(picture)])
    assert "Original" in [line["text"] for line in read["lines"]]


def test_the_stage_runs_over_shards_and_counts_its_statuses(tmp_path, label):
    """The command, from an images stage's shards to its own, as `dvc repro` calls it."""
    workspace = new_workspace(tmp_path / "project")
    copy_project(workspace.folder)
    (workspace.folder / "config" / "toy").mkdir(parents=True)
    (workspace.folder / "config" / "toy" / "ocr.json").write_text('{"canvas_px": 320, "threads": 1}')
    images = workspace.folder / "data" / "toy" / "images"
    write_images(images, {"B000000001": encoded(label[0], "JPEG"), "B000000002": None})
    workspace.run(sys.executable, "-m", "features.ocr", "toy")
    made = shards.ShardFolder(workspace.folder / "data" / "toy" / "ocr")
    assert made.manifest["status"] == {"missing": 1, "ok": 1}
    assert [line["text"] for line in made.get("B000000001")["lines"]] == ["ORGANIC", "COTTON", "SOAP"]
    unknown = workspace.run(sys.executable, "-m", "features.ocr", "nowhere", check=False)
    assert unknown.returncode == 1
    assert "config/nowhere/ocr.json does not exist" in unknown.stdout
