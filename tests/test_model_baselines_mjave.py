from dataclasses import replace

import torch
from test_model_baselines import eight, train

from model.baselines.mjave import agreement, tag_of
from model.examples import Question


def test_the_global_gate_weighs_token_against_picture():
    _, model, _ = train("mjave", eight(), 0)
    model.global_gate_text.weight.data = torch.eye(48)[:1]  # w1 x is the token's first number
    model.global_gate_text.bias.data.fill_(0.5)
    model.global_gate_image.weight.data = torch.full((1, 8), 0.25)
    x, whole = torch.zeros(1, 2, 48), torch.ones(1, 8)
    x[0, 1, 0] = -2.5
    wanted = torch.tensor([2.5, 0.0]).sigmoid()  # 0.5 + 8/4, and 2.5 less
    torch.testing.assert_close(model.global_gate(x, whole)[0, :, 0], wanted)


def test_the_regional_gate_weighs_regions_by_the_predicted_attributes():
    _, model, _ = train("mjave", eight(), 0)
    model.regional_gate_attributes.weight.data = torch.tensor([[2.0, -1.0]])
    model.regional_gate_attributes.bias.data.fill_(0.0)
    model.regional_gate_image.weight.data = torch.eye(8)[:1]
    regions = torch.zeros(1, 2, 8)
    regions[0, 1, 0] = 3.0
    gates = model.regional_gate(torch.tensor([[0.5, 1.0]]), regions)
    torch.testing.assert_close(gates, torch.tensor([[0.0, 3.0]]).sigmoid())


def test_attributes_and_tags_agree_by_kl():
    tags = torch.tensor([[[0.2, 0.5, 0.1, 0.1, 0.1], [0.0, 0.1, 0.7, 0.2, 0.0], [0.0, 0.9, 0.0, 0.0, 0.1]]])
    text = torch.tensor([[True, True, False]])  # the last token is none
    p = torch.tensor([[0.3, 0.9]])
    q = torch.tensor([(0.5 + 0.7) / 2, (0.2 + 0.1) / 2])
    first = p[0] * (p[0] / q).log()
    both = agreement(p, tags, text, torch.tensor([[True, True]]))
    torch.testing.assert_close(both, first.sum())
    torch.testing.assert_close(agreement(p, tags, text, torch.tensor([[False, True]])), first[1])


def test_the_questions_about_a_product_are_one_row():
    asked = eight()
    _, _, processor = train("mjave", asked, 0)
    assert processor.joint
    batch = processor.collate([processor.encode(question) for question in asked[:4]])
    assert batch["asked"].tolist() == [[True, True], [True, True]]
    assert batch["present"].tolist() == [[True, False], [True, False]]  # the scent is in no text
    first, second = tag_of(0, 1), tag_of(0, 2)
    assert batch["targets"][0, :9].tolist() == [-100, 0, 0, 0, 0, first, second, second, 0]
    alone = processor.collate([processor.encode(asked[1])])
    assert alone["asked"].tolist() == [[False, True]]
    assert first not in alone["targets"]


def test_tags_of_attributes_that_were_not_asked_are_left_out():
    asked = eight()
    _, model, processor = train("mjave", asked, 0)
    batch = processor.collate([processor.encode(Question(asked[1].product, "Scent"))])
    names = ("input_ids", "attention_mask", "asked", "regions", "region_mask")
    _, tags = model.scores(**{name: batch[name] for name in names})
    assert (tags[..., 1:3] < -1e30).all()
    assert (tags[..., [0, 3, 4]] > -1e30).all()


def test_an_answer_does_not_depend_on_what_else_is_asked_of_the_product():
    asked = eight()
    soap = [
        Question(replace(q.product, category="Soaps"), "Smell", q.values, q.origins, q.evidences)
        for q in asked[::2]
    ]
    _, model, processor = train("mjave", asked + soap, 150)  # what is a color of mugs is a smell of soaps
    mug = asked[0].product
    alone = model.extract([processor.encode(Question(mug, "Color"))], processor)
    names = ("Color", "Smell", "Scent")
    together = model.extract([processor.encode(Question(mug, name)) for name in names], processor)
    assert [one.value for one in alone[0]] == ["red"]
    assert together[0] == alone[0]
    of_smell = model.extract([processor.encode(Question(mug, "Smell"))], processor)
    assert together[1] == of_smell[0]


def test_without_a_picture_the_text_stands_alone():
    asked = eight()
    _, model, processor = train("mjave", asked, 0, image=False)
    batch = processor.collate([processor.encode(question) for question in asked])
    assert not batch["region_mask"].any()
    loss = model(**batch)["loss"]
    batch["regions"] += 1
    torch.testing.assert_close(model(**batch)["loss"], loss)
