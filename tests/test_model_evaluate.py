import json

import numpy as np
import pytest
from pydantic import ValidationError

from model import evaluate
from model.examples import Evidence, Extraction, OcrLine, Product, Question, Source
from pipeline import schema


def question(
    item, attribute="Color", values=(), origins=None, *, text="Mug", ocr=(), evidences=(), regions=None
):
    lines = tuple(OcrLine(line, 1.0, (0.0,) * 8) for line in ocr)
    product = Product(item, item, "Mugs", ((text, "title"),), lines, regions=regions)
    origins = tuple(origins) if origins else ("text",) * len(values)
    return Question(product, attribute, tuple(values), origins, tuple(evidences))


def judged(pairs, train=()):
    floor, probe = evaluate.train_rules(train)
    asked = [one for one, _ in pairs]
    found = [tuple(Extraction(value, 0.5) for value in values) for _, values in pairs]
    return evaluate.judge(asked, found, floor, probe)


def test_gold_is_values_and_evidences_without_repetition():
    evidences = [Evidence("RED", 0, 0, 3), Evidence("crimson", 0, 4, 11), Evidence("red", 1, 0, 3)]
    one = question("B000000001", values=["Red", "round"], origins=["printed", "visible"], evidences=evidences)
    assert evaluate.gold(one) == {"Red": "printed", "round": "visible", "crimson": "text"}


def test_a_value_that_stands_only_in_ocr_is_right_and_marked_as_read():
    one = question("B000000001", "Net Weight", ["180 g"], ["printed"], ocr=["ACME", "net 180", "g"])
    scores, rows = judged([(one, ["180 G"])])
    assert scores["f1"] == 1
    assert scores["in_ocr"] == {"read": {"precision": 1.0, "recall": 1.0, "f1": 1.0, "count": 1}}
    assert (rows[0]["gold"], rows[0]["origins"], rows[0]["in_ocr"]) == (["180 g"], ["printed"], [True])


def test_the_floor_is_scored_on_the_same_questions():
    train = [question(f"T{number:09}", values=["red"]) for number in range(3)]
    pairs = [
        (question("B000000001", values=["blue"], text="blue mug"), ["blue"]),
        (question("B000000002", values=["red"]), ["red"]),
    ]
    scores, _ = judged(pairs, train)
    assert scores["f1"] == 1
    assert scores["floor"]["f1"] == 0.5  # the majority, red, twice
    assert scores["floor"].keys() == scores.keys() - {"floor", "probe", "unscored_values"}
    (row,) = evaluate.plot_rows(scores, "by_attribute")
    assert row == {"name": "Color", "f1": 1, "floor_f1": 0.5, "precision": 1, "recall": 1, "count": 2}


def test_the_probe_is_scored_on_visible_values_only():
    def drawn(item, color, **more):
        regions = np.array([[3, 0] if color == "red" else [0, 3]], np.float16)
        return question(item, values=[color], origins=["visible"], regions=regions, **more)

    train = [drawn(f"T{number:09}", "red" if number % 2 else "blue") for number in range(6)]
    pairs = [
        (drawn("B000000001", "red"), ["red"]),
        (drawn("B000000002", "blue"), []),
        (question("B000000003", values=["red"]), []),
    ]
    scores, _ = judged(pairs, train)
    assert scores["probe"] == {"visible": {"precision": 1, "recall": 1, "f1": 1, "count": 2}}
    assert scores["by_origin"]["visible"]["recall"] == 0.5


def test_gold_without_any_word_is_counted_not_dropped_in_silence():
    scores, _ = judged([(question("B000000001", "Size", ["A"]), [])])
    assert (scores["unscored_values"], scores["count"]) == (1, 0)


def test_missing_answers_are_an_error():
    floor, probe = evaluate.train_rules([])
    with pytest.raises(ValueError, match="shorter"):
        evaluate.judge([question("B000000001")], [], floor, probe)


def test_prediction_rows_fit_the_contract_and_equal_rows_give_equal_bytes(tmp_path):
    one = question("B000000001", values=["red"], text="red mug")
    found = [(Extraction("red", 0.25, Source("text", 0, 0, 3)), Extraction("big", 0.125))]
    _, rows = evaluate.judge([one], found, *evaluate.train_rules([]))
    paths = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    for path in paths:
        schema.write_parquet(rows, schema.PREDICTIONS, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    read = evaluate.pq.read_table(paths[0]).to_pylist()
    assert read == rows
    assert read[0]["values"][1]["source"] == {"kind": "vocabulary", "index": None, "begin": None, "end": None}


def test_split_sizes_count_products_questions_and_positives(tmp_path):
    def attribute(split, *values):
        return {"key": "Color", "values": list(values), "split": split}

    rows = [
        {"attributes": [attribute("train", "red"), attribute("train")], "split": "train"},
        {"attributes": [attribute("train", "red"), attribute("test", "red")], "split": None},
    ]
    schema.write_parquet(rows, schema.PRODUCTS, tmp_path / "products.parquet")
    assert evaluate.split_sizes(tmp_path / "products.parquet") == {
        "train": {"products": 2, "questions": 3, "positives": 2},
        "validation": {"products": 0, "questions": 0, "positives": 0},
        "test": {"products": 1, "questions": 1, "positives": 1},
    }


def test_written_numbers_have_six_digits_and_keep_their_order(tmp_path):
    evaluate.write_json({"b": [1 / 3], "a": {"c": 2, "d": None}}, tmp_path / "deep" / "file.json")
    text = (tmp_path / "deep" / "file.json").read_text()
    assert text.index('"b"') < text.index('"a"')
    assert json.loads(text) == {"b": [0.333333], "a": {"c": 2, "d": None}}


def test_the_batch_size_is_bounded():
    with pytest.raises(ValidationError):
        evaluate.Settings(batch_size=0)
