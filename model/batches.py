"""Which questions a training step learns from, and what of them is computed at once.

A row is what a batch counts: a question, or all those of a product where they are asked together.
"""

import random
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from model.examples import Question

POOL = 8  # batches that are sorted by length together


def rows(asked: Sequence[Question], *, joint: bool) -> list[list[Question]]:
    """What is one row of a training batch: a question, or with `joint` all those of a product."""
    if not joint:
        return [[question] for question in asked]
    return [list(of_one) for _, of_one in groupby(asked, key=lambda question: id(question.product))]


def characters(question: Question) -> int:
    """How long its product's texts are."""
    product = question.product
    return sum(len(text) for text, _ in product.paragraphs) + sum(len(line.text) for line in product.ocr)


def order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """The rows of an epoch in order, batches of similar length, as a function of lengths, seed and epoch.

    Rows are shuffled, sorted by length within runs of `POOL` batches, and their batches shuffled; a smaller
    last batch stays the last.
    """
    chance = random.Random(f"{seed} {epoch}")
    rows = list(range(len(lengths)))
    chance.shuffle(rows)
    batches: list[list[int]] = []
    for begin in range(0, len(rows), POOL * batch_size):
        pool = sorted(rows[begin : begin + POOL * batch_size], key=lengths.__getitem__)
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    rest = [batches.pop()] if len(batches[-1]) < batch_size else []
    chance.shuffle(batches)
    return [row for batch in batches + rest for row in batch]


def num_tokens(row: Sequence[Any]) -> int:
    """Local-tokens of an encoded row: of one text and of all that is asked about it."""
    return row[0].num_tokens + sum(example.num_asking for example in row[1:])


def parts(rows: Sequence[Sequence[Any]], tokens: float) -> list[list[Any]]:
    """The encoded rows of a batch in their order, in runs of at most `tokens` tokens, each run as if padded.

    A longer row is a part of its own.
    """
    found: list[list[Any]] = []
    longest = 0
    for row in rows:
        size = num_tokens(row)
        longest = max(longest, size)
        if found and (len(found[-1]) + 1) * longest <= tokens:
            found[-1].append(row)
        else:
            found.append([row])
            longest = size
    return found
