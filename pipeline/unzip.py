"""A file on stdin to stdout, unzipped as often as it was zipped: what `pipeline.lines` runs beside itself."""

import os
import sys
import zlib
from contextlib import ExitStack
from typing import Any

from isal import igzip, isal_zlib

BLOCK_BYTES = 1 << 18  # so that what one process unzips is still in the cache when another looks at it
GZIP_MAGIC = b"\x1f\x8b"
IS_DAMAGED = 65  # the exit status for bad input, as in sysexits.h
DAMAGED: Any = (EOFError, zlib.error, isal_zlib.error, igzip.BadGzipFile)


def unzipped(file: Any, stack: ExitStack) -> Any:
    """The buffered reader `file`, or one of its content; what is opened is closed by `stack`."""
    while file.peek(2)[:2] == GZIP_MAGIC:
        file = stack.enter_context(igzip.IGzipFile(fileobj=file, mode="rb"))
    return file


def main() -> None:
    try:
        with ExitStack() as stack:
            file = unzipped(sys.stdin.buffer, stack)
            while block := file.read(BLOCK_BYTES):
                sys.stdout.buffer.write(block)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # nobody reads any more, nor what closing would say of it
        os._exit(1)
    except DAMAGED as error:
        sys.stderr.write(str(error))
        sys.exit(IS_DAMAGED)


if __name__ == "__main__":
    main()
