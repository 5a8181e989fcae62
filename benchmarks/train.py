"""The paper's configuration in training: 12 + 4 layers, 768 wide, batch 32, up to 1,024 tokens, bfloat16.

Prints instances per second, model FLOP utilisation, peak memory, and the time that 85,000 instances times 20
epochs would take, for which the paper needed 64 V100s and 74 minutes. Needs torch, transformers, numpy and
pyarrow alone; without a GPU it runs the same on the CPU, with fewer instances a step. On a GPU the step is
timed with attention by kernels for ragged sequences and length by length. `--peak` is the peak of the device
in TFLOP/s (an H200: 989); without it a square product is measured.
"""

import argparse
import resource
import time
from contextlib import nullcontext
from unittest import mock

import torch

from benchmarks.timing import machine, matmul_peak
from model import ragged
from model.network import Config, Network

WORDS, OUTPUT, REGIONS, WIDTH = 30522, 4, 37, 2048
SHARES = (0.06, 0.38, 0.09, 0.09, 0.09, 0.09, 0.09, 0.11)  # title, description, bullets, OCR


def batch(size: int, max_length: int) -> dict[str, torch.Tensor]:
    """Random instances of max_length // 4 to max_length local-tokens."""
    lengths = torch.linspace(max_length // 4, max_length, size).long().tolist()
    num_text, num_hyper = max_length - REGIONS, len(SHARES) + 2
    segment = torch.full((size, max_length), -1)
    position = torch.zeros(size, max_length, dtype=torch.long)
    chains = []
    for row, length in enumerate(lengths):
        start = 0
        sizes = [3, *(max(1, int(share * (length - REGIONS - 3))) for share in SHARES)]
        for hyper, count in enumerate(sizes):
            segment[row, start : start + count] = hyper
            position[row, start : start + count] = torch.arange(count)
            if hyper:
                chains.append(torch.arange(start, start + count) + row * num_text)
            start += count
        segment[row, num_text:] = num_hyper - 1
        position[row, num_text:] = torch.arange(REGIONS)
    tag_index = torch.nn.utils.rnn.pad_sequence(chains, batch_first=True)
    tag_mask = torch.arange(tag_index.shape[1]) < torch.tensor([len(chain) for chain in chains])[:, None]
    targets = torch.randint(1000, WORDS, (size, OUTPUT))
    return {
        "hyper_slot": torch.arange(num_hyper).expand(size, -1),
        "hyper_kind": torch.arange(num_hyper).clamp_max(6).expand(size, -1),
        "hyper_mask": torch.ones(size, num_hyper, dtype=torch.bool),
        "input_ids": torch.randint(1000, WORDS, (size, num_text)),
        "segment": segment,
        "position": position,
        "regions": torch.randn(size, REGIONS, WIDTH),
        "copy_mask": segment[:, :num_text] > 0,
        "tag_index": tag_index,
        "tag_mask": tag_mask,
        "tags": torch.full_like(tag_index, 2),
        "decoder_input_ids": targets.roll(1, 1),
        "targets": targets,
    }


def flops(config: Config, given: dict[str, torch.Tensor]) -> float:
    """Of a training step: two a product, three passes; see benchmarks.step for the encoder's share."""
    width, inner = config.hidden_size, config.intermediate_size
    owned = (given["segment"] >= 0).sum().item()
    hypers, (size, output) = given["hyper_mask"].sum().item(), given["targets"].shape
    feed_forward = 4 * width * inner
    encoder = (12 * width**2 + feed_forward) * hypers + (10 * width**2 + feed_forward) * owned
    for row in given["segment"]:
        encoder += sum(4 * width * count**2 for count in row[row >= 0].bincount().tolist())
    decoder = size * output * (12 * width**2 + feed_forward) * config.decoder_layers
    heads = size * output * 2 * width * config.vocab_size + 2 * width**2 * owned
    return 3 * (config.encoder_layers * encoder + decoder + heads)


class Training:
    """The network in training on one batch, again and again."""

    def __init__(
        self, config: Config, data: dict[str, torch.Tensor], device: str, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        self.model, self.device, self.dtype = Network(config), device, dtype
        self.model.to(torch.device(device))  # type: ignore[arg-type]
        self.data = {name: tensor.to(device) for name, tensor in data.items()}
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)

    def step(self) -> torch.Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            loss = self.model(**self.data)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.detach()

    def run(self, steps: int) -> tuple[float, float, float]:
        """Seconds of the first three steps together (one on a CPU) and of one of the next `steps`, and the
        loss of the last. Nothing waits for a GPU between steps."""
        cuda = self.device == "cuda"
        wait = torch.cuda.synchronize if cuda else lambda: None
        start = time.perf_counter()
        for _ in range(3 if cuda else 1):
            self.step()
        wait()
        first = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        wait()
        return first - start, (time.perf_counter() - first) / steps, float(loss)


def held_gib(device: str) -> float:
    if device == "cuda":  # what is allocated leaves out what recordings keep for themselves
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB


def ways(device: str, steps: int) -> dict[str, int]:
    """The forms that the device has and the steps to time them by."""
    return (
        {"length by length": 3, "ragged kernels": steps, "recorded": steps}
        if device == "cuda"
        else {"packed": steps}
    )


def never(*args: object) -> bool:
    return False


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--instances", type=int, help="of a step; by default 32, on a CPU 2")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, help="that count; by default 20, on a CPU 2")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device in this precision")
    return parser.parse_known_args()[0]


def main() -> None:
    given, device = parsed(), "cuda" if torch.cuda.is_available() else "cpu"
    size, steps = (
        given.instances or (32 if device == "cuda" else 2),
        given.steps or (20 if device == "cuda" else 2),
    )
    dtype, config = getattr(torch, given.precision), Config(max_position=given.max_length)
    torch.manual_seed(0)
    data = batch(size, given.max_length)
    work, tokens = flops(config, data), int((data["segment"] >= 0).sum())
    peak = given.peak * 1e12 if given.peak else matmul_peak(dtype, device=device)
    name = torch.cuda.get_device_name() if device == "cuda" else machine()
    print(f"training in {given.precision}, torch {torch.__version__}, {device}: {name}")
    print(f"{size} instances of {given.max_length // 4} to {given.max_length} tokens, {tokens} together")
    for way, count in ways(device, steps).items():
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        training = Training(config, data, device, dtype)
        training.model.encoder.compiled = way == "recorded"
        attention = nullcontext() if way != "length by length" else mock.patch.object(ragged, "fits", never)
        with attention:
            first, seconds, loss = training.run(count)
        del training
        rate, minutes = work / seconds, 85_000 * 20 * seconds / size / 60
        print(
            f"{way}: {seconds * 1e3:.0f} ms, {size / seconds:.1f} instances/s, {rate / 1e12:.3g} TFLOP/s, "
            f"{rate / peak:.0%} of {peak / 1e12:.3g}, {held_gib(device):.1f} GiB at most, first steps "
            f"{first:.1f} s, loss {loss:.3f} at the end; 85,000 x 20 instances: {minutes:,.0f} minutes",
            flush=True,
        )


if __name__ == "__main__":
    main()
