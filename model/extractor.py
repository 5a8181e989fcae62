"""A trained model as one object: lines of Amazon's metadata form in, attributes with their values out.

    extractor = Extractor.from_pretrained("runs/sample/smartave/0/model")
    extractor({"asin": "B000000001", "title": "Blue mug"}, image="mug.jpg", attributes=["Color"])

Texts, pictures, OCR and regions are prepared by the settings that the model was trained with. `model.predict`
applies it to files, and tells the form of lines and rows.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from model import checkpoint
from model.examples import Extraction, OcrLine, Product, Question
from pipeline import clean, images, mave, products, schema
from pipeline.tally import Tally

CHUNK = 32  # products whose pictures are in memory at a time
Rows = list[dict[str, Any]]
Process = Callable[[Rows], Iterable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Line:
    """One input line: a product to ask about, or the reason why there is none."""

    asin: str | None
    status: str
    category: str = ""
    paragraphs: tuple[tuple[str, str], ...] = ()
    url: str | None = None


def threshold(validation: Sequence[dict[str, Any]], precision: float) -> float:
    """The smallest score at or above which the values said on validation were right that often.

    Raises `ValueError` with the best precision there is when none reaches it.
    """
    best, found, right = 0.0, None, 0
    ordered = sorted(validation, key=lambda row: -row["score"])
    for number, row in enumerate(ordered, 1):
        right += row["correct"]
        if number < len(ordered) and ordered[number]["score"] == row["score"]:
            continue  # equal scores pass together or not at all
        best = max(best, right / number)
        if right / number >= precision:
            found = float(row["score"])
    if found is None:
        raise ValueError(
            f"no threshold gives a precision of {precision} on the {len(ordered)} values said on validation; "
            f"the best is {best:.3f}"
        )
    return found


def least_score(folder: Path, min_precision: float | None) -> float:
    """What the values of the model in `folder` must be scored for that precision on validation."""
    if min_precision is None:
        return 0.0
    return threshold(json.loads((folder / "validation.json").read_text(encoding="utf-8")), min_precision)


class Reader:
    """Turns raw lines into `Line`s by the rules that the training products were made by."""

    def __init__(self, provenance: dict[str, Any]) -> None:
        settings = provenance["products"]
        self.pattern = schema.ID_PATTERNS[settings["kind"]]
        self.dropped = frozenset(settings["drop_sources"])
        self.categories = provenance["attributes_by_category"]

    def read(self, raw: bytes) -> Line:
        if len(raw) > mave.MAX_LINE_BYTES:
            return Line(None, "line too long")
        metadata = mave.parse(raw, "", Tally())
        if metadata is None:
            return Line(None, "malformed line")
        asin = metadata.get("asin")
        if not isinstance(asin, str):
            return Line(None, "no asin")
        if not self.pattern.fullmatch(asin):
            return Line(clean.without_surrogates(asin), "id is not an asin")
        paragraphs = [pair for pair in clean.paragraphs(metadata) if pair[1] not in self.dropped]
        if not clean.has_title(paragraphs):
            return Line(asin, "no title")
        url = next(iter(products.image_urls(metadata)), None)
        return Line(asin, "ok", self.category(metadata), tuple(paragraphs), url)

    def category(self, metadata: dict[str, Any]) -> str:
        """The innermost of the line's categories that the model was trained on, else the innermost."""
        given = metadata.get("category")
        names = [metadata.get("main_cat"), *(given if isinstance(given, list) else [given])]
        names = [clean.without_surrogates(name) for name in names if isinstance(name, str) and name]
        return next((name for name in reversed(names) if name in self.categories), names[-1] if names else "")


def here(settings: dict[str, Any]) -> dict[str, Any]:
    """A stage's settings where a model is applied: trained with a GPU, it is applied without one too."""
    return {**settings, "device": "auto"} if settings.get("device") == "cuda" else settings


def of_pictures(provenance: dict[str, Any], folder: Path | None, hosts: Sequence[str]) -> images.Settings:
    """The settings of the training, with other places."""
    places = {"base": str(folder) if folder is not None else None, "base_sha256": None, "hosts": list(hosts)}
    return images.Settings.model_validate({**provenance.get("images", {}), **places})


class Seen:
    """What a model may see of pictures: fetched, read and cut into regions as for its training.

    `processes` do so at the same time, and share what may be asked of a host.
    """

    def __init__(
        self, provenance: dict[str, Any], folder: Path | None, hosts: Sequence[str], processes: int = 1
    ) -> None:
        self.settings = images.share(of_pictures(provenance, folder, hosts), processes)
        self.fetch: Process = images.make_worker(self.settings)
        looks = {"ocr": True, "image": True, **provenance["settings"]}
        self.ocr: Process | None = None
        self.regions: Process | None = None
        if looks["ocr"]:
            from features import ocr

            self.ocr = ocr.open_work(ocr.Settings.model_validate(here(provenance["ocr"])))
        if looks["image"]:
            from features import regions

            self.regions = regions.open_work(regions.Settings.model_validate(here(provenance["regions"])))

    def of(self, lines: Sequence[Line], folder: Path | None = None) -> list[tuple[str, dict[str, Any]]]:
        """Per line the status of its picture, and the fields of `Product` that come from it.

        `folder` takes the place of the one that names of pictures are looked up in.
        """
        if self.ocr is None and self.regions is None:
            return [("not used by this model", {})] * len(lines)
        settings, fetch = self.settings, self.fetch
        if folder is not None:
            settings = settings.model_copy(update={"base": str(folder)})
            fetch = images.make_worker(settings)
        names = {f"{number:06}": line.url for number, line in enumerate(lines)}
        pictures = list(fetch(images.inputs(names.items(), settings)))
        fields: list[dict[str, Any]] = [{} for _ in lines]
        for row, read in zip(self.ocr(pictures) if self.ocr else (), fields, strict=False):
            read["ocr"] = tuple(
                OcrLine(line["text"], line["confidence"], tuple(line["quad"])) for line in row["lines"] or ()
            )
        for row, cut in zip(self.regions(pictures) if self.regions else (), fields, strict=False):
            if row["num_regions"]:
                cut["boxes"] = np.array(row["boxes"], np.float32)
                cut["regions"] = np.frombuffer(row["features"], "<f2").reshape(row["num_regions"], -1)
        return [(picture["status"], found) for picture, found in zip(pictures, fields, strict=True)]


def answers(
    lines: Iterable[Line],
    seen: Callable[[Sequence[Line]], list[tuple[str, dict[str, Any]]]],
    asked: Callable[[Line], Sequence[str]],
    extract: Callable[[Iterable[Question]], Iterator[tuple[Extraction, ...]]],
    least_score: float,
) -> Iterator[dict[str, Any]]:
    """One output row per line, in order, holding `CHUNK` products at a time."""
    waiting = iter(lines)
    while chunk := list(islice(waiting, CHUNK)):
        usable = [line for line in chunk if line.status == "ok"]
        found = list(zip(usable, seen(usable), strict=True)) if usable else []
        given = [  # one object each: by it a model knows what is asked of the same product
            Product(str(line.asin), str(line.asin), line.category, line.paragraphs, **fields)
            for line, (_, fields) in found
        ]
        questions = [
            Question(product, attribute)
            for line, product in zip(usable, given, strict=True)
            for attribute in asked(line)
        ]
        said, pictures = extract(questions), iter(found)
        for line in chunk:
            row: dict[str, Any] = {"asin": line.asin, "status": line.status, "image": None, "attributes": []}
            if line.status == "ok":
                row["image"] = next(pictures)[1][0]
                row["attributes"] = [
                    {
                        "key": attribute,
                        "values": [
                            _value(extraction, line)
                            for extraction in next(said)
                            if round(extraction.score, 6) >= least_score
                        ],
                    }
                    for attribute in asked(line)
                ]
            yield row


def _value(extraction: Extraction, line: Line) -> dict[str, Any]:
    source = asdict(extraction.source)
    if source["kind"] == "text":
        source["field"] = line.paragraphs[source["index"]][1]
    return {"value": extraction.value, "score": round(extraction.score, 6), "source": source}


class Extractor:
    """A model, and all that prepares its input, loaded once."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        provenance: dict[str, Any],
        *,
        images: Path | None = None,
        hosts: Sequence[str] = (),
        least_score: float = 0.0,
        batch_size: int = 64,
        processes: int = 1,
    ) -> None:
        self.model, self.processor, self.provenance = model, processor, provenance
        self.least_score, self.batch_size = least_score, batch_size
        self.reader = Reader(provenance)
        self.seen = Seen(provenance, images, hosts, processes)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        images: Path | None = None,
        hosts: Sequence[str] = (),
        min_precision: float | None = None,
        batch_size: int = 64,
        processes: int = 1,
    ) -> "Extractor":
        """From what model.train wrote.

        Args:
            images: names of pictures in product lines are files below it.
            hosts: URLs of pictures are fetched from these only.
            min_precision: leave out values scored under the threshold that gives it on validation.
            batch_size: questions at a time.
            processes: as many share what may be asked of a host at a time.

        Raises `ValueError` when the folder is no trained model or no threshold gives the precision.
        """
        folder = Path(folder)
        model, processor = checkpoint.load(folder)
        return cls(
            model,
            processor,
            checkpoint.provenance(folder),
            images=images,
            hosts=hosts,
            least_score=least_score(folder, min_precision),
            batch_size=batch_size,
            processes=processes,
        )

    def __call__(
        self,
        product_line: Mapping[str, Any] | str | bytes,
        *,
        image: Path | str | None = None,
        attributes: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """What the model says of one product, given as JSON or as what JSON would give.

        Args:
            image: the file of its picture; without one, the picture that the line names.
            attributes: what is asked; without them, those trained for its category, else all.

        Raises `ValueError` when one of them is not of its kind, or `image` is no file.
        """
        if isinstance(product_line, Mapping):
            product_line = json.dumps(product_line)
        if not isinstance(product_line, str | bytes):
            raise ValueError(f"a product must be a mapping or its JSON, got {product_line!r}")
        raw = product_line if isinstance(product_line, bytes) else product_line.encode()
        line, folder = self.reader.read(raw), None
        if image is not None:
            picture = Path(image).expanduser()
            if not picture.is_file():
                raise ValueError(f"image must be a file, got {str(image)!r} (the line itself may hold a URL)")
            line, folder = replace(line, url=picture.name), picture.parent
        (row,) = self.rows([line], attributes=attributes, folder=folder)
        return row

    def rows(
        self,
        lines: Iterable[Line],
        *,
        attributes: Sequence[str] | None = None,
        folder: Path | None = None,
    ) -> Iterator[dict[str, Any]]:
        """One row per line, in order, as the lines come."""
        by_category, trained = self.provenance["attributes_by_category"], self.provenance["attributes"]
        names = None if attributes is None else list(attributes)
        if isinstance(attributes, str) or not all(isinstance(name, str) for name in names or ()):
            raise ValueError(f"attributes must be a list of names, got {attributes!r}")

        def asked(line: Line) -> Sequence[str]:
            return by_category.get(line.category, trained) if names is None else names

        def extract(questions: Iterable[Question]) -> Iterator[tuple[Extraction, ...]]:
            return checkpoint.extract(self.model, self.processor, questions, batch_size=self.batch_size)

        seen = functools.partial(self.seen.of, folder=folder)
        return answers(lines, seen, asked, extract, self.least_score)
