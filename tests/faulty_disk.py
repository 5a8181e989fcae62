"""A disk on which the k-th operation that writes fails, and every one after it."""

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

REASONS = (errno.ENOSPC, errno.EIO)


class Disk:
    def __init__(self, k: int, reason: int) -> None:
        self.k, self.reason, self.count = k, reason, 0

    def operate(self) -> None:
        self.count += 1
        if self.count >= self.k:
            raise OSError(self.reason, os.strerror(self.reason))


class _File:
    """Delegates to a file opened for writing; a write that fails leaves half of its bytes."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> Any:
        try:
            self._disk.operate()
        except OSError:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextlib.contextmanager
def failing(k: int, reason: int) -> Iterator[Disk]:
    """From the k-th write, fsync, rename or link of this process on, all fail with `reason`."""
    disk = Disk(k, reason)
    opened, written = io.open, pq.write_table

    def open_(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        made = opened(file, mode, *rest, **more)
        return _File(made, disk) if set(mode) & set("wax+") else made

    def write_table(table: Any, where: Any, **options: Any) -> None:
        try:
            disk.operate()
        except OSError:
            Path(where).write_bytes(b"PAR1")
            raise
        written(table, where, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", open_)
        patch.setattr(io, "open", open_)
        patch.setattr(pq, "write_table", write_table)
        for name in ("fsync", "replace", "link"):
            patch.setattr(os, name, _counted(getattr(os, name), disk))
        yield disk


def _counted(real: Any, disk: Disk) -> Any:
    def call(*arguments: Any, **more: Any) -> Any:
        disk.operate()
        return real(*arguments, **more)

    return call
