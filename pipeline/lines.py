"""JSON lines of files that are plain, gzipped or gzipped twice, as a stream; unusable ones are counted."""

import itertools
import json
import queue
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import orjson
from isal import igzip, isal_zlib

from pipeline import progress
from pipeline.tally import Tally

BLOCK_BYTES = 1 << 18  # so that what one thread unzips is still in the cache when another looks at it
MAX_LINE_BYTES = 64 << 20
TOLD_EVERY = 16  # blocks of which one asks the file where it is, which may wait for the interpreter
AHEAD = 8  # blocks that are unzipped while others are worked on
UNZIPS = "unzips ahead"  # name of the thread that does
GZIP_MAGIC = b"\x1f\x8b"
LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
DAMAGED: Any = (EOFError, zlib.error, isal_zlib.error, igzip.BadGzipFile)


def _always(block: bytes, begin: int, end: int) -> bool:
    return True


def numbered(
    path: Path, tally: Tally, is_wanted: Callable[[bytes, int, int], bool] = _always
) -> Iterator[tuple[int, bytes]]:
    """`(line number from 1, line without its end)`; blank lines are skipped, giant ones counted.

    Lines in `block[begin:end]` of which `is_wanted(block, begin, end)` says no are passed over uncopied.
    Raises `ValueError` for a Git LFS pointer and for a damaged gzip stream.
    """
    rest: list[bytes] = []  # of a line that spans blocks
    number, dropping = 0, False

    def is_usable(line: bytes) -> bool:
        if len(line) > MAX_LINE_BYTES:
            tally.add("line too long", f"{path.name}:{number}")
            return False
        return bool(line) and not line.isspace()

    with closing(_ahead(_blocks(path)) if _is_zipped(path) else _blocks(path)) as blocks:
        for block in blocks:
            begin = 0
            while (end := block.find(b"\n", begin)) >= 0:  # one at a time: the memory of a line stays warm
                number += 1
                if dropping:
                    tally.add("line too long", f"{path.name}:{number}")
                    dropping = False
                elif rest:
                    line = b"".join([*rest, block[:end]])
                    rest = []
                    if is_usable(line) and is_wanted(line, 0, len(line)):
                        yield number, line
                elif is_wanted(block, begin, end) and is_usable(line := block[begin:end]):
                    yield number, line
                begin = end + 1
            last = block[begin:]
            if dropping or sum(len(part) for part in rest) + len(last) > MAX_LINE_BYTES:
                rest, dropping = [], True
            elif last:
                rest.append(last)
    number += 1
    if dropping:
        tally.add("line too long", f"{path.name}:{number}")
    elif is_usable(line := b"".join(rest)) and is_wanted(line, 0, len(line)):
        yield number, line


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


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The plain bytes of a file, unzipped as often as it was zipped: a buffered reader.

    Raises `ValueError` for a Git LFS pointer and, while reading, for a damaged gzip stream.
    """
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb", buffering=BLOCK_BYTES))
        try:
            while file.peek(2)[:2] == GZIP_MAGIC:
                file = stack.enter_context(igzip.IGzipFile(fileobj=file, mode="rb"))
            if file.peek(len(LFS_MAGIC))[: len(LFS_MAGIC)] == LFS_MAGIC:
                raise ValueError(f"{path} is a Git LFS pointer, not the data: fetch the file it points at")
            yield file
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from error


def _is_zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == GZIP_MAGIC


def _blocks(path: Path) -> Generator[bytes, None, None]:
    with opened(path) as file, progress.of_bytes(path, path.stat().st_size) as bar:
        raw = file
        while isinstance(raw, igzip.IGzipFile):
            raw = raw.fileobj
        for number in itertools.count(1):
            block = file.read(BLOCK_BYTES)
            if number % TOLD_EVERY == 0 or not block:
                bar.update(raw.tell() - bar.n)
            if not block:
                return
            yield block


def _ahead(blocks: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
    """The same blocks, made by a thread meanwhile: unzipping does not hold the interpreter's lock."""
    made: queue.SimpleQueue[bytes | BaseException | None] = queue.SimpleQueue()
    places: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False: nobody wants more
    for _ in range(AHEAD):
        places.put(True)

    def make() -> None:
        try:
            with closing(blocks):
                for block in blocks:
                    if not places.get():
                        return
                    made.put(block)
            made.put(None)
        except BaseException as error:  # noqa: BLE001 - raised where the blocks are wanted
            made.put(error)

    thread = threading.Thread(target=make, name=UNZIPS, daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            places.put(True)
    finally:
        places.put(False)
        thread.join()
