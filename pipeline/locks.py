"""One writer at a time of a stage's output; who comes second is told who is at it."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCKS = Path(".cache/locks")
LOCK_WAIT_S = 10.0  # an orphan of a killed run needs a moment to stop


@contextlib.contextmanager
def sole_writer(stage: str, corpus: str) -> Iterator[None]:
    """Hold the lock of one stage of one corpus; `ValueError` names the process that holds it already.

    The kernel drops the lock with its process, so a killed run never blocks the next one.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    path = LOCKS / f"{corpus}.{stage}.lock"
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        raise ValueError(f"{stage} of {corpus} is being written by {holder(path)}") from None
    written = path.with_suffix(".holder")
    try:
        written.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        written.unlink(missing_ok=True)
        lock.release()


def holder(lock: Path) -> str:
    """The process that holds the lock at this path."""
    written = lock.with_suffix(".holder")
    return written.read_text().strip() if written.is_file() else "another process"
