import argparse
import gzip
import json

import pytest

from model import predict
from model.examples import OcrLine, Question, Source
from model.floor import Floor
from pipeline import mave

PROVENANCE = {
    "products": {"kind": "mave", "drop_sources": ["brand"]},
    "attributes": ["Color", "Size"],
    "attributes_by_category": {"Mugs": ["Color"], "Kitchen": ["Size"]},
}


@pytest.fixture
def reader():
    return predict.Reader(PROVENANCE)


def line(**fields):
    record = {
        "asin": "B000000001",
        "title": "Red <b>mug</b>",
        "brand": "ACME",
        "category": ["Kitchen", "Mugs"],
    }
    return json.dumps(record | fields).encode() + b"\n"


def test_a_line_is_cleaned_as_the_training_texts_were(reader):
    read = reader.read(line(feature=["Keeps  tea warm", ""], imageURLHighRes=["mug.jpg"]))
    assert read.status == "ok"
    assert read.paragraphs == (("Red mug", "title"), ("Keeps tea warm", "feature"))
    assert (read.category, read.url) == ("Mugs", "mug.jpg")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"{broken\n", "malformed line"),
        (b"\n", "malformed line"),
        (b"[1]\n", "malformed line"),
        (b"\xff\xfe\n", "malformed line"),
        (line(asin=None), "no asin"),
        (line(asin="../B000000001"), "id is not an asin"),
        (line(title="  "), "no title"),
        (line(title=None), "no title"),
        (line(title="var x = getTime()"), "no title"),
        (b"x" * (mave.MAX_LINE_BYTES + 1), "line too long"),
    ],
)
def test_a_bad_line_is_a_line_with_a_reason(reader, raw, status):
    assert reader.read(raw).status == status


@pytest.mark.parametrize(
    ("fields", "category"),
    [
        ({"category": ["Kitchen", "Mugs", "Tall ones"]}, "Mugs"),
        ({"category": "Kitchen"}, "Kitchen"),
        ({"category": ["Garden", "Pots"]}, "Pots"),
        ({"category": [], "main_cat": "Garden"}, "Garden"),
        ({"category": [{"odd": 1}, 3]}, ""),
        ({"category": ["half a \ud83d pair"]}, "half a  pair"),
    ],
)
def test_the_category_is_the_innermost_that_the_model_knows(reader, fields, category):
    assert reader.read(line(**fields)).category == category


def test_every_line_is_read_also_blank_ones_and_the_last_without_an_end(tmp_path):
    path = tmp_path / "catalogue.jsonl.gz"
    path.write_bytes(gzip.compress(b"one\n\ntwo\nthree"))
    with mave.opened(path) as file:
        assert list(predict.raw_lines(file)) == [b"one\n", b"\n", b"two\n", b"three"]
    assert predict.num_lines(path) == 4


def test_only_the_beginning_of_a_line_that_is_too_long_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(mave, "MAX_LINE_BYTES", 10)
    path = tmp_path / "catalogue.jsonl"
    path.write_bytes(b"x" * 35 + b"\nshort\n" + b"y" * 10 + b"\n" + b"z" * 25)
    with mave.opened(path) as file:
        assert list(predict.raw_lines(file)) == [b"x" * 11, b"short\n", b"y" * 10 + b"\n", b"z" * 11]


def said(*rows):
    return [{"attribute": "Color", "score": score, "correct": correct} for score, correct in rows]


def test_the_threshold_is_the_smallest_that_gives_the_precision():
    validation = said((0.9, True), (0.8, False), (0.7, True), (0.6, True), (0.5, False), (0.4, False))
    assert predict.threshold(validation, 1.0) == 0.9
    assert predict.threshold(validation, 0.75) == 0.6  # .8 and .7 are below, .6 is above again
    assert predict.threshold(validation, 0.5) == 0.4


def test_equal_scores_pass_the_threshold_together():
    validation = said((0.9, True), (0.9, False), (0.8, True))
    assert predict.threshold(validation, 0.6) == 0.8
    with pytest.raises(ValueError, match=r"no threshold gives a precision of 0\.9 .* the best is 0\.667"):
        predict.threshold(validation, 0.9)


def test_a_threshold_without_validation_values_is_an_error():
    with pytest.raises(ValueError, match="on the 0 values"):
        predict.threshold([], 0.5)


@pytest.fixture
def rule():
    """The no-learning floor in the model's place: it extracts for real, and is fast."""
    floor = Floor()
    for value in ("red", "blue"):
        floor.observe(Question(product("T"), "Color", (value,), ("text",)))
    floor.observe(Question(product("T"), "Size", (), ()))
    return lambda questions: map(floor.predict, questions)


def product(asin):
    from model.examples import Product

    return Product(asin, asin, "Mugs", ())


def unseen(lines):
    return [("no_url", {})] * len(lines)


def test_one_row_per_line_in_order_over_many_chunks(reader, rule):
    raws = [line(asin=f"B{number:09}") if number % 3 else b"{broken\n" for number in range(80)]
    lines = [reader.read(raw) for raw in raws]
    rows = list(predict.answers(lines, unseen, lambda line: ["Color", "Size"], rule, 0.0))
    assert [row["status"] for row in rows] == ["ok" if n % 3 else "malformed line" for n in range(80)]
    assert [row["asin"] for row in rows] == [f"B{n:09}" if n % 3 else None for n in range(80)]
    source = {"kind": "text", "index": 0, "begin": 0, "end": 3, "field": "title"}
    for row in rows:
        if row["status"] == "ok":
            color, size = row["attributes"]
            assert color == {"key": "Color", "values": [{"value": "red", "score": 0.5, "source": source}]}
            assert size == {"key": "Size", "values": []}
        else:
            assert (row["attributes"], row["image"]) == ([], None)


def test_values_under_the_threshold_are_left_out_and_their_attribute_stays(reader, rule):
    (row,) = predict.answers([reader.read(line())], unseen, lambda line: ["Color"], rule, 0.51)
    assert row["attributes"] == [{"key": "Color", "values": []}]


def test_a_value_read_on_the_picture_says_so(reader, rule):
    def seen(lines):
        return [("ok", {"ocr": (OcrLine("deep blue", 0.9, (0.0,) * 8),)})] * len(lines)

    (row,) = predict.answers([reader.read(line(title="Mug"))], seen, lambda line: ["Color"], rule, 0.0)
    (value,) = row["attributes"][0]["values"]
    assert value["source"] == {"kind": "ocr", "index": 0, "begin": 5, "end": 9}
    assert row["image"] == "ok"
    assert Source(**value["source"]) == Source("ocr", 0, 5, 9)


def command(tmp_path, **changes):
    options = {"model": tmp_path, "input": tmp_path / "in.jsonl", "output": tmp_path / "out.jsonl"}
    more = {"images": None, "hosts": (), "attributes": None, "min_precision": None, "batch_size": 4}
    return argparse.Namespace(**options | more | changes)


def test_a_missing_catalogue_folder_or_model_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"in\.jsonl does not exist"):
        predict.run(command(tmp_path))
    (tmp_path / "in.jsonl").write_bytes(line())
    with pytest.raises(ValueError, match="pictures is not a folder"):
        predict.run(command(tmp_path, images=tmp_path / "pictures"))
    with pytest.raises(ValueError, match="is not a trained model"):
        predict.run(command(tmp_path))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "option", [["--min-precision", "0"], ["--min-precision", "1.2"], ["--batch-size", "0"]]
)
def test_options_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        predict.parse(["--model", "m", "--input", "i", "--output", "o", *option])
    assert "must be" in capsys.readouterr().err


def test_help_says_what_goes_in_and_comes_out(capsys):
    with pytest.raises(SystemExit):
        predict.parse(["--help"])
    told = capsys.readouterr().out
    for word in ("--min-precision", "imageURLHighRes", "status", "source", "one line of JSON each"):
        assert word in told


def test_pictures_are_fetched_read_and_cut_into_regions_on_the_way(tmp_path):
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (320, 120), "white")
    ImageDraw.Draw(picture).text((30, 30), "NET 250", "black", ImageFont.load_default(60))
    picture.save(tmp_path / "mug.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "mug.jpg").read_bytes()[:900])
    provenance = {
        "settings": {"ocr": True, "image": True},
        "ocr": {"canvas_px": 320, "threads": 1},
        "regions": {"short_side_px": 64, "long_side_px": 128, "max_boxes": 3, "threads": 1},
    }
    names = ("mug.jpg", "broken.jpg", "none.jpg", "../mug.jpg", "https://example.org/mug.jpg", None)
    lines = [predict.Line("B000000001", "ok", url=name) for name in names]
    seen = predict.Seen(provenance, tmp_path, ()).of(lines)
    told = ["ok", "truncated", "missing", "outside_base", "forbidden_host", "no_url"]
    assert [status for status, _ in seen] == told
    fields = seen[0][1]
    assert "250" in " ".join(line.text for line in fields["ocr"])
    assert fields["regions"].shape == (len(fields["boxes"]), 2048)
    assert fields["boxes"][-1].tolist() == [0, 0, 320, 120]
    assert all(found == {"ocr": ()} for _, found in seen[1:])
