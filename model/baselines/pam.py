"""PAM (Lin et al., KDD 2021): one multimodal Transformer reads text, OCR and objects and writes the value.

From the paper and from M4C, whose recipe it follows: text through BERT's first 3 layers; OCR words as
vectors of their letters (n-grams and PHOC) and boxes; objects as detector features and boxes; a Transformer
of 4 layers that is encoder and decoder at once (inputs see inputs, an output sees all before it). Each
output is the best of three sources: a word of the vocabulary, a word of the text or an OCR word by a
pointer (W_q z)(W_k x) / sqrt(d). The vocabulary changes with category and attribute: the words of their
training values. A word that resembles one of these gets lambda = 0.05 times its similarity (0..100) on top.
Every place where the right word stands is right, so the loss is binary cross-entropy over all candidates;
greedy decoding, at most 10 outputs. The category is predicted beside it.
Choices: PAM is trained per attribute and sees no name; here the name stands before the text, as BERT's
first segment. Words are normalised, split as the scores split them. Character n-grams are hashed into a
trained table instead of fastText's 8 GB; OCR words have no region feature, which our detector does not
make, and their box is the line's, shared out by letters. Similarity is difflib's and 0 below 60. Several
values are joined by a separator; no value is the end at once. The category is a softmax on [CLS]. Where M4C
draws one of several places of the last word as the next input, so does this model; the detector's last
layer is not tuned.
"""

import difflib
import itertools
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from model.baselines import inputs
from model.baselines.inputs import (
    IGNORED,
    Baseline,
    Regions,
    bert_sizes,
    joint,
    load_bert,
    make_bert,
    stacked_regions,
)
from model.examples import Extraction, Product, Question, Source
from model.metrics import normalise, words

END, SEPARATOR = 0, 1  # the first two words of the vocabulary
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
FREQUENT = (
    "thheineranreesonstntenatedndtooreatiartengalitasishaetseouoflesaverorarihinemedecotaecsillsonalilael"
)
BIGRAMS = [FREQUENT[i : i + 2] for i in range(0, len(FREQUENT), 2)]  # fifty, of English
PHOC = sum((2, 3, 4, 5)) * len(LETTERS) + 2 * len(BIGRAMS)  # 604


class Settings(inputs.Settings):
    """The paper's; `max_length: 512` is the generous variant."""

    image: bool = True
    ocr: bool = True
    encoder_layers: int = Field(3, ge=1)
    fusion_layers: int = Field(4, ge=1)
    max_length: int = Field(100, ge=8)  # word pieces of attribute and text
    max_ocr: int = Field(100, ge=1)  # words
    max_objects: int = Field(10, ge=1)
    region_components: int | None = Field(None, ge=1)  # see model.standardise
    max_output_length: int = Field(10, ge=1)
    similarity: float = Field(0.05, ge=0)
    buckets: int = Field(20_000, ge=1)  # of hashed character n-grams


class Config(inputs.Config):
    model_type = "pam"


def phoc(word: str) -> np.ndarray:
    """Pyramidal histogram of characters: (604,) of 0 and 1.

    On levels 2 to 5 the word is cut into as many parts; a letter is in a part that covers half of it or more.
    The 50 bigrams likewise on level 2. Letters other than a-z and 0-9 are in none.
    """
    size = len(word)
    found = np.zeros(PHOC, np.float32)

    def parts(begin: float, end: float, level: int) -> list[int]:
        overlap = [min(end, (p + 1) / level) - max(begin, p / level) for p in range(level)]
        return [p for p, length in enumerate(overlap) if length / (end - begin) >= 0.5 - 1e-9]

    offset = 0
    for level in (2, 3, 4, 5):
        for i, letter in enumerate(word):
            if letter in LETTERS:
                for part in parts(i / size, (i + 1) / size, level):
                    found[offset + part * len(LETTERS) + LETTERS.index(letter)] = 1
        offset += level * len(LETTERS)
    for i in range(size - 1):
        if word[i : i + 2] in BIGRAMS:
            for part in parts(i / size, (i + 2) / size, 2):
                found[offset + part * len(BIGRAMS) + BIGRAMS.index(word[i : i + 2])] = 1
    return found


def ngrams(word: str, buckets: int) -> list[int]:
    """Buckets of the 3- to 5-grams of `<word>` and of the whole."""
    whole = f"<{word}>"
    grams = {whole} | {whole[i : i + n] for n in (3, 4, 5) for i in range(len(whole) - n + 1)}
    return sorted(zlib.crc32(gram.encode()) % buckets for gram in grams)


@dataclass(frozen=True, slots=True)
class Word:
    """A word that can be pointed at: normalised, where it stands, and its place among the inputs."""

    word: str
    source: Source
    position: int  # in the joint row of text, or among the OCR words
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # share of the picture


@dataclass(slots=True)
class Encoded(inputs.Encoded):
    pointed: list[Word]
    ocr: list[Word]
    outputs: list[str]  # the right words, "" for the separator; without the end


class Processor(inputs.Processor):
    """`vocabulary` are normalised words after END and SEPARATOR, `spelling` as training mostly wrote them;
    `known` are the numbers of an attribute's words by category, under "" of all categories."""

    vocabulary: list[str]
    spelling: list[str]
    known: dict[str, dict[str, list[int]]]
    categories: list[str]
    image: bool
    read_ocr: bool
    max_ocr: int
    max_objects: int
    max_output_length: int
    region_width: int
    similarity: float
    buckets: int

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.number = {word: 2 + i for i, word in enumerate(self.vocabulary)}
        self.similar = lru_cache(maxsize=1 << 18)(self._similar)

    def allowed(self, category: str, attribute: str) -> list[int]:
        """The vocabulary's words that this attribute has in this category, else in any, else none."""
        everywhere = self.known.get(attribute, {})
        return everywhere.get(category, everywhere.get("", []))

    def _similar(self, word: str, category: str, attribute: str) -> float:
        known = [self.vocabulary[i - 2] for i in self.allowed(category, attribute)]
        nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
        return 100 * difflib.SequenceMatcher(None, word, nearest[0]).ratio() if nearest else 0.0

    def encode(self, question: Question) -> Encoded:
        base = super().encode(question)
        product, shift = question.product, len(base.attribute)
        pointed = []
        waiting: list[tuple[str, int, int]] = []
        for i, place in enumerate(base.places):
            if place is None:
                waiting = []
                continue
            if not waiting and (i == 0 or base.places[i - 1] is None):
                waiting = words(product.paragraphs[place.index or 0][0])
            while waiting and waiting[0][2] <= (place.begin or 0):
                waiting.pop(0)
            if waiting and waiting[0][1] < (place.end or 0):
                word, begin, end = waiting.pop(0)
                pointed.append(Word(word, Source("text", place.index, begin, end), i + shift))
        outputs: list[str] = []
        for value in question.values:
            outputs += ([""] if outputs else []) + [word for word, _, _ in words(value)]
        if len(outputs) >= self.max_output_length:
            self.truncated["outputs"] += 1
        outputs = outputs[: self.max_output_length - 1]
        read = ocr_words(product, self.max_ocr) if self.read_ocr else []
        return Encoded(
            question, base.attribute, base.ids, base.places, [], pointed=pointed, ocr=read, outputs=outputs
        )

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Candidates C are [vocabulary V ; joint row T ; OCR words O].

        Returns `inputs.joint`; letters (B, O, G) n-grams, padded with `buckets`; phoc (B, O, 604), ocr_boxes
        (B, O, 4), ocr_mask (B, O); regions (B, R, width), boxes (B, R, 4), region_mask (B, R);
        allowed (B, C) bool; bonus (B, C); targets (B, Y, C) of 0 and 1, all 0 where the right word stands
        nowhere; step_mask (B, Y); category (B,).
        """
        batch = joint(self, examples)
        del batch["paragraph"], batch["text_mask"]
        rows, size = batch["input_ids"].shape
        first_text, count = 2 + len(self.vocabulary), max(1, max(len(one.ocr) for one in examples))
        first_ocr = first_text + size
        grams = [[ngrams(word.word, self.buckets) for word in one.ocr] for one in examples]
        longest = max((len(one) for row in grams for one in row), default=1)
        letters = torch.full((rows, count, longest), self.buckets)
        shapes, ocr_boxes = torch.zeros(rows, count, PHOC), torch.zeros(rows, count, 4)
        ocr_mask = torch.zeros(rows, count, dtype=torch.bool)
        allowed = torch.zeros(rows, first_ocr + count, dtype=torch.bool)
        bonus = torch.zeros(rows, first_ocr + count)
        steps = max(len(one.outputs) for one in examples) + 1
        targets = torch.zeros(rows, steps, first_ocr + count)
        step_mask = torch.zeros(rows, steps, dtype=torch.bool)
        for row, one in enumerate(examples):
            question = one.question
            key = (question.product.category, question.attribute)
            own = self.allowed(*key)
            allowed[row, [END, SEPARATOR, *own]] = True
            columns: dict[str, list[int]] = {self.vocabulary[i - 2]: [i] for i in own}
            columns[""] = [SEPARATOR]
            for first, found in ((first_text, one.pointed), (first_ocr, one.ocr)):
                for word in found:
                    allowed[row, first + word.position] = True
                    bonus[row, first + word.position] = self.similarity * self.similar(word.word, *key)
                    columns.setdefault(word.word, []).append(first + word.position)
            for step, output in enumerate(one.outputs):
                targets[row, step, columns.get(output, [])] = 1
            targets[row, len(one.outputs), END] = 1
            step_mask[row, : len(one.outputs) + 1] = True
            for word in one.ocr:
                own_grams = grams[row][word.position]
                letters[row, word.position, : len(own_grams)] = torch.tensor(own_grams)
                shapes[row, word.position] = torch.from_numpy(phoc(word.word))
                ocr_boxes[row, word.position] = torch.tensor(word.box)
                ocr_mask[row, word.position] = True
        products = [one.question.product for one in examples]
        regions, region_mask = stacked_regions(products, self.region_width, self.max_objects)
        numbers = {name: i for i, name in enumerate(self.categories)}
        return batch | {
            "letters": letters,
            "phoc": shapes,
            "ocr_boxes": ocr_boxes,
            "ocr_mask": ocr_mask,
            "regions": regions,
            "boxes": stacked_boxes(products, regions.shape[1]),
            "region_mask": region_mask & self.image,
            "allowed": allowed,
            "bonus": bonus,
            "targets": targets,
            "step_mask": step_mask,
            "category": torch.tensor([numbers.get(one.category, IGNORED) for one in products]),
        }

    def spell(self, example: Encoded, columns: Sequence[int], size: int) -> tuple[str, Source]:
        """The value that candidates spell: in the text's own letters where it is one stretch of it."""
        first_text = 2 + len(self.vocabulary)
        own = {first_text + word.position: word for word in example.pointed}
        own |= {first_text + size + word.position: word for word in example.ocr}
        copied = [own.get(column) for column in columns]
        first, product = copied[0], example.question.product
        if first is not None and all(word is not None for word in copied):
            places = [word.source for word in copied if word is not None]
            kind, index = first.source.kind, first.source.index or 0
            text = product.paragraphs[index][0] if kind == "text" else product.ocr[index].text
            together = all(
                (a.kind, a.index) == (b.kind, b.index)
                and (a.end or 0) <= (b.begin or 0)
                and not words(text[a.end : b.begin])
                for a, b in itertools.pairwise(places)
            )
            if together:
                begin, end = places[0].begin, places[-1].end
                return text[begin:end], Source(kind, index, begin, end)
        spelled = [
            self.spelling[column - 2] if word is None else _letters(product, word.source)
            for column, word in zip(columns, copied, strict=True)
        ]
        return spaced(spelled), Source("vocabulary")


def _letters(product: Product, source: Source) -> str:
    index = source.index or 0
    text = product.paragraphs[index][0] if source.kind == "text" else product.ocr[index].text
    return text[source.begin : source.end]


def spaced(parts: Sequence[str]) -> str:
    """Words with blanks between, but for scripts that have none."""
    text = ""
    for part in parts:
        blank = text and len(words(text[-1] + part[0])) < 2
        text += (" " if blank else "") + part
    return text


def ocr_words(product: Product, limit: int) -> list[Word]:
    """The words of the OCR lines with their boxes; a line's box is shared out by letters."""
    whole = product.boxes[-1] if product.boxes is not None and len(product.boxes) else None
    quads = [line.quad for line in product.ocr]
    width = float(whole[2]) if whole is not None else max((max(quad[0::2]) for quad in quads), default=1.0)
    height = float(whole[3]) if whole is not None else max((max(quad[1::2]) for quad in quads), default=1.0)
    width, height = max(width, 1.0), max(height, 1.0)
    found: list[Word] = []
    for index, line in enumerate(product.ocr):
        x1, x2 = min(line.quad[0::2]), max(line.quad[0::2])
        y1, y2 = min(line.quad[1::2]) / height, max(line.quad[1::2]) / height
        for word, begin, end in words(line.text):
            left, right = (x1 + (x2 - x1) * at / len(line.text) for at in (begin, end))
            box = (left / width, y1, right / width, y2)
            found.append(Word(word, Source("ocr", index, begin, end), len(found), box))
    return found[:limit]


def stacked_boxes(products: Sequence[Product], most: int) -> Tensor:
    """(B, R, 4) as shares of the picture, in the order of `stacked_regions`."""
    boxes = torch.zeros(len(products), most, 4)
    for row, product in enumerate(products):
        if product.boxes is not None and len(product.boxes):
            whole = np.maximum(np.tile(product.boxes[-1][2:], 2), 1.0)
            ordered = np.concatenate([product.boxes[-1:], product.boxes[:-1]])[:most] / whole
            boxes[row, : len(ordered)] = torch.from_numpy(ordered.astype(np.float32))
    return boxes


def learn_vocabulary(questions: Sequence[Question]) -> dict[str, Any]:
    """`vocabulary`, `spelling`, `known` and `categories` of a processor, from the training split."""
    spelled: dict[str, Counter[str]] = {}
    by: dict[str, dict[str, set[str]]] = {}
    for question in questions:
        of = by.setdefault(question.attribute, {"": set()})
        for value in question.values:
            for word, begin, end in words(value):
                spelled.setdefault(word, Counter())[value[begin:end]] += 1
                of[""].add(word)
                of.setdefault(question.product.category, set()).add(word)
    vocabulary = sorted(spelled)
    number = {word: 2 + i for i, word in enumerate(vocabulary)}
    return {
        "vocabulary": vocabulary,
        "spelling": [min(spelled[w], key=lambda s: (-spelled[w][s], s)) for w in vocabulary],
        "known": {
            attribute: {category: sorted(number[word] for word in found) for category, found in of.items()}
            for attribute, of in sorted(by.items())
        },
        "categories": sorted({question.product.category for question in questions}),
    }


class Model(Baseline):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.bert = make_bert(config.bert)
        width = config.bert["hidden_size"]
        sizes = {"num_hidden_layers": config.fusion_layers, "vocab_size": 1, "type_vocab_size": 4}
        self.fusion = make_bert(config.bert | sizes | {"pad_token_id": 0})
        self.text_in = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.standard = Regions(config.region_width, config.region_components)
        self.region_in = nn.Linear(self.standard.size, width)
        self.region_box = nn.Linear(4, width)
        self.letters = nn.EmbeddingBag(config.buckets + 1, 300, mode="mean", padding_idx=config.buckets)
        self.ocr_in = nn.Linear(300 + PHOC, width)
        self.ocr_box = nn.Linear(4, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.begin = nn.Parameter(0.02 * torch.randn(width))
        self.vocabulary = nn.Linear(width, config.num_words)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.category = nn.Linear(width, config.num_categories)
        self.post_init()

    @classmethod
    def start(
        cls, settings: Settings, questions: Sequence[Question], region_width: int
    ) -> tuple["Model", Processor]:
        learnt = learn_vocabulary(questions)
        names = ("image", "max_ocr", "max_objects", "max_output_length", "similarity", "buckets")
        processor = Processor.start(
            settings.model_copy(update={"ocr": False}),  # OCR words are an input of their own
            questions,
            read_ocr=settings.ocr,
            region_width=region_width,
            **learnt,
            **{name: getattr(settings, name) for name in names},
        )
        config = Config.of(
            bert=bert_sizes(settings, processor),
            fusion_layers=settings.fusion_layers,
            region_width=region_width,
            region_components=settings.region_components,
            buckets=settings.buckets,
            num_words=2 + len(learnt["vocabulary"]),
            num_categories=max(1, len(learnt["categories"])),
        )
        model = cls(config)
        load_bert(model.bert, settings.pretrained, processor.tokenizer)
        model.standard.measure(questions)
        return model, processor

    def embed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs [text ; regions ; OCR] (B, S, D), types, mask (B, S), candidates' embeddings (B, C, D)."""
        text = self.bert(
            batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
        ).last_hidden_state
        text = self.text_in(text)
        features = nn.functional.normalize(self.standard(batch["regions"]), dim=-1)
        regions = self.norms[0](self.region_in(features)) + self.norms[1](self.region_box(batch["boxes"]))
        letters = self.letters(batch["letters"].flatten(0, 1)).unflatten(0, batch["letters"].shape[:2])
        spelled = self.ocr_in(torch.cat([letters, batch["phoc"]], dim=-1))
        ocr = self.norms[2](spelled) + self.norms[3](self.ocr_box(batch["ocr_boxes"]))
        types = torch.cat(
            [torch.full_like(one[..., 0], n).long() for n, one in enumerate((text, regions, ocr))], dim=1
        )
        mask = torch.cat([batch["attention_mask"], batch["region_mask"], batch["ocr_mask"]], dim=1)
        words = self.vocabulary.weight.expand(len(text), -1, -1)
        candidates = self.norms[4](torch.cat([words, text, ocr], dim=1))
        return torch.cat([text, regions, ocr], dim=1), types, mask, candidates

    def step_scores(
        self, embedded: tuple[Tensor, Tensor, Tensor, Tensor], previous: Tensor, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Scores (B, Y, C) of outputs given those before, `previous` (B, Y - 1), and the state of [CLS]."""
        source, types, mask, candidates = embedded
        rows = torch.arange(len(source), device=source.device)[:, None]
        begin = self.begin.expand(len(source), 1, -1)
        outputs = torch.cat([begin, candidates[rows, previous]], dim=1)
        steps, size = outputs.shape[1], source.shape[1]
        seen = prefix_mask(mask, steps)
        additive = torch.zeros(seen.shape, device=seen.device, dtype=source.dtype)
        additive.masked_fill_(~seen, torch.finfo(source.dtype).min)
        places = torch.cat([torch.zeros(size), torch.arange(1, steps + 1)]).long().to(source.device)
        states = self.fusion(
            inputs_embeds=torch.cat([source, outputs], dim=1),
            attention_mask=additive[:, None],
            token_type_ids=torch.cat([types, torch.full_like(outputs[..., 0], 3).long()], dim=1),
            position_ids=places.expand(len(source), -1),
        ).last_hidden_state
        z, num_text = states[:, size:], batch["input_ids"].shape[1]
        pointed = torch.cat(
            [states[:, :num_text], states[:, size - batch["ocr_mask"].shape[1] : size]], dim=1
        )
        pointer = self.query(z) @ self.key(pointed).transpose(1, 2) / z.shape[-1] ** 0.5
        scores = torch.cat([self.vocabulary(z), pointer], dim=-1) + batch["bonus"][:, None]
        scores = scores.float().masked_fill(~batch["allowed"][:, None], torch.finfo(torch.float32).min)
        return scores, states[:, 0]

    def forward(
        self, *, targets: Tensor, step_mask: Tensor, category: Tensor, **batch: Tensor
    ) -> dict[str, Tensor]:
        embedded = self.embed(batch)
        wanted = targets[:, :-1]
        if self.training and wanted.shape[1]:
            chances = wanted.flatten(0, 1)
            chances = torch.where(chances.any(-1, keepdim=True), chances, torch.ones_like(chances))
            previous = torch.multinomial(chances, 1).unflatten(0, wanted.shape[:2]).squeeze(-1)
        else:
            previous = wanted.argmax(-1)
        scores, whole = self.step_scores(embedded, previous, batch)
        loss = output_loss(scores, targets, batch["allowed"], step_mask)
        parts = {"output_loss": loss.detach()}
        if (category != IGNORED).any():
            loss = loss + nn.functional.cross_entropy(
                self.category(whole).float(), category, ignore_index=IGNORED
            )
        return {"loss": loss, **parts}

    @torch.no_grad()
    def extract(self, examples: Sequence[Encoded], processor: Processor) -> list[tuple[Extraction, ...]]:
        """Greedy decoding; every value scored by the product of the sigmoids of the whole output."""
        batch = self.on_device(processor.collate(examples))
        embedded, size = self.embed(batch), batch["input_ids"].shape[1]
        columns = torch.zeros(len(examples), 0, dtype=torch.long, device=self.device)
        probability = torch.ones(len(examples), device=self.device)
        ended = torch.zeros(len(examples), dtype=torch.bool, device=self.device)
        for _ in range(processor.max_output_length):
            scores, _ = self.step_scores(embedded, columns, batch)
            best, column = scores[:, -1].max(-1)
            probability = torch.where(ended, probability, probability * best.sigmoid())
            column = column.masked_fill(ended, END)
            columns = torch.cat([columns, column[:, None]], dim=1)
            ended = ended | (column == END)
            if ended.all():
                break
        found = []
        for example, row, score in zip(examples, columns.tolist(), probability.tolist(), strict=True):
            row = row[: row.index(END)] if END in row else row
            values: dict[str, Extraction] = {}
            begin = 0
            for stop in [*[i for i, column in enumerate(row) if column == SEPARATOR], len(row)]:
                if row[begin:stop]:
                    value, source = processor.spell(example, row[begin:stop], size)
                    values.setdefault(normalise(value), Extraction(value, score, source))
                begin = stop + 1
            found.append(tuple(values.values()))
        return found


def prefix_mask(mask: Tensor, steps: int) -> Tensor:
    """(B, S + Y, S + Y) bool from the inputs' mask (B, S): inputs see inputs, an output also those before it.

    For inputs a, b, padding, and outputs y, z: a and b see a, b; y sees a, b, y; z sees a, b, y, z.
    """
    batch, size = mask.shape
    whole = size + steps
    seen = torch.zeros(batch, whole, whole, dtype=torch.bool, device=mask.device)
    seen[:, :, :size] = mask[:, None]
    seen[:, size:, size:] = torch.ones(steps, steps, dtype=torch.bool, device=mask.device).tril()
    return seen | torch.eye(whole, dtype=torch.bool, device=mask.device)


def output_loss(scores: Tensor, targets: Tensor, allowed: Tensor, step_mask: Tensor) -> Tensor:
    """Binary cross-entropy summed over allowed candidates, a mean over the steps that count (M4C)."""
    counted = allowed[:, None] & step_mask[..., None]
    losses = nn.functional.binary_cross_entropy_with_logits(
        scores.masked_fill(~counted, 0.0), targets, reduction="none"
    )
    return (losses * counted).sum() / step_mask.sum()


inputs.register(Config, Model)
