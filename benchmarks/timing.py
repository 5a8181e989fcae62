"""Interleaved runs: what else the machine does falls on all alike, or on none of the best."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import transformers


def turns_s(runs: Mapping[str, Callable[[], object]], repeats: int = 9) -> dict[str, list[float]]:
    """Wall seconds of each run in each turn, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def best_s(runs: Mapping[str, Callable[[], object]], repeats: int = 9) -> dict[str, float]:
    """Wall seconds of each run in its best turn."""
    return {name: min(of_one) for name, of_one in turns_s(runs, repeats).items()}


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over turns, which neither a slow minute nor one lucky turn moves."""
    return statistics.median(their / our for our, their in zip(ours, theirs, strict=True))


def matmul_peak(dtype: torch.dtype, size: int = 1536, device: str = "cpu") -> float:
    """FLOP/s of a square product."""
    size = 8192 if device == "cuda" else size
    a, b = torch.randn(2, size, size).to(device, dtype).unbind()

    def product() -> None:
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * size**3 / best_s({"product": product})["product"]


def machine() -> str:
    bf16 = (
        "with"
        if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        else "without"
    )
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{bf16} bf16 instructions, torch {torch.__version__}, transformers {transformers.__version__}"
    )
