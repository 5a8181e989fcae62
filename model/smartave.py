"""SMARTAVE as the paper sets it up: its settings, and how a model starts from them and a training split."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedTokenizerBase

from model.encoder import StructuredAttention
from model.examples import Question
from model.network import Config, Network
from model.pretrained import Checkpoint, checkpoint_path, same_words, start_tokenizer
from model.processor import Processor
from model.standardise import measured
from pipeline import params

__all__ = ["Config", "Model", "Processor", "Settings"]


TextKind = Literal["title", "description", "feature", "other"]
Pattern = Literal["h2h", "h2l", "l2h", "l2l"]


class Settings(params.Settings):
    """The paper's Table 6 for MAVE; `image` and `ocr` say what the model sees."""

    image: bool = True
    ocr: bool = True
    pretrained: str | None = "google-bert/bert-base-uncased"  # a folder, a hub name or package:NAME/FOLDER
    pretrained_layers: bool | Literal["local"] = False  # local: Q, K and V of local-to-local, no others
    tokenizer: str = "pretrained"  # or another checkpoint's, or "characters": those of the training split
    region_components: int | None = Field(None, ge=1)  # see model.standardise; null: the features as such
    hidden_size: int = Field(768, ge=1)
    encoder_layers: int = Field(12, ge=1)
    encoder_heads: int = Field(12, ge=1)
    decoder_layers: int = Field(4, ge=1)
    decoder_heads: int = Field(6, ge=1)
    intermediate_size: int = Field(3072, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    max_length: int = Field(1024, ge=8)
    max_output_length: int = Field(10, ge=1)
    beam_width: int = Field(5, ge=1)
    alpha: float = Field(0.6, ge=0)
    joint: bool = False  # all attributes of a product in one pass; the paper asks one by one
    grounded: bool = False  # say only what stands in a text, or what training knows of the attribute
    packed: bool = True  # false: the encoder in reference form, the same numbers slower
    compile: bool = False  # layers by torch.compile, half a minute, up to three times; recorded on a GPU
    without_texts: tuple[TextKind, ...] = ()  # Figure 3: kinds of paragraphs the model does not see
    without_patterns: tuple[Pattern, ...] = ()  # Figure 4: attention patterns left out
    shared_query_key: bool = False  # Table 3: one Q and one K for the four patterns


class Model(Network):
    """The network, and how it starts from settings, a training split and a pretrained checkpoint."""

    @classmethod
    def start(
        cls, settings: Settings, questions: Sequence[Question], region_width: int
    ) -> tuple["Model", Processor]:
        """An untrained model and its processor, from the settings and the training split.

        Takes from the training questions the statistics of the region features and, with
        `tokenizer: characters`, the vocabulary. Raises `ValueError` when the pretrained checkpoint
        does not fit.
        """
        path = checkpoint_path(settings.pretrained) if settings.pretrained else None
        tokenizer = start_tokenizer(settings.pretrained, settings.tokenizer, questions)
        processor = Processor(
            tokenizer,
            image=settings.image,
            ocr=settings.ocr,
            max_length=settings.max_length,
            max_output_length=settings.max_output_length,
            region_width=region_width,
            joint=settings.joint,
            without=settings.without_texts,
            grounded=settings.grounded,
        )
        processor.learn(questions)
        seen = {"image", "ocr", "without_texts", "grounded", "compile"}
        names = set(Settings.model_fields) - seen - {"pretrained", "pretrained_layers", "tokenizer"}
        config = Config(
            vocab_size=len(tokenizer),
            max_position=max(settings.max_length, settings.max_output_length + 1, 512),
            region_width=region_width,
            begin_token=processor.begin,
            end_token=processor.end,
            **settings.model_dump(include=names - {"max_length"}),
        )
        model = cls(config)
        if path is not None:
            model.load_pretrained(path, layers=settings.pretrained_layers, tokenizer=tokenizer)
        elif settings.pretrained_layers:
            asked = str(settings.pretrained_layers).lower()
            raise ValueError(
                f"pretrained_layers: {asked} asks for a checkpoint's layers, and pretrained is null"
            )
        if settings.image:
            model.measure_regions(questions)
        model.encoder.compiled = settings.compile
        return model, processor

    @torch.no_grad()
    def load_pretrained(
        self, path: str, *, layers: bool | Literal["local"], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Word and position embeddings from a checkpoint, by word; with `layers` its layers too.

        With "local" its Q, K and V go to local-to-local attention alone: it never saw a hyper-token.

        Raises `ValueError` when the checkpoint is not like BERT or its sizes are others.
        """
        start = Checkpoint(path)
        width = start.words.shape[1]
        if width != self.config.hidden_size:
            raise ValueError(f"{path} is {width} wide, hidden_size is {self.config.hidden_size}")
        ours, theirs = same_words(tokenizer, start.tokenizer)
        self.word.weight[ours] = start.words[theirs]
        known = min(self.config.max_position, len(start.positions))
        self.position.weight[:known] = start.positions[:known]
        self.embedding_norm.load_state_dict(start.norm.state_dict())
        if layers:
            parts = start.layers
            for theirs_name, our_name in (
                ("num_attention_heads", "encoder_heads"),
                ("intermediate_size", "intermediate_size"),
            ):
                size, our_size = getattr(start.config, theirs_name), getattr(self.config, our_name)
                if size != our_size:
                    raise ValueError(f"{path}: its {theirs_name} is {size}, {our_name} is {our_size}")
            self.encoder.start_from(parts, ["l2l"] if layers == "local" else StructuredAttention.patterns)

    @torch.no_grad()
    def measure_regions(self, questions: Sequence[Question]) -> None:
        """Let region features start standardised (`model.standardise`), which W_p absorbs."""
        mean, axes = measured(questions, tuple(self.region_axes.shape))
        self.region_mean.copy_(mean)
        self.region_axes.copy_(axes)


AutoConfig.register(Config.model_type, Config)
AutoModel.register(Config, Model)
AutoProcessor.register(Config, Processor)
