import io
import json
import shutil

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from model import charts, evaluate, report, results, showcase
from model.examples import Extraction, OcrLine, Product, Question, Source
from pipeline import schema
from pipeline.disk import sha256_of

COLORS = ("red", "green", "blue")


def jpeg(color):
    image = Image.new("RGB", (120, 90), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 100, 80), fill=color)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def shards(folder, rows, shard_schema):
    """A finished stage's output with one shard."""
    folder.mkdir(parents=True)
    schema.write_parquet(rows, shard_schema, folder / "00000.parquet")
    name = folder / "00000.parquet"
    entry = {
        "name": name.name,
        "bytes": name.stat().st_size,
        "first": rows[0]["asin"],
        "last": rows[-1]["asin"],
    }
    entry["sha256"] = sha256_of(name)
    (folder / "manifest.json").write_text(json.dumps({"rows": len(rows), "shards": [entry]}))


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Fifteen products, the model `smartave` run with seeds 0 and 1; the last image is broken."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    run = {"corpora": ["mine"], "models": ["smartave", "smartave-text"], "seeds": [0, 1]}
    (tmp_path / "config" / "run.json").write_text(json.dumps(run))
    asked, products = [], []
    for number in range(15):
        asin, color = f"B{number:09}", COLORS[number % 3]
        texts = ((f"Mug <{number}> & saucer", "title"), ("Keeps tea warm.", "feature"))
        quad = (5.0, 5.0, 60.0, 5.0, 60.0, 20.0, 5.0, 20.0)
        line = OcrLine("12 oz", 0.9, quad)
        product = Product(asin, asin, "Mugs", texts, (line,))
        asked.append(Question(product, "Color", (color,), ("visible",)))
        asked.append(Question(product, "Capacity", ("12 oz",), ("printed",)))
        asked.append(Question(product, "Material"))
        attribute = {"split": "test", "evidences": []}
        products.append(
            {
                "item": asin,
                "asin": asin,
                "corpus": "mine",
                "category": "Mugs",
                "title": texts[0][0],
                "paragraphs": [{"text": text, "source": source} for text, source in texts],
                "attributes": [
                    {"key": "Color", "values": [color], "origins": ["visible"], **attribute},
                    {"key": "Capacity", "values": ["12 oz"], "origins": ["printed"], **attribute},
                    {"key": "Material", "values": [], "origins": [], **attribute},
                ],
                "split": "test",
            }
        )
    data = tmp_path / "data" / "mine"
    data.mkdir(parents=True)
    schema.write_parquet(products, schema.PRODUCTS, data / "products.parquet")
    images, ocr, regions = [], [], []
    for number, product in enumerate(products):
        asin, ok = product["asin"], number < 14
        status = "ok" if ok else "truncated"
        images.append({"asin": asin, "status": status, "image": jpeg(COLORS[number % 3]) if ok else None})
        lines = [{"text": "12 oz", "confidence": 0.9, "quad": quad}] if ok else []
        ocr.append({"asin": asin, "status": status, "lines": lines})
        boxes = [[20.0, 10.0, 100.0, 80.0], [0.0, 0.0, 120.0, 90.0]] if ok else []
        regions.append(
            {
                "asin": asin,
                "status": status,
                "boxes": boxes,
                "scores": [0.5] * len(boxes),
                "num_regions": len(boxes),
            }
        )
    shards(data / "images", images, schema.IMAGES)
    shards(data / "ocr", ocr, schema.OCR)
    shards(data / "regions", regions, schema.region_schema(width=4))
    evaluate.write_json({"status": {"ok": 14, "truncated": 1}}, tmp_path / "metrics/mine/images.json")
    for seed in (0, 1):
        found = []
        for position, question in enumerate(asked):
            number, confident = position // 3, Extraction(COLORS[0], 0.95 - position / 100)
            found.append(
                {
                    "Color": (confident,) if seed == 0 or number % 2 else (),
                    "Capacity": (Extraction("12 oz", 0.9, Source("ocr", 0, 0, 5)),),
                    "Material": (),
                }[question.attribute]
            )
        scores, rows = evaluate.judge(asked, found, *evaluate.train_rules([]))
        folder = tmp_path / "runs" / "mine" / "smartave" / str(seed)
        folder.mkdir(parents=True)
        schema.write_parquet(rows, schema.PREDICTIONS, folder / "predictions.parquet")
        history = [{"step": step, "loss": 3 / step, "validation_f1": 1 - 1 / step} for step in range(1, 9)]
        (folder / "history.json").write_text(json.dumps(history))
        made_with = {
            "weights": {"words": "minilm", "regions": "random"},
            "engines": {"ocr": "easyocr", "regions": "torchvision"},
        }
        evaluate.write_json(
            scores | {"made_with": made_with}, tmp_path / f"metrics/mine/smartave/{seed}.json"
        )
    return tmp_path


def test_the_report_shows_scores_figures_data_and_products(corpus, capsys):
    report.run()
    html = (corpus / "reports" / "index.html").read_text()
    assert html.count("<svg") == 3
    assert "detector with random weights" in html
    assert html.count('class="card product"') == 12
    assert "Mug &lt;2&gt; &amp; saucer" in html
    sheet = corpus / "reports" / "images" / "mine-sheet.jpg"
    assert f"images/{sheet.name}" in html
    pictures = sorted(set((corpus / "reports" / "images").iterdir()) - {sheet})
    assert 0 < len(pictures) <= 12
    for picture in pictures:
        assert f"images/{picture.name}" in html
        assert max(Image.open(picture).size) <= showcase.PICTURE_PX
    terminal = capsys.readouterr().out
    assert "reports/index.html" in terminal
    assert "smartave" in terminal
    assert "not run" in terminal


def test_the_tables_stand_in_markdown_with_mean_and_deviation_over_seeds(corpus):
    report.run()
    lines = (corpus / "reports" / "index.md").read_text().splitlines()
    smartave = next(line for line in lines if line.startswith("| smartave |")).split(" | ")
    # seed 0: 5 of 15 colors and 15 capacities right of 30 said; seed 1: 2 of 7 colors and 15
    first, second = 20 / 30, 2 * 17 / (22 + 30)
    assert smartave[2] == f"{(first + second) / 2:.3f} ± {abs(first - second) / 2**0.5:.3f}"
    assert any(line.startswith("| smartave-text | not run |") for line in lines)
    assert any(line.startswith("| floor") for line in lines)
    assert any(line.startswith("| linear probe") for line in lines)
    assert "| test | 15 | 45 | 15 | 30 | 15 | 15 |" in lines
    assert "| images | 14 ok, 1 truncated |" in lines


def test_equal_inputs_give_equal_reports(corpus):
    report.run()
    once = {path: path.read_bytes() for path in (corpus / "reports").rglob("*.*")}
    report.run()
    assert once == {path: path.read_bytes() for path in (corpus / "reports").rglob("*.*")}


def test_a_report_before_anything_ran_says_so(corpus):
    for path in (corpus / "metrics" / "mine" / "smartave").iterdir():
        path.unlink()
    report.run()
    assert "| smartave | not run |" in (corpus / "reports" / "index.md").read_text()


def test_a_cell_of_other_settings_or_products_than_today_s_is_left_out_and_named(corpus):
    path = corpus / "metrics/mine/smartave/0.json"
    scores, splits = (
        json.loads(path.read_text()),
        {"test": {"products": 15, "questions": 45, "positives": 30}},
    )
    evaluate.write_json({"splits": splits, "tables": {}}, corpus / "metrics/mine/products.json")
    scores["made_with"]["sizes"] = splits
    evaluate.write_json(scores, path)
    (corpus / "config/mine/models").mkdir(parents=True)
    (corpus / "config/mine/models/smartave.json").write_text("{}")
    kept = {"corpus": "mine", "model": "smartave"}
    kept["settings"] = results.settings_digest("mine", "smartave")
    evaluate.write_json(kept, corpus / "docs/results/mine/smartave/0.json")
    named = report.OUTDATED.format("smartave 0")
    both, only_one = "2", "1 (not run: 0)"

    def told():
        one = report.section("mine", ["smartave"], [0, 1])
        return one["scores"].rows[1][1], one["cautions"][-1] == named, one["shown_by"]

    assert told() == (both, False, "smartave, seed 0")
    evaluate.write_json(kept | {"settings": "of another day"}, corpus / "docs/results/mine/smartave/0.json")
    assert told() == (only_one, True, "smartave, seed 1")
    evaluate.write_json(kept, corpus / "docs/results/mine/smartave/0.json")
    scores["made_with"]["sizes"] = {"test": splits["test"] | {"questions": 44}}
    evaluate.write_json(scores, path)
    assert told() == (only_one, True, "smartave, seed 1")


def test_products_that_are_no_more_are_not_shown(corpus):
    path = corpus / "data/mine/products.parquet"
    rows = pq.read_table(path).to_pylist()
    schema.write_parquet(rows[:4], schema.PRODUCTS, path)
    shown = showcase.shown("mine", "smartave", 0, number=12, reports=corpus / "reports")
    assert {one["item"] for one in shown} == {row["item"] for row in rows[:4]}


def test_a_report_without_configuration_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"run\.json does not exist"):
        report.run()


def row(score, *, right=True, gold=("red",)):
    values = [{"value": "red" if right else "blue", "score": score}] if gold else []
    return {"values": values, "gold": list(gold)}


def test_products_are_chosen_by_correctness_and_confidence():
    products = {f"G{number}": [row(0.9 - number / 10)] for number in range(4)}
    products |= {f"W{number}": [row(0.8 - number / 10, right=False)] for number in range(4)}
    products["EMPTY"] = [row(1.0, gold=())]
    chosen = showcase.choose(products, 6)
    assert chosen == [
        ("right", "G0"),
        ("right", "G1"),
        ("doubtful", "W3"),
        ("doubtful", "G3"),
        ("wrong", "W0"),
        ("wrong", "W1"),
    ]
    assert len(showcase.choose(products, 30)) == 9


def test_the_mean_of_one_seed_has_no_deviation_and_of_none_is_a_dash():
    assert report.mean_and_sd([0.5]) == "0.500"
    assert report.mean_and_sd([0.5, None, 0.7]) == "0.600 ± 0.141"
    assert report.mean_and_sd([None]) == "–"


def test_figures_without_numbers_are_not_drawn():
    assert charts.curves({"smartave": [[{"step": 1, "rate": 2}]]}, title="Curves") is None


def test_every_bar_has_its_number_however_far_its_deviation_reaches():
    bars = {"steady": {"mine": 50.0}, "collapsed once": {"mine": 90.0}}
    spread = {"steady": {"mine": 0.0}, "collapsed once": {"mine": 17.3}}
    drawn = charts.bars(bars, {}, title="Bars", percent=True, spread=spread)
    assert all(f">{number}<" in drawn for number in ("50.0", "90.0"))


def test_the_paper_s_tables_and_figures_come_from_what_is_kept(corpus):
    score = [0.5, 0.5, 0.5, 30]
    groups = {"by_origin": {"text": score}, "in_ocr": {"read": score}, "by_attribute": {"Color": score}}
    scores = {name: score for name in ("micro", "five_way", "positives_only", "chunk")}
    ran = (("mave", "pam", 0), ("mave", "pam", 1), ("mave", "pam", 2), ("mine", "smartave-alpha-10", 0))
    ran = (*ran, ("mine", "smartave-alpha-1", 0), ("theirs", "pam", 0), ("theirs", "smartave-alpha-1", 0))
    for name, model, seed in ran:
        path = corpus / f"config/{name}/models/{model}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        settings = "of another day" if seed == 2 else results.settings_digest(name, model)
        kept = {"corpus": name, "model": model, "seed": seed, "cost": {}, "settings": settings}
        kept |= {"floor": scores | groups}
        evaluate.write_json(kept | scores | groups, corpus / f"docs/results/{name}/{model}/{seed}.json")
    shutil.rmtree(corpus / "config" / "theirs")  # whose entry is not in params.yaml here
    report.run()
    html = (corpus / "reports" / "index.html").read_text()
    assert '50.00 <small>± 0.00</small> <span class="paper">91.51 ± 0.37</span>' in html
    assert "Grey: the paper&#39;s numbers, on mave." in html
    lines = (corpus / "reports" / "index.md").read_text().splitlines()
    assert "| PAM | 50.00 ± 0.00 (paper: 91.51 ± 0.37) | not run | 50.00 |" in lines
    note = (
        "From 6 finished cells in docs/results/; left out are 1 made with other settings than today's; "
        "params.yaml does not declare theirs: theirs are shown as they were kept."
    )
    assert note in lines
    assert note.replace("'", "&#39;") in html
    figures = sorted(path.name for path in (corpus / "reports" / "figures").iterdir())
    assert figures == ["figure-6.svg"]
    figure = (corpus / "reports" / "figures" / "figure-6.svg").read_text()
    assert ">mine<" in figure
    assert ">theirs<" not in figure  # one value of alpha is no line
    assert any(line.startswith("Not run: w/o title (mave)") for line in lines)
