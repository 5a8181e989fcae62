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


def bar(name: str, total: int | None, *, seconds: float, **how: Any) -> Any:
    """A tqdm bar; where nobody looks, a line every so many `seconds`. `total` None where nobody knows it."""
    watched = sys.stderr.isatty()
    return tqdm(
        desc=name,
        total=total,
        file=sys.stderr if watched else _Lines(),
        mininterval=0.5 if watched else seconds,
        dynamic_ncols=watched,
        **how,
    )


def of_bytes(path: Path | str, total: int | None, *, done: int = 0) -> Any:
    """A bar that counts bytes. Short work shows no line."""
    watched = sys.stderr.isatty()
    shown = {"delay": 0.0 if watched else 10.0, "leave": watched}
    return bar(Path(path).name, total, seconds=10, initial=done, unit="B", unit_scale=True, **shown)
