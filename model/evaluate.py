"""Scores of one trained model on the test split, beside the no-learning floor and the linear probe.

    python -m model.evaluate CORPUS MODEL SEED

Reads runs/CORPUS/MODEL/SEED/model, writes next to it predictions.parquet and plots/,
metrics/CORPUS/MODEL/SEED.json, and what of it is worth keeping to docs/results/. Gold is a question's
values and evidences, normalised; a value that stands only in an evidence is of origin `text`.
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pydantic import Field

from model import metrics, results
from model.examples import Extraction, Question, questions
from model.floor import Floor
from model.metrics import Answer, Chunk
from model.probe import Probe
from pipeline import params, progress, schema


class Settings(params.Settings):
    """Section `evaluate`."""

    batch_size: int = Field(64, ge=1, le=4096)  # questions in one pass of the model


def gold(question: Question) -> dict[str, str]:
    """Each right value with its origin; of values that are equal when normalised the first stays."""
    pairs = [*zip(question.values, question.origins, strict=True)]
    pairs += [(evidence.value, "text") for evidence in question.evidences]
    distinct: dict[str, tuple[str, str]] = {}
    for value, origin in pairs:
        distinct.setdefault(metrics.normalise(value), (value, origin))
    return dict(distinct.values())


def train_rules(asked: Iterable[Question]) -> tuple[Floor, Probe]:
    """The two things every score stands beside, learnt from the training split in one pass."""
    floor, probe = Floor(), Probe()
    for question in asked:
        floor.observe(question)
        probe.observe(question)
    probe.fit()
    return floor, probe


def chunks(question: Question, found: Iterable[Extraction]) -> tuple[set[Chunk], set[Chunk], int]:
    """The chunks said, those labelled, and how many values were said without a place in the text."""
    said: set[Chunk] = set()
    nowhere = 0
    for extraction in found:
        for source in (extraction.source, *extraction.elsewhere):
            if source.kind == "text":
                said.add((source.index or 0, source.begin or 0, source.end or 0))
            else:
                nowhere += 1
    return said, {(one.paragraph, one.begin, one.end) for one in question.evidences}, nowhere


def judge(
    asked: Iterable[Question], extracted: Iterable[tuple[Extraction, ...]], floor: Floor, probe: Probe
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The content of the metrics file (without `made_with`) and the rows of predictions.parquet."""
    answers: dict[str, list[Answer]] = {"model": [], "floor": [], "probe": []}
    placed: dict[str, list[tuple[set[Chunk], set[Chunk], int]]] = {"model": [], "floor": []}
    rows, unscored = [], 0
    for question, found in zip(asked, extracted, strict=True):
        product, right = question.product, gold(question)
        read = " ".join(line.text for line in product.ocr)
        in_ocr = [metrics.contains(read, value) for value in right]
        unscored += sum(not metrics.normalise(value) for value in right)
        extracted_by = {"model": found, "floor": floor.predict(question)}
        for system, extractions in extracted_by.items():
            placed[system].append(chunks(question, extractions))
        said = {
            **{system: [one.value for one in extractions] for system, extractions in extracted_by.items()},
            "probe": probe.predict(question),
        }
        for system, values in said.items():
            answers[system].append(
                metrics.answer(product.item, question.attribute, values, right, right.values(), in_ocr)
            )
        rows.append(
            {
                "item": product.item,
                "asin": product.asin,
                "attribute": question.attribute,
                "values": [
                    {"value": one.value, "score": one.score, "source": asdict(one.source)} for one in found
                ],
                "floor": said["floor"],
                "gold": list(right),
                "origins": list(right.values()),
                "in_ocr": in_ocr,
            }
        )
    none = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "count": 0}
    return {
        **metrics.all_scores(answers["model"]),
        "chunk": metrics.chunks(placed["model"]),
        "floor": metrics.all_scores(answers["floor"]) | {"chunk": metrics.chunks(placed["floor"])},
        "probe": {"visible": metrics.by_origin(answers["probe"]).get("visible", none)},
        "unscored_values": unscored,  # gold that normalises to nothing, such as "A"
    }, rows


def plot_rows(scores: dict[str, Any], group: str) -> list[dict[str, Any]]:
    """One point per name of `by_attribute` or `by_origin`, for `dvc plots`."""
    return [
        {"name": name, "f1": score["f1"], "floor_f1": scores["floor"][group][name]["f1"]}
        | {key: score[key] for key in ("precision", "recall", "count")}
        for name, score in scores[group].items()
    ]


def split_sizes(products: Path) -> dict[str, dict[str, int]]:
    """Products, questions and questions with a value per split; splits by instance share products."""
    sizes = {split: Counter({"products": 0, "questions": 0, "positives": 0}) for split in schema.SPLITS}
    for batch in pq.ParquetFile(products).iter_batches(columns=["attributes"]):
        for attributes in batch.column("attributes").to_pylist():
            for attribute in attributes:
                sizes[attribute["split"]].update(questions=1, positives=bool(attribute["values"]))
            for split in {attribute["split"] for attribute in attributes}:
                sizes[split].update(products=1)
    return {split: dict(counts) for split, counts in sizes.items()}


def rounded(value: Any) -> Any:
    """Floats to six digits, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 6) if isinstance(value, float) else value


def write_json(content: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def made_with(provenance: dict[str, Any], products: Path) -> dict[str, Any]:
    """What a reader has to know before comparing the numbers with any others."""
    return {
        "weights": {"words": provenance["weights"], "regions": provenance["regions"]["weights"]},
        "engines": {"ocr": provenance["ocr"]["engine"], "regions": provenance["regions"]["backend"]},
        "sizes": split_sizes(products),
    }


def run(corpus: str, name: str, seed: int) -> None:
    """Evaluate runs/CORPUS/MODEL/SEED/model and write the files named at the top of this module."""
    from model import checkpoint

    settings = params.load(Settings, params.CONFIG / corpus / "evaluate.json")
    folder, products = Path("runs", corpus, name, str(seed)), Path("data", corpus, "products.parquet")
    model, processor = checkpoint.load(folder / "model")
    provenance = json.loads((folder / "model" / "provenance.json").read_text(encoding="utf-8"))
    what = made_with(provenance, products)
    sizes = what["sizes"]
    shown: dict[str, Any] = {"seconds": 10, "unit": "question"}
    learnt = progress.bar(
        "floor and probe", sizes["train"]["questions"], iterable=questions(corpus, "train"), **shown
    )
    floor, probe = train_rules(learnt)
    asked, kept = itertools.tee(questions(corpus, "test"))
    extracted = checkpoint.extract(model, processor, asked, batch_size=settings.batch_size)
    watched = progress.bar(
        f"evaluate {corpus} {name} {seed}", sizes["test"]["questions"], iterable=extracted, **shown
    )
    scores, rows = judge(kept, watched, floor, probe)
    schema.write_parquet(rows, schema.PREDICTIONS, folder / "predictions.parquet")
    for group in ("by_attribute", "by_origin"):
        write_json(plot_rows(scores, group), folder / "plots" / f"{group}.json")
    whole = scores | {"made_with": what}
    write_json(whole, Path("metrics", corpus, name, f"{seed}.json"))
    results.keep(corpus, name, seed, whole, results.size(model))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", metavar="CORPUS", help="a corpus of params.yaml, its data stages done")
    parser.add_argument("model", metavar="MODEL", help="a model of params.yaml")
    parser.add_argument("seed", metavar="SEED", type=int, help="of weights, order and dropout")
    arguments = parser.parse_args()
    try:
        run(arguments.corpus, arguments.model, arguments.seed)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
