"""A file on stdin, unzipped as often as it was zipped: what `pipeline.lines` runs beside itself.

The two processes share the memory of some slots, since a pipe would cost a tenth of the time. Standard
output is a socket: out goes the length of a slot that is full, 0 at the end; in comes a byte for a slot that
is free again.
"""

import itertools
import os
import socket
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from mmap import mmap
from typing import Any

from isal import igzip, isal_zlib

BLOCK_BYTES = 1 << 18  # of text, which is still in the cache when its lines are looked for
NUM_SLOTS, SLOT_BYTES = 32, 1 << 20
LENGTH_BYTES = 4
GZIP_MAGIC = b"\x1f\x8b"
IS_DAMAGED = 65  # the exit status for bad input, as in sysexits.h
DAMAGED: Any = (EOFError, OverflowError, zlib.error, isal_zlib.error, igzip.BadGzipFile)


class Unfinished(Exception):
    """The process beside ended before the file did."""


class Unzipped(igzip.IGzipFile):
    def readinto(self, buffer: Any) -> int:
        length: int = self._buffer.readinto(buffer)  # type: ignore[attr-defined]  # inherited, it copies
        return length


def unzipped(file: Any, stack: ExitStack) -> Any:
    """The buffered reader `file`, or one of its content; what is opened is closed by `stack`."""
    while file.peek(2)[:2] == GZIP_MAGIC:
        file = stack.enter_context(Unzipped(fileobj=file, mode="rb"))
    return file


def fill(memory: mmap, reader: socket.socket, file: Any) -> None:
    """All of `file` into the slots, in turn. Raises `ConnectionError` where nobody reads, and `DAMAGED`."""
    slots = memoryview(memory)
    for number in itertools.count():
        if number >= NUM_SLOTS and not reader.recv(1):
            raise ConnectionAbortedError("nobody reads any more")
        begin = number % NUM_SLOTS * SLOT_BYTES
        length = file.readinto(slots[begin : begin + SLOT_BYTES])
        reader.sendall(length.to_bytes(LENGTH_BYTES))
        if not length:
            return


def filled(memory: mmap, filler: socket.socket) -> Iterator[bytes]:
    """What `fill` puts into `memory`, in blocks. Raises `Unfinished` where it does not come to its end."""
    for number in itertools.count():
        told = b""
        with suppress(ConnectionError):
            told = filler.recv(LENGTH_BYTES, socket.MSG_WAITALL)
        if len(told) < LENGTH_BYTES:
            raise Unfinished
        length = int.from_bytes(told)
        if not length:
            return
        begin = number % NUM_SLOTS * SLOT_BYTES
        end = begin + length
        for at in range(begin, end, BLOCK_BYTES):
            yield memory[at : min(at + BLOCK_BYTES, end)]
        with suppress(ConnectionError):  # it may be at its end, and gone
            filler.sendall(b"\0")


def main() -> None:
    try:
        with ExitStack() as stack:
            memory = mmap(int(sys.argv[1]), NUM_SLOTS * SLOT_BYTES)
            reader = stack.enter_context(socket.socket(fileno=sys.stdout.fileno()))
            fill(memory, reader, unzipped(sys.stdin.buffer, stack))
    except ConnectionError:  # nobody reads any more, nor what closing would say of it
        os._exit(1)
    except DAMAGED as error:
        sys.stderr.write(str(error))
        sys.exit(IS_DAMAGED)


if __name__ == "__main__":
    main()
