"""SUOpenTag (Xu et al., ACL 2019, "Scaling Up Open Tagging"): the attribute attends to the title by cosine.

From the paper: BERT's vectors of text and attribute, a BiLSTM for each; the attribute is the last forward and
the last backward state; token i gets [h_i ; cos(h_i, a) h_i], then one set of tags {B, I, O} for all
attributes and a CRF. No value is all O.
Choices: BERT is frozen where it is pretrained (the paper uses its vectors as embeddings) and trained where it
is not; word pieces are tagged, each; dropout stands before the output layer; 512 is the paper's size of both
directions together.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from model.baselines import chain, inputs
from model.baselines.chain import BIO
from model.baselines.inputs import (
    Baseline,
    Encoded,
    bert_sizes,
    bilstm,
    extractions,
    load_bert,
    make_bert,
    padded,
)
from model.examples import Extraction, Question


class Settings(inputs.TextSettings):
    lstm_size: int = Field(256, ge=1)  # of each direction
    frozen: bool = True  # BERT gives features; it is not trained


class Config(inputs.Config):
    model_type = "suopentag"


class Processor(inputs.Processor):
    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """input_ids, targets (B, T) and attention_mask (B, T) of the text; attribute_* (B, A) of the name."""
        input_ids = padded([example.ids for example in examples], self.pad)
        attribute = padded([[self.cls, *example.attribute] for example in examples], self.pad)
        lengths = torch.tensor([len(example.ids) for example in examples])
        attribute_lengths = torch.tensor([1 + len(example.attribute) for example in examples])
        tags = [chain.encode_tags(len(example.ids), example.spans, BIO) for example in examples]
        return {
            "input_ids": input_ids,
            "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
            "attribute_ids": attribute,
            "attribute_mask": torch.arange(attribute.shape[1]) < attribute_lengths[:, None],
            "targets": padded(tags, 0),
        }


def attended(states: Tensor, attribute: Tensor) -> Tensor:
    """[h_i ; cos(h_i, a) h_i]: (B, T, 2h) and (B, 2h) to (B, T, 4h)."""
    cosine = nn.functional.cosine_similarity(states, attribute[:, None], dim=-1)
    return torch.cat([states, cosine[..., None] * states], dim=-1)


class Model(Baseline):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.bert = make_bert(config.bert)
        width, size = config.bert["hidden_size"], config.lstm_size
        self.text_lstm = nn.LSTM(width, size, batch_first=True, bidirectional=True)
        self.attribute_lstm = nn.LSTM(width, size, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(config.dropout)
        self.emission = nn.Linear(4 * size, len(BIO))
        self.transitions = nn.Parameter(torch.zeros(len(BIO) + 2, len(BIO) + 2))
        self.post_init()

    @classmethod
    def start(
        cls, settings: Settings, questions: Sequence[Question], region_width: int
    ) -> tuple["Model", Processor]:
        processor = Processor.start(settings, questions)
        frozen = settings.frozen and settings.pretrained is not None
        sizes = {"lstm_size": settings.lstm_size, "dropout": settings.dropout, "frozen": frozen}
        model = cls(Config.of(bert=bert_sizes(settings, processor), **sizes))
        load_bert(model.bert, settings.pretrained, processor.tokenizer)
        model.bert.requires_grad_(not frozen)
        return model, processor

    def train(self, mode: bool = True) -> "Model":
        """Frozen features have no dropout."""
        super().train(mode)
        if self.config.frozen:
            self.bert.eval()
        return self

    def emissions(
        self, input_ids: Tensor, attention_mask: Tensor, attribute_ids: Tensor, attribute_mask: Tensor
    ) -> Tensor:
        """(B, T, 3)."""
        words = self.bert(input_ids, attention_mask).last_hidden_state
        name = self.bert(attribute_ids, attribute_mask).last_hidden_state
        states, _ = bilstm(self.text_lstm, words, attention_mask)
        _, attribute = bilstm(self.attribute_lstm, name, attribute_mask)
        return self.emission(self.dropout(attended(states, attribute)))

    def forward(self, *, targets: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        mask = batch["attention_mask"]
        loss = chain.negative_log_likelihood(self.emissions(**batch), targets, mask, self.transitions)
        return {"loss": loss}

    @torch.no_grad()
    def extract(self, examples: Sequence[Encoded], processor: Processor) -> list[tuple[Extraction, ...]]:
        """Every value scored by the probability of the whole row of tags."""
        batch = self.on_device(processor.collate(examples))
        del batch["targets"]
        paths, scores = chain.viterbi(self.emissions(**batch), batch["attention_mask"], self.transitions)
        return [
            extractions(example, [(*span, score) for span in chain.decode_tags(path, BIO)])
            for example, path, score in zip(examples, paths, scores, strict=True)
        ]


inputs.register(Config, Model)
