"""One encoder layer, forward and backward, beside a dense BERT layer of the same width and number of tokens.

The mix of segments: title 5 %, description 35 %, five bullets of 8 %, OCR 10 %, image 10 %; as many
examples as make 2,048 local-tokens, dense batches all. `bound` is what free attention would win over BERT,
1 + N / (6 D). Memory is the most that forward and backward hold at one time beside the weights and their
gradients. Gradients are dropped before each turn, as before a training step. At the longest, Longformer and
BigBird (their layers with their default windows) too. In float32, and in bfloat16 where the processor has
instructions for it. Times and ratios are medians over turns. Writes the plot of time and memory.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BigBirdConfig, LongformerConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.big_bird.modeling_big_bird import BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerModel

from benchmarks.timing import machine, matmul_peak, times_as_fast, turns_s
from features.devices import has_bfloat16
from features.memory import keep_freed
from model.encoder import Encoder
from model.packed import pack, packed_encoder

WIDTH, HEADS, INNER = 768, 12, 3072
SHARES = (0.05, 0.35, 0.08, 0.08, 0.08, 0.08, 0.08, 0.10, 0.10)
LENGTHS = (64, 128, 256, 512, 1024, 2048)
TOKENS = 2048
SIZES: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": INNER}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def layout(length: int) -> tuple[Tensor, Tensor]:
    """Hyper mask (1, N) and segment (1, L); the Attribute hyper-token owns nothing here."""
    sizes = [max(1, round(share * length)) for share in SHARES]
    sizes[1] += length - sum(sizes)
    segment = torch.cat([torch.full((size,), index + 1) for index, size in enumerate(sizes)])
    return torch.ones(1, len(sizes) + 1, dtype=torch.bool), segment[None]


def peak_bytes(run: Callable[[], Tensor], path: Path) -> int:
    """What forward and backward hold at most at one time, beside what was there before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run().backward()
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def turn(run: Callable[[], Tensor], wanted: list[Tensor]) -> None:
    for tensor in wanted:
        tensor.grad = None
    run().backward()


def dense(implementation: str) -> BertLayer:
    return BertLayer(BertConfig(**(SIZES | NO_DROPOUT | {"attn_implementation": implementation})))


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def of_dense(layer: nn.Module, tokens: Tensor) -> Tensor:
    return first(layer(tokens)).sum()


def of_peer(model: nn.Module, tokens: Tensor) -> Tensor:
    summed: Tensor = model(inputs_embeds=tokens).last_hidden_state.sum()
    return summed


def peers(length: int) -> dict[str, nn.Module]:
    """Models of one layer for long texts."""
    common: dict[str, Any] = {
        **SIZES,
        **NO_DROPOUT,
        "num_hidden_layers": 1,
        "max_position_embeddings": length + 8,
        "vocab_size": 8,
    }
    longformer = LongformerModel(LongformerConfig(**common, attention_window=[512]), add_pooling_layer=False)
    big_bird = BigBirdModel(BigBirdConfig(**common, attention_type="block_sparse"), add_pooling_layer=False)
    return {"Longformer": longformer, "BigBird": big_bird}


def forms(length: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Of each form the sum of what it makes of its tokens, as a function, and what wants gradients."""
    hyper_mask, segment = (part.repeat(TOKENS // length, 1) for part in layout(length))
    batch, num_hyper = hyper_mask.shape
    packing = pack(hyper_mask, segment)
    encoder = Encoder(
        num_layers=1, hidden_size=WIDTH, num_heads=HEADS, intermediate_size=INNER, dropout=0.0
    ).to(dtype)
    tokens = torch.randn(batch, num_hyper + length, WIDTH, dtype=dtype, requires_grad=True)
    rows = tokens.detach().flatten(0, 1).split([batch * num_hyper, batch * length])
    hyper, local = (part.clone().requires_grad_() for part in rows)

    def ours() -> Tensor:
        of_hyper, of_local = packed_encoder(encoder, hyper, local, packing)
        return of_hyper.sum() + of_local.sum()

    found = {"ours": (ours, [hyper, local, *encoder.parameters()])}
    for name in ("sdpa", "eager"):
        layer = dense(name).to(dtype)
        found[f"BERT {name}"] = (
            partial(of_dense, layer, tokens),
            [tokens, *layer.parameters()],
        )
    if length == max(LENGTHS) and dtype == torch.float32:
        for name, model in peers(length + 512).items():
            found[name] = (
                partial(of_peer, model, tokens),
                [tokens, *model.parameters()],
            )
    return found


def plot(rows: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 2 * len(rows), figsize=(7 * len(rows), 3.2), squeeze=False)
    for index, (dtype, curves) in enumerate(rows.items()):
        time, memory = axes[0][2 * index : 2 * index + 2]
        for name in ("ours", "BERT sdpa", "BERT eager"):
            time.plot(LENGTHS, [1e3 * x for x in curves[name]], label=name)
            memory.plot(LENGTHS, [x / 2**20 for x in curves[f"{name} bytes"]], label=name)
        bound = [
            1e3 * seconds / (1 + length / (6 * WIDTH))
            for length, seconds in zip(LENGTHS, curves["BERT sdpa"], strict=True)
        ]
        time.plot(LENGTHS, bound, "--", label="bound")
        for axis, unit in ((time, "ms"), (memory, "MiB at most")):
            axis.set(title=f"{dtype}: {unit}", xlabel="local-tokens", xscale="log", yscale="log")
            axis.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
            axis.tick_params(axis="x", which="minor", length=0, labelbottom=False)
            for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                which(ticker.ScalarFormatter())
        time.legend()
    path.parent.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="turns of each form, one after another")
    parser.add_argument("--plot", type=Path, default=Path("docs/figures/encoder.svg"))
    given = parser.parse_args(arguments or [])
    torch.manual_seed(0)
    keep_freed()  # as training does: else the clearing of pages is measured as well
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells its every start and stop
    print(f"encoder layer, forward + backward; {machine()}")
    rows: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.bfloat16, torch.float32) if has_bfloat16("cpu") else (torch.float32,):
            print(f"{dtype}: matmul peak {matmul_peak(dtype) / 1e9:.0f} GFLOP/s")
            curves = rows.setdefault(str(dtype).removeprefix("torch."), {})
            for length in LENGTHS:
                runs = forms(length, dtype)
                turns = turns_s({name: partial(turn, *form) for name, form in runs.items()}, given.repeats)
                seconds = {name: statistics.median(of_one) for name, of_one in turns.items()}
                cells = []
                for name, (run, _) in runs.items():
                    curves.setdefault(name, []).append(seconds[name])
                    curves.setdefault(f"{name} bytes", []).append(peak_bytes(run, Path(folder, "trace.json")))
                    cells.append(
                        f"{name} {seconds[name] * 1e3:.1f}ms {curves[f'{name} bytes'][-1] / 2**20:.0f}MiB"
                    )
                sdpa, eager = (
                    times_as_fast(turns["ours"], turns[f"BERT {name}"]) for name in ("sdpa", "eager")
                )
                print(
                    f"{length:6d}  " + ", ".join(cells) + f"; {sdpa:.3f}x SDPA, {eager:.3f}x eager, "
                    f"bound {1 + length / (6 * WIDTH):.2f}x"
                )
    plot(rows, given.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
