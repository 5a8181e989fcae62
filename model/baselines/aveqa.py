"""AVEQA (Wang et al., KDD 2020): attribute value extraction as question answering over a text.

From the paper: [CLS] attribute [SEP] context [SEP] through BERT; the start of the value is a softmax over
tokens, its end another over [h_start ; h_i]; [CLS] tells whether there is an answer; and a masked language
model is distilled from an untouched copy of the checkpoint, so that the encoder keeps what it knows of
language: L = L_QA + L_dMLM / 2 + L_NA / 2.
Choices where the paper is silent: 15 % of the text's tokens are masked at random, in a second pass, so that
the question is answered from the whole text; temperature 2; of several values the first is the target; L_QA
is over questions whose value stands in the text, all others have no answer. Where the checkpoint has no head
for masked words its word embeddings alone are the head, of teacher and student; without a checkpoint there is
nothing to distil and L_dMLM is 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

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
from model.pretrained import checkpoint_path


class Settings(inputs.TextSettings):
    distillation: float = Field(0.5, ge=0)  # weight of L_dMLM
    no_answer: float = Field(0.5, ge=0)  # weight of L_NA
    masked: float = Field(0.15, gt=0, lt=1)
    teacher_temperature: float = Field(2.0, gt=0)


class Config(inputs.Config):
    model_type = "aveqa"


class Processor(inputs.Processor):
    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """`inputs.joint`, and targets (B, 2): the first and the last token of the value, or IGNORED twice."""
        targets = torch.full((len(examples), 2), IGNORED)
        for row, example in zip(targets, examples, strict=True):
            if example.spans:
                begin, end = example.spans[0]
                row[0], row[1] = begin + len(example.attribute), end - 1 + len(example.attribute)
        return joint(self, examples) | {"targets": targets}


class MaskedWords(nn.Module):
    """Logits of words from states: BERT's own transform where the checkpoint has one, then its embeddings."""

    def __init__(self, config: BertConfig, *, transform: bool) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config) if transform else nn.Identity()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        return nn.functional.linear(self.transform(states), embeddings, self.bias)


def distilled(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of the student's distribution to the teacher's, both softened: (M, V) twice."""
    wanted = (teacher / temperature).softmax(-1)
    return -(wanted * (student / temperature).log_softmax(-1)).sum(-1).mean()


def best_end(end: Tensor, paragraph: Tensor, begin: int) -> int:
    """The last token of a value that begins at `begin`: not before it, in the same paragraph; both (T,)."""
    allowed = (paragraph == paragraph[begin]) & (torch.arange(len(end), device=end.device) >= begin)
    return int(end.masked_fill(~allowed, -torch.inf).argmax())


class Model(Baseline):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.bert = make_bert(config.bert)
        width = config.bert["hidden_size"]
        self.start_head = nn.Linear(width, 1)
        self.end_head = nn.Linear(2 * width, 1)
        self.answer_head = nn.Linear(width, 2)  # no answer, answer
        self.mlm = MaskedWords(self.bert.config, transform=config.transform)
        # In a list, so that it is neither trained nor saved nor switched to training.
        self._teacher: list[Any] = []
        self.post_init()

    @classmethod
    def start(
        cls, settings: Settings, questions: Sequence[Question], region_width: int
    ) -> tuple["Model", Processor]:
        processor = Processor.start(settings, questions)
        teacher: Any = None
        transform = False
        if settings.pretrained is not None and settings.distillation:
            path = checkpoint_path(settings.pretrained)
            found: Any = BertForMaskedLM.from_pretrained(path, output_loading_info=True)
            teacher, said = found
            transform = not any("predictions.transform" in name for name in said["missing_keys"])
        names = ("distillation", "no_answer", "masked", "teacher_temperature")
        sizes = {name: getattr(settings, name) for name in names}
        mask_token = processor.tokenizer.mask_token_id
        config = Config.of(
            bert=bert_sizes(settings, processor), transform=transform, mask_token=mask_token, **sizes
        )
        model = cls(config)
        load_bert(model.bert, settings.pretrained, processor.tokenizer)
        if teacher is not None:
            if mask_token is None:
                raise ValueError("the tokenizer has no word for a mask: distillation must be 0")
            if teacher.config.vocab_size != model.bert.config.vocab_size:
                raise ValueError(
                    f"{settings.pretrained} knows {teacher.config.vocab_size} words and the tokenizer "
                    f"{model.bert.config.vocab_size}: distillation must be 0"
                )
            if transform:
                model.mlm.transform.load_state_dict(teacher.cls.predictions.transform.state_dict())
                model.mlm.bias.data.copy_(teacher.cls.predictions.bias)
            model._teacher = [teacher.eval().requires_grad_(False)]
        return model, processor

    def states(self, input_ids: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return self.bert(input_ids, batch["attention_mask"], batch["token_type_ids"]).last_hidden_state

    def start_scores(self, states: Tensor, text_mask: Tensor) -> Tensor:
        """(B, T) log-probabilities of where the value begins."""
        logits = self.start_head(states).squeeze(-1).float()
        return logits.masked_fill(~text_mask, torch.finfo(logits.dtype).min).log_softmax(-1)

    def end_scores(self, states: Tensor, start: Tensor, text_mask: Tensor) -> Tensor:
        """(B, T) log-probabilities of where a value that begins at `start` (B,) ends."""
        rows = torch.arange(len(start), device=start.device)
        pairs = torch.cat([states[rows, start][:, None].expand_as(states), states], dim=-1)
        logits = self.end_head(pairs).squeeze(-1).float()
        positions = torch.arange(states.shape[1], device=start.device)
        allowed = text_mask & (positions >= start[:, None])
        return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).log_softmax(-1)

    def distillation_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """L_dMLM on tokens of the text that are masked at random."""
        (teacher,) = self._teacher
        teacher.to(self.device)
        input_ids = batch["input_ids"]
        masked = (torch.rand(input_ids.shape, device=self.device) < self.config.masked) & batch["text_mask"]
        if not masked.any():
            return torch.zeros((), device=self.device)
        hidden = input_ids.masked_fill(masked, self.config.mask_token)
        with torch.no_grad():
            known = teacher.bert(hidden, batch["attention_mask"], batch["token_type_ids"])
            words = known.last_hidden_state[masked]
            embeddings = teacher.bert.embeddings.word_embeddings.weight
            target = teacher.cls(words) if self.config.transform else words @ embeddings.T
        said = self.mlm(self.states(hidden, batch)[masked], self.bert.embeddings.word_embeddings.weight)
        return distilled(said.float(), target.float(), self.config.teacher_temperature)

    def forward(self, *, targets: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        states = self.states(batch["input_ids"], batch)
        answered = targets[:, 0] != IGNORED
        loss = self.config.no_answer * nn.functional.cross_entropy(
            self.answer_head(states[:, 0]).float(), answered.long()
        )
        parts: dict[str, Any] = {"answer_loss": loss.detach()}
        if answered.any():
            mask, (start, end) = batch["text_mask"][answered], targets[answered].unbind(1)
            span_loss = nn.functional.nll_loss(self.start_scores(states[answered], mask), start) / 2
            span_loss = (
                span_loss + nn.functional.nll_loss(self.end_scores(states[answered], start, mask), end) / 2
            )
            parts["span_loss"], loss = span_loss.detach(), loss + span_loss
        if self.training and self._teacher:
            kept = self.distillation_loss(batch)
            parts["distillation_loss"], loss = kept.detach(), loss + self.config.distillation * kept
        return {"loss": loss, **parts}

    @torch.no_grad()
    def extract(self, examples: Sequence[Encoded], processor: Processor) -> list[tuple[Extraction, ...]]:
        """At most one value, scored by P(answer) P(start) P(end)."""
        batch = self.on_device(processor.collate(examples))
        states = self.states(batch["input_ids"], batch)
        answer = self.answer_head(states[:, 0]).float().softmax(-1)[:, 1].tolist()
        starts = self.start_scores(states, batch["text_mask"])
        begins = starts.argmax(-1)
        ends = self.end_scores(states, begins, batch["text_mask"])
        found: list[tuple[Extraction, ...]] = []
        for row, (example, begin) in enumerate(zip(examples, begins.tolist(), strict=True)):
            if answer[row] < 0.5 or not batch["text_mask"][row, begin]:
                found.append(())
                continue
            last = best_end(ends[row], batch["paragraph"][row], begin)
            score = answer[row] * float((starts[row, begin] + ends[row, last]).exp())
            shift = len(example.attribute)
            found.append(extractions(example, [(begin - shift, last + 1 - shift, score)]))
        return found


inputs.register(Config, Model)
