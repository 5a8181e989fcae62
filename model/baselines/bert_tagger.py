"""A plain BERT tagger, for scale: what the encoder gives without anybody's idea on top.

From Google's MAVE benchmark (its bert_tagger, which calls itself AVEQA): the attribute and the texts in one
row, one sigmoid per token that says inside a value or outside, binary cross-entropy, and runs of tokens at
or over 0.5 are values whose score is their highest token's.
Choices: the loss is a mean over tokens instead of a sum, so that it does not depend on the length; every run
is a value, not the best one alone, because an attribute may have several.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.baselines import inputs
from model.baselines.inputs import (
    IGNORED,
    Baseline,
    Encoded,
    bert_sizes,
    extractions,
    joint,
    load_bert,
    make_bert,
)
from model.examples import Extraction, Question


class Settings(inputs.TextSettings):
    """BERT-base, 512 tokens."""


class Config(inputs.Config):
    model_type = "bert-tagger"


class Processor(inputs.Processor):
    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """`inputs.joint`, and targets (B, T): 1 inside a value, 0 outside, IGNORED where no text stands."""
        batch = joint(self, examples)
        targets = torch.where(batch["text_mask"], 0, IGNORED)
        for row, example in zip(targets, examples, strict=True):
            for begin, end in example.spans:
                row[begin + len(example.attribute) : end + len(example.attribute)] = 1
        del batch["paragraph"]
        return batch | {"targets": targets}


def runs(inside: Sequence[bool]) -> list[tuple[int, int]]:
    """Half-open spans of neighbouring True: [F, T, T, F, T] gives [1, 3) and [4, 5)."""
    begins = [i for i, yes in enumerate(inside) if yes and (i == 0 or not inside[i - 1])]
    ends = [i + 1 for i, yes in enumerate(inside) if yes and (i + 1 == len(inside) or not inside[i + 1])]
    return list(zip(begins, ends, strict=True))


class Model(Baseline):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.bert = make_bert(config.bert)
        self.inside = nn.Linear(config.bert["hidden_size"], 1)
        self.post_init()

    @classmethod
    def start(
        cls, settings: Settings, questions: Sequence[Question], region_width: int
    ) -> tuple["Model", Processor]:
        processor = Processor.start(settings, questions)
        model = cls(Config.of(bert=bert_sizes(settings, processor)))
        load_bert(model.bert, settings.pretrained, processor.tokenizer)
        return model, processor

    def logits(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T): how surely each token is inside a value."""
        states = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state
        return self.inside(states).squeeze(-1).float()

    def forward(
        self,
        *,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor,
        text_mask: Tensor,
        targets: Tensor,
    ) -> dict[str, Tensor]:
        logits = self.logits(input_ids, token_type_ids, attention_mask)
        wanted = targets.clamp_min(0).float()
        losses = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return {"loss": (losses * text_mask).sum() / text_mask.sum().clamp_min(1)}

    @torch.no_grad()
    def extract(self, examples: Sequence[Encoded], processor: Processor) -> list[tuple[Extraction, ...]]:
        batch = self.on_device(processor.collate(examples))
        logits = self.logits(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
        likely = (logits.sigmoid() * batch["text_mask"]).tolist()
        found = []
        for example, row in zip(examples, likely, strict=True):
            own = row[len(example.attribute) : len(example.attribute) + len(example.ids)]
            spans = runs([probability >= 0.5 for probability in own])
            found.append(extractions(example, [(b, e, max(own[b:e])) for b, e in spans]))
        return found


inputs.register(Config, Model)
