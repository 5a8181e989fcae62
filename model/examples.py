"""Questions to a model: one product, one attribute, and what is known about the answer."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


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


def questions(corpus: str, split: str) -> Iterator[Question]:
    """All questions of one split, in the order of products.parquet, OCR and regions joined by asin."""
    raise NotImplementedError
