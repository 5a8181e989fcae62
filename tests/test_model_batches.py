"""Batches: their order, and what of them is computed at once."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_model_trainer import TINY, asked

from model import batches, smartave
from model.cell import Training
from model.examples import Question


def test_batches_are_a_function_of_seed_and_epoch_and_of_similar_length():
    lengths = [i * 37 % 101 for i in range(70)]
    order = batches.order(lengths, 8, 0, 0)
    assert sorted(order) == list(range(70))
    assert order == batches.order(lengths, 8, 0, 0)
    assert len({tuple(batches.order(lengths, 8, *other)) for other in ((0, 0), (0, 1), (1, 0))}) == 3
    spreads = [
        max(lengths[i] for i in order[k : k + 8]) - min(lengths[i] for i in order[k : k + 8])
        for k in range(0, 64, 8)
    ]
    assert sum(spreads) / len(spreads) < 20  # of 100


def test_rows_are_questions_or_with_joint_products():
    first, second = (question.product for question in asked(2))
    questions = [Question(first, "Color"), Question(first, "Size"), Question(second, "Color")]
    assert [len(row) for row in batches.rows(questions, joint=False)] == [1, 1, 1]
    assert [len(row) for row in batches.rows(questions, joint=True)] == [2, 1]


@dataclass
class Sized:
    num_asking: int
    of_product: int

    @property
    def num_tokens(self):
        return self.num_asking + self.of_product


A_ROW = st.lists(st.builds(Sized, st.integers(1, 9), st.just(7)), min_size=1, max_size=3)


@given(st.lists(A_ROW, min_size=1), st.integers(1, 200))
def test_parts_are_as_long_as_may_be_and_no_row_is_lost_or_moved(rows, tokens):
    found = batches.parts(rows, tokens)
    assert [row for part in found for row in part] == rows

    def padded(part):
        return len(part) * max(map(batches.num_tokens, part))

    assert all(padded(part) <= tokens or len(part) == 1 for part in found)
    assert all(padded([*part, following[0]]) > tokens for part, following in pairwise(found))


@pytest.mark.parametrize("joint", [False, True])
def test_the_tokens_of_a_row_are_those_that_are_computed(joint):
    settings = smartave.Settings.model_validate(TINY | {"joint": joint})
    _, processor = smartave.Model.start(settings, asked(3), 1)
    names = ("Color", "Size", "Scent") if joint else ("Color",)
    product = asked(1)[0].product
    row = [processor.encode(Question(product, name)) for name in names]
    assert batches.num_tokens(row) == (processor.collate(row)["segment"] >= 0).sum()


def test_the_paper_s_batch_is_computed_at_once():
    row = [Sized(num_asking=3, of_product=1021)]
    assert len(batches.parts([row] * 32, Training().max_tokens)) == 1
