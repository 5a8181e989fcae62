"""Counts by reason, with the first few places: a failed row is counted, never lost silently."""

from collections import Counter
from dataclasses import dataclass, field

MAX_EXAMPLES = 5


@dataclass
class Tally:
    """`add("no metadata", "labels/00-positives.jsonl:12")`; `report()` is small, sorted JSON."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str | None = None, count: int = 1) -> None:
        self.counts[reason] += count
        if where is not None:
            examples = self.examples.setdefault(reason, [])
            if len(examples) < MAX_EXAMPLES:
                examples.append(where)

    def report(self) -> dict[str, dict[str, object]]:
        return {
            reason: {"count": count, "examples": self.examples.get(reason, [])}
            for reason, count in sorted(self.counts.items())
        }
