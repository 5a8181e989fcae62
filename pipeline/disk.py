"""Files that are whole or not there: temporary name, fsync, rename, and their sha256."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

RESERVE_BYTES = 256 << 20


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomically(path: Path, *, mode: int = 0o644, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`: complete and on disk under the final name after the block, or gone.

    What is not `durable` may be damaged or lost by a failure of power, and is for who checks what he reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def start_sync(file: BinaryIO) -> None:
    """Let what was written to `file` leave for the disk, and wait for nothing: a later fsync is short.

    What is there already leaves the system's cache.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # not every file takes advice
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise `ValueError` where the file system of `folder` cannot take `num_bytes` more and stay usable."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free - RESERVE_BYTES:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free, {num_bytes / 1e9:.1f} GB more are needed "
            f"and {RESERVE_BYTES / 1e9:.1f} GB stay free"
        )


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(value: Any, path: Path, *, durable: bool = True) -> None:
    with atomically(path, durable=durable) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def is_intact(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the file is the one of which `record` tells `bytes` and `sha256`."""
    return path.stat().st_size == record["bytes"] and sha256_of(path) == record["sha256"]
