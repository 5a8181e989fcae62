"""From questions to tensors and back: hyper-tokens, local-tokens, tags, outputs, and where values stand.

Every text of a product becomes a segment with a hyper-token of its own; when a kind of segment
has no slot left, further texts join the last one of their kind (the paper's n <= 20).
Shapes: B batch, N hyper-tokens, T text tokens, R regions, L = T + R local-tokens, Y output tokens,
S text segments of the batch.
"""

import json
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model.examples import Extraction, Question, Source
from model.grounding import Ground, Trie, trie
from model.pretrained import word_pieces
from model.tagging import O, encode_tags

SLOTS = {"attribute": 1, "title": 1, "description": 4, "feature": 6, "other": 1, "ocr": 6, "image": 1}
KINDS = tuple(SLOTS)
FIRST_SLOT = dict(zip(SLOTS, np.cumsum([0, *SLOTS.values()]).tolist(), strict=False))
NUM_SLOTS = sum(SLOTS.values())
IGNORED = -100


@dataclass(slots=True)
class Place:
    """Where a text token stands: `text` or `ocr`, which paragraph or line, which characters."""

    kind: str
    index: int
    begin: int
    end: int


@dataclass(slots=True)
class Segment:
    """One hyper-token and its text tokens."""

    kind: str
    slot: int
    ids: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)


@dataclass(slots=True)
class Encoded:
    """One question as numbers. `tags` and `targets` are empty lists where the answer is not asked."""

    question: Question
    segments: list[Segment]  # the attribute's first; without the image's
    regions: np.ndarray  # (R, width) float16
    tags: list[list[int]]  # of every segment but the attribute's
    targets: list[int]

    @property
    def num_tokens(self) -> int:
        """Local-tokens."""
        return sum(len(segment.ids) for segment in self.segments) + len(self.regions)

    @property
    def num_asking(self) -> int:
        """Of these, the words of the attribute's name."""
        return len(self.segments[0].ids)


def fit_lengths(lengths: Sequence[int], budget: int) -> list[int]:
    """Cut the longest first until the sum is within `budget`: [2, 9, 5] in 10 gives [2, 4, 4].

    What cannot be shared evenly goes to the earliest.
    """
    lengths = list(lengths)
    if sum(lengths) <= budget:
        return lengths
    cap = 0
    while sum(min(n, cap + 1) for n in lengths) <= budget:
        cap += 1
    spare = budget - sum(min(n, cap) for n in lengths)
    fitted = []
    for n in lengths:
        extra = int(n > cap and spare > 0)
        spare -= extra
        fitted.append(min(n, cap) + extra)
    return fitted


def occurrences(needle: Sequence[int], haystack: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open spans at which `needle` stands in `haystack`; an empty needle stands nowhere."""
    size = len(needle)
    return [
        (i, i + size)
        for i in range(len(haystack) - size + 1)
        if size and list(haystack[i : i + size]) == list(needle)
    ]


class Processor:
    """Turns questions into batches, and a model's output tokens into extractions.

    Args:
        tokenizer: any with [PAD], [CLS], [SEP] and a token to part values ([unused0] or [VALUE]).
        image, ocr: whether the model sees regions and OCR lines at all.
        max_length: local-tokens (text and regions); longer texts are cut, the longest first, and counted.
        max_output_length: output tokens, the end token not counted.
        joint: whether questions about one product, one after another, are one row of a batch. The length of
            the attribute's name then takes nothing from the product's text.
        region_width: width of a region's feature.
        without: kinds of paragraphs (title, description, feature, other) that the model does not see.
        grounded: whether an output may only hold values that stand in a text of the product, or are `known`.
        spelling: values as training wrote them, by what `joined` makes of their word pieces.
        known: the values of each attribute in training.
    """

    FILE = "processor_config.json"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image: bool,
        ocr: bool,
        max_length: int,
        max_output_length: int,
        region_width: int,
        joint: bool = False,
        without: Sequence[str] = (),
        grounded: bool = False,
        spelling: Mapping[str, str] | None = None,
        known: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.without, self.grounded = list(without), grounded
        self.spelling, self.known = dict(spelling or {}), dict(known or {})
        self._tries: dict[str, Trie] = {}
        self.tokenizer = tokenizer
        self.image, self.ocr, self.joint = image, ocr, joint
        self.max_length, self.max_output_length = max_length, max_output_length
        self.region_width = region_width
        self.pad, self.begin, self.end = (
            tokenizer.pad_token_id,
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
        )
        vocabulary = tokenizer.get_vocab()
        self.separator = next(vocabulary[word] for word in ("[unused0]", "[VALUE]") if word in vocabulary)
        self.characters = "[VALUE]" in vocabulary
        self.truncated: Counter[str] = Counter()
        self._pieces = word_pieces(tokenizer)

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        names = ("image", "ocr", "joint", "max_length", "max_output_length", "region_width", "without")
        settings = {name: getattr(self, name) for name in (*names, "grounded", "spelling", "known")}
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
        (Path(folder) / self.FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: Path, **_: Any) -> "Processor":
        """What `save_pretrained` left in `folder`; what else AutoProcessor passes on is not used."""
        settings = json.loads((Path(folder) / cls.FILE).read_text(encoding="utf-8"))
        return cls(AutoTokenizer.from_pretrained(folder), **settings)

    def _ids(self, text: str) -> list[int]:
        return [piece for piece, _, _ in self._pieces(text)]

    def learn(self, questions: Iterable[Question]) -> None:
        """Which values there are, and how they are mostly written: pieces tell neither accents nor blanks."""
        written: dict[str, Counter[str]] = {}
        known: dict[str, set[str]] = {}
        for question in questions:
            for value in question.values:
                written.setdefault(self.joined(self._ids(value)), Counter())[value] += 1
                known.setdefault(question.attribute, set()).add(value)
        often = {joined: min(seen, key=lambda v: (-seen[v], v)) for joined, seen in written.items()}
        self.spelling = {joined: value for joined, value in often.items() if value != joined}
        if self.grounded:
            self.known = {attribute: sorted(values) for attribute, values in sorted(known.items())}

    def ground(self, example: Encoded) -> Ground:
        """What the output of a question may hold; long values are cut as targets are."""
        attribute = example.question.attribute
        if attribute not in self._tries:
            values = (self._ids(value)[: self.max_output_length] for value in self.known.get(attribute, ()))
            self._tries[attribute] = trie(value for value in values if value)
        texts = [
            [piece for piece, _ in pieces]
            for segment in example.segments[1:]
            for _, pieces in groupby(
                zip(segment.ids, segment.places, strict=True), key=lambda one: (one[1].kind, one[1].index)
            )
        ]
        return Ground(texts, self._tries[attribute], end=self.end, separator=self.separator)

    def _segments(self, question: Question) -> list[Segment]:
        product = question.product
        attribute = Segment("attribute", FIRST_SLOT["attribute"], self._ids(question.attribute))
        segments = [attribute]
        texts = [
            (kind, "text", index, text)
            for index, (text, source) in enumerate(product.paragraphs)
            if (kind := source if source in SLOTS else "other") not in self.without
        ]
        if self.ocr:
            texts += [("ocr", "ocr", index, line.text) for index, line in enumerate(product.ocr)]
        used: Counter[str] = Counter()
        last: dict[str, Segment] = {}
        for kind, place, index, text in texts:
            pieces = self._pieces(text)
            if not pieces:
                continue
            if used[kind] < SLOTS[kind]:
                last[kind] = Segment(kind, FIRST_SLOT[kind] + used[kind])
                segments.append(last[kind])
                used[kind] += 1
            else:
                self.truncated["texts that joined the last segment of their kind"] += 1
            last[kind].ids += [piece for piece, _, _ in pieces]
            last[kind].places += [Place(place, index, begin, end) for _, begin, end in pieces]
        return segments

    def _tags(self, question: Question, segment: Segment) -> list[int]:
        spans = []
        if segment.kind == "ocr":  # appendix B: values are matched with the OCR text
            for value in question.values:
                spans += occurrences(self._ids(value), segment.ids)
        else:
            for evidence in question.evidences:
                inside = [
                    i
                    for i, place in enumerate(segment.places)
                    if place.index == evidence.paragraph
                    and place.begin < evidence.end
                    and evidence.begin < place.end
                ]
                if inside:
                    spans.append((inside[0], inside[-1] + 1))
        return encode_tags(len(segment.ids), spans)

    def _targets(self, question: Question) -> list[int]:
        targets: list[int] = []
        for value in question.values:
            targets += ([self.separator] if targets else []) + self._ids(value)
        if len(targets) > self.max_output_length:
            self.truncated["outputs"] += 1
        return [*targets[: self.max_output_length], self.end]

    def encode(self, question: Question) -> Encoded:
        """Raises `ValueError` when regions are not `region_width` wide or leave no room for a text."""
        segments = self._segments(question)
        regions = question.product.regions if self.image else None
        if regions is None:
            regions = np.zeros((0, self.region_width), np.float16)
        if regions.shape[1] != self.region_width:
            raise ValueError(
                f"{question.product.asin}: regions are {regions.shape[1]} wide, "
                f"the model was made for {self.region_width}"
            )
        if len(regions) >= self.max_length:
            raise ValueError(
                f"{question.product.asin}: {len(regions)} regions leave no room for texts in a max_length of "
                f"{self.max_length}; raise it, or lower regions.max_boxes"
            )
        regions = regions[::-1]  # the whole image first, at a position of its own
        sharing = segments[1:] if self.joint else segments
        if self.joint:
            self._cut(segments[0], self.max_length)
        lengths = [len(segment.ids) for segment in sharing]
        for segment, kept in zip(sharing, fit_lengths(lengths, self.max_length - len(regions)), strict=True):
            self._cut(segment, kept)
        return Encoded(
            question=question,
            segments=segments,
            regions=regions,
            tags=[self._tags(question, segment) for segment in segments[1:]],
            targets=self._targets(question),
        )

    def _cut(self, segment: Segment, length: int) -> None:
        self.truncated["text tokens"] += max(0, len(segment.ids) - length)
        segment.ids, segment.places = segment.ids[:length], segment.places[:length]

    def rows(self, examples: Sequence[Encoded]) -> list[list[Encoded]]:
        """The examples of each row of a batch: one, or with `joint` neighbours that ask about one product."""
        if not self.joint:
            return [[example] for example in examples]
        return [
            list(asked) for _, asked in groupby(examples, key=lambda example: id(example.question.product))
        ]

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pads at the end. Text tokens come before regions in `segment` and `position`.

        Q questions make B rows, see `rows`; of A attributes, the most of a row, come first the hyper-tokens.

        Returns:
            hyper_slot, hyper_kind (B, N); hyper_mask (B, N) bool; the attributes' are the first.
            input_ids (B, T); segment (B, L), -1 at padding; position (B, L), from 0 in each segment.
            regions (B, R, width) float32; copy_mask (B, T) bool, False for the attributes' words.
            tag_index (S, M), into the flattened (Q * T) tokens; tag_mask (S, M) bool; tags (S, M).
            decoder_input_ids, targets (Q, Y), targets IGNORED at padding.
        """
        rows = self.rows(examples)
        batch, num_attributes = len(rows), max(len(row) for row in rows)
        texts = [[example.segments[0] for example in row] + row[0].segments[1:] for row in rows]
        num_text = max(1, *(sum(len(segment.ids) for segment in row) for row in texts))
        num_regions = max(len(row[0].regions) for row in rows)
        num_hyper = num_attributes + max(len(row[0].segments) - 1 + (len(row[0].regions) > 0) for row in rows)
        num_output = max(len(example.targets) for example in examples)
        hyper_slot = torch.zeros(batch, num_hyper, dtype=torch.long)
        hyper_kind = torch.zeros(batch, num_hyper, dtype=torch.long)
        hyper_mask = torch.zeros(batch, num_hyper, dtype=torch.bool)
        input_ids = torch.full((batch, num_text), self.pad)
        segment_of = torch.full((batch, num_text + num_regions), -1)
        position = torch.zeros(batch, num_text + num_regions, dtype=torch.long)
        regions = torch.zeros(batch, num_regions, self.region_width)
        copy_mask = torch.zeros(batch, num_text, dtype=torch.bool)
        decoder_input_ids = torch.full((len(examples), num_output), self.pad)
        targets = torch.full((len(examples), num_output), IGNORED)
        chains: list[tuple[int, list[int]]] = []
        question = 0
        for row, asked in enumerate(rows):
            owners = [*range(len(asked)), *range(num_attributes, num_hyper)]
            start, own = 0, []
            for hyper, segment in zip(owners, texts[row], strict=False):
                stop = start + len(segment.ids)
                hyper_slot[row, hyper] = segment.slot
                hyper_kind[row, hyper] = KINDS.index(segment.kind)
                hyper_mask[row, hyper] = True
                input_ids[row, start:stop] = torch.tensor(segment.ids, dtype=torch.long)
                segment_of[row, start:stop] = hyper
                position[row, start:stop] = torch.arange(stop - start)
                if hyper >= num_attributes:
                    copy_mask[row, start:stop] = True
                    own.append(start)
                start = stop
            if count := len(asked[0].regions):
                hyper = num_attributes + len(own)
                hyper_slot[row, hyper] = FIRST_SLOT["image"]
                hyper_kind[row, hyper] = KINDS.index("image")
                hyper_mask[row, hyper] = True
                segment_of[row, num_text : num_text + count] = hyper
                position[row, num_text : num_text + count] = torch.arange(count)
                regions[row, :count] = torch.from_numpy(asked[0].regions.astype(np.float32))
            for example in asked:
                chains += [
                    (question * num_text + at, tags) for at, tags in zip(own, example.tags, strict=True)
                ]
                size = len(example.targets)
                targets[question, :size] = torch.tensor(example.targets)
                decoder_input_ids[question, :size] = torch.tensor([self.begin, *example.targets[:-1]])
                question += 1
        longest = max((len(tags) for _, tags in chains), default=0) or 1
        tag_index = torch.zeros(len(chains), longest, dtype=torch.long)
        tag_mask = torch.zeros(len(chains), longest, dtype=torch.bool)
        tags = torch.full((len(chains), longest), O)
        for row, (start, labels) in enumerate(chains):
            tag_index[row, : len(labels)] = torch.arange(start, start + len(labels))
            tag_mask[row, : len(labels)] = True
            tags[row, : len(labels)] = torch.tensor(labels, dtype=torch.long)
        return {
            "hyper_slot": hyper_slot,
            "hyper_kind": hyper_kind,
            "hyper_mask": hyper_mask,
            "input_ids": input_ids,
            "segment": segment_of,
            "position": position,
            "regions": regions,
            "copy_mask": copy_mask,
            "tag_index": tag_index,
            "tag_mask": tag_mask,
            "tags": tags,
            "decoder_input_ids": decoder_input_ids,
            "targets": targets,
        }

    def decode(
        self, example: Encoded, tokens: Sequence[int], score: float, copied: Sequence[Sequence[float]]
    ) -> tuple[Extraction, ...]:
        """The values that an output spells, each with the place it was copied from.

        Args:
            tokens: output ids up to the end token, which may be missing.
            score: probability of the whole output.
            copied: (Y, T), the part of each output token's probability that was copied from each text
                token of the product, as a share of the token's whole probability. A value counts as read
                from a text when more than half of it was copied; then its spelling is the text's own.
        """
        tokens = list(tokens)
        if self.end in tokens:
            tokens = tokens[: tokens.index(self.end)]
        values, begin = [], 0
        for stop in [*[i for i, token in enumerate(tokens) if token == self.separator], len(tokens)]:
            if pieces := tokens[begin:stop]:
                values.append(self._extraction(example, pieces, score, np.asarray(copied[begin:stop])))
            begin = stop + 1
        unique = {value.value: value for value in reversed(values) if value.value}
        return tuple(value for value in values if unique.get(value.value) is value)

    def _extraction(
        self, example: Encoded, pieces: list[int], score: float, copied: np.ndarray
    ) -> Extraction:
        own = example.segments[1:]  # the attribute's name is no place to read a value
        ids = [piece for segment in own for piece in segment.ids]
        places = [place for segment in own for place in segment.places]
        spans = [
            (begin, end)
            for begin, end in occurrences(pieces, ids)
            if len({(place.kind, place.index) for place in places[begin:end]}) == 1
        ]
        if spans and copied.sum() > 0.5 * len(pieces):
            steps = np.arange(len(pieces))
            begin, end = max(spans, key=lambda span: copied[steps, np.arange(*span)].sum())
            first, last = places[begin], places[end - 1]
            source = Source(first.kind, first.index, first.begin, last.end)
            product = example.question.product
            text = (
                product.paragraphs[first.index][0] if first.kind == "text" else product.ocr[first.index].text
            )
            return Extraction(text[first.begin : last.end], score, source)
        return Extraction(self.spell(pieces), score)

    def spell(self, pieces: Sequence[int]) -> str:
        """Word pieces to text as training wrote it most often; what it never wrote is `joined`."""
        text = self.joined(pieces)
        return self.spelling.get(text, text)

    def joined(self, pieces: Sequence[int]) -> str:
        """Word pieces to text, without the blanks that the tokenizer puts around punctuation."""
        words = self.tokenizer.convert_ids_to_tokens(list(pieces))
        if self.characters:
            return "".join(words)
        text = ""
        for word in words:
            joined = word.startswith("##")
            bare = word[2:] if joined else word
            glue = joined or not text or bare in string.punctuation or text[-1] in string.punctuation
            text += bare if glue else " " + bare
        return text
