"""A small cell for real: trained, evaluated, reported, applied."""

import contextlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from model import card, checkpoint, evaluate, predict, smartave, train
from model.extractor import Extractor
from pipeline import schema
from pipeline.disk import sha256_of
from pipeline.reading import ShardFolder

COLORS = ("red", "green", "blue")
SPLITS = ("train",) * 12 + ("validation",) * 3 + ("test",) * 6
TRAIN = {"batch_size": 8, "epochs": 25, "learning_rate": 0.003, "warmup_steps": 5, "evaluations": 1}
TEXT_ONLY = {
    "image": False,
    "ocr": False,
    "pretrained": None,
    "tokenizer": "characters",
    "hidden_size": 48,
    "encoder_heads": 4,
    "decoder_heads": 4,
    "intermediate_size": 96,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "dropout": 0.0,
    "max_length": 64,
}
BERT = {
    "image": False,
    "ocr": False,
    "pretrained": None,
    "tokenizer": "characters",
    "hidden_size": 48,
    "encoder_heads": 4,
    "intermediate_size": 96,
    "encoder_layers": 1,
    "dropout": 0.0,
    "max_length": 64,
}


def shards(folder, rows, shard_schema):
    folder.mkdir(parents=True)
    path = folder / "00000.parquet"
    schema.write_parquet(rows, shard_schema, path)
    entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    entry |= {"first": rows[0]["asin"], "last": rows[-1]["asin"]}
    (folder / "manifest.json").write_text(json.dumps({"rows": len(rows), "shards": [entry]}))
    assert len(ShardFolder(folder)) == len(rows)


def title(number):
    return f"Nice {COLORS[number % 3]} mug number {number}"


def write_corpus(root):
    """Twenty-one mugs: the color stands in the title, the size on the label, the shape in the features."""
    products, ocr, regions = [], [], []
    for number, split in enumerate(SPLITS):
        asin, color = f"B{number:09}", COLORS[number % 3]
        span = {"value": color, "paragraph": 0, "begin": 5, "end": 5 + len(color)}
        features = np.zeros((2, 8), np.float16)
        features[:, number % 2] = 3
        answers = [
            {"key": "Color", "values": [color], "origins": ["text"], "evidences": [span]},
            {"key": "Size", "values": ["12 oz"], "origins": ["printed"], "evidences": []},
            {
                "key": "Shape",
                "values": [("round", "tall")[number % 2]],
                "origins": ["visible"],
                "evidences": [],
            },
            {"key": "Scent", "values": [], "origins": [], "evidences": []},
        ]
        products.append(
            {
                "item": asin,
                "asin": asin,
                "corpus": "mine",
                "category": "Mugs",
                "title": title(number),
                "paragraphs": [{"text": title(number), "source": "title"}],
                "attributes": [answer | {"split": split} for answer in answers],
                "split": split,
            }
        )
        lines = [{"text": "net 12 oz", "confidence": 0.9, "quad": [0.0] * 8}]
        ocr.append({"asin": asin, "status": "ok", "lines": lines})
        boxes = {"boxes": [[0.0, 0.0, 9.0, 9.0]] * 2, "scores": [0.5] * 2, "num_regions": 2}
        regions.append({"asin": asin, "status": "ok", "features": features.tobytes(), **boxes})
    shards(root / "data/mine/ocr", ocr, schema.OCR)
    shards(root / "data/mine/regions", regions, schema.region_schema(width=8))
    schema.write_parquet(products, schema.PRODUCTS, root / "data/mine/products.parquet")
    config = root / "config" / "mine"
    settings = {
        "products": {"kind": "mave", "drop_sources": ["brand"]},
        "images": {"cdn_size_px": 500},
        "ocr": {"engine": "easyocr"},
        "regions": {"backend": "torchvision", "weights": "random"},
        "evaluate": {"batch_size": 5},
        "models/tiny": {"architecture": "model.smartave", "code": "0", "settings": TEXT_ONLY, "train": TRAIN},
        "models/tagger": {
            "architecture": "model.baselines.bert_tagger",
            "code": "0",
            "settings": BERT,
            "train": TRAIN | {"epochs": 20},
        },
        "models/pam": {
            "architecture": "model.baselines.pam",
            "code": "0",
            "settings": BERT | {"image": True, "ocr": True, "fusion_layers": 1, "buckets": 20},
            "train": TRAIN | {"epochs": 20},
        },
    }
    for name, content in settings.items():
        evaluate.write_json(content, config / f"{name}.json")


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """The folder in which the model `tiny` was trained and evaluated on the corpus `mine`."""
    root = tmp_path_factory.mktemp("cell")
    write_corpus(root)
    with contextlib.chdir(root):
        train.run("mine", "tiny", 0)
        evaluate.run("mine", "tiny", 0)
    return root


def read(path):
    return json.loads(path.read_text())


def test_the_metrics_file_holds_what_the_contract_names(cell):
    scores = read(cell / "metrics/mine/tiny/0.json")
    group = {"precision", "recall", "f1", "count"}
    assert group < scores.keys()
    assert scores["by_attribute"].keys() == {"Color", "Scent", "Shape", "Size"}
    assert scores["by_origin"].keys() == {"printed", "text", "visible"}
    assert scores["in_ocr"].keys() == {"not_read", "read"}
    for system in (scores, scores["floor"]):
        for name in ("by_attribute", "by_origin", "in_ocr"):
            assert all(one.keys() == group for one in system[name].values())
    assert scores["in_ocr"]["read"]["count"] == 6  # the sizes
    assert scores["probe"]["visible"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "count": 6}
    assert scores["floor"]["by_origin"]["printed"]["f1"] == 1.0
    made_with = scores["made_with"]
    assert made_with["weights"] == {"words": "random", "regions": "random"}
    assert made_with["sizes"]["test"] == {"products": 6, "questions": 24, "positives": 18}


def test_it_learnt_what_stands_in_the_text(cell):
    scores = read(cell / "metrics/mine/tiny/0.json")
    assert scores["by_attribute"]["Color"]["f1"] >= 0.8


def test_predictions_are_one_row_per_question_of_the_test_split(cell):
    rows = pq.read_table(cell / "runs/mine/tiny/0/predictions.parquet").to_pylist()
    assert len(rows) == 24
    assert {row["item"] for row in rows} == {f"B{number:09}" for number in range(15, 21)}


def test_a_second_evaluation_gives_equal_bytes(cell, monkeypatch):
    monkeypatch.chdir(cell)
    paths = [cell / "metrics/mine/tiny/0.json", *sorted((cell / "runs/mine/tiny/0").rglob("*.*"))]
    once = [path.read_bytes() for path in paths]
    evaluate.run("mine", "tiny", 0)
    assert once == [path.read_bytes() for path in paths]


def test_the_model_applied_to_a_catalogue_answers_line_by_line(cell, tmp_path, monkeypatch):
    monkeypatch.chdir(cell)
    lines = [
        {"asin": "B000000099", "title": title(1), "brand": "red", "category": ["Kitchen", "Mugs"]},
        "broken",
        {"asin": "B000000098", "title": title(2), "category": ["Unknown"], "imageURLHighRes": ["none.jpg"]},
    ]
    catalogue, output = tmp_path / "catalogue.jsonl", tmp_path / "out.jsonl"
    catalogue.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    given = ["--model", "runs/mine/tiny/0/model", "--input", str(catalogue), "--output", str(output)]
    tally = predict.run(predict.parse([*given, "--batch-size", "3"]))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["asin"], row["status"]) for row in rows] == [
        ("B000000099", "ok"),
        (None, "malformed line"),
        ("B000000098", "ok"),
    ]
    assert [attribute["key"] for attribute in rows[0]["attributes"]] == ["Color", "Scent", "Shape", "Size"]
    (color,) = rows[0]["attributes"][0]["values"]
    assert color["value"] == "green"
    assert tally.counts == {"ok": 2, "malformed line": 1, "image: not used by this model": 2}
    predict.run(predict.parse([*given, "--attributes", "Color", "--min-precision", "0.5"]))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [attribute["key"] for attribute in rows[2]["attributes"]] == ["Color"]


def test_one_product_gets_what_its_line_in_a_catalogue_gets(cell, tmp_path, monkeypatch):
    monkeypatch.chdir(cell)
    given = [
        {"asin": "B000000099", "title": title(1), "brand": "red", "category": ["Kitchen", "Mugs"]},
        {"asin": "B000000098", "title": title(2), "category": ["Unknown"]},
    ]
    catalogue, output = tmp_path / "catalogue.jsonl", tmp_path / "out.jsonl"
    catalogue.write_text("".join(f"{json.dumps(line)}\n" for line in given))
    options = ["--model", "runs/mine/tiny/0/model", "--input", str(catalogue), "--output", str(output)]
    predict.run(predict.parse(options))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    extractor = Extractor.from_pretrained("runs/mine/tiny/0/model")
    assert extractor.seen.settings.cdn_size_px == 500  # as in training
    for line, row in zip(given, rows, strict=True):
        answer = extractor(line)
        assert scores(answer) == pytest.approx(scores(row), abs=1e-5)  # products share batches in a catalogue
        assert answer == row
    assert rows[0]["attributes"][0]["values"][0]["value"] == "green"
    (color,) = extractor(given[1], attributes=["Color"])["attributes"]
    assert [value["value"] for value in color["values"]] == ["blue"]


def scores(row):
    """The scores in a row, which are taken out of it."""
    return [value.pop("score") for attribute in row["attributes"] for value in attribute["values"]]


def test_a_trained_folder_loads_by_its_type(cell):
    folder = cell / "runs/mine/tiny/0/model"
    model = transformers.AutoModel.from_pretrained(folder)
    assert type(model) is smartave.Model
    ours, _ = checkpoint.load(folder)
    assert model.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor.cpu(), model.state_dict()[name]), name
    assert type(transformers.AutoConfig.from_pretrained(folder)) is smartave.Config
    assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab()["[VALUE]"] == 4


def test_a_folder_to_hand_on_has_a_card_and_works(cell, tmp_path, monkeypatch):
    monkeypatch.chdir(cell)
    folder = tmp_path / "upload"
    card.assemble("mine", "tiny", 0, folder)
    trained = cell / "runs/mine/tiny/0/model"
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in trained.iterdir()} | {"README.md"}
    found = ModelCard.load(folder / "README.md")
    metrics = read(cell / "metrics/mine/tiny/0.json")
    assert found.data.eval_results[0].metric_value == metrics["f1"]
    assert found.text.count("| origin: ") == 3
    assert "| test split | 6 products, 24 questions, 18 with a value |" in found.text
    assert "Color, Scent, Shape, Size." in found.text
    line = {"asin": "B000000099", "title": title(1), "category": ["Mugs"]}
    (color,) = Extractor.from_pretrained(folder)(line, attributes=["Color"])["attributes"]
    assert [value["value"] for value in color["values"]] == ["green"]


def test_baselines_go_the_same_road(cell, tmp_path, monkeypatch):
    monkeypatch.chdir(cell)
    for name in ("tagger", "pam"):
        train.run("mine", name, 0)
        evaluate.run("mine", name, 0)
    tagger, pam = (read(cell / f"metrics/mine/{name}/0.json") for name in ("tagger", "pam"))
    assert tagger["by_attribute"]["Color"]["f1"] >= 0.8
    assert tagger["chunk"]["count"] == 6
    assert tagger["chunk"]["f1"] >= 0.8
    assert pam["by_origin"]["printed"]["f1"] >= 0.8  # it reads OCR
    assert tagger["floor"] == pam["floor"]
    catalogue, output = tmp_path / "catalogue.jsonl", tmp_path / "out.jsonl"
    catalogue.write_text(json.dumps({"asin": "B000000099", "title": title(1), "category": ["Mugs"]}) + "\n")
    given = ["--model", "runs/mine/tagger/0/model", "--input", str(catalogue), "--output", str(output)]
    predict.run(predict.parse([*given, "--attributes", "Color"]))
    (answer,) = read(output)["attributes"]
    assert [value["value"] for value in answer["values"]] == ["green"]
    assert answer["values"][0]["source"]["kind"] == "text"


def test_a_finished_cell_leaves_its_result(cell):
    kept = read(cell / "docs/results/mine/tiny/0.json")
    scores = read(cell / "metrics/mine/tiny/0.json")
    assert kept["micro"][2] == round(scores["f1"], 4)
    assert kept["cost"]["examples"] == 12 * 4 * TRAIN["epochs"]
    assert kept["cost"]["training_s"] > 0
    assert kept["cost"]["parameters"] > kept["cost"]["without_embeddings"] > 0


def test_an_unreachable_precision_writes_nothing(cell, tmp_path, monkeypatch):
    monkeypatch.chdir(cell)
    catalogue = tmp_path / "catalogue.jsonl"
    catalogue.write_text("{}\n")
    validation = cell / "runs/mine/tiny/0/model/validation.json"
    before = validation.read_text()
    validation.write_text(json.dumps([{"attribute": "Color", "score": 0.9, "correct": False}]))
    given = [
        "--model",
        "runs/mine/tiny/0/model",
        "--input",
        str(catalogue),
        "--output",
        str(tmp_path / "out"),
    ]
    try:
        with pytest.raises(ValueError, match="no threshold"):
            predict.run(predict.parse([*given, "--min-precision", "0.9"]))
    finally:
        validation.write_text(before)
    assert not (tmp_path / "out").exists()
