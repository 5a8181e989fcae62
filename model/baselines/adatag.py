"""AdaTag (Yan et al., ACL 2021): one encoder, and a decoder whose weights an attribute's embedding generates.

From the paper: word embeddings and a BiLSTM over the text; for attribute r, emissions P_i = W^r h_i + b^r
with W^r = reshape(A_w r + a_w), b^r = A_b r + a_b (a hypernetwork), and transitions T^r = sum_j lambda_j
T_j of k = 3 matrices with lambda = softmax(G r + g) (a mixture of experts); tags {B, I, O, E}, a CRF per
attribute.
r is pretrained on the training split: over the value's mentions, BERT's vector of the attribute's name put
in the value's place and of the value itself, beside uncontextual vectors of both; a table starts from it.
Choices: word vectors and the uncontextual part are the checkpoint's own word embeddings, as the authors'
GloVe is not to be had; the name stands bare instead of between [BOA] and [EOA], which no checkpoint knows;
the first 20 mentions of an attribute; 200 units a direction, dropout 0.4. Without a checkpoint words and
table start from random vectors. An attribute that training does not know is asked with the mean of all. A
product's text is encoded once for all of its attributes.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import BertModel

from model.baselines import chain, inputs
from model.baselines.chain import BIOE
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

MENTIONS = 20  # of an attribute, for its embedding
WINDOW = 100  # characters of text on each side of a mention


class Settings(inputs.TextSettings):
    lstm_size: int = Field(200, ge=1)  # of each direction
    experts: int = Field(3, ge=1)
    dropout: float = Field(0.4, ge=0, lt=1)


class Config(inputs.Config):
    model_type = "adatag"


class Processor(inputs.Processor):
    """`attributes` are those of the training split; an attribute's number is its place there plus one."""

    attributes: list[str]
    joint = True  # a row of a training batch is a product with all questions about it

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """input_ids and attention_mask (P, T) of the P distinct products; text (B,), which of them a question
        is about; attribute (B,), 0 for an unknown one; targets (B, T)."""
        products = {id(one.question.product): one for one in examples}
        number = {key: position for position, key in enumerate(products)}
        input_ids = padded([one.ids for one in products.values()], self.pad)
        lengths = torch.tensor([len(one.ids) for one in products.values()])
        known = {name: 1 + position for position, name in enumerate(self.attributes)}
        tags = [chain.encode_tags(input_ids.shape[1], one.spans, BIOE) for one in examples]
        return {
            "input_ids": input_ids,
            "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
            "text": torch.tensor([number[id(one.question.product)] for one in examples]),
            "attribute": torch.tensor([known.get(one.question.attribute, 0) for one in examples]),
            "targets": torch.tensor(tags),
        }

    def encode(self, question: Question) -> Encoded:
        """Without the attribute's tokens, so that the row of a product is the same for all of them."""
        ids, places = self.row(question.product, self.max_length - 1)
        places = [None, *places]
        return Encoded(question, [], [self.cls, *ids], places, inputs.spans(question, places))


def mixture(gates: Tensor, experts: Tensor) -> Tensor:
    """T^r = sum_j lambda_j T_j: gate logits (B, k) and matrices (k, K, K) to (B, K, K)."""
    return torch.einsum("bk,kij->bij", gates.softmax(-1), experts)


@torch.no_grad()
def attribute_vectors(questions: Sequence[Question], processor: Processor, bert: BertModel) -> Tensor:
    """(A, 4 D): name in context, value in context, name and value without, means over mentions."""
    mentions: dict[str, list[tuple[str, str, str]]] = {name: [] for name in processor.attributes}
    for question in questions:
        for one in question.evidences:
            if len(mentions[question.attribute]) < MENTIONS:
                text = question.product.paragraphs[one.paragraph][0]
                before, after = text[: one.begin][-WINDOW:], text[one.end :][:WINDOW]
                mentions[question.attribute].append((before, text[one.begin : one.end], after))
    table = bert.embeddings.word_embeddings.weight
    bert.eval()

    def inside(before: str, words: str, after: str) -> Tensor:
        """The mean of BERT's vectors of `words` where they stand."""
        left, middle, right = (processor.ids(part) for part in (before, words, after))
        room = bert.config.max_position_embeddings - 2 - len(left)
        middle, right = middle[:room], right[: max(0, room - len(middle))]
        row = torch.tensor([[processor.cls, *left, *middle, *right, processor.sep]])
        states = bert(row).last_hidden_state[0]
        return states[1 + len(left) : 1 + len(left) + len(middle)].mean(0)

    rows = []
    for name, found in mentions.items():
        nothing = torch.zeros(table.shape[1])
        names = [inside(before, name, after) for before, _, after in found] or [inside("", name, "")]
        pieces = [processor.ids(value) for _, value, _ in found]
        values = [inside(*one) for one, ids in zip(found, pieces, strict=True) if ids] or [nothing]
        static = [table[ids].mean(0) for ids in pieces if ids] or [nothing]
        parts = (names, values, [table[processor.ids(name)].mean(0)], static)
        rows.append(torch.cat([torch.stack(part).mean(0) for part in parts]))
    return torch.stack(rows)


class Model(Baseline):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, size, tags = config.hidden_size, config.lstm_size, len(BIOE)
        self.word = nn.Embedding(config.vocab_size, width)
        self.attribute = nn.Embedding(config.num_attributes + 1, 4 * width)
        self.dropout = nn.Dropout(config.dropout)
        self.lstm = nn.LSTM(width, size, batch_first=True, bidirectional=True)
        self.weight = nn.Linear(4 * width, tags * 2 * size)  # A_w, a_w
        self.bias = nn.Linear(4 * width, tags)  # A_b, a_b
        self.gate = nn.Linear(4 * width, config.experts)  # G, g
        self.experts = nn.Parameter(0.1 * torch.randn(config.experts, tags + 2, tags + 2))
        self.post_init()

    @classmethod
    def start(
        cls, settings: Settings, questions: Sequence[Question], region_width: int
    ) -> tuple["Model", Processor]:
        attributes = sorted({question.attribute for question in questions})
        processor = Processor.start(settings, questions, attributes=attributes)
        config = Config.of(
            vocab_size=len(processor.tokenizer),
            hidden_size=settings.hidden_size,
            num_attributes=len(attributes),
            lstm_size=settings.lstm_size,
            experts=settings.experts,
            dropout=settings.dropout,
        )
        model = cls(config)
        if settings.pretrained is not None:
            bert = make_bert(bert_sizes(settings, processor))
            load_bert(bert, settings.pretrained, processor.tokenizer)
            model.word.weight.data.copy_(bert.embeddings.word_embeddings.weight)
            vectors = attribute_vectors(questions, processor, bert)
            model.attribute.weight.data.copy_(torch.cat([vectors.mean(0, keepdim=True), vectors]))
        return model, processor

    def scores(
        self, input_ids: Tensor, attention_mask: Tensor, text: Tensor, attribute: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Emissions (B, T, 4), transitions (B, 6, 6) and the mask (B, T)."""
        states, _ = bilstm(self.lstm, self.dropout(self.word(input_ids)), attention_mask)
        r = self.attribute(attribute)
        weight = self.weight(r).unflatten(-1, (len(BIOE), -1))  # (B, 4, 2h)
        emissions = self.dropout(states)[text] @ weight.transpose(1, 2) + self.bias(r)[:, None]
        return emissions, mixture(self.gate(r), self.experts), attention_mask[text]

    def forward(self, *, targets: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        emissions, transitions, mask = self.scores(**batch)
        return {"loss": chain.negative_log_likelihood(emissions, targets, mask, transitions)}

    @torch.no_grad()
    def extract(self, examples: Sequence[Encoded], processor: Processor) -> list[tuple[Extraction, ...]]:
        """Every value scored by the probability of the whole row of tags."""
        batch = self.on_device(processor.collate(examples))
        del batch["targets"]
        emissions, transitions, mask = self.scores(**batch)
        paths, scores = chain.viterbi(emissions, mask, transitions)
        return [
            extractions(example, [(*span, score) for span in chain.decode_tags(path, BIOE)])
            for example, path, score in zip(examples, paths, scores, strict=True)
        ]


inputs.register(Config, Model)
