import pickle
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import SHARED_DATA, copy_project, new_workspace
from corrupt_images import TABLE
from image_shards import encoded, write_images
from PIL import Image, ImageDraw, ImageFont

from features import craft, ocr
from features import rapid as rapid_engine
from features.decode import batches
from features.lines import Line, agreement, edits, lines_in_order, reading_order, shares
from pipeline import pictures, sample, schema, shards

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"


CORNERS = [[10, 10], [60, 10], [60, 30], [10, 30]]


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
def work(settings: ocr.Settings) -> ocr.Work:
    return ocr.open_work(settings)


@pytest.fixture(scope="session")
def reader(settings: ocr.Settings):
    """EasyOCR as it is."""
    torch.set_num_threads(settings.threads)
    return ocr.open_reader(settings)


@pytest.fixture(scope="session")
def process(work):
    return lambda rows: rows_of(work, rows)


def rows_of(work: ocr.Work, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [made for made in work(rows) if not isinstance(made, Counter)]


def lines_of(made: dict[str, object]) -> list[Line]:
    return [Line(line["text"], line["confidence"], tuple(line["quad"])) for line in made["lines"]]


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
    pictures = [row(encoded(label[0])), row(encoded(label[0].rotate(180))), row(encoded(label[0]))]
    first = process(pictures)
    process(pictures[1:2])
    for name, made in (("first", first), ("again", process(pictures))):
        schema.write_parquet(made, schema.OCR, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()


def test_a_line_less_sure_than_asked_for_is_left_out(work, process, label):
    [everything] = process([row(encoded(label[0]))])
    bar = sorted(line["confidence"] for line in everything["lines"])[1]
    strict = replace(work, settings=work.settings.model_copy(update={"min_confidence": bar}))
    [kept] = rows_of(strict, [row(encoded(label[0]))])
    assert kept["lines"] == [line for line in everything["lines"] if line["confidence"] >= bar]
    assert len(kept["lines"]) == 2


def test_a_shard_of_broken_images_has_a_row_for_each(work):
    """Also of bytes that `images` would never have let through as ok."""
    rows = [
        row(data, "ok" if name != "bomb" else status, asin=name) for name, (data, status, _) in TABLE.items()
    ]
    made = {one["asin"]: one["status"] for one in rows_of(work, rows)}
    assert list(made) == list(TABLE)
    for name, (_, status, _) in TABLE.items():
        expected = {"ok", "no_text"} if status == "ok" else {"undecodable", "too_many_pixels"}
        assert made[name] in expected, name


# The same as readtext


def readtext(reader, path: Path, canvas_px: int) -> list[Line]:
    """What a user's own loop over files reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = reader.readtext(str(path), canvas_size=canvas_px)
    width, height = Image.open(path).size
    return lines_in_order(found, height=height, width=width)


def shown_equal(mine: list[Line], theirs: list[Line]) -> None:
    assert [line.text for line in mine] == [line.text for line in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert np.abs(np.subtract(one.quad, other.quad)).max() <= 1
        assert abs(one.confidence - other.confidence) < 1e-3


@pytest.fixture(scope="session")
def drawn(label) -> dict[str, Image.Image]:
    """Pictures of several shapes, with slanted, tiny, faint and upright text, and one without."""
    faint = Image.new("RGB", (400, 240), (200, 40, 40))
    ImageDraw.Draw(faint).text((30, 60), "SALTED", font=ImageFont.truetype(str(FONT), 40), fill=(215, 60, 50))
    small = Image.new("RGB", (300, 160), "white")
    ImageDraw.Draw(small).text((20, 60), "Net weight 250 g", font=ImageFont.truetype(str(FONT), 11), fill=0)
    return {
        "plain": label[0],
        "slanted": label[0].rotate(14, fillcolor=(255, 255, 255), resample=Image.Resampling.BICUBIC),
        "upright": label[0].rotate(90, expand=True),
        "faint": faint,
        "small": small,
        "blank": Image.new("RGB", (300, 160), (30, 90, 60)),
    }


@pytest.mark.parametrize("canvas_px", [2560, 256])
def test_exact_mode_reads_what_readtext_reads_from_the_file(canvas_px, work, reader, drawn, tmp_path):
    engine = replace(work.engine, canvas_px=canvas_px)
    rows, expected = [], []
    for name, image in drawn.items():
        path = tmp_path / f"{name}.{'png' if name == 'small' else 'jpg'}"
        image.save(path)
        rows.append(row(path.read_bytes(), asin=name))
        expected.append(readtext(reader, path, canvas_px))
    made = rows_of(replace(work, engine=engine), rows)
    for one, theirs in zip(made, expected, strict=True):
        shown_equal(lines_of(one), theirs)
    assert sum(map(len, expected)) > (8 if canvas_px == 2560 else 3)


def test_the_fused_network_gives_the_maps_of_easyocrs_own(work, reader):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 96, 160, generator=generator)
    with torch.inference_mode():
        theirs, _ = reader.detector(pixels)
    mine = work.engine.maps(pixels)
    assert mine.shape == theirs.shape == (2, 48, 80, 2)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_components_become_the_boxes_that_easyocr_makes_of_them():
    """Smoothed noise has components of every form, also at the edges."""
    from easyocr.craft_utils import getDetBoxes

    noise, count = np.random.default_rng(3), 0
    for _ in range(40):
        text, link = (cv2.GaussianBlur(noise.random((60, 90), np.float32), (0, 0), 2.2) for _ in range(2))
        text, link = ((part - part.min()) / (part.max() - part.min()) for part in (text, link))
        link *= 0.6
        theirs, _, _ = getDetBoxes(text, link, craft.TEXT, craft.LINK, craft.LOW_TEXT)
        mine = craft.boxes_of(np.stack([text, link], axis=2))
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)
        count += len(mine)
    assert count > 40


def test_equal_shapes_are_batched_up_to_a_limit_and_others_never():
    shapes = [(32, 64), (64, 64), (32, 64), (32, 64), (64, 64)]
    assert batches(shapes, 32 * 64 * 2) == [[0, 2], [3], [1], [4]]
    assert batches([(640, 640)], 1) == [[0]]


def test_shrinking_keeps_the_grey_that_a_jpeg_stores(label, tmp_path):
    red = Image.new("RGB", (64, 48), (230, 10, 20))
    red.paste((20, 40, 220), (10, 10, 40, 30))
    for form in ("JPEG", "PNG"):
        path = tmp_path / form
        red.save(path, form)
        theirs = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        assert np.abs(theirs.astype(int) - pictures.decode_grey(path.read_bytes())).max() <= 1
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(red, "JPEG", exif=exif)
    assert pictures.decode_grey(turned).shape == (64, 48)


def test_fast_mode_tells_how_far_it_agrees_with_exact(label):
    fast = ocr.open_work(ocr.Settings(canvas_px=400, mode="fast", check_every=2))
    rows = [row(encoded(label[0])), row(encoded(label[0].rotate(180))), row(None, "missing")]
    *made, counts = fast([*rows, row(encoded(label[0]))])
    assert [one["status"] for one in made] == ["ok", made[1]["status"], "missing", "ok"]
    assert counts["pictures"] == 2  # the first and the third of those that there are
    told = ocr.agreement_with_exact(counts)["agreement_with_exact"]
    assert told["lines"] == 6
    assert "read" not in told
    assert told["share_of_lines_found"] == told["share_of_characters_right"] == 1
    assert ocr.agreement_with_exact(Counter()) == {}


def test_fast_mode_reads_what_is_hard_exactly_and_says_how_often(label, monkeypatch):
    fast = ocr.open_work(ocr.Settings(canvas_px=400, mode="fast", check_every=0))
    monkeypatch.setattr(fast, "exact", lambda pictures: [[(CORNERS, "exactly", 1.0)] for _ in pictures])
    rows = [row(encoded(label[0])), row(encoded(Image.new("RGB", (400, 240), "white")))]
    *made, counts = fast(rows)
    assert [len(one["lines"]) for one in made] == [3, 0]
    assert ocr.agreement_with_exact(counts) == {"hard": 0}
    monkeypatch.setattr(ocr, "UNSURE", 1.1)  # whatever is read is unsure
    for many, words, hard in ((17, ["ORGANIC", "COTTON", "SOAP"], 0), (16, ["exactly"], 1)):
        monkeypatch.setattr(ocr, "MANY_CHARACTERS", many)
        first, second, counts = fast(rows)
        assert [line["text"] for line in first["lines"]] == words
        assert second["lines"] == []
        assert ocr.agreement_with_exact(counts) == {"hard": hard}
    monkeypatch.setattr(
        fast, "settings", fast.settings.model_copy(update={"min_confidence": 1.0, "check_every": 1})
    )
    first, _, counts = fast(rows)  # lines that are left out are unsure all the same
    assert [line["text"] for line in first["lines"]] == ["exactly"]
    told = ocr.agreement_with_exact(counts)
    compared = told["agreement_with_exact"]
    assert (told["hard"], compared["lines"], compared["lines_found"]) == (1, 2, 1)


def test_where_fast_is_exact_nothing_is_hard(label, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(ocr, "UNSURE", 1.1)
    monkeypatch.setattr(ocr, "MANY_CHARACTERS", 1)
    fast = ocr.open_work(ocr.Settings(canvas_px=400, mode="fast"))
    assert fast.engine is fast.exact
    *_, counts = fast([row(encoded(label[0]))])
    assert ocr.agreement_with_exact(counts)["hard"] == 0


def test_fast_mode_says_with_which_precision_it_ran(monkeypatch):
    monkeypatch.setattr(shards, "ShardFolder", lambda path: path)
    monkeypatch.setattr(shards, "chunks_of_folder", lambda folder, size: [])
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    native = ocr.job("sample", ocr.Settings(mode="fast")).made_with()
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert native["precision"] == "bfloat16"
    assert ocr.job("sample", ocr.Settings(mode="fast")).made_with()["precision"] == "float32"


def test_fast_mode_looks_for_text_on_a_smaller_canvas_and_is_checked_against_the_larger(label, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    fast = ocr.open_work(ocr.Settings(canvas_px=960, fast_canvas_px=400, mode="fast"))
    assert (fast.engine.canvas_px, fast.exact.canvas_px) == (400, 960)
    *_, counts = fast([row(encoded(label[0].resize((800, 480), Image.Resampling.BICUBIC)))])
    assert ocr.agreement_with_exact(counts)["agreement_with_exact"]["share_of_lines_found"] == 1
    exact = ocr.open_work(ocr.Settings(canvas_px=960, fast_canvas_px=400))
    assert exact.engine.canvas_px == 960
    large = ocr.open_work(ocr.Settings(canvas_px=3200, mode="fast"))
    assert large.engine.canvas_px == 3200


def test_exact_shards_do_not_hang_on_the_canvas_of_fast_ones(monkeypatch):
    monkeypatch.setattr(shards, "ShardFolder", lambda path: path)
    monkeypatch.setattr(shards, "chunks_of_folder", lambda folder, size: [])
    for mode, hangs in (("exact", False), ("fast", True)):
        digests = [
            ocr.job("sample", ocr.Settings(mode=mode, fast_canvas_px=px)).made_with() for px in (400, 800)
        ]
        assert (digests[0] != digests[1]) == hangs


# The other engine


@pytest.mark.parametrize("given", [{"mode": "fast"}, {"languages": ("ja",)}, {"device": "cuda"}])
def test_what_rapidocr_does_not_know_is_refused(given):
    with pytest.raises(ValueError, match=f"engine rapidocr knows no {next(iter(given))}"):
        ocr.Settings(engine="rapidocr", **given)


def test_rapidocr_reads_english_and_chinese_with_the_models_of_its_package(label):
    rapid = ocr.open_work(ocr.Settings(engine="rapidocr", canvas_px=400))
    [read] = rows_of(rapid, [row(encoded(label[0]))])
    assert [line["text"] for line in read["lines"]] == ["ORGANIC", "COTTON", "SOAP"]
    for line in read["lines"]:
        assert np.abs(np.subtract(box_of(line["quad"]), label[1][line["text"]])).max() <= 12
    files = rapid_engine.weight_files()
    assert {path.suffix for path in files.values()} == {".onnx"}


def test_rapidocr_reads_nothing_on_a_picture_too_thin_for_its_canvas(label):
    rapid = ocr.open_work(ocr.Settings(engine="rapidocr", canvas_px=400))
    thin, plain = rows_of(rapid, [row(encoded(Image.new("RGB", (900, 16), "white"))), row(encoded(label[0]))])
    assert (thin["status"], thin["lines"]) == ("no_text", [])
    assert len(plain["lines"]) == 3


# Lines


def test_text_is_composed_unicode_without_blank_lines():
    quad = [[-3, 0], [40, 0], [40, 10], [-3, 10]]
    found = [(quad, "Cafe\u0301 ", 0.9), (quad, "  ", 0.8)]
    [line] = lines_in_order(found, height=30, width=30)
    assert line.text == "Caf\u00e9"
    assert line.quad == (0, 0, 30, 0, 30, 10, 0, 10)  # inside the picture


def placed(text: str, x: float, y: float, height: float = 20) -> Line:
    return Line(text, 1.0, (x, y, x + 50, y, x + 50, y + height, x, y + height))


def test_reading_order_goes_row_by_row():
    found = [
        placed("d", 10, 60),
        placed("b", 200, 4),
        placed("c", 300, 0),
        placed("a", 10, 8),
        placed("e", 100, 64),
    ]
    assert "".join(line.text for line in reading_order(found)) == "abcde"
    assert reading_order(found) == reading_order(found[::-1])


def test_agreement_counts_lines_by_place_and_characters_by_edits():
    wanted = [placed("ORGANIC", 0, 0), placed("COTTON", 0, 40), placed("SOAP", 100, 0)]
    found = [placed("ORGANlC", 2, 1), placed("COTTON", 0, 55), placed("S0AP!", 100, 0)]
    counts = agreement(wanted, found)  # the second lies too far down
    assert counts == {"pictures": 1, "lines": 3, "lines_found": 2, "characters": 11, "characters_right": 8}
    assert agreement(wanted, [*found, placed("SOAP", 100, 0)])["lines_found"] == 2  # one place, one line
    assert agreement([], found)["lines"] == 0
    assert shares(counts) == {
        **counts,
        "share_of_lines_found": 0.666667,
        "share_of_characters_right": 0.727273,
    }


def test_where_no_line_is_wanted_no_share_is_told():
    told = shares(agreement([], [placed("SOAP", 0, 0)]))
    assert told == {"pictures": 1, "lines": 0, "lines_found": 0, "characters": 0, "characters_right": 0}
    assert shares(Counter()) == {}


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0), ("ab", "ba", 2)],
)
def test_edits_are_counted(one, other, count):
    assert edits(one, other) == edits(other, one) == count


# Weights


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
def test_a_real_pack_shot_is_read_as_readtext_reads_it(work, reader):
    path = SHARED_DATA / "packshots" / "images" / "R000127406.jpg"
    engine = replace(work.engine, canvas_px=640)
    [read] = rows_of(replace(work, engine=engine), [row(path.read_bytes())])
    assert "Original" in [line["text"] for line in read["lines"]]
    shown_equal(lines_of(read), readtext(reader, path, 640))


@pytest.mark.soak
@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="no ../shared/data")
@pytest.mark.timeout(3600)
def test_every_pack_shot_and_sample_picture_is_read_as_readtext_reads_it(work, reader, tmp_path):
    sample.generate(sample.Settings(), tmp_path)
    drawn = [path for path in sorted((tmp_path / "images").glob("*.jpg")) if is_whole(path)][:100]
    paths = [*sorted((SHARED_DATA / "packshots" / "images").iterdir()), *drawn]
    assert len(paths) == 183
    engine = replace(work.engine, canvas_px=2560)
    rows = [row(path.read_bytes(), asin=str(path)) for path in paths]
    for made in rows_of(replace(work, engine=engine), rows):
        shown_equal(lines_of(made), readtext(reader, Path(made["asin"]), 2560))


def is_whole(path: Path) -> bool:
    return pictures.inspect(path.read_bytes(), max_pixels=10**8, min_px=1).status == "ok"


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
