"""Beam search beside `transformers` generate, on the same decoder and memory: same outputs, both timed.

The paper's decoder (4 layers, 768 wide, 30,522 words), 16 examples of 128 text tokens, beam 5, at most 10
tokens. transformers computes the vocabulary at the last token alone and recomputes its short prefixes;
what does not depend on the output is computed once for it too.
Weights are random, with a bias towards the end token so that outputs have a few tokens.
"""

from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.timing import best_s, machine
from model.decoder import beam_search, mixture
from model.smartave import Config, Model

EXAMPLES, TEXT, MAX_LENGTH, END_BIAS = 16, 128, 10, 9.0


class Peer(transformers.PreTrainedModel, transformers.GenerationMixin):
    """Our decoder as a model that transformers generates from."""

    config_class = transformers.PretrainedConfig

    def __init__(self, model: Model, memory: Tensor, text: Tensor, text_ids: Tensor) -> None:
        super().__init__(transformers.PretrainedConfig.from_dict({"vocab_size": model.config.vocab_size}))
        self.model, self.parts = model, (memory, text, text_ids)
        self.expanded: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def forward(self, input_ids: Tensor, **kwargs: object) -> transformers.modeling_outputs.CausalLMOutput:
        times = len(input_ids) // EXAMPLES  # of each example's beams, which stand together
        if times not in self.expanded:
            memory, text, ids = (part.repeat_interleave(times, 0) for part in self.parts)
            remembered = self.model.decoder.remember(memory, text, torch.ones_like(ids, dtype=torch.bool))
            self.expanded[times] = remembered, ids, (ids[:, :, None] == ids[:, None, :]).float()
        remembered, ids, same = self.expanded[times]
        states, copy, gate, _ = self.model.decoder(self.model.embed_output(input_ids), remembered)
        vocabulary = self.model.vocabulary(states[:, -1:])
        return transformers.modeling_outputs.CausalLMOutput(
            logits=mixture(vocabulary, copy[:, -1:] @ same, gate[:, -1:], ids)
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        return {"input_ids": input_ids}


@torch.no_grad()
def main() -> None:
    transformers.set_seed(0)
    config = Config(encoder_layers=1)
    model = Model(config).eval()
    model.vocabulary_bias[config.end_token] = END_BIAS
    memory, text = torch.randn(EXAMPLES, 768), torch.randn(EXAMPLES, TEXT, 768)
    ids = torch.randint(1000, config.vocab_size, (EXAMPLES, TEXT))
    peer = Peer(model, memory, text, ids).eval()
    begins = torch.full((EXAMPLES, 1), config.begin_token)

    def theirs() -> Tensor:
        return peer.generate(
            begins,
            num_beams=config.beam_width,
            max_length=MAX_LENGTH + 2,
            eos_token_id=config.end_token,
            pad_token_id=config.end_token,
            length_penalty=0.0,
            do_sample=False,
            use_cache=False,
        )

    def ours(num_best: int) -> Tensor:
        remembered = model.decoder.remember(memory, text, torch.ones_like(ids, dtype=torch.bool))
        return beam_search(
            model.next_token(remembered, ids, config.beam_width),
            batch_size=EXAMPLES,
            width=config.beam_width,
            max_length=MAX_LENGTH,
            begin=config.begin_token,
            end=config.end_token,
            num_best=num_best,
        )[0]

    want, got = theirs()[:, 1:], ours(1)[:, 0]
    want = torch.nn.functional.pad(want, (0, got.shape[1] - want.shape[1]), value=config.end_token)
    lengths = (got != config.end_token).sum(1)
    unforced = lengths < MAX_LENGTH  # a forced end costs nothing there
    equal = int((got == want).all(1)[unforced].sum())
    times = best_s(
        {"transformers": theirs, "ours, 5 best": lambda: ours(5), "ours, the best": lambda: ours(1)},
        repeats=3,
    )
    print(f"Beam search, {EXAMPLES} examples; {machine()}")
    print(f"outputs of {lengths.min()} to {lengths.max()} tokens, {equal} of {int(unforced.sum())} equal")
    for name, seconds in times.items():
        print(f"{name:>15} {seconds * 1e3:8.1f} ms {times['transformers'] / seconds:6.2f}x")


if __name__ == "__main__":
    main()
