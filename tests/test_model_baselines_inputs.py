"""A product as one row of tokens, and token spans as values with a place."""

import numpy as np
import pytest
import torch

from model.baselines import inputs
from model.examples import Evidence, OcrLine, Product, Question, Source
from model.pretrained import character_tokenizer

QUAD = (0.0,) * 8


def processor(**changes):
    tokenizer = character_tokenizer(["abc 12"])
    return inputs.Processor(tokenizer, **{"ocr": True, "max_length": 32} | changes)


def question(values=("b",), spans=(), attribute="ab"):
    product = Product("X", "X", "C", (("a b", "title"), ("c b", "feature")), (OcrLine("B 1", 0.9, QUAD),))
    return Question(product, attribute, values, ("text",) * len(values), spans)


def test_a_row_is_texts_with_separators_that_stand_nowhere():
    one = processor()
    row = one.encode(question())
    words = one.tokenizer.convert_ids_to_tokens(row.ids)
    assert words == ["[CLS]", "a", "b", "[SEP]", "c", "b", "[SEP]", "b", "1", "[SEP]"]
    assert row.places[0] is None
    assert row.places[2] == Source("text", 0, 2, 3)
    assert row.places[7] == Source("ocr", 0, 0, 1)
    assert [place is None for place in row.places] == [word in ("[CLS]", "[SEP]") for word in words]
    assert one.tokenizer.convert_ids_to_tokens(row.attribute) == ["a", "b", "[SEP]"]
    assert (row.num_tokens, row.num_asking) == (13, 3)


def test_gold_is_the_evidences_and_what_stands_in_ocr():
    row = processor().encode(question(spans=(Evidence("b", 1, 2, 3),)))
    assert row.spans == [(5, 6), (7, 8)]
    assert processor(ocr=False).encode(question(spans=(Evidence("b", 1, 2, 3),))).spans == [(5, 6)]


def test_texts_are_cut_at_their_end_and_counted():
    one = processor(max_length=8)
    row = one.encode(question())
    assert len(row.ids) + len(row.attribute) == 8
    assert one.truncated == {"text tokens": 5}


def test_a_value_said_twice_is_one_with_two_places_and_ends_with_its_text():
    row = processor().encode(question())
    found = inputs.extractions(row, [(2, 3, 0.5), (5, 7, 0.9), (0, 1, 1.0)])
    (value,) = found
    assert (value.value, value.score, value.source) == ("b", 0.9, Source("text", 1, 2, 3))
    assert value.elsewhere == (Source("text", 0, 2, 3),)
    (cut,) = inputs.extractions(row, [(1, 5, 0.7)])
    assert cut.value == "a b"


def test_both_segments_stand_in_one_row():
    one = processor()
    batch = inputs.joint(one, [one.encode(question()), one.encode(question(attribute="a"))])
    words = one.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert words[:6] == ["[CLS]", "a", "b", "[SEP]", "a", "b"]
    assert batch["token_type_ids"][0, :6].tolist() == [0, 0, 0, 0, 1, 1]
    assert batch["paragraph"][1].tolist() == [-1, -1, -1, 1, 1, -1, 2, 2, -1, 3, 3, -1, -1]
    assert batch["attention_mask"][1].sum() == 12


def test_the_whole_picture_comes_first_and_boxes_fill_the_rest():
    regions = np.arange(12, dtype=np.float16).reshape(4, 3)
    products = [Product("X", "X", "", (), (), None, regions), Product("Y", "Y", "", ())]
    features, mask = inputs.stacked_regions(products, 3, 3)
    assert features[0].tolist() == [[9, 10, 11], [0, 1, 2], [3, 4, 5]]
    assert mask.tolist() == [[True] * 3, [False] * 3]
    with pytest.raises(ValueError, match="regions are 3 wide, the model was made for 4"):
        inputs.stacked_regions(products, 4, 3)


def test_regions_are_standardised_by_whole_pictures():
    standard = inputs.Regions(2, None)
    asked = [
        Question(Product(asin, asin, "", (), (), None, np.array([[9, 9], whole], np.float16)), "A")
        for asin, whole in (("X", [1, 5]), ("X", [1, 5]), ("Y", [3, 5]))
    ]
    standard.measure(asked)
    assert standard.mean.tolist() == [2, 5]
    assert standard.axes.tolist() == [1, 1]
    assert standard(torch.tensor([[4.0, 6.0]])).tolist() == [[2, 1]]
