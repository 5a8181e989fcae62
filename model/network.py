"""SMARTAVE's network: one structured Transformer over all modalities of a product (section 3, appendix A).

Shapes: B batch, N hyper-tokens, T text tokens, R regions, L = T + R local-tokens, D width,
A attributes asked of a row, Q questions, Y output tokens, S text segments. Masks are True where something
is there. Without `joint`, A is 1 and Q is B. Needs torch, transformers, numpy and pyarrow only.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from model import ragged
from model.decoder import CopyDecoder, Memory, View, beam_search, log_copied, mixture, precise
from model.encoder import Encoder
from model.examples import Extraction
from model.grounding import grounded
from model.packed import pack, packed_encoder
from model.processor import FIRST_SLOT, IGNORED, KINDS, NUM_SLOTS, Encoded, Processor
from model.recorded import FILL, HYPER, WIDE, Recordings
from model.standardise import standardised
from model.tagging import Tagger, batch_mean

VIEW_SIZE = 256


class Config(PretrainedConfig):
    """Sizes of a Smartave model; the defaults are the paper's."""

    model_type = "smartave"

    def __init__(
        self,
        *,
        vocab_size: int = 30522,
        max_position: int = 1024,
        region_width: int = 2048,
        region_components: int | None = None,
        hidden_size: int = 768,
        encoder_layers: int = 12,
        encoder_heads: int = 12,
        decoder_layers: int = 4,
        decoder_heads: int = 6,
        intermediate_size: int = 3072,
        dropout: float = 0.1,
        max_output_length: int = 10,
        beam_width: int = 5,
        alpha: float = 0.6,
        joint: bool = False,
        packed: bool = True,
        without_patterns: Sequence[str] = (),
        shared_query_key: bool = False,
        begin_token: int = 101,
        end_token: int = 102,
        **kwargs,
    ) -> None:
        self.vocab_size, self.max_position = vocab_size, max_position
        self.region_width, self.region_components = region_width, region_components
        self.hidden_size, self.intermediate_size, self.dropout = hidden_size, intermediate_size, dropout
        self.encoder_layers, self.encoder_heads = encoder_layers, encoder_heads
        self.decoder_layers, self.decoder_heads = decoder_layers, decoder_heads
        self.max_output_length, self.beam_width, self.alpha = max_output_length, beam_width, alpha
        self.joint, self.packed = joint, packed
        self.without_patterns, self.shared_query_key = list(without_patterns), shared_query_key
        self.begin_token, self.end_token = begin_token, end_token
        super().__init__(**kwargs)


class Network(PreTrainedModel):
    """Encoder, copy decoder on the Attribute hyper-token, and CRF tagging as an auxiliary task.

    With `joint`, the attributes of a product are asked in one pass. Each has its hyper-token, which reads
    those of the product and is read by none, so that the product is encoded once and asking several together
    gives what asking one by one does. The price: the product's tokens no longer know what is asked.

    The output matrix W_v is the word embedding, as in the checkpoint that it starts from.
    """

    config_class = Config
    region_mean: Tensor
    region_axes: Tensor
    accepts_loss_kwargs = False  # the loss is a mean already
    main_input_name = "input_ids"
    recordings: Recordings | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, width)
        self.position = nn.Embedding(config.max_position, width)
        self.hyper = nn.Embedding(NUM_SLOTS, width)
        self.modality = nn.Embedding(len(KINDS), width)
        self.token_type = nn.Embedding(2, width)  # of hyper-tokens, of local-tokens
        components = config.region_components
        self.region = nn.Linear(components or config.region_width, width)
        self.register_buffer("region_mean", torch.zeros(config.region_width))
        shape = (config.region_width, components) if components else (config.region_width,)
        self.register_buffer("region_axes", torch.ones(shape))
        self.embedding_norm = nn.LayerNorm(width, eps=1e-12)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.encoder = Encoder(
            num_layers=config.encoder_layers,
            hidden_size=width,
            num_heads=config.encoder_heads,
            intermediate_size=config.intermediate_size,
            dropout=config.dropout,
            without=config.without_patterns,
            shared=config.shared_query_key,
        )
        self.decoder = CopyDecoder(
            num_layers=config.decoder_layers,
            hidden_size=width,
            num_heads=config.decoder_heads,
            intermediate_size=config.intermediate_size,
            dropout=config.dropout,
            view_size=VIEW_SIZE if config.joint else None,
        )
        self.vocabulary_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.tagger = Tagger(hidden_size=width, view_size=VIEW_SIZE if config.joint else None)
        self.view = View(hidden_size=width, view_size=VIEW_SIZE) if config.joint else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if module is self.region:  # features of unit variance become tokens of unit variance
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def standardise(self, features: Tensor) -> Tensor:
        """(..., region_width) to what W_p takes, (..., region_components or region_width)."""
        return standardised(features, self.region_mean, self.region_axes)

    def words(self, ids: Tensor) -> Tensor:
        """Word embeddings (..., D).

        The output matrix, which is the same, has a dense gradient; to it this one is added as rows, and not
        as two more matrices that are zero almost everywhere.
        """
        return nn.functional.embedding(ids, self.word.weight, sparse=True)

    def embed_local(
        self, at: Tensor, input_ids: Tensor, regions: Tensor, position: Tensor, kind: Tensor
    ) -> Tensor:
        """Local-tokens at the flat places `at` of (B, L), as (len(at), D).

        Word or projected region, position, type and modality (section 3.3); positions restart in segments.
        """
        num_text, num_local = input_ids.shape[1], position.shape[1]
        at = at % position.numel()  # what only fills up is beyond it
        row, column = at // num_local, at % num_local
        local = self.words(input_ids[row, column.clamp_max(num_text - 1)])
        image = (column >= num_text).nonzero().flatten()
        features = regions[row[image], column[image] - num_text]
        projected = self.region(self.standardise(features).to(self.region.weight.dtype))
        local = local.index_copy(0, image, projected.to(local.dtype))
        position, kind = position.flatten()[at], kind.flatten()[at]
        local = local + self.position(position) + self.token_type.weight[1] + self.modality(kind)
        return self.embedding_dropout(self.embedding_norm(local))

    def encode(
        self,
        *,
        hyper_slot: Tensor,
        hyper_kind: Tensor,
        hyper_mask: Tensor,
        input_ids: Tensor,
        segment: Tensor,
        position: Tensor,
        regions: Tensor,
        copy_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The encoded hyper-tokens of the attributes (B, A, D), which are first, and text tokens (B, T, D).

        Of text tokens those where `copy_mask` is True are used: the others have no defined content.
        """
        is_attribute = hyper_mask & (hyper_slot == FIRST_SLOT["attribute"])
        num_attributes = int(is_attribute.sum(1).max())
        private = is_attribute if self.config.joint else None
        batch, num_text = input_ids.shape
        # Hyper-tokens enter small, as they are: normalised, they would outweigh what they gather.
        hyper = self.hyper(hyper_slot) + self.token_type.weight[0] + self.modality(hyper_kind)
        hyper = self.embedding_dropout(hyper)
        kind = hyper_kind.gather(1, segment.clamp_min(0))  # (B, L)
        if self.config.packed:
            fits = ragged.fits(self.encoder.num_heads, hyper)
            if recorded := self.training and self.encoder.compiled and fits:
                more, more_hyper = (0, -segment.shape[1] % WIDE), (0, -hyper.shape[1] % HYPER)
                segment = nn.functional.pad(segment, more, value=-1)
                position, kind = (nn.functional.pad(x, more) for x in (position, kind))
                hyper, hyper_mask = (
                    nn.functional.pad(hyper, (0, 0, *more_hyper)),
                    nn.functional.pad(hyper_mask, more_hyper),
                )
                private = None if private is None else nn.functional.pad(private, more_hyper)
            packing = pack(hyper_mask, segment, private, FILL if recorded else None)
            local = self.embed_local(packing.local_at, input_ids, regions, position, kind)
            hyper = hyper.flatten(0, 1).index_select(0, packing.hyper_at)
            if recorded:
                self.recordings = self.recordings or Recordings(self.encoder)
                encoded = self.recordings(hyper, local, packing)
            else:
                used = packing.pack(is_attribute, nn.functional.pad(copy_mask, (0, regions.shape[1])))
                encoded = packed_encoder(self.encoder, hyper, local, packing, keep=used)
            hyper, text = packing.unpack(*encoded, num_text)
            return hyper[:, :num_attributes], text
        everywhere = torch.arange(segment.numel(), device=segment.device)
        local = self.embed_local(everywhere, input_ids, regions, position, kind).unflatten(0, (batch, -1))
        hyper, local = self.encoder(hyper, local, hyper_mask, segment, private)
        return hyper[:, :num_attributes], local[:, :num_text]

    def embed_output(self, tokens: Tensor, position: Tensor | None = None) -> Tensor:
        """Output tokens (Q, Y), at positions 0 to Y - 1 or all at the one that is given, as (Q, Y, D)."""
        if position is None:
            position = torch.arange(tokens.shape[1], device=tokens.device)
        return self.embedding_dropout(self.embedding_norm(self.words(tokens) + self.position(position)))

    def vocabulary(self, states: Tensor) -> Tensor:
        """Log-probabilities to generate each word, (..., D) to (..., V)."""
        logits = nn.functional.linear(states, self.word.weight, self.vocabulary_bias)
        return precise(logits).log_softmax(-1)

    @staticmethod
    def counts(batch: Mapping[str, Tensor]) -> Tensor:
        """The output and the text tokens that the two losses are means over, (2,)."""
        return torch.stack([(batch["targets"] != IGNORED).sum(), batch["tag_mask"].sum()])

    def forward(
        self,
        *,
        input_ids: Tensor,
        copy_mask: Tensor,
        tag_index: Tensor,
        tag_mask: Tensor,
        tags: Tensor,
        decoder_input_ids: Tensor,
        targets: Tensor,
        counts: Tensor | None = None,
        **layout: Tensor,
    ) -> dict[str, Tensor]:
        """The loss L = L_D + alpha L_Seq and its parts, means over valid tokens; see Processor.collate.

        Of a part of a batch, `counts` is what `Model.counts` says of the whole, so that the losses add up.
        """
        outputs, texts = self.counts({"targets": targets, "tag_mask": tag_mask}) if counts is None else counts
        # Before anything else: later it would wait for a GPU to encode.
        asked = (targets != IGNORED).flatten().nonzero().flatten()
        attributes, text = self.encode(input_ids=input_ids, copy_mask=copy_mask, **layout)
        memory = self.remember(attributes, text, copy_mask, layout["hyper_mask"])
        states, copy, gate, _ = self.decoder(self.embed_output(decoder_input_ids), memory)
        copied = log_copied(copy, memory.of_question(input_ids), targets)
        states, wanted, gate, copied = (  # the vocabulary is wide: only for tokens that count
            x.flatten(0, 1).index_select(0, asked) for x in (states, targets, gate, copied)
        )
        generated = self.vocabulary(states).gather(-1, wanted[:, None]).squeeze(-1)
        log_likelihood = torch.logaddexp(
            nn.functional.logsigmoid(gate) + generated, nn.functional.logsigmoid(-gate) + copied
        )
        decoder_loss = batch_mean(-log_likelihood.sum(), outputs)
        emissions = self.emissions(memory).flatten(0, 1)  # (Q * T, C)
        emissions = emissions.index_select(0, tag_index.flatten()).unflatten(0, tag_index.shape)
        tagging_loss = self.tagger.loss(emissions, tags, tag_mask, texts)
        loss = decoder_loss + self.config.alpha * tagging_loss
        return {"loss": loss, "decoder_loss": decoder_loss.detach(), "tagging_loss": tagging_loss.detach()}

    def remember(self, attributes: Tensor, text: Tensor, copy_mask: Tensor, hyper_mask: Tensor) -> Memory:
        """What decoder and tagger read of an encoded batch."""
        if self.view is None:
            return self.decoder.remember(attributes.squeeze(1), text, copy_mask)
        asked = hyper_mask[:, : attributes.shape[1]]
        view = self.view(text, attributes, asked)
        return self.decoder.remember(attributes[asked], text, copy_mask, asked, view)

    def emissions(self, memory: Memory) -> Tensor:
        """The tagger's emissions for each question, (Q, T, C)."""
        emissions = memory.of_question(self.tagger.emissions(memory.text))
        return emissions if memory.view is None else emissions + self.tagger.emissions_of_view(memory.view)

    def next_token(self, memory: Memory, input_ids: Tensor, width: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The step of `beam_search`; each hypothesis keeps the keys and values of its earlier tokens."""
        ids = memory.of_question(input_ids)
        past = self.decoder.no_past(len(ids) * width)
        same = memory.of_question(precise((input_ids[:, :, None] == input_ids[:, None, :]).to(memory.text)))

        def step(tokens: Tensor, parents: Tensor) -> Tensor:
            nonlocal past
            position = tokens.new_tensor([past[0].shape[3]])
            past = [kept.index_select(1, parents.flatten()) for kept in past]
            states, copy, gate, past = self.decoder(self.embed_output(tokens, position), memory, past)
            return mixture(self.vocabulary(states), copy @ same, gate, ids)

        return step

    @torch.no_grad()
    def extract(self, examples: Sequence[Encoded], processor: Processor) -> list[tuple[Extraction, ...]]:
        """The values of each example by beam search, the most probable output first and only."""
        batch = {name: tensor.to(self.device) for name, tensor in processor.collate(examples).items()}
        input_ids, copy_mask = batch["input_ids"], batch["copy_mask"]
        names = ("hyper_slot", "hyper_kind", "hyper_mask", "input_ids", "segment", "position", "regions")
        attributes, text = self.encode(copy_mask=copy_mask, **{name: batch[name] for name in names})
        memory = self.remember(attributes, text, copy_mask, batch["hyper_mask"])
        step = self.next_token(memory, input_ids, self.config.beam_width)
        if processor.grounded:
            step = grounded(step, [processor.ground(one) for one in examples], self.config.beam_width)
        tokens, scores = beam_search(
            step,
            batch_size=len(examples),
            width=self.config.beam_width,
            max_length=self.config.max_output_length,
            begin=self.config.begin_token,
            end=self.config.end_token,
            num_best=1,
            device=self.device,
        )
        shares = self.copied_shares(memory, input_ids, tokens[:, 0]).cpu().numpy()
        own = memory.of_question(copy_mask).cpu().numpy()
        best, probabilities = tokens[:, 0].tolist(), scores[:, 0].exp().tolist()
        return [
            processor.decode(example, output, probability, share[:, mask])
            for example, output, probability, share, mask in zip(
                examples, best, probabilities, shares, own, strict=True
            )
        ]

    def copied_shares(self, memory: Memory, input_ids: Tensor, output: Tensor) -> Tensor:
        """Of each output token (Q, Y) the share of its probability copied from each text token, (Q, Y, T)."""
        begins = torch.full_like(output[:, :1], self.config.begin_token)
        states, copy, gate, _ = self.decoder(
            self.embed_output(torch.cat([begins, output[:, :-1]], dim=1)), memory
        )
        generated = gate.sigmoid() * self.vocabulary(states).gather(-1, output[..., None]).squeeze(-1).exp()
        same = memory.of_question(input_ids)[:, None] == output[..., None]
        copied = (1 - gate.sigmoid())[..., None] * copy * same
        return copied / (generated + copied.sum(-1)).clamp_min(1e-30)[..., None]
