"""The usable pictures among a stage's input rows, some at a time, so that memory stays bounded."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from features.memory import give_back
from pipeline import pictures
from pipeline.reading import Rows

if TYPE_CHECKING:
    import numpy as np

TOGETHER, TOGETHER_PIXELS = 16, 24_000_000  # rows, and pixels of their pictures; one picture may have more


@dataclass(frozen=True, slots=True)
class Decoded:
    asin: str
    status: str  # `ok`, `undecodable`, or why there is no image
    rgb: "np.ndarray | None" = None  # (height, width, 3) uint8, upright
    grey: "np.ndarray | None" = None  # (height, width) uint8


def groups(rows: Rows, *, grey: bool = False) -> Iterator[list[Decoded]]:
    """The rows in order; which stand together depends on nothing but them."""
    group: list[Decoded] = []
    pixels = 0
    for row in rows:
        decoded = _decoded(row, grey)
        size = 0 if decoded.rgb is None else decoded.rgb.size // 3
        if group and (len(group) == TOGETHER or pixels + size > TOGETHER_PIXELS):
            yield group
            give_back()
            group, pixels = [], 0
        group.append(decoded)
        pixels += size
    if group:
        yield group
        give_back()


def _decoded(row: dict, grey: bool) -> Decoded:
    import numpy as np

    if row["status"] != "ok":
        return Decoded(row["asin"], row["status"])
    try:
        rgb = np.asarray(pictures.decode(row["image"]))
        return Decoded(row["asin"], "ok", rgb, pictures.decode_grey(row["image"]) if grey else None)
    except Exception:  # noqa: BLE001 - a decoder may raise anything; the status counts it
        return Decoded(row["asin"], "undecodable")


def batches(shapes: list[tuple[int, int]], max_pixels: int) -> list[list[int]]:
    """Indices of equal shapes (height, width) together, in order, at most `max_pixels` at a time."""
    of_shape: dict[tuple[int, int], list[int]] = {}
    for index, shape in enumerate(shapes):
        of_shape.setdefault(shape, []).append(index)
    made = []
    for shape, members in of_shape.items():
        most = max(1, max_pixels // (shape[0] * shape[1]))
        made += [members[at : at + most] for at in range(0, len(members), most)]
    return made
