"""Where a model's words and layers come from: a checkpoint by its name, its parts, and its tokenizer."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from model.examples import Question

# Where the parts of a layer stand in `transformers`, by the checkpoint's type
LAYERS = {
    "bert": {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "output_norm": "output.LayerNorm",
    },
    "mpnet": {
        "query": "attention.attn.q",
        "key": "attention.attn.k",
        "value": "attention.attn.v",
        "attention_output": "attention.attn.o",
        "attention_norm": "attention.LayerNorm",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "output_norm": "output.LayerNorm",
    },
}
ROLES = ("pad_token", "cls_token", "sep_token")


def take(ours: nn.Module, theirs: nn.Module) -> None:
    """The weights of a checkpoint's part, of which `taken` knows from then on."""
    ours.load_state_dict(theirs.state_dict())
    ours.is_taken = True  # type: ignore[assignment]


def taken(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of layers that start from a checkpoint; of a model from disk nobody knows."""
    parts = [module for module in model.modules() if getattr(module, "is_taken", False)]
    return [parameter for part in parts for parameter in part.parameters()]


class Checkpoint:
    """A pretrained encoder whose embeddings are BERT's: words, learnt positions and a LayerNorm.

    Raises `ValueError` when it is of another kind.
    """

    def __init__(self, path: str) -> None:
        self.path, self.encoder = path, AutoModel.from_pretrained(path)
        self.config = self.encoder.config
        embeddings = getattr(self.encoder, "embeddings", None)
        positions, norm = (getattr(embeddings, part, None) for part in ("position_embeddings", "LayerNorm"))
        if positions is None or norm is None:
            raise ValueError(f"{path} is a {self.config.model_type}, whose embeddings are not like BERT's")
        first = 0 if positions.padding_idx is None else positions.padding_idx + 1
        self.words: Tensor = self.encoder.get_input_embeddings().weight  # (V, D)
        self.positions: Tensor = positions.weight[first:]  # (positions, D), of the first token first
        self.norm: nn.LayerNorm = norm
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    @property
    def layers(self) -> list[dict[str, nn.Module]]:
        """The parts of each layer, under one set of names. Raises `ValueError` for types not in `LAYERS`."""
        kind = self.config.model_type
        if kind not in LAYERS:
            raise ValueError(f"{self.path} is a {kind}; layers are known of {', '.join(LAYERS)}")
        return [
            {name: layer.get_submodule(place) for name, place in LAYERS[kind].items()}
            for layer in self.encoder.encoder.layer
        ]


def word_pieces(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], tuple[tuple[int, int, int], ...]]:
    """A function from a text to its word pieces, (id, begin, end) in characters; it remembers texts."""

    @lru_cache(maxsize=1 << 16)
    def pieces(text: str) -> tuple[tuple[int, int, int], ...]:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return tuple((piece, begin, end) for piece, (begin, end) in offsets)

    return pieces


def same_words(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids, ours and theirs, of all words in both vocabularies.

    Padding, start and separator go by their role: MPNet's vocabulary has a [CLS] that it never learnt, and
    its start is `<s>`.
    """
    known = theirs.get_vocab()
    pairs = {i: known[word] for word, i in ours.get_vocab().items() if word in known}
    for role in ROLES:
        mine, other = getattr(ours, f"{role}_id"), getattr(theirs, f"{role}_id")
        if mine is not None and other is not None:
            pairs[mine] = other
    return list(pairs), list(pairs.values())


def checkpoint_path(name: str) -> str:
    """`package:NAME/FOLDER` is a folder inside an installed package; anything else is returned as it is."""
    if not name.startswith("package:"):
        return name
    from importlib.resources import files

    package, _, folder = name.removeprefix("package:").partition("/")
    path = Path(str(files(package))) / folder
    if not path.is_dir():
        raise ValueError(f"{name}: {path} is not a folder")
    return str(path)


def character_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the characters of `texts`, lower-cased, most frequent first."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    counts = Counter(character for text in texts for character in text.lower() if not character.isspace())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[VALUE]"]
    words += sorted(counts, key=lambda character: (-counts[character], character))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        additional_special_tokens=["[VALUE]"],
    )


def start_tokenizer(
    pretrained: str | None, tokenizer: str, questions: Sequence[Question]
) -> PreTrainedTokenizerBase:
    """The checkpoint's own (`pretrained`), another one's, or `characters`: those of the training split.

    Raises `ValueError` when it is to be the checkpoint's and there is none.
    """
    if tokenizer == "characters":
        texts = [text for q in questions for text, _ in q.product.paragraphs]
        return character_tokenizer(texts + [text for q in questions for text in (q.attribute, *q.values)])
    if tokenizer != "pretrained":
        return AutoTokenizer.from_pretrained(checkpoint_path(tokenizer))
    if pretrained is None:
        raise ValueError("tokenizer: pretrained needs a checkpoint, and pretrained is null")
    return AutoTokenizer.from_pretrained(checkpoint_path(pretrained))
