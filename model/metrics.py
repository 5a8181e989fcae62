"""Scores of exact match: pure functions over answers.

Two numbers stand side by side (docs: Evaluation). The set-based micro score compares the
distinct normalised values of each question, so a missed second value costs recall. MAVE's
five-way score looks at the first value only, so one right value is enough.

Every quotient with a zero denominator is 0; `count`, the number of gold values behind a
score, tells such a score from a bad one.
"""

import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Ideographs and kana: written without spaces, so each is a word of its own.
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_WORD = re.compile(rf"{_UNSPACED.pattern}|(?:(?!{_UNSPACED.pattern})\S)+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """SQuAD's answer normalisation after NFKC: lower case, no ASCII punctuation, no articles, single spaces.

    For Chinese the rules on articles, case and ASCII punctuation change nothing; NFKC folds
    full-width forms. "" means that nothing is left: such a prediction counts as no value.
    """
    text = unicodedata.normalize("NFKC", text).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def words(text: str) -> list[tuple[str, int, int]]:
    """The normalised words of `text`, each with its `[begin, end)` in characters of the raw text."""
    spans = ((normalise(match.group()), match.start(), match.end()) for match in _WORD.finditer(text))
    return [(word, begin, end) for word, begin, end in spans if word]


def standing(text: str, value: str) -> Iterator[tuple[int, int]]:
    """Where the words of `value` stand in `text` one after the other, in characters; never inside a word."""
    sought, found = [word for word, _, _ in words(value)], words(text)
    there, size = [word for word, _, _ in found], len(sought)
    for at in range(len(there) - size + 1) if size else ():
        if there[at : at + size] == sought:
            yield found[at][1], found[at + size - 1][2]


def contains(text: str, value: str) -> bool:
    """Whether the words of `value` stand in `text`."""
    return any(True for _ in standing(text, value))


@dataclass(frozen=True, slots=True)
class Answer:
    """One question with what is right and what was said; build it with `answer`."""

    item: str
    attribute: str
    predicted: tuple[str, ...]  # normalised, distinct, best first
    gold: tuple[str, ...]  # normalised, distinct
    origins: tuple[str, ...]  # parallel to gold
    in_ocr: tuple[bool, ...]  # parallel to gold


def answer(
    item: str,
    attribute: str,
    predicted: Iterable[str],
    gold: Iterable[str],
    origins: Iterable[str],
    in_ocr: Iterable[bool],
) -> Answer:
    """Normalise both sides; of equal values the first stays, values that normalise to nothing go."""
    distinct: dict[str, tuple[str, bool]] = {}
    for value, origin, read in zip(gold, origins, in_ocr, strict=True):
        distinct.setdefault(normalise(value), (origin, read))
    distinct.pop("", None)
    said = dict.fromkeys(normalise(value) for value in predicted)
    said.pop("", None)
    return Answer(
        item,
        attribute,
        tuple(said),
        tuple(distinct),
        tuple(origin for origin, _ in distinct.values()),
        tuple(read for _, read in distinct.values()),
    )


Score = dict[str, float]


def _score(right: int, predicted: int, gold: int) -> Score:
    """`predicted` and `gold` are the denominators of precision and recall."""
    precision = right / predicted if predicted else 0.0
    recall = right / gold if gold else 0.0
    total = precision + recall
    f1 = 2 * precision * recall / total if total else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def micro(answers: Iterable[Answer]) -> Score:
    """The primary score: a true positive is a pair (question, distinct value) that is both said and gold."""
    right = predicted = gold = 0
    for one in answers:
        right += len(set(one.predicted) & set(one.gold))
        predicted += len(one.predicted)
        gold += len(one.gold)
    return _score(right, predicted, gold) | {"count": gold}


def positives_only(answers: Iterable[Answer]) -> Score:
    """`micro` over the questions that have a value: predictions on negatives cost nothing here."""
    return micro(one for one in answers if one.gold)


def five_way(answers: Iterable[Answer]) -> Score:
    """MAVE's outcomes for the first predicted value, gold's letter first: N none, A right, B wrong.

    `P = AA/(AA+AB+NA)`, `R = AA/(AA+AB+AN)`; NN enters neither.
    """
    outcomes = dict.fromkeys(("NN", "NA", "AN", "AA", "AB"), 0)
    for one in answers:
        if not one.gold:
            outcomes["NA" if one.predicted else "NN"] += 1
        elif not one.predicted:
            outcomes["AN"] += 1
        else:
            outcomes["AA" if one.predicted[0] in one.gold else "AB"] += 1
    right, wrong = outcomes["AA"], outcomes["AB"]
    score = _score(right, right + wrong + outcomes["NA"], right + wrong + outcomes["AN"])
    return outcomes | score | {"count": right + wrong + outcomes["AN"]}


Chunk = tuple[int, int, int]  # paragraph, begin, end


def chunks(pairs: Iterable[tuple[set[Chunk], set[Chunk], int]]) -> Score:
    """JAVE's chunk score: a value is right where it begins and ends as labelled, in the labelled paragraph.

    Each pair is one question's predicted chunks, its gold chunks, and how many values were predicted that
    stand nowhere in the text: these are wrong chunks, so that nobody gains by not saying where.
    """
    right = predicted = gold = 0
    for said, wanted, nowhere in pairs:
        right += len(said & wanted)
        predicted += len(said) + nowhere
        gold += len(wanted)
    return _score(right, predicted, gold) | {"count": gold}


def by_attribute(answers: Iterable[Answer]) -> dict[str, Score]:
    groups: defaultdict[str, list[Answer]] = defaultdict(list)
    for one in answers:
        groups[one.attribute].append(one)
    return {attribute: micro(groups[attribute]) for attribute in sorted(groups)}


def _by_value(answers: Iterable[Answer], kinds_of: Callable[[Answer], Sequence[str]]) -> dict[str, Score]:
    """Micro scores per kind of gold value, where `kinds_of` gives each gold value's kind.

    A kind's questions are those with at least one gold value of that kind. Its true positives and
    misses are its own gold values there. Its false positives are the predictions there that match
    no gold value at all: one that matches a gold value of another kind is neither right nor wrong
    here, and a wrong one in a question of two kinds counts under both. Predictions on negatives
    have no kind; they count in `micro` alone.
    """
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for one in answers:
        kinds = kinds_of(one)
        wrong = len(set(one.predicted) - set(one.gold))
        for kind in set(kinds):
            own = {value for value, its in zip(one.gold, kinds, strict=True) if its == kind}
            right = len(own & set(one.predicted))
            for position, number in enumerate((right, right + wrong, len(own))):
                counts[kind][position] += number
    return {kind: _score(*counts[kind]) | {"count": counts[kind][2]} for kind in sorted(counts)}


def by_origin(answers: Iterable[Answer]) -> dict[str, Score]:
    """Per origin of the gold value (`_by_value` says how precision is counted)."""
    return _by_value(answers, lambda one: one.origins)


def by_in_ocr(answers: Iterable[Answer]) -> dict[str, Score]:
    """`read` and `not_read`: whether our OCR found the gold value on the picture."""
    return _by_value(answers, lambda one: ["read" if read else "not_read" for read in one.in_ocr])


def all_scores(answers: Sequence[Answer]) -> dict:
    """Everything that stands in a metrics file for one system, but `made_with`."""
    return {
        **micro(answers),
        "five_way": five_way(answers),
        "positives_only": positives_only(answers),
        "by_origin": by_origin(answers),
        "by_attribute": by_attribute(answers),
        "in_ocr": by_in_ocr(answers),
    }


def paired_bootstrap(
    first: Sequence[Answer], second: Sequence[Answer], *, samples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Difference of two systems' micro F1 on the same questions, `first - second`.

    Products are drawn, not questions, because the questions of one product are not independent.
    Returns `difference`, its 95 % interval `low` and `high`, and the two-sided `p` of no difference.
    """
    if [(one.item, one.attribute, one.gold) for one in first] != [
        (one.item, one.attribute, one.gold) for one in second
    ]:
        raise ValueError("paired bootstrap needs the same questions in the same order from both systems")
    items = {item: row for row, item in enumerate(dict.fromkeys(one.item for one in first))}
    counts = np.zeros((2, len(items), 3))  # right, predicted, gold
    for system, answers in enumerate((first, second)):
        for one in answers:
            right = len(set(one.predicted) & set(one.gold))
            counts[system, items[one.item]] += (right, len(one.predicted), len(one.gold))

    def difference(weights: np.ndarray) -> np.ndarray:  # (samples, items) -> (samples,)
        right, predicted, gold = np.moveaxis(weights @ counts, -1, 0)  # each (2, samples)
        f1 = 2 * right / np.maximum(predicted + gold, 1)
        return f1[0] - f1[1]

    drawn = np.random.default_rng(seed).multinomial(len(items), [1 / len(items)] * len(items), size=samples)
    differences = difference(drawn)
    low, high = np.quantile(differences, [0.025, 0.975])
    tail = min((differences <= 0).mean(), (differences >= 0).mean())
    return {
        "difference": float(difference(np.ones((1, len(items))))[0]),
        "low": float(low),
        "high": float(high),
        "p": float(min(1.0, 2 * tail)),
    }
