"""Questions to a model: one product, one attribute, and what is known about the answer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.reading import ShardFolder


@dataclass(frozen=True, slots=True)
class OcrLine:
    text: str
    confidence: float
    quad: tuple[float, ...]  # x, y of four corners, in pixels


@dataclass(frozen=True, slots=True)
class Product:
    """What a model may see of a product. Whether it looks at OCR or regions is its own choice."""

    item: str
    asin: str
    category: str
    paragraphs: tuple[tuple[str, str], ...]  # (text, source)
    ocr: tuple[OcrLine, ...] = ()
    boxes: np.ndarray | None = None  # (R, 4) float32; the last is the whole image
    regions: np.ndarray | None = None  # (R, width) float16; None: no usable image


@dataclass(frozen=True, slots=True)
class Evidence:
    value: str
    paragraph: int
    begin: int  # characters, half-open
    end: int


@dataclass(frozen=True, slots=True)
class Question:
    """`values` empty is a negative: the product has no value for the attribute."""

    product: Product
    attribute: str
    values: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()  # parallel to values
    evidences: tuple[Evidence, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value was read: `text` (paragraph index), `ocr` (line index) or `vocabulary`."""

    kind: str
    index: int | None = None
    begin: int | None = None
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Extraction:
    value: str
    score: float  # probability of the whole output, in 0..1
    source: Source = field(default_factory=lambda: Source("vocabulary"))
    elsewhere: tuple[Source, ...] = ()  # further places where a tagger found the same value


class Images:
    """OCR lines and regions of a corpus by asin. Features are views of mapped memory."""

    def __init__(self, corpus: str) -> None:
        self.ocr = ShardFolder(Path("data", corpus, "ocr"))
        self.regions = ShardFolder(Path("data", corpus, "regions"))
        for folder in (self.ocr, self.regions):
            folder.verify()  # training for hours on a shard that is not what was written would be worse

    def of(self, asin: str) -> dict[str, Any]:
        """The fields of `Product` that come from the image; empty where there is no usable one."""
        lines = self.ocr.get(asin)["lines"] or ()
        features = self.regions.array(asin)
        boxes = self.regions.get(asin)["boxes"]
        usable = features is not None and len(features) > 0
        return {
            "ocr": tuple(OcrLine(line["text"], line["confidence"], tuple(line["quad"])) for line in lines),
            "boxes": np.array(boxes, np.float32) if usable else None,
            "regions": features if usable else None,
        }


def questions(corpus: str, split: str) -> Iterator[Question]:
    """All questions of one split, in the order of products.parquet, OCR and regions joined by asin.

    Raises `ValueError` when a stage's output is incomplete, `KeyError` when a product has no row there.
    """
    images = Images(corpus)
    for batch in pq.ParquetFile(Path("data", corpus, "products.parquet")).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            asked = [attribute for attribute in row["attributes"] if attribute["split"] == split]
            if not asked:
                continue
            product = Product(
                item=row["item"],
                asin=row["asin"],
                category=row["category"],
                paragraphs=tuple((paragraph["text"], paragraph["source"]) for paragraph in row["paragraphs"]),
                **images.of(row["asin"]),
            )
            for attribute in asked:
                yield Question(
                    product=product,
                    attribute=attribute["key"],
                    values=tuple(attribute["values"]),
                    origins=tuple(attribute["origins"]),
                    evidences=tuple(Evidence(**evidence) for evidence in attribute["evidences"]),
                )
