"""JSON lines of files that are plain, gzipped or gzipped twice, as a stream; unusable ones are counted."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import msgspec
import orjson
from isal import igzip

from pipeline import progress, unzip
from pipeline.tally import Tally
from pipeline.unzip import BLOCK_BYTES, DAMAGED, GZIP_MAGIC

MAX_LINE_BYTES = 64 << 20
TOLD_EVERY = 16  # blocks of which one moves the bar
LARGE_BYTES = 8 << 20  # zipped, from which on a process beside this one is worth its start
LFS_MAGIC = b"version https://git-lfs.github.com/spec/"

Fields = TypeVar("Fields")


def _always(block: bytes, begin: int, end: int) -> bool:
    return True


class Begun(NamedTuple):
    """A file that `numbered` reads on, once."""

    path: Path
    blocks: Generator[bytes, None, None]

    @property
    def name(self) -> str:
        return self.path.name


@contextmanager
def begun(paths: Iterable[Path]) -> Iterator[list[Path | Begun]]:
    """`paths` for `numbered`, for who has something else to do before the first line.

    The first, where it is large and zipped, is being unzipped already.
    """
    paths = list(paths)
    with ExitStack() as stack:
        first = [Begun(path, stack.enter_context(closing(_blocks(path)))) for path in paths[:1]]
        yield [*first, *paths[1:]]


def numbered(
    path: Path | Begun, tally: Tally, is_wanted: Callable[[bytes, int, int], bool] = _always
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

    with closing(path.blocks if isinstance(path, Begun) else _blocks(path)) as blocks:
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


def parse_fields(line: bytes, where: str, tally: Tally, read: msgspec.json.Decoder[Fields]) -> Fields | None:
    """`parse` for who asks for no more than the fields that `read` names: the rest is only checked."""
    try:
        if line.isascii() or line.decode():  # of texts that it passes over, msgspec does not check the bytes
            return read.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    return cast("Fields | None", parse(line, where, tally))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The plain bytes of a file, unzipped as often as it was zipped: a buffered reader.

    Raises `ValueError` for a Git LFS pointer and, while reading, for a damaged gzip stream.
    """
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb", buffering=BLOCK_BYTES))
        try:
            file = unzip.unzipped(file, stack)
            if file.peek(len(LFS_MAGIC))[: len(LFS_MAGIC)] == LFS_MAGIC:
                raise ValueError(f"{path} is a Git LFS pointer, not the data: fetch the file it points at")
            yield file
        except DAMAGED as error:
            raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged or cut short: {why}")


def _is_large_and_zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return path.stat().st_size >= LARGE_BYTES and file.read(2) == GZIP_MAGIC


def _blocks(path: Path) -> Generator[bytes, None, None]:
    if not _is_large_and_zipped(path):
        return _unzipped_here(path)
    blocks = _unzipped_beside(path)
    next(blocks)
    return blocks


def _unzipped_here(path: Path) -> Generator[bytes, None, None]:
    with opened(path) as file, progress.of_bytes(path, path.stat().st_size) as bar:
        raw = file
        while isinstance(raw, igzip.IGzipFile):
            raw = raw.fileobj
        yield from _with_progress(iter(lambda: file.read(BLOCK_BYTES), b""), raw, bar)


def _with_progress(blocks: Iterable[bytes], raw: Any, bar: Any) -> Generator[bytes, None, None]:
    """`blocks`; `bar` shows the place in `raw`, the file on disk that they come from."""
    for number, block in enumerate(blocks, 1):
        if number % TOLD_EVERY == 0:
            bar.update(raw.tell() - bar.n)
        yield block
    bar.update(raw.tell() - bar.n)


def _unzipped_beside(path: Path) -> Generator[bytes, None, None]:
    """An empty block when a process beside this one has begun, then what it unzips.

    A thread would wait for this interpreter's lock.
    """
    here, there = socket.socketpair()
    with (
        here,
        there,
        path.open("rb", buffering=0) as file,  # the two share its place in the file
        tempfile.TemporaryFile() as shared,
    ):
        for _ in range(unzip.NUM_SLOTS):
            shared.write(bytes(unzip.SLOT_BYTES))  # so that a full disk is an error here
        shared.flush()
        command = [sys.executable, "-I", unzip.__file__, str(shared.fileno())]
        with (
            mmap(shared.fileno(), 0) as memory,
            subprocess.Popen(
                command, stdin=file, stdout=there.fileno(), stderr=subprocess.PIPE, pass_fds=[shared.fileno()]
            ) as process,
        ):
            there.close()
            assert process.stderr is not None
            try:
                yield b""
                with progress.of_bytes(path, os.fstat(file.fileno()).st_size) as bar:
                    yield from _with_progress(unzip.filled(memory, here), file, bar)
            except unzip.Unfinished:
                status, told = process.wait(), process.stderr.read().decode(errors="replace").strip()
                if status == unzip.IS_DAMAGED:
                    raise _damaged(path, told) from None
                why = f"that ended with {status} {told}".rstrip()
                raise OSError(f"{path} could not be unzipped: {why}") from None
            finally:
                process.kill()
