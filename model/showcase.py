"""Products to look at: what a model said about them, beside what is true and what was seen."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from model.metrics import normalise
from pipeline.reading import ShardFolder

PICTURE_PX = 640


def verdict(row: dict[str, Any]) -> bool:
    """Whether exactly the right values were said."""
    said = {normalise(value["value"]) for value in row["values"]} - {""}
    return said == {normalise(value) for value in row["gold"]} - {""}


def confidence(rows: Sequence[dict[str, Any]]) -> float:
    """The lowest score of any value said; 1 where nothing was said."""
    return min((value["score"] for row in rows for value in row["values"]), default=1.0)


def choose(products: dict[str, list[dict[str, Any]]], number: int) -> list[tuple[str, str]]:
    """(kind, item) of a third each: surely right, surely wrong, and least sure of the rest.

    `products[item]` are its rows of predictions.parquet. Depends on nothing but them; ties go by item.
    """
    share = number // 3
    sure = sorted(products, key=lambda item: (-confidence(products[item]), item))
    good = [i for i in sure if all(map(verdict, products[i])) and any(row["gold"] for row in products[i])]
    wrong = [item for item in sure if not all(map(verdict, products[item]))]
    chosen = {item: "right" for item in good[:share]} | {item: "wrong" for item in wrong[:share]}
    unsure = sorted(products, key=lambda item: (confidence(products[item]), item))
    rest = [item for item in unsure if item not in chosen]
    chosen |= {item: "doubtful" for item in rest[: number - len(chosen)]}
    order = ("right", "doubtful", "wrong")
    return sorted(((kind, item) for item, kind in chosen.items()), key=lambda pair: order.index(pair[0]))


def said_of(row: dict[str, Any]) -> dict[str, Any]:
    """One attribute of a shown product, ready to print."""
    places = {"text": "text", "ocr": "OCR line", "vocabulary": "vocabulary"}
    return {
        "attribute": row["attribute"],
        "right": verdict(row),
        "said": [
            {
                "value": value["value"],
                "score": f"{value['score']:.2f}",
                "place": places[value["source"]["kind"]]
                + ("" if value["source"]["index"] is None else f" {value['source']['index']}"),
            }
            for value in row["values"]
        ],
        "true": [
            {"value": value, "origin": origin + (", in OCR" if read else "")}
            for value, origin, read in zip(row["gold"], row["origins"], row["in_ocr"], strict=True)
        ],
    }


def picture(asin: str, folders: dict[str, ShardFolder], path: Path) -> str | None:
    """Draw OCR quads and region boxes into a small JPEG at `path`; the status where there is no image."""
    from PIL import Image

    from features import show

    found = {stage: folder.get(asin) for stage, folder in folders.items()}
    if found["images"]["status"] != "ok":
        return str(found["images"]["status"])
    drawn = show.draw(found["images"]["image"], found["ocr"], found["regions"]).convert("RGB")
    drawn.thumbnail((PICTURE_PX, PICTURE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    drawn.save(buffer, "JPEG", quality=80)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return None


def contact_sheet(corpus: str, reports: Path) -> str | None:
    """Good, doubtful and failed pictures on one sheet below `reports`; None where the stages have not run."""
    from features import show

    if not all(
        Path("data", corpus, stage, "manifest.json").is_file() for stage in ("images", "ocr", "regions")
    ):
        return None
    name = Path("images", f"{corpus}-sheet.jpg")
    (reports / name).parent.mkdir(parents=True, exist_ok=True)
    show.sheet(corpus).save(reports / name, "JPEG", quality=80)
    return name.as_posix()


def shown(corpus: str, model: str, seed: int, *, number: int, reports: Path) -> list[dict[str, Any]]:
    """The chosen products of one cell's test split, with their pictures written to `reports`/images/."""
    products: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(Path("runs", corpus, model, str(seed), "predictions.parquet")).to_pylist():
        products.setdefault(row["item"], []).append(row)
    folders = {stage: ShardFolder(Path("data", corpus, stage)) for stage in ("images", "ocr", "regions")}
    usable = {row["asin"] for row in folders["images"].rows(["asin", "status"]) if row["status"] == "ok"}
    pictured = {item: rows for item, rows in products.items() if rows[0]["asin"] in usable}
    chosen = choose(pictured or products, number)
    wanted = {item for _, item in chosen}
    texts: dict[str, dict[str, Any]] = {}
    columns = ["item", "category", "title", "paragraphs"]
    for batch in pq.ParquetFile(Path("data", corpus, "products.parquet")).iter_batches(columns=columns):
        texts |= {row["item"]: row for row in batch.to_pylist() if row["item"] in wanted}
    showcase = []
    for kind, item in chosen:
        if item not in texts:  # the products were made anew since
            continue
        rows, text = products[item], texts[item]
        name = Path("images", f"{corpus}-{item}.jpg")
        missing = picture(rows[0]["asin"], folders, reports / name)
        showcase.append(
            {
                "kind": kind,
                "item": item,
                "category": text["category"],
                "title": text["title"],
                "paragraphs": [one["text"] for one in text["paragraphs"] if one["source"] != "title"][:4],
                "picture": None if missing else name.as_posix(),
                "missing": missing,
                "answers": [said_of(row) for row in rows],
            }
        )
    return showcase
