"""MAVE: labels joined with Amazon's metadata, as Google's script does it, but as a stream.

    python -m pipeline.mave --metadata FILE... --labels FILE... --output FILE.jsonl

Files are JSON lines, plain, gzipped, or gzipped twice. Of several metadata lines with one asin the first
that survives cleaning counts. Spans are passed on unchecked, as in the original; `pipeline.products`
checks them.
"""

import argparse
import gzip
import io
import json
import re
import sys
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import orjson
from tqdm import tqdm

from pipeline import clean
from pipeline.disk import atomically
from pipeline.tally import Tally

MAX_LINE_BYTES = 64 << 20
GZIP_MAGIC = b"\x1f\x8b"
LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
ASIN = re.compile(rb'"asin"\s*:\s*"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Record:
    """One metadata line that was asked for, its text cleaned."""

    metadata: dict[str, Any]
    paragraphs: list[tuple[str, str]]


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The plain bytes of a file that may be gzipped, once or twice.

    Raises `ValueError` for a Git LFS pointer and, while reading, for a damaged gzip stream.
    """
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb", buffering=1 << 20))
        try:
            while file.peek(2)[:2] == GZIP_MAGIC:
                unzipped = gzip.GzipFile(fileobj=file, mode="rb")
                file = stack.enter_context(io.BufferedReader(unzipped, 1 << 20))
            if file.peek(len(LFS_MAGIC))[: len(LFS_MAGIC)] == LFS_MAGIC:
                raise ValueError(f"{path} is a Git LFS pointer, not the data: fetch the file it points at")
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from error


def lines(path: Path, tally: Tally) -> Iterator[tuple[int, bytes]]:
    """`(line number from 1, line)`; blank lines are skipped, giant ones counted as `line too long`."""
    size = path.stat().st_size
    with (
        opened(path) as file,
        tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar,
    ):
        raw = _raw(file)
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number % 1000 == 0:
                bar.update(raw.tell() - bar.n)
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                tally.add("line too long", f"{path.name}:{number}")
                continue
            if line.strip():
                yield number, line


def _raw(file: Any) -> IO[bytes]:
    """The file on disk below any gzip layers: its position is the progress."""
    while isinstance(getattr(file, "raw", None), gzip.GzipFile):
        file = file.raw.fileobj
    return file


def parse(line: bytes, where: str, tally: Tally) -> dict[str, Any] | None:
    """The JSON object of a line, or None and a count of `malformed line`."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:  # the standard library also reads lone surrogates, NaN and a byte order mark
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        tally.add("malformed line", where)
        return None
    return value


def labels(paths: Iterable[Path], tally: Tally) -> Iterator[tuple[int, str, bytes, dict[str, Any]]]:
    """`(file index, where, line, label)` of every usable label line; a repeated id in a file is counted."""
    for index, path in enumerate(paths):
        seen = set()
        for number, line in lines(path, tally):
            where = f"{path.name}:{number}"
            label = parse(line, where, tally)
            if label is None:
                continue
            if not isinstance(label.get("id"), str) or not isinstance(label.get("attributes"), list):
                tally.add("label without id or attributes", where)
            elif not isinstance(label.get("category"), str):
                tally.add("label without category", where)
            elif label["id"] in seen:
                tally.add("repeated label", where)
            else:
                seen.add(label["id"])
                yield index, where, line, label


def records(paths: Iterable[Path], wanted: Collection[str], tally: Tally) -> Iterator[Record]:
    """The first surviving metadata line of every asin in `wanted`, in file order, texts cleaned.

    Lines of other asins are skipped unparsed; lines that cannot be used are counted by reason.
    """
    found: set[str] = set()
    unusable: set[str] = set()
    wanted_bytes = {asin.encode() for asin in wanted}
    for path in paths:
        for number, line in lines(path, tally):
            named = ASIN.findall(line)
            if named and not any(asin in wanted_bytes or b"\\" in asin for asin in named):
                tally.add("metadata without label")
                continue
            where = f"{path.name}:{number}"
            metadata = parse(line, where, tally)
            if metadata is None:
                continue
            asin = metadata.get("asin")
            if not isinstance(asin, str) or not asin:
                tally.add("metadata without asin", where)
            elif asin not in wanted:
                tally.add("metadata without label")
            elif asin in found:
                tally.add("repeated metadata", where)
            else:
                paragraphs = clean.paragraphs(metadata, tally)
                if clean.has_title(paragraphs):
                    found.add(asin)
                    yield Record(metadata, paragraphs)
                else:
                    unusable.add(asin)
                    tally.add("no title", where)
    for asin in sorted(set(wanted) - found - unusable):
        tally.add("no metadata", asin)


def join(metadata: Iterable[Path], label_files: Iterable[Path], output: Path) -> Tally:
    """Write one full line per label line, sorted by id (then by label file); returns what was counted."""
    tally = Tally()
    by_id: dict[str, list[tuple[int, bytes]]] = {}
    complete: list[tuple[str, int, bytes]] = []
    for index, _, line, label in labels(label_files, tally):
        if "paragraphs" in label:
            complete.append((label["id"], index, line))
        else:
            by_id.setdefault(label["id"], []).append((index, line))
    with tempfile.TemporaryFile(dir=output.parent) as spool:
        places: list[tuple[str, int, int, int]] = []  # id, label file, offset, length

        def put(index: int, label: dict[str, Any], paragraphs: Any) -> None:
            row = {name: label[name] for name in ("id", "category")}
            line = json.dumps({**row, "paragraphs": paragraphs, "attributes": label["attributes"]}).encode()
            places.append((label["id"], index, spool.tell(), len(line)))
            spool.write(line)

        for _, index, line in complete:
            label = json.loads(line)
            put(index, label, label["paragraphs"])
        for record in records(metadata, by_id, tally):
            paragraphs = [{"text": text, "source": source} for text, source in record.paragraphs]
            for index, line in by_id[record.metadata["asin"]]:
                put(index, json.loads(line), paragraphs)
        with atomically(output) as temporary, temporary.open("wb") as file:
            for _, _, offset, length in sorted(places):
                spool.seek(offset)
                file.write(spool.read(length) + b"\n")
    tally.add("lines written", count=len(places))
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
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
