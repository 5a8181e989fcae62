"""The no-learning floor: what a look-up of known values reaches, to stand beside every score.

A value of the attribute known from training that is seen in the product's text or OCR lines
is the answer: the longest one (in characters after normalisation), of equally long ones the
most frequent in training, of equally frequent ones the first in the alphabet. Where none is
seen, the answer is the attribute's most frequent training value, or nothing if more than half
of the attribute's training questions have no value. Attributes unknown in training get nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator

from model.examples import Extraction, Product, Question, Source
from model.metrics import words

Words = tuple[str, ...]  # a normalised value, word by word


class Floor:
    """`observe` every training question, then `predict`."""

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()
        self._empty: Counter[str] = Counter()
        self._values: defaultdict[str, Counter[Words]] = defaultdict(Counter)
        self._spelling: dict[tuple[str, Words], str] = {}
        self._starting: defaultdict[tuple[str, str], set[Words]] = defaultdict(set)  # attribute, first word

    def observe(self, question: Question) -> None:
        attribute = question.attribute
        known = {tuple(word for word, _, _ in words(value)): value for value in question.values}
        known.pop((), None)
        self._asked[attribute] += 1
        self._empty[attribute] += not known
        for value, spelling in known.items():
            self._values[attribute][value] += 1
            self._spelling.setdefault((attribute, value), spelling)
            self._starting[attribute, value[0]].add(value)

    def predict(self, question: Question) -> tuple[Extraction, ...]:
        """At most one value, scored by the share of the attribute's training questions that have it."""
        attribute = question.attribute
        values = self._values.get(attribute)
        if not values:
            return ()
        seen = min(
            self._seen(question.product, attribute),
            key=lambda found: (-len(" ".join(found[0])), -values[found[0]], found[0]),
            default=None,
        )
        if seen is None:
            if 2 * self._empty[attribute] > self._asked[attribute]:
                return ()
            seen = min(values, key=lambda value: (-values[value], value)), Source("vocabulary")
        value, source = seen
        share = values[value] / self._asked[attribute]
        return (Extraction(self._spelling[attribute, value], share, source),)

    def _seen(self, product: Product, attribute: str) -> Iterator[tuple[Words, Source]]:
        """Known values with where they stand: paragraphs in order, then OCR lines in order."""
        places = [("text", index, text) for index, (text, _) in enumerate(product.paragraphs)]
        places += [("ocr", index, line.text) for index, line in enumerate(product.ocr)]
        for kind, index, text in places:
            spans = words(text)
            there = tuple(word for word, _, _ in spans)
            for at, word in enumerate(there):
                for value in sorted(self._starting.get((attribute, word), ())):
                    end = at + len(value)
                    if there[at:end] == value:
                        yield value, Source(kind, index, spans[at][1], spans[end - 1][2])
