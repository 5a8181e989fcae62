"""The model card, filled from what training and evaluation left."""

import copy

import pytest
from huggingface_hub import ModelCard

from model import card

PROVENANCE = {
    "architecture": "model.smartave",
    "corpus": "mine",
    "seed": 3,
    "settings": {"image": True, "ocr": False, "hidden_size": 48},
    "train": {"epochs": 25},
    "weights": "a|b",
    "products": {"kind": "mave"},
    "ocr": {"engine": "easyocr"},
    "regions": {"backend": "torchvision", "weights": "random"},
    "attributes": ["Color", "Size"],
}


def score(f1, count=6):
    return {"precision": f1 + 0.01, "recall": f1 - 0.01, "f1": f1, "count": count}


def groups(f1):
    return score(f1, 18) | {
        "five_way": score(f1 + 0.02),
        "positives_only": score(f1 + 0.03),
        "by_origin": {"printed": score(f1 + 0.04), "text": score(f1 + 0.05)},
        "in_ocr": {"not_read": score(f1 + 0.06)},
    }


SCORES = groups(0.8) | {
    "floor": groups(0.4),
    "probe": {"visible": score(0.91)},
    "made_with": {"sizes": {"test": {"products": 6, "questions": 24, "positives": 18}}},
}


def test_every_score_stands_beside_the_floors():
    text = card.card("tiny", PROVENANCE, SCORES)
    assert "| all values | 0.800 | 0.810 | 0.790 | 18 | 0.400 |\n" in text
    assert "| five-way, first value | 0.820 | 0.830 | 0.810 | 6 | 0.420 |\n" in text
    assert "| questions with a value | 0.830 | 0.840 | 0.820 | 6 | 0.430 |\n" in text
    assert "| origin: printed | 0.840 | 0.850 | 0.830 | 6 | 0.440 |\n" in text
    assert "| origin: text | 0.850 | 0.860 | 0.840 | 6 | 0.450 |\n" in text
    assert "| by our OCR: not read | 0.860 | 0.870 | 0.850 | 6 | 0.460 |\n" in text
    assert "finds the visible values with an F1 of 0.910.\n" in text
    assert "not evaluated" not in text


def test_the_probe_is_not_told_where_no_value_is_visible():
    scores = SCORES | {"probe": {"visible": score(0.0, count=0)}}
    assert "linear probe" not in card.card("tiny", PROVENANCE, scores)


def test_the_hub_reads_language_licence_and_scores():
    data = ModelCard(card.card("tiny", PROVENANCE, SCORES)).data
    assert (data.language, data.license, data.library_name) == ("en", "apache-2.0", "transformers")
    assert {one.metric_type: one.metric_value for one in data.eval_results} == {
        "f1": 0.8,
        "precision": 0.81,
        "recall": 0.79,
    }
    chinese = copy.deepcopy(PROVENANCE) | {"products": {"kind": "mepave"}}
    assert ModelCard(card.card("tiny", chinese, SCORES)).data.language == "zh"
    given = ModelCard(card.card("tiny", chinese, SCORES, language="de", licence="mit")).data
    assert (given.language, given.license) == ("de", "mit")


def test_what_it_was_made_with_is_told_and_tables_stay_tables():
    text = card.card("tiny", PROVENANCE, SCORES)
    assert (
        "| words start from | a\\|b |\n| regions by | torchvision |\n| detector weights | random |\n" in text
    )
    assert "| test split | 6 products, 24 questions, 18 with a value |\n| epochs | 25 |\n" in text
    assert "It looks at texts, at regions of the picture.\n" in text
    assert "easyocr" not in text
    assert "detector's weights are random" in text
    assert "Color, Size." in text


def test_before_evaluation_the_card_says_so():
    text = card.card("tiny", PROVENANCE, None)
    assert "This model was not evaluated." in text
    assert "floor" not in text
    assert ModelCard(text).data.eval_results is None


def test_without_a_trained_model_or_onto_a_folder_that_is_there_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"runs/mine/tiny/0/model is not a trained model: it has no prov"):
        card.assemble("mine", "tiny", 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = tmp_path / "runs/mine/tiny/0/model"
    model.mkdir(parents=True)
    (model / "provenance.json").write_text("{}")
    with pytest.raises(ValueError, match="runs exists already"):
        card.assemble("mine", "tiny", 0, tmp_path / "runs")
