import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import metrics


def asked(predicted=(), gold=(), origins=None, in_ocr=None, item="B000000001", attribute="Color"):
    origins = origins or ["text"] * len(gold)
    in_ocr = in_ocr or [False] * len(gold)
    return metrics.answer(item, attribute, predicted, gold, origins, in_ocr)


def approx(**numbers):
    return pytest.approx(numbers)


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("The  Sea-Salt, an Herb!", "seasalt herb"),
        ("the a", ""),
        ("...", ""),
        ("Ｒｅｄ １８０ｇ", "red 180g"),
        ("圆领", "圆领"),
        ("a字裙", "a字裙"),
        ("Theatre", "theatre"),
        ("\u00bd cup", "1\u20442 cup"),
    ],
)
def test_normalisation_is_that_of_squad_after_nfkc(raw, normal):
    assert metrics.normalise(raw) == normal


@given(st.text())
def test_words_keep_their_place_in_the_raw_text(text):
    for word, begin, end in metrics.words(text):
        assert metrics.normalise(text[begin:end]) == word


@pytest.mark.parametrize(
    ("text", "value", "there"),
    [
        ("Sea Salt chips", "sea salt", True),
        ("Sea, the Salt", "sea salt", True),
        ("seasalt", "sea salt", False),
        ("redwood", "red", False),
        ("红色连衣裙", "红色", True),
        ("180g red", "180 G", False),
        ("anything", "the", False),
        ("", "red", False),
        ("Size: RED.", "red", True),
    ],
)
def test_a_value_is_found_on_word_boundaries_only(text, value, there):
    assert metrics.contains(text, value) is there


def test_gold_null_and_predicted_null_is_nn_and_enters_no_score():
    nothing = [asked()]
    assert metrics.five_way(nothing) == approx(
        NN=1, NA=0, AN=0, AA=0, AB=0, precision=0, recall=0, f1=0, count=0
    )
    assert metrics.micro(nothing) == approx(precision=0, recall=0, f1=0, count=0)


def test_one_of_two_gold_values_is_all_in_five_way_and_half_the_recall_in_the_set_score():
    half = [asked(["a1"], ["a1", "b1"])]
    assert metrics.five_way(half)["f1"] == 1
    assert metrics.micro(half) == approx(precision=1, recall=0.5, f1=2 / 3, count=2)


def test_a_prediction_that_normalises_to_nothing_is_no_value():
    assert metrics.five_way([asked(["the a"], ["red"])])["AN"] == 1
    assert metrics.five_way([asked(["the a"])])["NN"] == 1
    assert metrics.micro([asked(["the a"])])["precision"] == 0


def test_gold_that_normalises_to_nothing_is_no_value():
    assert asked(["red"], ["An", "Red"], ["text", "visible"]).gold == ("red",)
    assert metrics.five_way([asked(["red"], ["..."])])["NA"] == 1


def test_duplicated_gold_values_and_predictions_count_once_and_the_first_origin_stays():
    one = asked(["Red", "red!"], ["Red", "the red", "RED"], ["printed", "text", "text"], [True, False, False])
    assert (one.predicted, one.gold, one.origins, one.in_ocr) == (("red",), ("red",), ("printed",), (True,))
    assert metrics.micro([one]) == approx(precision=1, recall=1, f1=1, count=1)


def test_the_five_outcomes_give_precision_and_recall_as_mave_defines_them():
    answers = [
        asked(),  # NN
        asked(["red"]),  # NA
        asked([], ["red"]),  # AN
        asked(["red", "wrong"], ["red"]),  # AA: only the first counts
        asked(["Red"], ["blue", "red"]),  # AA
        asked(["wrong", "red"], ["red"]),  # AB
    ]
    assert metrics.five_way(answers) == approx(
        NN=1, NA=1, AN=1, AA=2, AB=1, precision=2 / 4, recall=2 / 4, f1=0.5, count=4
    )
    # right: red, red, red; predicted 1+2+1+2; gold 1+1+2+1
    assert metrics.micro(answers) == approx(precision=3 / 6, recall=3 / 5, f1=6 / 11, count=5)
    assert metrics.positives_only(answers) == approx(precision=3 / 5, recall=3 / 5, f1=0.6, count=5)


def test_precision_per_origin_counts_wrong_values_under_every_origin_of_their_question():
    answers = [
        asked(["red", "wrong"], ["red", "round"], ["text", "visible"]),
        asked(["round"], ["round"], ["visible"]),
        asked(["noise"]),  # a negative: under no origin
    ]
    scores = metrics.by_origin(answers)
    # text: 1 right, 1 wrong, 1 gold. visible: 1 right (the second question), 1 wrong, 2 gold.
    assert scores["text"] == approx(precision=1 / 2, recall=1, f1=2 / 3, count=1)
    assert scores["visible"] == approx(precision=1 / 2, recall=1 / 2, f1=1 / 2, count=2)
    assert list(scores) == ["text", "visible"]


def test_values_that_only_ocr_read_are_scored_apart_from_those_it_missed():
    answers = [
        asked(["180g"], ["180g"], ["printed"], [True]),
        asked(["190g"], ["200g"], ["printed"], [False]),
        asked([], ["150g"], ["printed"], [True]),
    ]
    scores = metrics.by_in_ocr(answers)
    assert scores["read"] == approx(precision=1, recall=1 / 2, f1=2 / 3, count=2)
    assert scores["not_read"] == approx(precision=0, recall=0, f1=0, count=1)


def test_attributes_are_scored_apart_and_negatives_belong_to_their_attribute():
    answers = [asked(["red"], ["red"]), asked(["big"], attribute="Size"), asked(attribute="Size")]
    scores = metrics.by_attribute(answers)
    assert scores["Color"]["f1"] == 1
    assert scores["Size"] == approx(precision=0, recall=0, f1=0, count=0)


def test_every_group_of_the_metrics_file_is_there():
    scores = metrics.all_scores([asked(["red"], ["red"])])
    expected = "precision recall f1 count five_way positives_only by_origin by_attribute in_ocr"
    assert list(scores) == expected.split()


def test_equal_systems_do_not_differ_and_a_better_one_does():
    right = [asked(["red"], ["red"], item=f"B{number:09}") for number in range(40)]
    wrong = [asked(["blue"] if n % 2 else ["red"], ["red"], item=f"B{n:09}") for n in range(40)]
    same = metrics.paired_bootstrap(right, right)
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    better = metrics.paired_bootstrap(right, wrong, samples=500)
    assert better["difference"] == pytest.approx(0.5)
    assert 0.3 < better["low"] < 0.5 < better["high"] < 0.7
    assert better["p"] == 0
    assert better == metrics.paired_bootstrap(right, wrong, samples=500)


def test_the_bootstrap_refuses_answers_to_different_questions():
    with pytest.raises(ValueError, match="same questions"):
        metrics.paired_bootstrap([asked([], ["red"])], [asked([], ["blue"])])
