"""A trained model as a folder to hand on, with a model card.

    python -m model.card CORPUS MODEL SEED FOLDER

Copies runs/CORPUS/MODEL/SEED/model to FOLDER, which must not exist yet, and writes its README.md: what the
model is, what it was made with (provenance.json, from training) and, where it was evaluated, how well it does
beside the no-learning floor. The scores are those that stand in metrics/CORPUS/MODEL/SEED.json, so run
`dvc repro` before. `hf upload USER/NAME FOLDER` publishes the folder.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from model import checkpoint

LANGUAGES = {"mepave": "zh"}  # by kind of corpus; else "en"
LICENCE = "apache-2.0"


def table(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per score of a metrics file, with the floor's F1: micro, other counts, by origin, by OCR."""
    floor = scores["floor"]
    pairs = [("all values", scores, floor)]
    for key, name in (("five_way", "five-way, first value"), ("positives_only", "questions with a value")):
        pairs.append((name, scores[key], floor[key]))
    for group, label in (("by_origin", "origin: {}"), ("in_ocr", "by our OCR: {}")):
        pairs += [
            (label.format(name.replace("_", " ")), one, floor[group][name])
            for name, one in scores[group].items()
        ]
    return [
        {"name": name, "floor_f1": theirs["f1"]}
        | {key: one[key] for key in ("precision", "recall", "f1", "count")}
        for name, one, theirs in pairs
    ]


def front_matter(
    name: str, provenance: dict[str, Any], scores: dict[str, Any] | None, language: str, licence: str
) -> str:
    """The hub's metadata as YAML, with the test scores as its model index."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="attribute-value-extraction",
            dataset_type=provenance["corpus"],
            dataset_name=provenance["corpus"],
            dataset_split="test",
            metric_type=metric,
            metric_value=scores[metric],
        )
        for metric in ("f1", "precision", "recall")
        if scores is not None
    ]
    return ModelCardData(
        language=language,
        license=licence,
        library_name="transformers",
        tags=["attribute-value-extraction", "product-attributes"],
        model_name=name if results else None,
        eval_results=results or None,
    ).to_yaml()


def card(
    name: str,
    provenance: dict[str, Any],
    scores: dict[str, Any] | None,
    *,
    language: str | None = None,
    licence: str = LICENCE,
) -> str:
    """README.md of the model `name`; `scores` is the content of its metrics file, None before `evaluate`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,  # Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    language = language or LANGUAGES.get(provenance["products"]["kind"], "en")
    return environment.get_template("card.md.j2").render(
        front_matter=front_matter(name, provenance, scores, language, licence),
        name=name,
        about=provenance,
        sees={"image": True, "ocr": True, **provenance["settings"]},
        scores=scores,
        table=table(scores) if scores is not None else [],
    )


def assemble(
    corpus: str, name: str, seed: int, folder: Path, *, language: str | None = None, licence: str = LICENCE
) -> None:
    """Write the whole folder, or nothing. Raises `ValueError` without a trained model or if FOLDER exists."""
    model = Path("runs", corpus, name, str(seed), "model")
    metrics = Path("metrics", corpus, name, f"{seed}.json")
    if folder.exists():
        raise ValueError(f"{folder} exists already")
    made_with = checkpoint.provenance(model)
    scores = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else None
    text = card(name, made_with, scores, language=language, licence=licence)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(model, temporary)
    (temporary / "README.md").write_text(text, encoding="utf-8")
    temporary.rename(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("corpus", metavar="CORPUS")
    add("model", metavar="MODEL")
    add("seed", metavar="SEED", type=int)
    add("folder", metavar="FOLDER", type=Path)
    add("--language", metavar="TAG", help="of the corpus (default: zh for MEPAVE, else en)")
    add("--licence", metavar="ID", default=LICENCE, help=f"of the weights (default: {LICENCE})")
    return parser.parse_args()


def main() -> None:
    given = parse()
    try:
        assemble(
            given.corpus,
            given.model,
            given.seed,
            given.folder,
            language=given.language,
            licence=given.licence,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"card: {error}")


if __name__ == "__main__":
    main()
