"""One encoder layer, forward and backward, beside a dense BERT layer of the same width and tokens.

The reference form masks dense scores, so nothing is won over BERT yet; this is the line that the packed
form has to beat. The mix of segments: title 5 %, description 35 %,
five bullets of 8 %, OCR 10 %, image 10 %.
"""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from model.encoder import EncoderLayer, structured_masks

WIDTH, HEADS, INNER = 768, 12, 3072
SHARES = (0.05, 0.35, 0.08, 0.08, 0.08, 0.08, 0.08, 0.10, 0.10)
REPEATS = 5


def layout(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hyper mask (1, N) and segment (1, L); the Attribute hyper-token owns nothing here."""
    sizes = [max(1, round(share * length)) for share in SHARES]
    sizes[1] += length - sum(sizes)
    segment = torch.cat([torch.full((size,), index + 1) for index, size in enumerate(sizes)])
    return torch.ones(1, len(sizes) + 1, dtype=torch.bool), segment[None]


def median_s(run: Callable[[], None]) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=INNER, attn_implementation="sdpa"
    )
    dense = BertLayer(config)
    ours = EncoderLayer(hidden_size=WIDTH, num_heads=HEADS, intermediate_size=INNER, dropout=0.1)
    print(f"forward + backward, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'tokens':>7} {'BERT sdpa':>10} {'ours':>10} {'speed-up':>9}")
    for length in (64, 256, 1024):
        hyper_mask, segment = layout(length)
        masks = structured_masks(hyper_mask, segment)
        num_hyper = hyper_mask.shape[1]
        hyper, local = torch.randn(1, num_hyper, WIDTH), torch.randn(1, length, WIDTH)
        whole = torch.cat([hyper, local], dim=1)

        def run_dense(whole: torch.Tensor = whole) -> None:
            out = dense(whole)
            (out[0] if isinstance(out, tuple) else out).sum().backward()

        def run_ours(hyper: torch.Tensor = hyper, local: torch.Tensor = local, masks=masks) -> None:
            sum(part.sum() for part in ours(hyper, local, masks)).backward()

        theirs_s, ours_s = median_s(run_dense), median_s(run_ours)
        print(
            f"{num_hyper + length:7d} {theirs_s * 1e3:8.1f}ms {ours_s * 1e3:8.1f}ms {theirs_s / ours_s:8.2f}x"
        )


if __name__ == "__main__":
    main()
