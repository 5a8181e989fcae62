"""Regions of pictures: the detector's precisions beside PyTorch's own way and, where installed, detectron2.

    python -m benchmarks regions

All have the same seeded weights and one thread. Shown are pictures per second, their ratio to the peer
(detectron2, else `reference`), and how far boxes, scores and features are from the peer's. BENCH_SIDE is the
short side in pixels (default 800, as the stage's), BENCH_PICTURES the number of pictures (default 2).
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from features import detector
from features.detector import Regions
from features.detectron import Detectron

SIDE_PX = int(os.environ.get("BENCH_SIDE", "800"))
NUM_PICTURES = int(os.environ.get("BENCH_PICTURES", "2"))
ASKED = {"short_side_px": SIDE_PX, "long_side_px": 1333, "max_boxes": 36, "nms_iou": 0.5, "min_score": 0.02}

See = Callable[..., Regions]


def seeded(variant: str) -> dict[str, torch.Tensor]:
    """A trained detector's parameters as far as speed goes: class scores that keep some proposals."""
    state = detector.untrained(variant, seed=0).state_dict()
    generator = torch.Generator().manual_seed(1)
    for name, size in (("cls_score", 0.003), ("bbox_pred", 0.0003)):
        shape = state[f"predictor.{name}.weight"].shape
        state[f"predictor.{name}.weight"] = torch.randn(shape, generator=generator) * size
    return state


def drawn(number: int) -> np.ndarray:
    noise = np.random.default_rng(number).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    return np.kron(noise, np.ones((40, 40, 1), np.uint8))


def ways(variant: str, folder: Path) -> dict[str, See]:
    path = folder / f"{variant}.safetensors"
    save_file(seeded(variant), path, metadata={"variant": variant})
    reference = detector.load(path, variant)
    made: dict[str, See] = {}
    try:
        made["detectron2"] = Detectron(path, variant)
    except ValueError as error:
        print(f"without detectron2: {error}")
    made["reference"] = reference
    made["float32"] = detector.hastened(reference, torch.float32)
    made["bfloat16"] = detector.hastened(reference, torch.bfloat16)
    return made


def difference(mine: list[Regions], theirs: list[Regions]) -> str:
    """Of the boxes that both have in the same place, best first."""
    boxes = scores = 0.0
    cosine = 1.0
    met = total = 0
    for one, other in zip(mine, theirs, strict=True):
        gap = np.abs(one.boxes[:, None] - other.boxes[None]).max(axis=2)
        pairs = [(k, int(gap[k].argmin())) for k in range(len(gap)) if gap[k].min() < 2]
        met, total = met + len(pairs), total + len(other.boxes)
        for k, i in pairs:
            boxes, scores = max(boxes, gap[k, i]), max(scores, abs(float(one.scores[k] - other.scores[i])))
            a, b = one.features[k].astype(float), other.features[i].astype(float)
            cosine = min(cosine, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    return f"{met} of {total} boxes met, within {boxes:.4f} px, {scores:.1e}, cosine >= {cosine:.6f}"


def main() -> None:
    torch.set_num_threads(1)
    pictures = [drawn(number) for number in range(NUM_PICTURES)]
    with tempfile.TemporaryDirectory() as folder:
        for variant in ("c4", "fpn"):
            print(f"{variant}, {NUM_PICTURES} pictures, short side {SIDE_PX}, one thread")
            peer: tuple[float, list[Regions]] | None = None
            for name, see in ways(variant, Path(folder)).items():
                see(pictures[0][:64, :64], **ASKED)
                start = time.perf_counter()
                found = [see(one, **ASKED) for one in pictures]
                seconds = time.perf_counter() - start
                peer = peer or (seconds, found)
                told = difference(found, peer[1])
                rate = len(pictures) / seconds
                print(f"{name:11s} {rate:7.3f} pictures/s {peer[0] / seconds:5.2f}x   {told}")


if __name__ == "__main__":
    main()
