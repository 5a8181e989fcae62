import numpy as np
import pytest
import torch
from test_model_baselines import QUAD, eight, train

from model.baselines import pam
from model.baselines.pam import END, SEPARATOR
from model.examples import OcrLine, Product, Question, Source


@pytest.fixture(scope="module")
def ready():
    _, model, processor = train("pam", eight(), 0)
    return model, processor


def test_phoc_of_a_short_word_by_hand():
    found = pam.phoc("to")
    letters, count = pam.LETTERS, len(pam.LETTERS)
    assert len(found) == 604
    wanted = {letters.index("t"), count + letters.index("o")}  # level 2: a half each
    third = 2 * count  # level 3: the middle third is half of neither ... each letter covers 1/3 + 1/6
    wanted |= {third + letters.index("t"), third + 2 * count + letters.index("o")}
    fourth = 5 * count  # level 4: a half covers two quarters, each half of the letter
    wanted |= {fourth + part * count + letters.index("t") for part in (0, 1)}
    wanted |= {fourth + part * count + letters.index("o") for part in (2, 3)}
    at = 14 * count + pam.BIGRAMS.index("to")  # the bigram covers both halves of the word, half of it each
    wanted |= {at, at + len(pam.BIGRAMS)}
    assert set(np.flatnonzero(found)) == wanted
    assert pam.phoc("红").sum() == 0


def test_inputs_see_inputs_and_an_output_sees_those_before_it():
    seen = pam.prefix_mask(torch.tensor([[True, True, False]]), 2)[0].long()
    assert seen.tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],  # padding, which nobody sees
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_the_right_word_is_right_in_the_vocabulary_in_the_text_and_in_ocr(ready):
    _, processor = ready
    lines = (OcrLine("red 12", 0.9, QUAD),)
    product = Product("X", "X", "Mugs", (("red or redish", "title"),), lines)
    batch = processor.collate([processor.encode(Question(product, "Color", ("red",)))])
    vocabulary = 2 + len(processor.vocabulary)
    size = batch["input_ids"].shape[1]
    title = 1 + len("color") + 1  # after [CLS], the attribute and [SEP]; the tokens are characters
    first, second = batch["targets"][0]
    assert first.nonzero().flatten().tolist() == [
        processor.number["red"],
        vocabulary + title,
        vocabulary + size,
    ]
    assert second.nonzero().flatten().tolist() == [END]
    allowed = batch["allowed"][0]
    words = [processor.number[word] for word in ("blue", "green", "pink", "red")]
    assert allowed[:vocabulary].nonzero().flatten().tolist() == [END, SEPARATOR, *words]
    pointed = allowed[vocabulary : vocabulary + size].nonzero().flatten().tolist()
    assert pointed == [title, title + 3, title + 5]  # the first pieces of three words
    bonus = batch["bonus"][0]
    assert bonus[vocabulary + title] == pytest.approx(0.05 * 100)
    assert bonus[vocabulary + title + 3] == 0
    assert bonus[vocabulary + title + 5] == pytest.approx(0.05 * 100 * 2 * 3 / 9)  # difflib: 2 M / T


def test_the_vocabulary_is_of_the_category_and_the_attribute():
    asked = [
        Question(Product(f"X{i}", f"X{i}", category, ()), attribute, (value,))
        for i, (category, attribute, value) in enumerate(
            [
                ("Mugs", "Color", "sky blue"),
                ("Hats", "Color", "Red"),
                ("Hats", "Size", "XL"),
                ("Hats", "Color", "red"),
                ("Hats", "Color", "red"),
            ]
        )
    ]
    learnt = pam.learn_vocabulary(asked)
    assert learnt["vocabulary"] == ["blue", "red", "sky", "xl"]
    assert learnt["spelling"] == ["blue", "red", "sky", "XL"]
    assert learnt["known"] == {
        "Color": {"": [2, 3, 4], "Mugs": [2, 4], "Hats": [3]},
        "Size": {"": [5], "Hats": [5]},
    }
    _, _, processor = train("pam", asked, 0)
    assert processor.allowed("Mugs", "Color") == [2, 4]
    assert processor.allowed("Cups", "Color") == [2, 3, 4]
    assert processor.allowed("Cups", "Width") == []


def test_the_pointer_is_a_scaled_product_of_query_and_key(ready):
    model, processor = ready
    model.eval()
    batch = processor.collate([processor.encode(eight()[0])])
    embedded = model.embed(batch)
    kept = {}
    handle = model.fusion.register_forward_hook(lambda *said: kept.update(states=said[2].last_hidden_state))
    scores, _ = model.step_scores(embedded, torch.zeros(1, 0, dtype=torch.long), batch)
    handle.remove()
    states = kept["states"][0]
    z, vocabulary = states[-1], 2 + len(processor.vocabulary)
    ocr = len(embedded[0][0]) - batch["ocr_mask"].shape[1]
    number = batch["ocr_mask"][0].nonzero().flatten()[1]  # "20" of NET 20 ML
    by_hand = model.query(z) @ model.key(states[ocr + number]) / 48**0.5
    column = vocabulary + batch["input_ids"].shape[1] + number
    torch.testing.assert_close(scores[0, 0, column], by_hand + batch["bonus"][0, column])
    torch.testing.assert_close(scores[0, 0, END], model.vocabulary(z)[END])


def test_the_loss_is_binary_over_candidates_and_a_mean_over_steps():
    scores, targets = torch.zeros(1, 2, 3), torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    allowed = torch.tensor([[True, True, False]])
    loss = pam.output_loss(scores, targets, allowed, torch.tensor([[True, False]]))
    torch.testing.assert_close(loss, 2 * torch.tensor(2.0).log())


def test_a_value_copied_from_one_stretch_keeps_its_letters_and_place(ready):
    _, processor = ready
    product = Product(
        "X", "X", "Mugs", (("A Deep-Red, Blue mug", "title"),), (OcrLine("NET 20 ML", 0.9, QUAD),)
    )
    example = processor.encode(Question(product, "Color"))
    size = processor.collate([example])["input_ids"].shape[1]
    text = {word.word: 2 + len(processor.vocabulary) + word.position for word in example.pointed}
    read = {word.word: 2 + len(processor.vocabulary) + size + word.position for word in example.ocr}
    spell = processor.spell
    assert spell(example, [text["deepred"], text["blue"]], size) == (
        "Deep-Red, Blue",
        Source("text", 0, 2, 16),
    )
    assert spell(example, [read["20"], read["ml"]], size) == ("20 ML", Source("ocr", 0, 4, 9))
    assert spell(example, [text["blue"], text["deepred"]], size) == ("Blue Deep-Red,", Source("vocabulary"))
    mixed = [text["deepred"], processor.number["green"]]
    assert spell(example, mixed, size) == ("Deep-Red, green", Source("vocabulary"))


def test_ocr_words_share_their_line_s_box_by_letters():
    product = Product(
        "X", "X", "", (), (OcrLine("ab cdefg", 0.9, QUAD),), np.array([[0, 0, 100, 40]], np.float32)
    )
    first, second = pam.ocr_words(product, 9)
    assert first.box == pytest.approx((0.1, 0.25, 0.3, 0.75))  # 2 of 8 letters of a line from 10 to 90
    assert second.box == pytest.approx((0.4, 0.25, 0.9, 0.75))
    assert len(pam.ocr_words(product, 1)) == 1


def test_words_without_blanks_are_joined_without():
    assert pam.spaced(["sky", "blue"]) == "sky blue"
    assert pam.spaced(["红", "色"]) == "红色"


def test_what_is_only_seen_and_what_is_only_printed_is_learnt():
    asked = []
    for one in eight()[::2]:
        asked += [
            Question(one.product, "Shape", (("round", "tall")[int(one.product.item[-1]) % 2],), ("visible",))
        ]
        asked += [Question(one.product, "Size", (f"{int(one.product.item[-1]) + 2}0 ml",), ("printed",))]
    _, model, processor = train("pam", asked, 150)
    found = model.extract([processor.encode(question) for question in asked], processor)
    assert [extractions[0].value.lower() for extractions in found] == [q.values[0] for q in asked]
    assert found[1][0].source.kind in ("ocr", "vocabulary")
