"""Label lines by id: the lines lie on disk, memory holds some 150 bytes of each (3.5 million: 0.5 GiB)."""

import os
import re
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import msgspec

from pipeline import lines
from pipeline.disk import start_sync
from pipeline.tally import Tally

NONE = -1
BLOCK_BYTES = 32 << 10
COPIED_BYTES = 1 << 18
UNCOUNTED = Tally()
NOTHING = (None, msgspec.Raw(b"null"))


class Fields(TypedDict, total=False):
    """What the index needs of a label line; the rest is parsed when it is asked for."""

    id: Any
    category: Any
    attributes: list[msgspec.Raw]
    paragraphs: msgspec.Raw


READ = msgspec.json.Decoder(Fields)
PASSED_OVER = sys.get_int_max_str_digits()  # bytes of a line in which no number can be too long to be parsed


class Spool:
    """Values on disk by number, for what is too much to hold; neighbours are read together."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=1 << 20)  # noqa: SIM115
        self._end = array("Q", [0])
        self._flushed = 0
        self._block_at, self._block = 0, b""

    def __len__(self) -> int:
        return len(self._end) - 1

    def add(self, value: bytes) -> int:
        self._file.write(value)
        self._end.append(self._end[-1] + len(value))
        return len(self) - 1

    def get(self, number: int) -> bytes:
        begin, end = self._end[number], self._end[number + 1]
        if begin < self._block_at or end > self._block_at + len(self._block):
            if end > self._flushed:
                self._file.flush()
                self._flushed = self._end[-1]
            self._block_at = begin
            self._block = os.pread(self._file.fileno(), max(BLOCK_BYTES, end - begin), begin)
        return self._block[begin - self._block_at : end - self._block_at]

    def copy(self, numbers: Iterable[int], to: BinaryIO, at_once: int = COPIED_BYTES) -> None:
        """Write these values, in this order; neighbours together, `at_once` bytes and a value at most.

        What is written leaves for the disk meanwhile.
        """
        self._file.flush()
        begin = end = waiting = 0
        for number in numbers:
            if self._end[number] != end or end - begin > at_once:
                waiting += to.write(os.pread(self._file.fileno(), end - begin, begin))
                begin = self._end[number]
                if waiting > 32 * at_once:
                    start_sync(to)
                    waiting = 0
            end = self._end[number + 1]
        to.write(os.pread(self._file.fileno(), end - begin, begin))

    def close(self) -> None:
        self._file.close()


class Labels:
    """All usable label lines of `paths`; the others are counted. Close it, or use it in a `with`.

    `products` maps every id, as UTF-8, to its rank among the ids in order of first appearance. A second
    line of one id in one file is counted as `repeated label` and left out. With `pattern`, other ids are
    counted as `id is not an asin`.
    """

    def __init__(
        self, paths: Iterable[Path], tally: Tally, folder: Path, pattern: re.Pattern[str] | None = None
    ) -> None:
        self.paths = list(paths)
        self.products: dict[bytes, int] = {}
        self._first = array("l")  # by product: its first line; the others are chained by _next
        self._last = array("l")
        self._next, self._file, self._place = array("l"), array("H"), array("L")
        self._full = bytearray()
        self._lines = Spool(folder)
        self._pattern = pattern
        for file in range(len(self.paths)):
            self._read(file, tally)

    def __len__(self) -> int:
        return len(self._next)

    def __enter__(self) -> "Labels":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def numbers(self, product: int) -> Iterator[int]:
        """The lines of one product, in the order of the files."""
        number = self._first[product]
        while number != NONE:
            yield number
            number = self._next[number]

    def label(self, number: int) -> dict[str, Any]:
        row: dict[str, Any] | None = lines.parse(self._lines.get(number), "", UNCOUNTED)
        assert row is not None, "it was parsed when it was indexed"
        return row

    def where(self, number: int) -> str:
        return f"{self.paths[self._file[number]].name}:{self._place[number]}"

    def is_full(self, number: int) -> bool:
        """Whether the line carries its own `paragraphs` and needs no metadata."""
        return bool(self._full[number])

    def without_text(self) -> Mapping[bytes, int]:
        """Those of `products` with a line that needs metadata."""
        if not any(self._full):
            return self.products
        return {
            asin: product
            for asin, product in self.products.items()
            if not all(map(self.is_full, self.numbers(product)))
        }

    def _read(self, file: int, tally: Tally) -> None:
        path = self.paths[file]
        for place, line in lines.numbered(path, tally):
            where = f"{path.name}:{place}"
            row: Any = (
                lines.parse_fields(line, where, tally, READ)
                if len(line) <= PASSED_OVER
                else lines.parse(line, where, tally)
            )
            if row is None or not self._usable(row, where, tally):
                continue
            key = row["id"].encode("utf-8", "surrogatepass")
            product = self.products.setdefault(key, len(self.products))
            number = len(self)
            if product == len(self._first):
                self._first.append(number)
                self._last.append(number)
            elif self._file[self._last[product]] == file:
                tally.add("repeated label", where)
                continue
            else:
                self._next[self._last[product]] = number
                self._last[product] = number
            self._next.append(NONE)
            self._file.append(file)
            self._place.append(place)
            self._full.append(row.get("paragraphs") not in NOTHING)
            self._lines.add(line)

    def _usable(self, row: Fields, where: str, tally: Tally) -> bool:
        if not isinstance(row.get("id"), str) or not isinstance(row.get("attributes"), list):
            tally.add("label without id or attributes", where)
        elif not isinstance(row.get("category"), str):
            tally.add("label without category", where)
        elif self._pattern is not None and not self._pattern.fullmatch(row["id"]):
            tally.add("id is not an asin", where)
        else:
            return True
        return False
