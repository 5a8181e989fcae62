"""Lines of text in a picture: their order, and how far two readings of one picture agree."""

import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SAME_PLACE_IOU = 0.5  # of the upright boxes around two quads


@dataclass(frozen=True, slots=True)
class Line:
    text: str
    confidence: float
    quad: tuple[float, ...]  # x, y of four corners, from the text's top left on

    @property
    def left(self) -> float:
        return min(self.quad[::2])

    @property
    def top(self) -> float:
        return min(self.quad[1::2])

    @property
    def right(self) -> float:
        return max(self.quad[::2])

    @property
    def bottom(self) -> float:
        return max(self.quad[1::2])


def lines_in_order(
    found: Iterable[tuple[Sequence[Sequence[float]], str, float]],
    *,
    height: int,
    width: int,
    min_confidence: float = 0.0,
) -> list[Line]:
    """(corners, text, confidence) as an engine gives them: NFC, inside the picture, not blank, in order."""
    lines = []
    for corners, text, confidence in found:
        text = unicodedata.normalize("NFC", text).strip()
        if text and confidence >= min_confidence:
            inside = [(min(max(float(x), 0), width), min(max(float(y), 0), height)) for x, y in corners]
            lines.append(Line(text, float(confidence), tuple(value for corner in inside for value in corner)))
    return reading_order(lines)


def reading_order(lines: Sequence[Line]) -> list[Line]:
    """Row by row, each from the left: a line joins a row when its middle lies in the row's first line."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: (line.top, line.left, line.text)):
        middle = statistics.mean((line.top, line.bottom))
        row = next((row for row in rows if row[0].top <= middle < row[0].bottom), None)
        if row is None:
            rows.append([line])
        else:
            row.append(line)
    rows.sort(key=lambda row: row[0].top)
    return [line for row in rows for line in sorted(row, key=lambda line: (line.left, line.top, line.text))]


def agreement(wanted: Sequence[Line], found: Sequence[Line]) -> Counter[str]:
    """How much of `wanted` was `found`: lines by their place, characters of these by edit distance.

    Counts `lines` wanted, `lines_found`, `characters` of the lines found, and `characters_right` of them.
    Each line found stands for one line wanted, the best overlapping first.
    """
    pairs = sorted(
        ((iou(one, other), i, k) for i, one in enumerate(wanted) for k, other in enumerate(found)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    counts = Counter(pictures=1, lines=len(wanted), lines_found=0, characters=0, characters_right=0)
    taken: set[int] = set()
    met: set[int] = set()
    for overlap, i, k in pairs:
        if overlap < SAME_PLACE_IOU:
            break
        if i in met or k in taken:
            continue
        met.add(i)
        taken.add(k)
        length = len(wanted[i].text)
        counts["lines_found"] += 1
        counts["characters"] += length
        counts["characters_right"] += max(0, length - edits(wanted[i].text, found[k].text))
    return counts


def shares(counts: Counter[str]) -> dict[str, float]:
    """`agreement`'s counts with the two shares that they are for, each where there is something to share;
    empty where nothing was compared."""
    if not counts["pictures"]:
        return {}
    told: dict[str, float] = {name: counts[name] for name in sorted(counts)}
    if counts["lines"]:
        told["share_of_lines_found"] = round(counts["lines_found"] / counts["lines"], 6)
    if counts["characters"]:
        told["share_of_characters_right"] = round(counts["characters_right"] / counts["characters"], 6)
    return told


def iou(one: Line, other: Line) -> float:
    across = min(one.right, other.right) - max(one.left, other.left)
    down = min(one.bottom, other.bottom) - max(one.top, other.top)
    shared = max(0.0, across) * max(0.0, down)
    areas = [(line.right - line.left) * (line.bottom - line.top) for line in (one, other)]
    return shared / (sum(areas) - shared) if shared else 0.0


def edits(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements that turn one into the other."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for k, another in enumerate(other, start=1):
            diagonal, row[k] = row[k], min(row[k] + 1, row[k - 1] + 1, diagonal + (letter != another))
    return row[-1]
