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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from model.extractor import Extractor
from pipeline import mave, progress
from pipeline.disk import atomically
from pipeline.tally import Tally


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


def run(arguments: argparse.Namespace) -> Tally:
    """Write the whole output, or none of it; returns the statuses of lines and pictures."""
    if not arguments.input.is_file():
        raise ValueError(f"{arguments.input} does not exist")
    if arguments.images is not None and not arguments.images.is_dir():
        raise ValueError(f"{arguments.images} is not a folder")
    extractor = Extractor.from_pretrained(
        arguments.model,
        images=arguments.images,
        hosts=arguments.hosts,
        min_precision=arguments.min_precision,
        batch_size=arguments.batch_size,
    )
    if arguments.min_precision is not None:
        sys.stderr.write(f"values with a score under {extractor.least_score} are left out\n")
    for name in sorted(set(arguments.attributes or ()) - set(extractor.provenance["attributes"])):
        sys.stderr.write(f"{name}: the model was not trained on this attribute, and is asked all the same\n")
    tally = Tally()
    with (
        mave.opened(arguments.input) as file,
        atomically(arguments.output) as temporary,
        temporary.open("wb") as output,
    ):
        lines = (extractor.reader.read(raw) for raw in raw_lines(file))
        rows = extractor.rows(lines, attributes=arguments.attributes)
        for row in progress.bar(
            "predict", num_lines(arguments.input), seconds=10, iterable=rows, unit="line"
        ):
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
