"""Where models compute: on a GPU where there is one. Shards of a GPU and of a processor never mix."""

import sys
from typing import Literal, TypeVar

from pipeline import params

Device = Literal["auto", "cpu", "cuda"]
S = TypeVar("S", bound=params.Settings)


def here(settings: S, stage: str) -> S:
    """`settings` with the `device` that this machine has for it: `cpu` or `cuda`.

    Raises `ValueError` for `cuda` where torch sees no GPU.
    """
    import torch

    device, has_gpu = settings.device, torch.cuda.is_available()  # type: ignore[attr-defined]
    if device == "cuda" and not has_gpu:
        raise ValueError(f"{stage}.device is cuda, and torch sees no GPU")
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    return settings.model_copy(update={"device": device})


def has_bfloat16(device: str) -> bool:
    """Whether `device` multiplies bfloat16 natively."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def tell_if_slow(precision: str, device: str, stage: str) -> None:
    """Say on stderr when `precision` is one that `device` only imitates."""
    if precision == "bfloat16" and not has_bfloat16(device):
        sys.stderr.write(
            f"{stage}.precision is bfloat16, for which this machine ({device}) has no instructions: "
            "float32 would be many times as fast\n"
        )


def max_workers(device: str) -> int | None:
    """How many workers may share a device; None: as many as keep all cores busy."""
    return 1 if device == "cuda" else None
