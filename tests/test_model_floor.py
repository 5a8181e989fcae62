from model.examples import Extraction, OcrLine, Product, Question, Source
from model.floor import Floor


def question(attribute="Color", values=(), *, texts=(), ocr=()):
    product = Product(
        "B000000001",
        "B000000001",
        "Mugs",
        tuple((text, "title") for text in texts),
        tuple(OcrLine(text, 1.0, (0.0,) * 8) for text in ocr),
    )
    return Question(product, attribute, tuple(values), ("text",) * len(values))


def floor(*answers, attribute="Color"):
    rule = Floor()
    for values in answers:
        rule.observe(question(attribute, values))
    return rule


def test_a_known_value_seen_in_the_text_is_the_answer_with_its_place():
    rule = floor(["Red"], ["blue"], ["blue"], [])
    texts = ["Mug", "The (RED) one"]
    assert rule.predict(question(texts=texts)) == (Extraction("Red", 0.25, Source("text", 1, 4, 9)),)


def test_a_known_value_seen_by_ocr_is_the_answer_with_its_line():
    rule = floor(["Red"], ["blue"], ["blue"])
    (answer,) = rule.predict(question(texts=["Mug"], ocr=["ACME", "deep red"]))
    assert answer.source == Source("ocr", 1, 5, 8)


def test_the_longest_value_seen_wins_then_the_most_frequent_then_the_alphabet():
    rule = floor(["red"], ["red"], ["red"], ["dark red"], ["teal"], ["teal"], ["blue"], ["pink"])
    assert rule.predict(question(texts=["red or dark red"]))[0].value == "dark red"
    assert rule.predict(question(texts=["blue teal"]))[0].value == "teal"
    assert rule.predict(question(texts=["pink blue"]))[0].value == "blue"


def test_the_first_place_of_a_value_is_its_source():
    rule = floor(["red"])
    assert rule.predict(question(texts=["red"], ocr=["red"]))[0].source == Source("text", 0, 0, 3)


def test_unseen_values_give_the_training_majority_from_the_vocabulary():
    rule = floor(["red"], ["blue", "red"], ["blue"], ["red"], [])
    assert rule.predict(question(texts=["Mug"])) == (Extraction("red", 0.6, Source("vocabulary")),)


def test_an_attribute_that_mostly_has_no_value_gets_none_unless_a_known_one_is_seen():
    rule = floor([], [], ["red"])
    assert rule.predict(question(texts=["Mug"])) == ()
    assert rule.predict(question(texts=["red mug"]))[0].value == "red"


def test_an_attribute_never_seen_in_training_gets_nothing():
    assert floor(["red"]).predict(question("Shape", texts=["red"])) == ()


def test_values_of_other_attributes_are_not_seen():
    rule = floor(["red"])
    rule.observe(question("Shape", ["round"]))
    assert rule.predict(question(texts=["round mug"]))[0].value == "red"


def test_chinese_values_are_found_without_spaces():
    rule = floor(["红色"], ["蓝色"], ["蓝色"])
    assert rule.predict(question(texts=["新款红色连衣裙"])) == (
        Extraction("红色", 1 / 3, Source("text", 0, 2, 4)),
    )
