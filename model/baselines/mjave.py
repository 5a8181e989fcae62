"""M-JAVE (Zhu et al., EMNLP 2020): attributes and values predicted together, the picture let in by two gates.

From the authors' code (jd-aig/JAVE): frozen BERT vectors x_i of the text's tokens; self-attention gives
H_t; attention to the picture's regions gives each token a visual vector, scaled by the global gate g1_i =
sigmoid(w1 x_i + w2 v_whole + b): H = H_t + g1 * visual. Attributes: sigmoid of W (W3 pool(x) + W4 pool(H) +
W5 x_cls). The regional gate g2_j = sigmoid(w6 p + w7 v_j) weighs the regions by the predicted attributes p
and gives visual2_i. Tags, B and I of every attribute and O: W (W8 x_i + W9 H_i + W10 p + visual2_i), no
CRF. L = CE of tags + BCE of attributes + KL(p || q) / 2, where q_a is the mean of the highest B and the
highest I probability of attribute a.
Choices: both attentions have their softmax, which the code comments out and without which they grow with
the text's length; pool is a mean where the code sums, for the same reason; the regions are the detector's
and the whole picture instead of a 7 x 7 grid. No question is put to this model: it tags all attributes at
once, so a row of a batch is a product with all questions about it. Attributes that were not asked of a
product are neither right nor wrong there: their tags are left out of the softmax; in use those that
training never asked in the product's category are.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from model.baselines import chain, inputs
from model.baselines.chain import BIO
from model.baselines.inputs import (
    IGNORED,
    Baseline,
    Encoded,
    Regions,
    bert_sizes,
    extractions,
    load_bert,
    make_bert,
    padded,
    spans,
    stacked_regions,
)
from model.encoder import masked_softmax
from model.examples import Extraction, Question

NOTHING = torch.finfo(torch.float32).min


class Settings(inputs.Settings):
    image: bool = True
    attention_size: int = Field(200, ge=1)
    max_regions: int = Field(50, ge=1)
    region_components: int | None = Field(None, ge=1)  # see model.standardise
    frozen: bool = True  # BERT gives features; it is not trained


class Config(inputs.Config):
    model_type = "mjave"


def tags_of(asked: Tensor) -> Tensor:
    """Which tags attributes leave, (..., A) bool to (..., 2 A + 1)."""
    return torch.cat([torch.ones_like(asked[..., :1]), asked.repeat_interleave(2, dim=-1)], dim=-1)


def tag_of(attribute: int, part: int) -> int:
    """The tag of attribute number `attribute`: 0 is O, then B and I (`part` 1 and 2) of each in turn."""
    return 2 * attribute + part


class Processor(inputs.Processor):
    attributes: list[str]
    by_category: dict[str, list[str]]  # attributes that training asked in a category
    image: bool
    max_regions: int
    region_width: int
    joint = True  # a row of a training batch is a product with all questions about it

    def encode(self, question: Question) -> Encoded:
        """Without the attribute's tokens: the row of a product is the same for all of them."""
        ids, places = self.row(question.product, self.max_length - 1)
        places = [None, *places]
        return Encoded(question, [], [self.cls, *ids], places, spans(question, places))

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """One row for each of the P distinct products, in order.

        Returns:
            input_ids, attention_mask, targets (P, T), IGNORED where no text stands; asked, present (P, A),
            the attributes that are asked and those of them that have a value in the text; regions
            (P, R, width), the whole picture first, region_mask (P, R).
        """
        groups: dict[int, list[Encoded]] = {}
        for one in examples:
            groups.setdefault(id(one.question.product), []).append(one)
        number = {name: position for position, name in enumerate(self.attributes)}
        asked = torch.zeros(len(groups), len(self.attributes), dtype=torch.bool)
        present = torch.zeros_like(asked)
        rows = [group[0] for group in groups.values()]
        tags = [[0 if place else IGNORED for place in one.places] for one in rows]
        for row, group in enumerate(groups.values()):
            for one in group:
                attribute = number.get(one.question.attribute)
                if attribute is None:
                    continue
                asked[row, attribute], present[row, attribute] = True, bool(one.spans)
                for position, part in enumerate(chain.encode_tags(len(one.ids), one.spans, BIO)):
                    if part and tags[row][position] == 0:
                        tags[row][position] = tag_of(attribute, part)
        input_ids = padded([one.ids for one in rows], self.pad)
        lengths = torch.tensor([len(one.ids) for one in rows])
        products = [one.question.product for one in rows]
        regions, region_mask = stacked_regions(products, self.region_width, self.max_regions)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
            "asked": asked,
            "regions": regions,
            "region_mask": region_mask & self.image,
            "present": present,
            "targets": padded(tags, IGNORED),
        }

    def may_have(self, question: Question) -> list[int]:
        """The attributes that the product may have, for all that training tells."""
        names = self.by_category.get(question.product.category, self.attributes)
        return [i for i, name in enumerate(self.attributes) if name in names or name == question.attribute]


class Attention(nn.Module):
    """Scaled dot-product attention with projections of its own."""

    def __init__(self, width: int, source_width: int, size: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, size)
        self.key = nn.Linear(source_width, size)
        self.value = nn.Linear(source_width, size)

    def weights(self, x: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """(B, T, S), zero where the mask (B, S) is False; all zero where it has no True."""
        scores = self.query(x) @ self.key(source).transpose(1, 2) / self.query.out_features**0.5
        return masked_softmax(scores, mask[:, None])


def agreement(attributes: Tensor, tags: Tensor, text: Tensor, asked: Tensor) -> Tensor:
    """KL(p || q) over the asked attributes, a mean over examples.

    Args:
        attributes: (B, A), p.
        tags: (B, T, 2 A + 1) probabilities.
        text: (B, T) bool.
        asked: (B, A) bool.
    """
    highest = (tags * text[..., None]).amax(1)[:, 1:].unflatten(-1, (-1, 2))  # (B, A, 2)
    q = highest.mean(-1).clamp_min(1e-9)
    p = attributes.clamp_min(1e-9)
    return (p * (p.log() - q.log()) * asked).sum(-1).mean()


class Model(Baseline):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.bert = make_bert(config.bert)
        width, size, count = config.bert["hidden_size"], config.attention_size, config.num_attributes
        self.standard = Regions(config.region_width, config.region_components)
        region = self.standard.size
        self.self_attention = Attention(width, width, size)
        self.cross_attention = Attention(width, region, size)
        self.global_gate_text = nn.Linear(width, 1)  # w1, b
        self.global_gate_image = nn.Linear(region, 1, bias=False)  # w2
        self.attribute_parts = nn.ModuleList(nn.Linear(n, size) for n in (width, size, width))  # W3, W4, W5
        self.attribute_head = nn.Linear(size, count)
        self.regional_gate_attributes = nn.Linear(count, 1)  # w6
        self.regional_gate_image = nn.Linear(region, 1, bias=False)  # w7
        self.tag_parts = nn.ModuleList(nn.Linear(n, size) for n in (width, size, count))  # W8, W9, W10
        self.tag_head = nn.Linear(size, 2 * count + 1)
        self.post_init()

    @classmethod
    def start(
        cls, settings: Settings, questions: Sequence[Question], region_width: int
    ) -> tuple["Model", Processor]:
        by_category: dict[str, set[str]] = {}
        for question in questions:
            by_category.setdefault(question.product.category, set()).add(question.attribute)
        attributes = sorted(set().union(*by_category.values()))
        processor = Processor.start(
            settings,
            questions,
            attributes=attributes,
            by_category={category: sorted(names) for category, names in sorted(by_category.items())},
            image=settings.image,
            max_regions=settings.max_regions,
            region_width=region_width,
        )
        frozen = settings.frozen and settings.pretrained is not None
        config = Config.of(
            bert=bert_sizes(settings, processor),
            attention_size=settings.attention_size,
            num_attributes=len(attributes),
            region_width=region_width,
            region_components=settings.region_components,
            frozen=frozen,
        )
        model = cls(config)
        load_bert(model.bert, settings.pretrained, processor.tokenizer)
        model.bert.requires_grad_(not frozen)
        model.standard.measure(questions)
        return model, processor

    def train(self, mode: bool = True) -> "Model":
        """Frozen features have no dropout."""
        super().train(mode)
        if self.config.frozen:
            self.bert.eval()
        return self

    def global_gate(self, x: Tensor, whole: Tensor) -> Tensor:
        """g1 (B, T, 1): how much of the picture each token lets in; of the whole picture (B, width)."""
        return (self.global_gate_text(x) + self.global_gate_image(whole)[:, None]).sigmoid()

    def regional_gate(self, attributes: Tensor, regions: Tensor) -> Tensor:
        """g2 (B, R): how much each region tells about the predicted attributes (B, A)."""
        return (self.regional_gate_attributes(attributes)[:, None] + self.regional_gate_image(regions))[
            ..., 0
        ].sigmoid()

    def scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        asked: Tensor,
        regions: Tensor,
        region_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Attribute logits (B, A) and tag logits (B, T, 2 A + 1), those of attributes not asked at -inf."""
        x = self.bert(input_ids, attention_mask).last_hidden_state
        regions = self.standard(regions) * region_mask[..., None]
        text = self.self_attention
        h = text.weights(x, x, attention_mask) @ text.value(x)
        image = self.cross_attention
        attended, values = image.weights(x, regions, region_mask), image.value(regions)
        h = h + self.global_gate(x, regions[:, 0]) * (attended @ values)
        length = attention_mask.sum(1, keepdim=True)
        pooled = [(one * attention_mask[..., None]).sum(1) / length for one in (x, h)]
        parts = zip(self.attribute_parts, (*pooled, x[:, 0]), strict=True)
        attributes = self.attribute_head(sum(layer(part) for layer, part in parts))
        p = attributes.sigmoid()
        second = (attended * self.regional_gate(p, regions)[:, None]) @ values
        tokens, states, names = (layer(one) for layer, one in zip(self.tag_parts, (x, h, p), strict=True))
        tags = self.tag_head(tokens + states + names[:, None] + second).float()
        return attributes.float(), tags.masked_fill(~tags_of(asked)[:, None], NOTHING)

    def forward(self, *, targets: Tensor, present: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        asked = batch["asked"]
        attributes, tags = self.scores(**batch)
        text = targets != IGNORED
        right = tags.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
        tag_loss = -(right * text).sum() / text.sum().clamp_min(1)
        wrong = nn.functional.binary_cross_entropy_with_logits(attributes, present.float(), reduction="none")
        attribute_loss = (wrong * asked).sum() / asked.sum().clamp_min(1)
        kl = agreement(attributes.sigmoid(), tags.softmax(-1), text, asked)
        parts = {"tag_loss": tag_loss.detach(), "attribute_loss": attribute_loss.detach()}
        return {"loss": tag_loss + attribute_loss + 0.5 * kl, **parts}

    @torch.no_grad()
    def extract(self, examples: Sequence[Encoded], processor: Processor) -> list[tuple[Extraction, ...]]:
        """The values tagged with the question's attribute, scored by their tags' probability.

        A product is looked at once for all of its questions; which attributes it may have is said by each of
        them, and not by what else is asked.
        """
        products = {id(one.question.product): one for one in examples}
        number = {key: position for position, key in enumerate(products)}
        batch = self.on_device(processor.collate(list(products.values())))
        batch["asked"] = torch.ones_like(batch["asked"])
        names = ("input_ids", "attention_mask", "asked", "regions", "region_mask")
        _, tags = self.scores(**{name: batch[name] for name in names})
        found: list[tuple[Extraction, ...]] = []
        for example in examples:
            row = number[id(example.question.product)]
            if example.question.attribute not in processor.attributes:
                found.append(())
                continue
            first = tag_of(processor.attributes.index(example.question.attribute), 1)
            parts = {first: 1, first + 1: 2}
            asked = torch.zeros_like(batch["asked"][row])
            asked[processor.may_have(example.question)] = True
            of_row = tags[row, : len(example.ids)].masked_fill(~tags_of(asked), NOTHING)
            scores, best = of_row.softmax(-1).max(-1)
            own = [parts.get(tag, 0) for tag in best.tolist()]
            said = []
            for begin, end in chain.decode_tags(own, BIO):
                said.append((begin, end, float(scores[begin:end].cpu().prod())))
            found.append(extractions(example, said))
        return found


inputs.register(Config, Model)
