"""Product lines to rows: reading, thresholds, pictures, and the whole as one object."""

import json

import pytest

from model import extractor
from model.batches import rows
from model.examples import OcrLine, Product, Question, Source
from model.floor import Floor
from pipeline import mave

PROVENANCE = {
    "products": {"kind": "mave", "drop_sources": ["brand"]},
    "attributes": ["Color", "Size"],
    "attributes_by_category": {"Mugs": ["Color"], "Kitchen": ["Size"]},
}


@pytest.fixture
def reader():
    return extractor.Reader(PROVENANCE)


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


def test_a_line_with_half_a_surrogate_pair_for_its_asin_can_be_written(reader):
    read = reader.read(line(asin="B0000\ud80001"))
    assert (read.asin, read.status) == ("B000001", "id is not an asin")
    json.dumps(read.asin, ensure_ascii=False).encode()


def said(*rows):
    return [{"attribute": "Color", "score": score, "correct": correct} for score, correct in rows]


def test_the_threshold_is_the_smallest_that_gives_the_precision():
    validation = said((0.9, True), (0.8, False), (0.7, True), (0.6, True), (0.5, False), (0.4, False))
    assert extractor.threshold(validation, 1.0) == 0.9
    assert extractor.threshold(validation, 0.75) == 0.6  # .8 and .7 are below, .6 is above again
    assert extractor.threshold(validation, 0.5) == 0.4


def test_equal_scores_pass_the_threshold_together():
    validation = said((0.9, True), (0.9, False), (0.8, True))
    assert extractor.threshold(validation, 0.6) == 0.8
    with pytest.raises(ValueError, match=r"no threshold gives a precision of 0\.9 .* the best is 0\.667"):
        extractor.threshold(validation, 0.9)


def test_a_threshold_without_validation_values_is_an_error():
    with pytest.raises(ValueError, match="on the 0 values"):
        extractor.threshold([], 0.5)


@pytest.fixture
def rule():
    """The no-learning floor in the model's place: it extracts for real, and is fast."""
    floor = Floor()
    for value in ("red", "blue"):
        floor.observe(Question(product("T"), "Color", (value,), ("text",)))
    floor.observe(Question(product("T"), "Size", (), ()))
    return lambda questions: map(floor.predict, questions)


def product(asin):
    return Product(asin, asin, "Mugs", ())


def unseen(lines):
    return [("no_url", {})] * len(lines)


def test_one_row_per_line_in_order_over_many_chunks(reader, rule):
    raws = [line(asin=f"B{number:09}") if number % 3 else b"{broken\n" for number in range(80)]
    lines = [reader.read(raw) for raw in raws]
    rows = list(extractor.answers(lines, unseen, lambda line: ["Color", "Size"], rule, 0.0))
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


def test_all_that_is_asked_of_a_line_is_asked_of_one_product(reader, rule):
    asked = []

    def extract(questions):
        asked.extend(questions)
        return rule(asked)

    lines = [reader.read(line(asin=f"B{number:09}")) for number in range(3)]
    list(extractor.answers(lines, unseen, lambda line: ["Color", "Size"], extract, 0.0))
    of_products = rows(asked, joint=True)
    assert [[question.attribute for question in row] for row in of_products] == [["Color", "Size"]] * 3


def test_values_under_the_threshold_are_left_out_and_their_attribute_stays(reader, rule):
    (row,) = extractor.answers([reader.read(line())], unseen, lambda line: ["Color"], rule, 0.51)
    assert row["attributes"] == [{"key": "Color", "values": []}]


def test_a_value_read_on_the_picture_says_so(reader, rule):
    def seen(lines):
        return [("ok", {"ocr": (OcrLine("deep blue", 0.9, (0.0,) * 8),)})] * len(lines)

    (row,) = extractor.answers([reader.read(line(title="Mug"))], seen, lambda line: ["Color"], rule, 0.0)
    (value,) = row["attributes"][0]["values"]
    assert value["source"] == {"kind": "ocr", "index": 0, "begin": 5, "end": 9}
    assert row["image"] == "ok"
    assert Source(**value["source"]) == Source("ocr", 0, 5, 9)


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
    lines = [extractor.Line("B000000001", "ok", url=name) for name in names]
    seen = extractor.Seen(provenance, tmp_path, ()).of(lines)
    told = ["ok", "truncated", "missing", "outside_base", "forbidden_host", "no_url"]
    assert [status for status, _ in seen] == told
    fields = seen[0][1]
    assert "250" in " ".join(line.text for line in fields["ocr"])
    assert fields["regions"].shape == (len(fields["boxes"]), 2048)
    assert fields["boxes"][-1].tolist() == [0, 0, 320, 120]
    assert all(found == {"ocr": ()} for _, found in seen[1:])


def test_pictures_are_prepared_as_for_the_training_and_looked_for_where_the_catalogue_says(tmp_path):
    images = {"cdn_size_px": 500, "max_pixels": 10**8, "base": "data/mine/pictures", "hosts": ["a.example"]}
    about = {"settings": {"ocr": False, "image": False}, "images": images | {"base_sha256": "0" * 64}}
    settings = extractor.Seen(about, tmp_path, ["b.example"]).settings
    assert (settings.cdn_size_px, settings.max_pixels) == (500, 10**8)
    assert (settings.base, settings.base_sha256, settings.hosts) == (str(tmp_path), None, ("b.example",))


def test_a_model_trained_with_a_gpu_reads_pictures_without_one_and_a_chosen_processor_stays(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    about = {"settings": {"ocr": True, "image": False}, "ocr": {"canvas_px": 320, "device": "cuda"}}
    assert extractor.Seen(about, None, ()).ocr.settings.device == "auto"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    about["ocr"] = about["ocr"] | {"device": "cpu"}
    assert extractor.Seen(about, None, ()).ocr.settings.device == "cpu"


class Ruled:
    """The floor as a model and its processor."""

    def __init__(self, floor):
        self.floor = floor

    def encode(self, question):
        return question

    def extract(self, questions, processor):
        return [self.floor.predict(question) for question in questions]


def test_a_product_is_asked_with_the_picture_that_is_given(tmp_path):
    from PIL import Image, ImageDraw, ImageFont

    for name, text in (("mug.jpg", "NET 250"), ("shop.jpg", "NET 174")):
        picture = Image.new("RGB", (320, 120), "white")
        ImageDraw.Draw(picture).text((30, 30), text, "black", ImageFont.load_default(60))
        picture.save(tmp_path / name)
    floor = Floor()
    for value in ("174", "250"):
        floor.observe(Question(product("T"), "Size", (value,), ("printed",)))
    about = {"settings": {"ocr": True, "image": False}, "ocr": {"canvas_px": 320, "threads": 1}}
    model = Ruled(floor)
    ask = extractor.Extractor(model, model, PROVENANCE | about, images=tmp_path)
    raw = line(imageURLHighRes=["shop.jpg"])

    def answer(**given):
        row = ask(raw, attributes=["Size"], **given)
        (value,) = row["attributes"][0]["values"]
        return row["image"], value["value"], value["source"]["kind"]

    assert answer() == ("ok", "174", "ocr")
    assert answer(image=tmp_path / "mug.jpg") == ("ok", "250", "ocr")
    with pytest.raises(ValueError, match=r"image must be a file, got .*none.jpg"):
        answer(image=str(tmp_path / "none.jpg"))
    with pytest.raises(ValueError, match=r"image must be a file, got 'https://a.example/mug.jpg' \(the line"):
        answer(image="https://a.example/mug.jpg")
    assert ask("broken", image=tmp_path / "mug.jpg") == {
        "asin": None,
        "status": "malformed line",
        "image": None,
        "attributes": [],
    }


def test_a_product_may_be_a_line_or_what_it_holds():
    floor = Floor()
    floor.observe(Question(product("T"), "Color", ("red",), ("text",)))
    about = {"settings": {"ocr": False, "image": False}}
    ask = extractor.Extractor(Ruled(floor), Ruled(floor), PROVENANCE | about)
    row = ask(line())
    assert [(one["key"], one["values"][0]["value"]) for one in row["attributes"]] == [("Color", "red")]
    assert ask(line().decode()) == ask(json.loads(line())) == row
    ask = extractor.Extractor(Ruled(floor), Ruled(floor), PROVENANCE | about, least_score=1.01)
    assert ask(line())["attributes"] == [{"key": "Color", "values": []}]


def test_what_is_asked_is_a_list_of_names_and_nothing_is_asked_where_it_is_empty():
    floor = Floor()
    floor.observe(Question(product("T"), "Color", ("red",), ("text",)))
    about = {"settings": {"ocr": False, "image": False}}
    ask = extractor.Extractor(Ruled(floor), Ruled(floor), PROVENANCE | about)
    assert ask(line(), attributes=[])["attributes"] == []
    named = ask(line(), attributes=(name for name in ("Color", "Color")))["attributes"]
    assert [one["key"] for one in named] == ["Color", "Color"]
    for wrong in ("Color", [None], ["Color", 3]):
        with pytest.raises(ValueError, match="attributes must be a list of names, got"):
            ask(line(), attributes=wrong)
    for wrong in (None, [], 3):
        with pytest.raises(ValueError, match="a product must be a mapping or its JSON, got"):
            ask(wrong)
