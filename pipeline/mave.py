"""MAVE: labels joined with Amazon's metadata, as Google's script does it, but as a stream.

    python -m pipeline.mave --metadata FILE... --labels FILE... --output FILE.jsonl

Files are JSON lines, plain, gzipped, or gzipped twice. Of several metadata lines with one asin the first
that survives cleaning counts. Spans are passed on unchecked, as in the original; `pipeline.products`
checks them.
"""

import argparse
import heapq
import json
import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import msgspec
import orjson

from pipeline import clean
from pipeline.disk import atomically
from pipeline.labels import NONE, Labels, Spool
from pipeline.lines import BLOCK_BYTES, MAX_LINE_BYTES, Begun, begun, numbered, opened, parse, parse_fields
from pipeline.tally import MAX_EXAMPLES, Tally

__all__ = ["MAX_LINE_BYTES", "Record", "join", "may_be_wanted", "opened", "parse", "records"]

KEY = b'"asin"'
NAMED = re.compile(rb'"asin"\s*:\s*"([^"]*)"')
PLAINLY_NAMED = re.compile(rb'"asin"\s*:\s*"([^"\\]*)"')
BACKSLASH = ord("\\")
MISSING, UNUSABLE, FOUND = range(3)


class Metadata(TypedDict, total=False):
    """All that anybody asks of a metadata line; half of a line's bulk is something else."""

    asin: Any
    title: Any
    brand: Any
    feature: Any
    description: Any
    price: Any
    main_cat: Any
    image: Any
    imageURL: Any
    imageURLHighRes: Any


class Record(NamedTuple):
    """One metadata line that was asked for, its text cleaned; `product` is what `wanted` says of its asin."""

    product: int
    metadata: Metadata
    paragraphs: list[tuple[str, str]]


def may_be_wanted(block: bytes, begin: int, end: int, wanted: Mapping[bytes, int]) -> bool:
    """False only for a metadata line, `block[begin:end]`, whose asin is not in `wanted`.

    Most lines are told apart unparsed: where the last `"asin"` is a key and one `}` follows, it is the line's
    own and the one that counts.
    """
    at = block.rfind(KEY, begin, end)
    if at > begin and block[at - 1] != BACKSLASH and (last := PLAINLY_NAMED.match(block, at, end)):
        after = last.end()
        if block.find(b"{", after, end) < 0 and block.count(b"}", after, end) == 1:
            return last[1] in wanted
    named = NAMED.findall(block, begin, end)
    return not named or any(asin in wanted or b"\\" in asin for asin in named)


READ = msgspec.json.Decoder(Metadata)


def records(paths: Iterable[Path | Begun], wanted: Mapping[bytes, int], tally: Tally) -> Iterator[Record]:
    """The first surviving metadata line of every asin in `wanted`, in file order, texts cleaned.

    `wanted` maps asins, as UTF-8, to small numbers. Lines that cannot be used are counted by reason.
    """
    state = bytearray(max(wanted.values(), default=NONE) + 1)
    unasked = 0

    def is_wanted(block: bytes, begin: int, end: int) -> bool:
        nonlocal unasked
        if may_be_wanted(block, begin, end, wanted):
            return True
        unasked += 1
        return False

    for path in paths:
        name = path.name
        for number, line in numbered(path, tally, is_wanted):
            where = f"{name}:{number}"
            metadata = parse_fields(line, where, tally, READ)
            if metadata is None:
                continue
            asin = metadata.get("asin")
            if not isinstance(asin, str) or not asin:
                tally.add("metadata without asin", where)
                continue
            product = wanted.get(asin.encode("utf-8", "surrogatepass"))
            if product is None:
                unasked += 1
            elif state[product] == FOUND:
                tally.add("repeated metadata", where)
            else:
                paragraphs = clean.paragraphs(metadata, tally)
                if clean.has_title(paragraphs):
                    state[product] = FOUND
                    yield Record(product, metadata, paragraphs)
                else:
                    state[product] = UNUSABLE
                    tally.add("no title", where)
    if unasked:
        tally.add("metadata without label", count=unasked)
    missing = (asin for asin, product in wanted.items() if state[product] == MISSING)
    num_missing = sum(state[product] == MISSING for product in wanted.values())
    for asin in heapq.nsmallest(MAX_EXAMPLES, missing):
        tally.add("no metadata", asin.decode("utf-8", "replace"))
        num_missing -= 1
    if num_missing:
        tally.add("no metadata", count=num_missing)


def join(metadata: Iterable[Path], label_files: Iterable[Path], output: Path) -> Tally:
    """Write one full line per label line, sorted by id (then by label file); returns what was counted."""
    tally = Tally()
    with (
        begun(metadata) as sources,
        Labels(label_files, tally, output.parent) as labels,
        closing(Spool(output.parent)) as made,
    ):
        places = array("l", [NONE]) * len(labels)  # in `made`, by label line

        def add(number: int, paragraphs: Any = None) -> None:
            label = labels.label(number)
            try:
                places[number] = made.add(_full_line(label, paragraphs or label["paragraphs"]))
            except RecursionError:  # what was just parsed may be too deep to be written
                tally.add("malformed line", labels.where(number))

        for number in filter(labels.is_full, range(len(labels))):
            add(number)
        for record in records(sources, labels.without_text(), tally):
            paragraphs = [{"text": text, "source": source} for text, source in record.paragraphs]
            for number in labels.numbers(record.product):
                if not labels.is_full(number):
                    add(number, paragraphs)
        ordered = (
            places[number]
            for asin in sorted(labels.products)
            for number in labels.numbers(labels.products[asin])
            if places[number] != NONE
        )
        with atomically(output) as temporary, temporary.open("wb", buffering=BLOCK_BYTES) as file:
            made.copy(ordered, file)
        tally.add("lines written", count=len(made))
    return tally


def _full_line(label: dict[str, Any], paragraphs: Any) -> bytes:
    row = {
        "id": label["id"],
        "category": label["category"],
        "paragraphs": paragraphs,
        "attributes": label["attributes"],
    }
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # half of a surrogate pair, or a giant number
        return json.dumps(row).encode() + b"\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.mave", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--metadata", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--labels", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    arguments = parser.parse_args()
    try:
        tally = join(arguments.metadata, arguments.labels, arguments.output)
    except (ValueError, OSError) as error:
        sys.exit(f"pipeline.mave: {error}")
    json.dump(tally.report(), sys.stdout, indent=2)


if __name__ == "__main__":
    main()
