"""Progress with rate and time left: a moving bar at a terminal, else a line now and then."""

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


class _Lines:
    """tqdm's states as lines of their own."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def of_bytes(path: Path | str, total: int | None, *, done: int = 0) -> Any:
    """A tqdm bar that counts bytes; `total` None where nobody knows it. Short work shows no line."""
    watched = sys.stderr.isatty()
    return tqdm(
        desc=Path(path).name,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        file=sys.stderr if watched else _Lines(),
        mininterval=0.5 if watched else 10,
        delay=0.0 if watched else 10,
        leave=watched,
        dynamic_ncols=watched,
    )
