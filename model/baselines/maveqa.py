"""MAVEQA (Yang et al., WSDM 2022): question answering over many texts with ETC's global and long tokens.

From Google's code of the paper: global tokens [CLS], category, attribute and one for each paragraph (at
most 64); long tokens are the category's words, the attribute's and the paragraphs' (at most 1,024), with
types of their own. Global tokens see each other; long tokens see those of their own text within a radius,
and all global tokens; one softmax over both. A sigmoid on each paragraph's global token says that the value
stands there, another on each long token that it is inside the value; both must be at 0.5 or over; the run
with the highest token is the answer. L is the sum of the two binary cross-entropies.
Choices: ETC is not to be had for PyTorch, so BERT's layers carry the pattern as a mask over [global ;
long], and positions restart in each text. ETC's relative positions tell a long token which global token is
its own; here both get the embedding of their text's number. Global tokens see the long tokens of their own
text only, [CLS] all (ETC's "hard" setting). The losses are means over tokens. A long
token learns the attribute's words through its global token, so that one layer cannot answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from pydantic import Field
from torch import Tensor, nn

from model.baselines import inputs
from model.baselines.inputs import (
    IGNORED,
    Baseline,
    bert_sizes,
    extractions,
    load_bert,
    make_bert,
    padded,
    spans,
)
from model.examples import Extraction, Question, Source

FIXED = 3  # global tokens before those of paragraphs: [CLS], category, attribute
TYPES = ("global", "category", "attribute", "title", "description", "other")


class Settings(inputs.TextSettings):
    max_length: int = Field(1024, ge=8)  # long tokens
    max_global: int = Field(64, ge=4)
    radius: int = Field(84, ge=1)  # how far a long token sees; ETC's


class Config(inputs.Config):
    model_type = "maveqa"


@dataclass(slots=True)
class Encoded(inputs.Encoded):
    """`owner` is the global token of each long token, `types` its number in TYPES."""

    owner: list[int]
    types: list[int]
    num_global: int


class Processor(inputs.Processor):
    max_global: int

    def encode(self, question: Question) -> Encoded:
        product = question.product
        ids: list[int] = []
        places: list[Source | None] = []
        owner: list[int] = []
        types: list[int] = []
        for number, text in ((1, product.category), (2, question.attribute)):
            found = self.ids(text)[: self.max_length // 4]
            ids, owner, types = ids + found, owner + [number] * len(found), types + [number] * len(found)
        places += [None] * len(ids)
        last = FIXED - 1
        for kind, index, text in inputs.texts(product, ocr=self.ocr):
            pieces = self.pieces(text)
            if last + 1 == self.max_global:
                self.truncated["text tokens"] += len(pieces)
                continue
            last += 1  # also a text without any token has its global token
            source = product.paragraphs[index][1] if kind == "text" else "other"
            sort = TYPES.index(source if source in ("title", "description") else "other")
            ids += [piece for piece, _, _ in pieces]
            places += [Source(kind, index, begin, end) for _, begin, end in pieces]
            owner += [last] * len(pieces)
            types += [sort] * len(pieces)
        self.truncated["text tokens"] += max(0, len(ids) - self.max_length)
        cut = slice(self.max_length)
        ids, places, owner, types = ids[cut], places[cut], owner[cut], types[cut]
        return Encoded(question, [], ids, places, spans(question, places), owner, types, last + 1)

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """input_ids, owner, types, position (B, L), owner -1 at padding; num_global (B,);
        global_targets (B, G), IGNORED but at paragraphs; targets (B, L), IGNORED but at their tokens."""
        position, targets, paragraphs = [], [], []
        for example in examples:
            seen = dict.fromkeys(example.owner, 0)
            inside = [0 if place else IGNORED for place in example.places]
            holds = [IGNORED] * FIXED + [0] * (example.num_global - FIXED)
            for begin, end in example.spans:
                inside[begin:end] = [1] * (end - begin)
                holds[example.owner[begin]] = 1
            own = []
            for number in example.owner:
                own.append(seen[number])
                seen[number] += 1
            position.append(own)
            targets.append(inside)
            paragraphs.append(holds)
        return {
            "input_ids": padded([example.ids for example in examples], self.pad),
            "owner": padded([example.owner for example in examples], -1),
            "types": padded([example.types for example in examples], 0),
            "position": padded(position, 0),
            "num_global": torch.tensor([example.num_global for example in examples]),
            "global_targets": padded(paragraphs, IGNORED),
            "targets": padded(targets, IGNORED),
        }


def visible(owner: Tensor, num_global: Tensor, radius: int) -> Tensor:
    """(B, G + L, G + L) bool: what each token sees; padding sees and is seen by itself alone.

    For two texts of two tokens and one of padding, radius 1, without category and attribute:

              CLS  p0  p1 | a  b  c  d  -
        CLS    x   x   x  | x  x  x  x  .
        p0     x   x   x  | x  x  .  .  .
        p1     x   x   x  | .  .  x  x  .
        a      x   x   x  | x  x  .  .  .
        c      x   x   x  | .  .  x  x  .
        -      .   .   .  | .  .  .  .  x
    """
    _, num_long = owner.shape
    most = int(num_global.max())
    numbers = torch.arange(most, device=owner.device)
    there = torch.cat([numbers < num_global[:, None], owner >= 0], dim=1)  # (B, G + L)
    steps = torch.arange(num_long, device=owner.device)
    near = (steps[:, None] - steps).abs() <= radius
    own = (numbers[:, None] == owner[:, None]) | (numbers == 0)[:, None]  # (B, G, L)
    long = (owner[:, :, None] == owner[:, None]) & near  # (B, L, L)
    upper = torch.cat([torch.ones_like(own[:, :, :1]).expand(-1, -1, most), own], dim=2)
    lower = torch.cat([torch.ones_like(long[:, :, :1]).expand(-1, -1, most), long], dim=2)
    seen = torch.cat([upper, lower], dim=1) & there[:, None] & there[:, :, None]
    return seen | torch.eye(most + num_long, dtype=torch.bool, device=owner.device)


def runs_by_paragraph(likely: Sequence[float], owner: Sequence[int]) -> list[tuple[int, int, float]]:
    """Half-open runs of tokens of one paragraph that are likely inside a value, each with its highest token.

    likely .9 .8 .6 .1 of paragraphs 1 1 2 2 gives [0, 2) with .9 and [2, 3) with .6.
    """
    marks = [paragraph if one >= 0.5 else None for paragraph, one in zip(owner, likely, strict=True)]
    found, end = [], 0
    for mark, group in groupby(marks):
        begin, end = end, end + len(list(group))
        if mark is not None:
            found.append((begin, end, max(likely[begin:end])))
    return found


class Model(Baseline):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.bert = make_bert(config.bert)
        width = config.bert["hidden_size"]
        self.kind = nn.Embedding(FIXED + 1, width)  # of global tokens: [CLS], category, attribute, paragraph
        self.token_type = nn.Embedding(len(TYPES), width)
        self.text = nn.Embedding(config.max_global, width)  # which text: shared by its global and long tokens
        self.holds = nn.Linear(width, 1)
        self.inside = nn.Linear(width, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def start(
        cls, settings: Settings, questions: Sequence[Question], region_width: int
    ) -> tuple["Model", Processor]:
        processor = Processor.start(settings, questions, max_global=settings.max_global)
        sizes = {"max_global": settings.max_global, "radius": settings.radius}
        model = cls(Config.of(bert=bert_sizes(settings, processor), **sizes))
        load_bert(model.bert, settings.pretrained, processor.tokenizer)
        return model, processor

    def logits(
        self, input_ids: Tensor, owner: Tensor, types: Tensor, position: Tensor, num_global: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Whether a global token's text holds the value (B, G), and a long token is inside it (B, L)."""
        most = int(num_global.max())
        numbers = torch.arange(most, device=input_ids.device)
        start = self.kind(numbers.clamp(max=FIXED)) + self.token_type.weight[0] + self.text(numbers)
        words = self.bert.embeddings.word_embeddings(input_ids) + self.token_type(types)
        words = words + self.text(owner.clamp_min(0))
        mask = visible(owner, num_global, self.config.radius)
        additive = torch.zeros(mask.shape, dtype=words.dtype, device=mask.device)
        additive.masked_fill_(~mask, torch.finfo(words.dtype).min)
        states = self.bert(
            inputs_embeds=torch.cat([start.expand(len(input_ids), -1, -1), words], dim=1),
            attention_mask=additive[:, None],
            position_ids=torch.cat([torch.zeros_like(position[:, :1]).expand(-1, most), position], dim=1),
        ).last_hidden_state
        holds, inside = self.holds(states[:, :most]), self.inside(states[:, most:])
        return holds.squeeze(-1).float(), inside.squeeze(-1).float()

    def forward(self, *, global_targets: Tensor, targets: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        loss = torch.zeros((), device=targets.device)
        for logits, wanted in zip(self.logits(**batch), (global_targets, targets), strict=True):
            counted = wanted != IGNORED
            losses = nn.functional.binary_cross_entropy_with_logits(
                logits, wanted.clamp_min(0).float(), reduction="none"
            )
            loss = loss + (losses * counted).sum() / counted.sum().clamp_min(1)
        return {"loss": loss}

    @torch.no_grad()
    def extract(self, examples: Sequence[Encoded], processor: Processor) -> list[tuple[Extraction, ...]]:
        """The run with the highest token in a paragraph that holds the value, scored by that token."""
        batch = self.on_device(processor.collate(examples))
        del batch["global_targets"], batch["targets"]
        holds, inside = (logits.sigmoid().tolist() for logits in self.logits(**batch))
        found = []
        for row, example in enumerate(examples):
            likely = [
                inside[row][i] if place and holds[row][example.owner[i]] >= 0.5 else 0.0
                for i, place in enumerate(example.places)
            ]
            scored = runs_by_paragraph(likely, example.owner)
            found.append(extractions(example, sorted(scored, key=lambda one: -one[2])[:1]))
        return found


inputs.register(Config, Model)
