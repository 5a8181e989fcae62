import pytest
import torch
import transformers
from test_model_baselines import MINILM, eight, train

from model.baselines.aveqa import Model, Settings, best_end, distilled


def test_distillation_is_the_cross_entropy_of_softened_distributions():
    teacher, student = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    torch.testing.assert_close(distilled(student, teacher, 2.0), torch.tensor(2.0).log())
    e = torch.tensor(1.0).exp()
    p = e / (e + 1)  # of the teacher at temperature 2
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(distilled(teacher, teacher, 2.0), entropy)


def test_a_value_ends_in_its_own_paragraph_and_not_before_it_begins():
    end = torch.tensor([9.0, 1.0, 2.0, 0.0, 8.0])
    assert best_end(end, torch.tensor([0, 0, 0, -1, 1]), 1) == 2


@pytest.fixture
def model():
    return train("aveqa", eight(), 0)[1]


def test_the_end_is_a_softmax_from_the_start_on(model):
    states = torch.randn(1, 4, 48)
    mask = torch.tensor([[False, True, True, True]])
    scores = model.end_scores(states, torch.tensor([2]), mask)
    logits = [model.end_head(torch.cat([states[0, 2], states[0, i]])) for i in (2, 3)]
    torch.testing.assert_close(scores[0, 2:], torch.cat(logits).log_softmax(0))
    assert (scores[0, :2] < -1e30).all()


def test_the_loss_is_the_span_s_plus_half_of_the_answer_s(model):
    _, model, processor = train("aveqa", eight(), 0)
    model.eval()
    losses = model(**processor.collate([processor.encode(question) for question in eight()]))
    torch.testing.assert_close(losses["loss"], losses["span_loss"] + losses["answer_loss"])
    batch = processor.collate([processor.encode(question) for question in eight()])
    states = model.states(batch["input_ids"], batch)
    right = torch.tensor([1, 0] * 4)
    answer = torch.nn.functional.cross_entropy(model.answer_head(states[:, 0]), right)
    torch.testing.assert_close(losses["answer_loss"], answer / 2)


def test_where_the_answer_head_says_no_there_is_no_value(model):
    _, model, processor = train("aveqa", eight(), 60)
    examples = [processor.encode(question) for question in eight()[:1]]
    assert model.extract(examples, processor)[0]
    model.answer_head.bias.data = torch.tensor([99.0, 0.0])
    assert model.extract(examples, processor) == [()]


def test_the_teacher_is_frozen_and_the_masked_words_teach_the_student():
    transformers.set_seed(0)
    model, processor = Model.start(Settings(**MINILM, dropout=0.0, masked=0.5), eight(), 8)
    model.train()
    batch = processor.collate([processor.encode(question) for question in eight()])
    losses = model(**batch)
    parts = losses["span_loss"] + losses["answer_loss"] + losses["distillation_loss"] / 2
    torch.testing.assert_close(losses["loss"].detach(), parts)
    model.distillation_loss(batch).backward()
    assert model.bert.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0
    (teacher,) = model._teacher
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training
    assert not any("teacher" in name for name in model.state_dict())
