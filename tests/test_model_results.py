"""What is kept of a cell, and what the paper's tables make of it."""

import json
import subprocess

import pytest

from model import paper, results
from model.cell import Training
from model.results import keep, settings_digest
from pipeline import images, schema

SCORE = {"precision": 0.51234, "recall": 0.5, "f1": 0.50609, "count": 40}


def whole(f1=0.5, attributes=3):
    one = SCORE | {"f1": f1}
    scores = {
        **one,
        "five_way": one,
        "positives_only": one,
        "chunk": one,
        "by_origin": {"text": one, "visible": SCORE},
        "in_ocr": {"read": one},
        "by_attribute": {f"Attribute {i}": one | {"count": i} for i in range(attributes)},
    }
    return scores | {
        "floor": scores | {"f1": 0.1},
        "made_with": {"weights": {"words": "minilm", "regions": "random"}},
    }


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("smartave", "pam"):
        path = tmp_path / "config" / "mine" / "models" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"architecture": f"model.{name}", "code": "1", "settings": {}}))
    (tmp_path / "config" / "mine" / "ocr.json").write_text("{}")
    return tmp_path


SIZES = {"parameters": 12_300_000, "without_embeddings": 1_000_000}


def test_a_result_says_its_numbers_and_what_gave_them(project):
    costs = project / ".cache" / "costs" / "mine" / "pam" / "0.json"
    costs.parent.mkdir(parents=True)
    costs.write_text('{"training_s": 88.0, "examples": 900, "device": "cpu"}')
    path = keep("mine", "pam", 0, whole(), SIZES)
    assert path.as_posix() == "docs/results/mine/pam/0.json"
    kept = json.loads(path.read_text())
    assert kept["micro"] == [0.5123, 0.5, 0.5, 40]
    assert kept["floor"]["micro"][2] == 0.1
    assert kept["by_origin"]["visible"][2] == 0.5061
    assert kept["cost"] == SIZES | {"training_s": 88.0, "examples": 900, "device": "cpu"}
    assert kept["settings"] == settings_digest("mine", "pam")
    assert kept["commit"] is None  # there is no repository here
    assert results.cells() == [kept]
    assert results.cells(["other"]) == []


def test_a_result_stays_under_two_kilobytes_by_leaving_attributes_out(project):
    kept = keep("mine", "pam", 0, whole(attributes=50), SIZES)
    assert kept.stat().st_size <= 2048
    shown = json.loads(kept.read_text())["by_attribute"]
    assert next(iter(shown)) == "Attribute 49"  # the one with most values
    scores = whole() | {"by_origin": {f"origin {i}": SCORE for i in range(90)}}
    with pytest.raises(ValueError, match="bytes, over 2048"):
        keep("mine", "pam", 0, scores, SIZES)


def test_the_settings_digest_follows_settings_and_not_code(project):
    before = settings_digest("mine", "pam")
    path = project / "config" / "mine" / "models" / "pam.json"
    path.write_text(path.read_text().replace('"1"', '"2"'))
    assert settings_digest("mine", "pam") == before
    (project / "config" / "mine" / "ocr.json").write_text('{"canvas_px": 9}')
    assert (after := settings_digest("mine", "pam")) != before
    (project / "config" / "mine" / "source.json").write_text('{"products": 9}')
    assert settings_digest("mine", "pam") not in (before, after)


def test_a_setting_that_came_later_leaves_the_digest_of_those_that_had_none(project):
    path = project / "config" / "mine" / "models" / "smartave.json"
    digests = []
    for settings in ({"ocr": True}, {"ocr": True, "grounded": False}, {"ocr": True, "grounded": True}):
        path.write_text(json.dumps({"code": "1", "settings": settings}))
        digests.append(settings_digest("mine", "smartave"))
    assert digests[0] == digests[1] != digests[2]


def test_the_default_budget_of_tokens_is_that_of_the_results_that_were_kept_without_one(project):
    path = project / "config" / "mine" / "models" / "smartave.json"
    digests = []
    tokens = Training().max_tokens
    for of_train in ({"accumulate": 1}, {"max_tokens": tokens}, {"max_tokens": tokens + 1}):
        path.write_text(json.dumps({"code": "1", "train": {"batch_size": 8, **of_train}}))
        digests.append(settings_digest("mine", "smartave"))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("stage", "one", "other", "is_same"),
    [
        ("ocr", {"device": "auto"}, {"device": "cuda"}, True),
        ("source", [{"path": "a", "sha256": "1"}], [{"url": "b", "sha256": "1"}], True),
        ("source", [{"path": "a", "sha256": "1"}], [{"path": "a", "sha256": "2"}], False),
        ("source", [{"path": "a", "sha256": None}], [{"path": "b", "sha256": None}], False),
        ("images", {"base": "a", "base_sha256": "1"}, {"base": "b", "base_sha256": "1"}, True),
        ("images", {"base": "a", "base_sha256": None}, {"base": "b", "base_sha256": None}, False),
        ("images", {"max_transient": 0.01, "attempts": 5}, {"max_transient": 0.2, "attempts": 9}, True),
        ("images", {"requests_per_s": None, "min_px": 1}, {"requests_per_s": 9, "min_px": 2}, False),
    ],
)
def test_devices_places_of_pinned_files_and_ways_to_ask_are_not_what_numbers_depend_on(
    stage, one, other, is_same, project
):
    digests = []
    for settings in (one, other):
        (project / "config" / "mine" / f"{stage}.json").write_text(json.dumps(settings))
        digests.append(settings_digest("mine", "pam"))
    assert (digests[0] == digests[1]) == is_same


def test_the_ways_to_ask_are_the_settings_of_images_that_change_no_byte():
    assert results.ASKED_FOR.keys() == images.UNSEEN


def test_a_result_of_other_settings_is_not_current(project):
    one = json.loads(keep("mine", "pam", 0, whole(), SIZES).read_text())
    assert results.is_current(one)
    (project / "config" / "mine" / "source.json").write_text('{"products": 9}')
    assert not results.is_current(one)
    assert not results.is_current(one | {"model": "gone"})


def test_the_commit_says_when_code_differs_from_it(project, workspace, monkeypatch):
    monkeypatch.chdir(workspace.folder)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert head.startswith(results.commit())
    workspace.edit("model/results.py", "MAX_BYTES = 2048", "MAX_BYTES = 2047")
    assert results.commit() == head[:12] + "+"


@pytest.fixture
def found(project):
    for seed, f1 in ((0, 0.8), (1, 0.9)):
        keep("mine", "smartave", seed, whole(f1), SIZES)
    keep("mine", "pam", 0, whole(0.7), SIZES)
    path = project / "config" / "mave" / "models" / "pam.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    keep("mave", "pam", 0, whole(0.6), SIZES)
    return paper.gather(results.cells(), {"mine": {"smartave-alpha-06": "smartave"}})


def test_table_one_has_the_floor_first_and_the_paper_s_numbers_on_its_corpus_only(found):
    table = paper.main_table(found, ["mave", "mine"])
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.rows[0] == ["no-learning floor", "10.00", "10.00"]
    assert rows["SMARTAVE"] == ["not run", "85.00 ± 7.07"]
    assert rows["PAM"] == ["60.00", "70.00"]
    assert rows["AVEQA"] == ["not run", "not run"]
    pam = [row[0] for row in table.rows].index("PAM")
    assert table.grey[pam, 1] == "91.51 ± 0.37"
    assert {column for _, column in table.grey} == {1}
    assert table.best == {([row[0] for row in table.rows].index("SMARTAVE"), 2)}


def test_a_variant_that_is_its_base_has_its_base_s_numbers(found):
    assert paper.of(found, "mine", "smartave-alpha-06") == [0.8, 0.9]
    assert paper.of(found, "mine", "smartave-alpha-1") == []
    assert ("smartave-alpha-06", "smartave-alpha-06") not in paper.names_of(found, "mine")
    assert "0 (mine)" in paper.missing(found, ["mine"], paper.FIGURE_6)
    assert "0.6 (mine)" not in paper.missing(found, ["mine"], paper.FIGURE_6)


def test_every_table_and_figure_of_the_paper_is_there(found):
    tables, figures = paper.everything(found)
    titles = " ".join(title for title, _, _ in tables)
    assert all(f"Table {number}" in titles for number in (1, 2, 3, 7))
    assert "in no text, mine" in titles  # it has visible values
    assert [title[:8] for title, _, _ in figures] == ["Figure 3", "Figure 4", "Figure 5", "Figure 6"]
    for title, _, table in tables:
        assert all(len(row) == len(table.head) for row in table.rows), title


def test_a_figure_of_variants_shows_the_corpora_where_one_ran(project, found):
    assert paper.bar_figure(found, ["mine", "mave"], paper.FIGURE_3, "Figure 3") == ""
    (project / "config" / "mine" / "models" / "smartave-no-ocr.json").write_text("{}")
    keep("mine", "smartave-no-ocr", 0, whole(0.5), SIZES)
    drawn = paper.bar_figure(paper.gather(results.cells(), {}), ["mine", "mave"], paper.FIGURE_3, "Figure 3")
    assert all(label in drawn for label in ("<svg", "mine", "w/o OCR", "50.0", "all", "85.0"))
    assert "mave" not in drawn


def test_the_paper_s_own_table_two_is_whole():
    assert all(len(text.split()) == 12 for text in paper.TABLE_2.values())
    for model, text in paper.TABLE_2.items():
        p, r, f1 = (float(one) for one in text.split()[:3])
        assert abs(2 * p * r / (p + r) - f1) < 0.02, model


def test_durations_are_said_as_the_paper_says_them():
    assert paper.duration([88.4]) == "88 s"
    assert paper.duration([53 * 60]) == "53 min"
    assert paper.duration([74 * 60]) == "1 h 14 min"
    assert paper.duration([]) == "–"


def test_every_model_of_the_tables_is_declared():
    from conftest import ROOT

    from model import config

    declared = config.read(ROOT / "params.yaml")["models"]
    assert set(paper.MODELS) <= set(declared)


def test_folds_of_a_corpus_stand_together(project):
    for fold, f1 in ((0, 0.6), (1, 0.8)):
        path = project / "config" / f"mine_fold{fold}" / "models" / "pam.json"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        keep(f"mine_fold{fold}", "pam", 0, whole(f1), SIZES)
    found = paper.gather(results.cells(), {})
    assert [corpus for corpus, _ in found] == ["mine"]
    assert paper.main_table(found, ["mine"]).rows[6] == ["PAM", "70.00 ± 14.14"]
    assert paper.breakdown(found, "mine").head[1] == "text (80)"
    one = json.loads(keep("mine", "pam", 0, whole(0.5), SIZES).read_text())
    found = paper.gather([one, *results.cells()], {})
    assert [corpus for corpus, _ in found] == ["mine", "mine (folds)"]


def test_whichever_of_two_alike_ran_both_have_its_numbers(project):
    keep("mine", "pam", 0, whole(0.7), SIZES)
    found = paper.gather(results.cells(), {"mine": {"pam": "smartave", "other": "smartave"}})
    assert [paper.of(found, "mine", name) for name in ("smartave", "pam", "other")] == [[0.7]] * 3


def test_floors_and_counts_of_machines_that_read_otherwise_are_told_as_they_are(project):
    for model, seed, floor, read in (("pam", 0, 0.1, 38), ("smartave", 0, 0.2, 36), ("pam", 1, 0.4, 38)):
        scores = whole()
        floors = scores["floor"] | {"f1": floor}
        scores |= {"in_ocr": {"read": SCORE | {"count": read}}, "floor": floors}
        keep("mine", model, seed, scores, SIZES)
    found = paper.gather(results.cells(), {})
    assert paper.floor_of(found, "mine", "micro", 2) == "27.50"  # 0.15 of seed 0, 0.4 of seed 1
    assert paper.breakdown(found, "mine").head[1:] == [
        "text (40)",
        "visible (40)",
        "read by our OCR (36–38)",
    ]


def test_a_size_that_differs_between_corpora_is_told_of_each(project):
    sizes = {"mine": 12_300_000, "mave": 12_300_000, "mepave": 9_000_000}
    for corpus, total in sizes.items():
        path = project / "config" / corpus / "models" / "smartave-encoder-2.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        keep(corpus, "smartave-encoder-2", 0, whole(), SIZES | {"parameters": total})
    found = paper.gather(results.cells(), {})
    assert paper.layers_table(found, list(sizes)[:2]).rows[1][1] == "12.3M (1.0M)"
    assert paper.layers_table(found, list(sizes)).rows[1][1] == (
        "12.3M (1.0M) on mine, mave; 9.0M (1.0M) on mepave"
    )
    assert paper.layers_table(found, list(sizes)).rows[2][1] == "–"


def predictions(project, model, seed, values, origin="text", floor="blue"):
    rows = [
        {"item": f"B{i}", "asin": f"B{i}", "attribute": "Color", "gold": ["red"], "in_ocr": [False],
         "origins": [origin if i < 10 else "text"], "floor": [floor],
         "values": [{"value": value, "score": 0.9, "source": {"kind": "vocabulary"}}]}
        for i, value in enumerate(values)
    ]  # fmt: skip
    folder = project / "runs" / "mine" / model / str(seed)
    folder.mkdir(parents=True)
    schema.write_parquet(rows, schema.PREDICTIONS, folder / "predictions.parquet")


def compared(found, model):
    answers = paper.answers_of(found, "mine")
    return paper.significance(answers.get(model, {}), answers.get(paper.OURS, {}))


def test_a_paired_bootstrap_stands_beside_each_model_whose_predictions_are_here(project):
    for name, f1, floor in (("smartave", 1.0, 0.0), ("pam", 0.25, 0.0)):
        scores = whole(f1)
        keep("mine", name, 0, scores | {"floor": scores["floor"] | {"f1": floor}}, SIZES)
    found = paper.gather(results.cells(), {})
    assert compared(found, "pam") == "–"
    predictions(project, "smartave", 0, ["red"] * 20)
    assert compared(found, "pam") == "–"
    assert compared(found, paper.FLOOR) == "-100.0, p < 0.002"
    predictions(project, "pam", 0, ["red"] * 5 + ["blue"] * 15)
    assert compared(found, "pam") == "-75.0, p < 0.002"
    assert compared(found, "smartave") == "–"


def test_predictions_of_another_training_than_the_kept_one_are_left_out(found, project):
    predictions(project, "smartave", 0, ["red"] * 20)  # F1 1.0, and what is kept says 0.8
    assert paper.answers_of(found, "mine")["smartave"] == {}


@pytest.mark.parametrize("origin", ["printed", "visible", "unknown"])
def test_values_that_stand_in_no_text_are_compared_by_themselves(project, origin):
    scores = whole(1.0)
    for seed in (0, 1):
        predictions(project, "smartave", seed, ["red"] * 20, origin)
        keep("mine", "smartave", seed, scores | {"floor": scores["floor"] | {"f1": 0.0}}, SIZES)
    predictions(project, "pam", 0, ["red"] * 5 + ["blue"] * 5 + ["red"] * 10, origin)
    keep("mine", "pam", 0, whole(0.75), SIZES)
    found = paper.gather(results.cells(), {})
    table = paper.picture_table(found, "mine", paper.answers_of(found, "mine"))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["SMARTAVE"] == ["2", "10", "100.00 ± 0.00", "–"]
    assert rows["PAM"][:3] == ["1", "10", "50.00"]
    assert rows["PAM"][3].startswith("-50.0, p ")
    assert rows[paper.FLOOR] == ["2", "10", "0.00 ± 0.00", "-100.0, p < 0.002"]
    assert rows["AVEQA"] == ["–", "–", "–", "–"]
