"""Reading shards: a stage's whole output, and groups of its rows as the input of the next one."""

import bisect
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from pipeline.disk import atomically, is_intact
from pipeline.provenance import digest

Rows = list[dict[str, Any]]


def store() -> Path:
    return Path(os.environ.get("SMARTAVE_STORE") or ".cache/shards")


def read(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not a readable shard: {error}") from error


class ShardFolder:
    """The output of a stage. Raises `ValueError` when it is not complete or a file has the wrong size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = path / "manifest.json"
        if not manifest.is_file():
            raise ValueError(f"{path} is not complete: it has no manifest.json (run its stage again)")
        try:
            self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        except ValueError as error:
            raise ValueError(f"{manifest} is not JSON: {error}") from error
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        self.files = [path / shard["name"] for shard in self.shards]
        for file, shard in zip(self.files, self.shards, strict=True):
            size = file.stat().st_size if file.is_file() else None
            if size != shard["bytes"]:
                raise ValueError(f"{file} must have {shard['bytes']} bytes, got {size}")
        self._firsts = [shard["first"] for shard in self.shards]
        self._open: dict[int, tuple[pa.Table, dict[str, int]]] = {}

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def verify(self) -> None:
        """Read every byte; `ValueError` names the first shard that is not what was written."""
        for file, shard in zip(self.files, self.shards, strict=True):
            if not is_intact(file, shard):
                raise ValueError(f"{file} is corrupt: it does not have the sha256 {shard['sha256']}")

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """All rows in order of asin, one shard in memory at a time."""
        for file in self.files:
            yield from read(file, columns).to_pylist()

    def get(self, asin: str) -> dict[str, Any]:
        """Raises `KeyError` where there is no such row."""
        table, row = self._find(asin)
        found: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
        return found

    def array(self, asin: str, column: str = "features") -> np.ndarray | None:
        """A read-only view `(rows, width)` of mapped memory, dtype as in the schema; None for null."""
        table, row = self._find(asin)
        value = table.column(column)[row]
        if not value.is_valid:
            return None
        about = table.schema.metadata
        dtype = np.dtype(about[b"dtype"].decode()).newbyteorder("<")
        view = np.frombuffer(value.as_buffer(), dtype=dtype).reshape(-1, int(about[b"width"]))
        view.flags.writeable = False
        return view

    def _find(self, asin: str) -> tuple[pa.Table, int]:
        index = bisect.bisect_right(self._firsts, asin) - 1
        if index < 0:
            raise KeyError(asin)
        if index not in self._open:
            table = self._map(index)
            self._open[index] = table, {name: row for row, name in enumerate(table["asin"].to_pylist())}
        table, rows_of = self._open[index]
        return table, rows_of[asin]

    def _map(self, index: int) -> pa.Table:
        """The shard uncompressed in the store, mapped: random reads then cost a page, shared by processes."""
        path = store() / "mapped" / f"{self.shards[index]['sha256']}.arrow"
        if not path.is_file():
            if not is_intact(self.files[index], self.shards[index]):
                raise ValueError(f"{self.files[index]} is corrupt: it does not have its sha256")
            table = read(self.files[index])
            with atomically(path) as temporary, pa.ipc.new_file(temporary, table.schema) as writer:
                writer.write_table(table)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class Chunk(Protocol):
    """The input rows of one shard: their digest, and a way for a worker to get at them. Picklable."""

    @property
    def digest(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def ends(self) -> tuple[str, str]: ...  # first and last asin
    def load(self) -> Rows: ...


@dataclass(frozen=True, slots=True)
class RowsChunk:
    """Rows held in memory: for small ones, such as an asin and a URL."""

    rows: tuple[dict[str, Any], ...]

    @property
    def digest(self) -> str:
        return digest(self.rows)

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def ends(self) -> tuple[str, str]:
        return self.rows[0]["asin"], self.rows[-1]["asin"]

    def load(self) -> Rows:
        return [dict(row) for row in self.rows]


@dataclass(frozen=True, slots=True)
class FolderChunk:
    """Rows that a worker reads from another stage's shards: `pieces` are (file, first row, end row)."""

    digest: str
    num_rows: int
    ends: tuple[str, str]
    columns: tuple[str, ...]
    pieces: tuple[tuple[Path, int, int], ...]

    def load(self) -> Rows:
        rows: Rows = []
        for path, begin, end in self.pieces:
            table = read(path, self.columns)
            rows += table.slice(begin, end - begin).to_pylist()
        for row in rows:
            image = row.get("image")
            if image is not None and hashlib.sha256(image).hexdigest() != row["sha256"]:
                raise ValueError(
                    f"the image of {row['asin']} does not have its sha256 in {self.pieces[0][0]}"
                )
        return rows


def chunks_of_rows(rows: Sequence[dict[str, Any]], shard_size: int) -> list[Chunk]:
    return [RowsChunk(tuple(rows[at : at + shard_size])) for at in range(0, len(rows), shard_size)]


def chunks_of_folder(
    folder: ShardFolder,
    shard_size: int,
    *,
    columns: tuple[str, ...] = ("asin", "status", "sha256", "image"),
    key: tuple[str, ...] = ("asin", "status", "sha256"),
) -> list[Chunk]:
    """Groups of `shard_size` rows across the folder's files; a worker gets `columns` of them.

    `key` are the columns that stand for the row's content in the digest: with the defaults the
    image's sha256 does, so that no image byte is read here.
    """
    chunks: list[Chunk] = []
    rows: Rows = []
    pieces: list[tuple[Path, int, int]] = []

    def close() -> None:
        if rows:
            ends = rows[0]["asin"], rows[-1]["asin"]
            chunks.append(FolderChunk(digest(rows), len(rows), ends, columns, tuple(pieces)))
            rows.clear()
            pieces.clear()

    for path in folder.files:
        found = read(path, key).to_pylist()
        begin = 0
        while begin < len(found):
            end = min(len(found), begin + shard_size - len(rows))
            rows += found[begin:end]
            pieces.append((path, begin, end))
            begin = end
            if len(rows) == shard_size:
                close()
    close()
    return chunks
