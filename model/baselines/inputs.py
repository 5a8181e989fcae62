"""What a baseline is given: a product's texts as one row of tokens, BERT's layers, and its regions.

The paper's baselines "simply concatenate" texts: [CLS] paragraph [SEP] paragraph [SEP] ..., cut at its end.
Where a token stands is a `Source`; separators stand nowhere, and no value may hold one.
Shapes: B batch, T tokens, R regions, D width. Masks are True where something is there.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from model.examples import Extraction, Product, Question, Source
from model.metrics import normalise, standing
from model.pretrained import checkpoint_path, same_words, start_tokenizer, take, word_pieces
from model.standardise import measured, standardised
from pipeline import params

IGNORED = -100


class Settings(params.Settings):
    """What every baseline has; names that SMARTAVE has too mean the same there."""

    ocr: bool = False  # True reads OCR lines as further paragraphs, which the text models' papers do not
    pretrained: str | None = "google-bert/bert-base-uncased"
    tokenizer: str = "pretrained"
    hidden_size: int = Field(768, ge=1)
    encoder_layers: int = Field(12, ge=1)
    encoder_heads: int = Field(12, ge=1)
    intermediate_size: int = Field(3072, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    max_length: int = Field(512, ge=8)


class TextSettings(Settings):
    """Of a model that has no use for a picture."""

    image: Literal[False] = False


@dataclass(slots=True)
class Encoded:
    """One question as numbers; `spans` are the gold values that stand in `ids`, as half-open token spans."""

    question: Question
    attribute: list[int]
    ids: list[int]
    places: list[Source | None]
    spans: list[tuple[int, int]]

    @property
    def num_tokens(self) -> int:
        """Of the row that is read; regions and OCR words beside it are not counted."""
        return len(self.attribute) + len(self.ids)

    @property
    def num_asking(self) -> int:
        """Of these, the attribute's."""
        return len(self.attribute)


class Processor:
    """Turns questions into `Encoded`; a model's own processor adds `collate`.

    Args:
        tokenizer: any with [PAD], [CLS] and [SEP].
        ocr: whether OCR lines follow the paragraphs.
        max_length: tokens of attribute and text together; what is cut is counted in `truncated`.
        more: what a model's processor needs besides, plain values; they become attributes.
    """

    FILE: ClassVar = "processor_config.json"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, ocr: bool, max_length: int, **more: Any
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = {"ocr": ocr, "max_length": max_length, **more}
        self.ocr, self.max_length = ocr, max_length
        for name, value in more.items():
            setattr(self, name, value)
        self.pad, self.cls, self.sep = (
            tokenizer.pad_token_id,
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
        )
        self.truncated: Counter[str] = Counter()
        self.pieces = word_pieces(tokenizer)

    @classmethod
    def start(cls, settings: Settings, questions: Sequence[Question], **more: Any) -> Any:
        tokenizer = start_tokenizer(settings.pretrained, settings.tokenizer, questions)
        return cls(tokenizer, ocr=settings.ocr, max_length=settings.max_length, **more)

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        text = json.dumps(self.settings, indent=2, sort_keys=True, ensure_ascii=False)
        (Path(folder) / self.FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Any:
        settings = json.loads((Path(folder) / cls.FILE).read_text(encoding="utf-8"))
        return cls(AutoTokenizer.from_pretrained(folder), **settings)

    def ids(self, text: str) -> list[int]:
        return [piece for piece, _, _ in self.pieces(text)]

    def row(self, product: Product, room: int) -> tuple[list[int], list[Source | None]]:
        """The product's texts as at most `room` tokens, each text closed by a separator."""
        ids: list[int] = []
        places: list[Source | None] = []
        for kind, index, text in texts(product, ocr=self.ocr):
            if found := self.pieces(text):
                ids += [*(piece for piece, _, _ in found), self.sep]
                places += [*(Source(kind, index, begin, end) for _, begin, end in found), None]
        self.truncated["text tokens"] += max(0, len(ids) - room)
        return ids[:room], places[:room]

    def encode(self, question: Question) -> Encoded:
        """The row starts with [CLS]; the attribute's tokens, closed by a separator, are not in it."""
        attribute = [*self.ids(question.attribute), self.sep][: self.max_length // 2]
        ids, places = self.row(question.product, self.max_length - len(attribute) - 1)
        places = [None, *places]
        return Encoded(question, attribute, [self.cls, *ids], places, spans(question, places))


def texts(product: Product, *, ocr: bool) -> list[tuple[str, int, str]]:
    """(kind, index, text) of paragraphs in their order, then of OCR lines."""
    found = [("text", index, text) for index, (text, _) in enumerate(product.paragraphs)]
    return found + [("ocr", index, line.text) for index, line in enumerate(product.ocr) if ocr]


def spans(question: Question, places: Sequence[Source | None]) -> list[tuple[int, int]]:
    """The labelled evidences as spans of tokens, and, where OCR is read, the values that stand in it."""
    gold = [("text", one.paragraph, one.begin, one.end) for one in question.evidences]
    for index in {place.index or 0 for place in places if place and place.kind == "ocr"}:
        text = question.product.ocr[index].text
        gold += [("ocr", index, *found) for value in question.values for found in standing(text, value)]
    found = set()
    for kind, index, begin, end in gold:
        inside = [
            i
            for i, place in enumerate(places)
            if place
            and (place.kind, place.index) == (kind, index)
            and (place.begin or 0) < end
            and begin < (place.end or 0)
        ]
        if inside:
            found.add((inside[0], inside[-1] + 1))
    return sorted(found)


def extractions(example: Encoded, found: Iterable[tuple[int, int, float]]) -> tuple[Extraction, ...]:
    """Values of scored token spans, best first; a value said twice keeps its other places.

    A span that would leave its text ends there.
    """
    values: dict[str, Extraction] = {}
    for begin, end, score in sorted(found, key=lambda one: (-one[2], one[:2])):
        first = example.places[begin]
        if first is None:
            continue
        last = first
        for place in example.places[begin:end]:
            if place is None or (place.kind, place.index) != (first.kind, first.index):
                break
            last = place
        product = example.question.product
        index = first.index or 0
        text = product.paragraphs[index][0] if first.kind == "text" else product.ocr[index].text
        source = Source(first.kind, index, first.begin, last.end)
        value = text[first.begin : last.end]
        known = values.get(normalise(value))
        if known is None:
            values[normalise(value)] = Extraction(value, score, source)
        else:
            values[normalise(value)] = Extraction(
                known.value, known.score, known.source, (*known.elsewhere, source)
            )
    values.pop("", None)
    return tuple(values.values())


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """(B, T) int64, filled at the end."""
    batch = torch.full((len(rows), max(map(len, rows), default=0)), fill)
    for number, row in enumerate(rows):
        batch[number, : len(row)] = torch.tensor(row, dtype=torch.long)
    return batch


def joint(processor: Processor, examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """[CLS] attribute [SEP] text as BERT's two segments; `ids[i]` stands at `i + len(attribute)`.

    Returns input_ids, token_type_ids (B, T); attention_mask, text_mask (B, T) bool, the latter True where a
    token stands in a text; paragraph (B, T), which text it stands in, -1 for none.
    """
    rows = [[example.ids[0], *example.attribute, *example.ids[1:]] for example in examples]
    input_ids = padded(rows, processor.pad)
    types = torch.zeros_like(input_ids)
    paragraph = torch.full_like(input_ids, -1)
    for number, example in enumerate(examples):
        types[number, 1 + len(example.attribute) : len(rows[number])] = 1
        which = {key: order for order, key in enumerate(dict.fromkeys(map(text_of, example.places)))}
        numbers = [which[text_of(place)] if place else -1 for place in example.places[1:]]
        begin = 1 + len(example.attribute)
        paragraph[number, begin : begin + len(numbers)] = torch.tensor(numbers, dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    attention = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return {
        "input_ids": input_ids,
        "token_type_ids": types,
        "attention_mask": attention,
        "text_mask": paragraph >= 0,
        "paragraph": paragraph,
    }


def text_of(place: Source | None) -> tuple[str, int] | None:
    """Which text a token stands in."""
    return None if place is None else (place.kind, place.index or 0)


def bilstm(lstm: nn.LSTM, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """States (B, T, 2h), zero at padding, and the last of both directions (B, 2h); no row is empty."""
    packed = pack_padded_sequence(x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
    states, (last, _) = lstm(packed)
    states, _ = pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])
    return states, torch.cat([last[0], last[1]], dim=-1)


# BERT


def bert_sizes(settings: Settings, processor: Processor) -> dict[str, Any]:
    """`BertConfig` by name; positions past the checkpoint's start from random weights."""
    return {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.encoder_layers,
        "num_attention_heads": settings.encoder_heads,
        "intermediate_size": settings.intermediate_size,
        "hidden_dropout_prob": settings.dropout,
        "attention_probs_dropout_prob": settings.dropout,
        "max_position_embeddings": max(512, settings.max_length),
        "pad_token_id": processor.pad,
    }


@torch.no_grad()
def load_bert(bert: BertModel, name: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Embeddings by word, and the first layers, of the checkpoint `name`; without one nothing is done.

    Raises `ValueError` when it is no BERT, or of another width, or has too few layers.
    """
    if name is None:
        return
    path = checkpoint_path(name)
    theirs = AutoModel.from_pretrained(path)
    if theirs.config.model_type != "bert":
        raise ValueError(f"{name} is a {theirs.config.model_type}, and a baseline starts from a bert")
    for key, setting in (
        ("hidden_size", "hidden_size"),
        ("num_attention_heads", "encoder_heads"),
        ("intermediate_size", "intermediate_size"),
    ):
        if getattr(theirs.config, key) != getattr(bert.config, key):
            raise ValueError(
                f"{name}: its {key} is {getattr(theirs.config, key)}, "
                f"{setting} is {getattr(bert.config, key)}"
            )
    layers = bert.config.num_hidden_layers
    if len(theirs.encoder.layer) < layers:
        raise ValueError(f"{name} has {len(theirs.encoder.layer)} layers, encoder_layers is {layers}")
    ours, source = same_words(tokenizer, AutoTokenizer.from_pretrained(path))
    embeddings = bert.embeddings
    embeddings.word_embeddings.weight[ours] = theirs.embeddings.word_embeddings.weight[source]
    positions = theirs.embeddings.position_embeddings.weight
    positions = positions[: embeddings.position_embeddings.num_embeddings]
    embeddings.position_embeddings.weight[: len(positions)] = positions
    embeddings.token_type_embeddings.load_state_dict(theirs.embeddings.token_type_embeddings.state_dict())
    embeddings.LayerNorm.load_state_dict(theirs.embeddings.LayerNorm.state_dict())
    for layer, start in zip(bert.encoder.layer, theirs.encoder.layer, strict=False):
        take(layer, start)


class Config(PretrainedConfig):
    """Sizes by name, as `Model.start` gives them and config.json keeps them."""

    @classmethod
    def of(cls, **sizes: Any) -> Any:
        return cls(**sizes)


def make_bert(sizes: dict[str, Any]) -> BertModel:
    return BertModel(BertConfig(**sizes), add_pooling_layer=False)


class Baseline(PreTrainedModel):
    """What the models share as `transformers` models; each has its own `start`, `forward` and `extract`."""

    accepts_loss_kwargs = False  # the loss is a mean already
    main_input_name = "input_ids"

    def _init_weights(self, module: nn.Module) -> None:
        """Glorot for matrices: the small models of a small corpus learn from it (docs/log.md)."""
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def register(config: type[PretrainedConfig], model: type[Baseline]) -> None:
    """Make `AutoModel.from_pretrained` know a baseline by its `model_type`."""
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)


# Regions


class Regions(nn.Module):
    """Standardises region features as SMARTAVE does (`model.standardise`): an affine map, never trained.

    Out come `size` numbers: `components`, or as many as features.
    """

    mean: Tensor
    axes: Tensor

    def __init__(self, width: int, components: int | None) -> None:
        super().__init__()
        self.size = components or width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("axes", torch.ones((width, components) if components else (width,)))

    @torch.no_grad()
    def measure(self, questions: Sequence[Question]) -> None:
        mean, axes = measured(questions, tuple(self.axes.shape))
        self.mean.copy_(mean)
        self.axes.copy_(axes)

    def forward(self, regions: Tensor) -> Tensor:
        return standardised(regions, self.mean, self.axes)


def stacked_regions(products: Sequence[Product], width: int, limit: int) -> tuple[Tensor, Tensor]:
    """(B, R, width) float32 and (B, R) bool, the whole picture first, then at most `limit` - 1 boxes.

    R is at least 1. Raises `ValueError` when features are not `width` wide.
    """
    rows = []
    for product in products:
        regions = product.regions if product.regions is not None else np.zeros((0, width), np.float16)
        if regions.shape[1] != width:
            raise ValueError(
                f"{product.asin}: regions are {regions.shape[1]} wide, the model was made for {width}"
            )
        rows.append(np.concatenate([regions[-1:], regions[:-1][: limit - 1]]))
    most = max(1, *map(len, rows))
    features = torch.zeros(len(rows), most, width)
    mask = torch.zeros(len(rows), most, dtype=torch.bool)
    for number, row in enumerate(rows):
        features[number, : len(row)] = torch.from_numpy(row.astype(np.float32))
        mask[number, : len(row)] = True
    return features, mask
