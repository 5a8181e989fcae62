import torch
from test_model_baselines import eight, train

from model.baselines.maveqa import runs_by_paragraph, visible
from model.examples import Evidence, Product, Question


def test_the_whole_pattern():
    owner = torch.tensor([[1, 1, 2, 2, -1]])  # two texts of two tokens, and padding
    seen = visible(owner, torch.tensor([3]), radius=1)[0].long()
    assert seen.tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 0],  # [CLS] sees all
        [1, 1, 1, 1, 1, 0, 0, 0],  # a text's global token sees its own
        [1, 1, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],  # a long token sees its text and all global tokens
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


def test_a_long_token_sees_no_further_than_the_radius():
    seen = visible(torch.full((1, 4), 1), torch.tensor([2]), radius=2)[0, 2:, 2:]
    assert seen.long().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]


def test_padded_global_tokens_are_not_seen():
    seen = visible(torch.tensor([[1, 1], [1, 2]]), torch.tensor([2, 3]), radius=9)
    assert not seen[0, :2, 2].any()
    assert seen[1, :2, 2].all()


def test_category_attribute_and_texts_become_global_and_long_tokens():
    _, _, processor = train("maveqa", eight(), 0)
    example = processor.encode(eight()[0])
    assert example.num_global == 5  # [CLS], category, attribute, two texts
    words = ["Mugs", "Color"]
    assert (
        example.owner
        == [i for i, word in zip((1, 2), words, strict=False) for _ in word] + [3] * 10 + [4] * 6
    )
    assert sorted(set(example.types)) == [1, 2, 3, 5]
    batch = processor.collate([example])
    assert batch["global_targets"].tolist() == [[-100, -100, -100, 1, 0]]
    assert batch["targets"][0].tolist().count(1) == 3
    assert batch["position"][0, :11].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]


def test_texts_beyond_the_global_tokens_are_dropped_and_counted():
    _, _, processor = train("maveqa", eight(), 0, max_global=4)
    processor.truncated.clear()
    assert processor.encode(eight()[0]).num_global == 4
    assert processor.truncated["text tokens"] == len("Fortea")


def test_a_run_counts_only_where_its_paragraph_holds_the_value():
    _, model, processor = train("maveqa", eight(), 100)
    product = Product("B000000009", "B000000009", "Mugs", (("Nice red mug", "title"),))
    asked = [Question(product, "Color", ("red",), ("text",), (Evidence("red", 0, 5, 8),))]
    examples = [processor.encode(one) for one in asked]
    assert [one.value for one in model.extract(examples, processor)[0]] == ["red"]
    model.holds.bias.data -= 99
    assert model.extract(examples, processor) == [()]


def test_a_run_ends_with_its_paragraph() -> None:
    likely, owner = [0.9, 0.8, 0.6, 0.1, 0.7], [1, 1, 2, 2, 2]
    assert runs_by_paragraph(likely, owner) == [(0, 2, 0.9), (2, 3, 0.6), (4, 5, 0.7)]
