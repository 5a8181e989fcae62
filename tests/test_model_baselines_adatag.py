import torch
from test_model_baselines import MINILM, eight, train

from model.baselines.adatag import mixture
from model.examples import Evidence, Product, Question


def test_transitions_are_a_mixture_of_experts():
    experts = torch.stack([torch.eye(3), torch.ones(3, 3)])
    gates = torch.tensor([[0.0, 0.0], [torch.tensor(3.0).log(), 0.0]])
    mixed = mixture(gates, experts)
    torch.testing.assert_close(mixed[0], torch.eye(3) / 2 + 0.5)
    torch.testing.assert_close(mixed[1], torch.eye(3) * 0.75 + 0.25)


def test_emissions_are_generated_by_the_attribute():
    _, model, processor = train("adatag", eight(), 0)
    batch = processor.collate([processor.encode(question) for question in eight()[:2]])
    del batch["targets"]
    assert len(batch["input_ids"]) == 1  # one product, read once for two questions
    emissions, transitions, mask = model.scores(**batch)
    states, _ = model.lstm(model.word(batch["input_ids"]))
    for row, number in enumerate(batch["attribute"].tolist()):
        r = model.attribute.weight[number]
        weight = (model.weight.weight @ r + model.weight.bias).view(4, -1)
        bias = model.bias.weight @ r + model.bias.bias
        torch.testing.assert_close(emissions[row], states[0] @ weight.T + bias, rtol=1e-4, atol=1e-4)
    assert transitions.shape == (2, 6, 6)
    assert not torch.equal(transitions[0], transitions[1])
    assert mask.all()


def test_an_attribute_s_vector_comes_from_its_mentions_in_training():
    _, model, processor = train("adatag", eight(), 0, **MINILM)
    assert processor.attributes == ["Color", "Scent"]
    color, scent = model.attribute.weight.data[1].view(4, 384), model.attribute.weight.data[2].view(4, 384)
    values = [processor.ids(color) for color in ("red", "blue", "green", "pink")]
    static = torch.stack([model.word.weight[ids].mean(0) for ids in values]).mean(0)
    torch.testing.assert_close(color[3], static)
    torch.testing.assert_close(color[2], model.word.weight[processor.ids("Color")].mean(0))
    assert (scent[1] == 0).all()  # it has no value in training
    assert (scent[3] == 0).all()
    assert scent[0].abs().sum() > 0
    torch.testing.assert_close(model.attribute.weight[0], model.attribute.weight[1:].mean(0))


def test_a_mention_longer_than_bert_reads_is_cut():
    value = "water, sugar, cocoa butter, " * 100
    product = Product("B000000001", "B000000001", "Food", ((f"Made of {value}.", "description"),))
    evidence = Evidence(value, 0, 8, 8 + len(value))
    asked = [Question(product, "Ingredients", (value,), ("text",), (evidence,))]
    _, model, processor = train("adatag", asked, 0, **MINILM)
    assert len(processor.ids(value)) > 512
    assert model.attribute.weight.isfinite().all()


def test_an_unknown_attribute_is_asked_as_number_zero():
    _, _, processor = train("adatag", eight(), 0)
    width = Question(eight()[0].product, "Width")
    assert processor.collate([processor.encode(width)])["attribute"].tolist() == [0]
