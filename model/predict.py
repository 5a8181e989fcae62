"""Apply a trained model to a catalogue: lines of Amazon's metadata form in, one line of JSON each out.

    python -m model.predict --model runs/sample/smartave/0/model --input catalogue.jsonl --output out.jsonl

A line is `{"asin", "title", "description": [...], "feature": [...], "category": [...],
"imageURLHighRes": [...], ...}`; the file may be gzipped. Texts, pictures, OCR and regions are prepared
by the settings that the model was trained with. Out come, in the order of the input,
`{"asin", "status", "image", "attributes": [{"key", "values": [{"value", "score", "source"}]}]}`.

`status` is "ok" or the reason why a line could not be used; `image` is "ok" or why there was no picture.
`source` says where a value was read: `kind` text, ocr or vocabulary; `index` the cleaned paragraph (its
`field` is title, description, feature, ...) or OCR line, and `begin`, `end` in its characters.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from model.examples import Extraction, OcrLine, Product, Question
from pipeline import clean, images, mave, products, schema
from pipeline.disk import atomically
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
            return Line(asin, "id is not an asin")
        paragraphs = [pair for pair in clean.paragraphs(metadata) if pair[1] not in self.dropped]
        if not clean.has_title(paragraphs):
            return Line(asin, "no title")
        url = next(iter(products.image_urls(metadata)), None)
        return Line(asin, "ok", self.category(metadata), tuple(paragraphs), url)

    def category(self, metadata: dict[str, Any]) -> str:
        """The innermost of the line's categories that the model was trained on, else the innermost."""
        given = metadata.get("category")
        names = [metadata.get("main_cat"), *(given if isinstance(given, list) else [given])]
        names = [name.encode("utf-8", "ignore").decode() for name in names if isinstance(name, str) and name]
        return next((name for name in reversed(names) if name in self.categories), names[-1] if names else "")


def raw_lines(file: BinaryIO) -> Iterator[bytes]:
    """Every line, also blank ones; of one that is too long, its beginning."""
    while line := file.readline(mave.MAX_LINE_BYTES + 1):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(mave.MAX_LINE_BYTES)
        yield line


def num_lines(path: Path) -> int:
    with mave.opened(path) as file:
        return sum(1 for _ in raw_lines(file))


class Seen:
    """What a model may see of pictures: fetched, read and cut into regions as for its training."""

    def __init__(self, provenance: dict[str, Any], folder: Path | None, hosts: Sequence[str]) -> None:
        base = str(folder) if folder is not None else None
        self.settings = images.Settings.model_validate({"base": base, "hosts": list(hosts)})
        self.fetch: Process = images.make_worker(self.settings)
        looks = {"ocr": True, "image": True, **provenance["settings"]}
        self.ocr: Process | None = None
        self.regions: Process | None = None
        if looks["ocr"]:
            from features import ocr

            self.ocr = ocr.make_worker(ocr.Settings.model_validate(provenance["ocr"]))
        if looks["image"]:
            from features import regions

            self.regions = regions.make_worker(regions.Settings.model_validate(provenance["regions"]))

    def of(self, lines: Sequence[Line]) -> list[tuple[str, dict[str, Any]]]:
        """Per line the status of its picture, and the fields of `Product` that come from it."""
        if self.ocr is None and self.regions is None:
            return [("not used by this model", {})] * len(lines)
        names = {f"{number:06}": line.url for number, line in enumerate(lines)}
        pictures = list(self.fetch(images.inputs(names, self.settings)))
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
        questions = [
            Question(
                Product(str(line.asin), str(line.asin), line.category, line.paragraphs, **fields), attribute
            )
            for line, (_, fields) in found
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


def run(arguments: argparse.Namespace) -> Tally:
    """Write the whole output, or none of it; returns the statuses of lines and pictures."""
    from model import checkpoint

    if not arguments.input.is_file():
        raise ValueError(f"{arguments.input} does not exist")
    if arguments.images is not None and not arguments.images.is_dir():
        raise ValueError(f"{arguments.images} is not a folder")
    model, processor = checkpoint.load(arguments.model)
    provenance = json.loads((arguments.model / "provenance.json").read_text(encoding="utf-8"))
    least_score = 0.0
    if arguments.min_precision is not None:
        validation = json.loads((arguments.model / "validation.json").read_text(encoding="utf-8"))
        least_score = threshold(validation, arguments.min_precision)
        sys.stderr.write(f"values with a score under {least_score} are left out\n")
    for name in sorted(set(arguments.attributes or ()) - set(provenance["attributes"])):
        sys.stderr.write(f"{name}: the model was not trained on this attribute, and is asked all the same\n")
    reader = Reader(provenance)

    def asked(line: Line) -> Sequence[str]:
        trained = provenance["attributes_by_category"].get(line.category, provenance["attributes"])
        return arguments.attributes or trained

    def extract(questions: Iterable[Question]) -> Iterator[tuple[Extraction, ...]]:
        return checkpoint.extract(model, processor, questions, batch_size=arguments.batch_size)

    tally = Tally()
    seen = Seen(provenance, arguments.images, arguments.hosts)
    with (
        mave.opened(arguments.input) as file,
        atomically(arguments.output) as temporary,
        temporary.open("wb") as output,
    ):
        lines = (reader.read(raw) for raw in raw_lines(file))
        rows = answers(lines, seen.of, asked, extract, least_score)
        for row in tqdm(rows, "predict", num_lines(arguments.input), unit="line"):
            tally.add(row["status"])
            if row["image"] is not None:
                tally.add(f"image: {row['image']}")
            output.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return tally


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="FOLDER", help="what model.train wrote")
    add("--input", required=True, type=Path, metavar="FILE", help="the catalogue, .jsonl or .jsonl.gz")
    add("--output", required=True, type=Path, metavar="FILE", help="written whole or not at all")
    add("--images", type=Path, metavar="FOLDER", help="image names of the catalogue are files below it")
    add("--hosts", nargs="+", default=(), metavar="HOST", help="image URLs are fetched from these only")
    add("--attributes", nargs="+", metavar="NAME", help="default: those trained for the category, else all")
    add(
        "--min-precision",
        type=_share,
        metavar="P",
        help="leave out values scored under the threshold that gives this precision on validation",
    )
    add("--batch-size", type=_positive, default=64, metavar="N", help="questions at a time (default: 64)")
    return parser.parse_args(command_line)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be over 0 and at most 1, got {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def main() -> None:
    try:
        tally = run(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"predict: {error}")
    for reason, count in sorted(tally.counts.items()):
        sys.stderr.write(f"{count:>8} {reason}\n")


if __name__ == "__main__":
    main()
