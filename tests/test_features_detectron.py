"""Parity with detectron2 itself: what it gave for seeded weights and one seeded picture.

`GIVEN` was printed by detectron2's main branch of 2026-06-06 (02b5c4e, version 0.6) on torch 2.14.1, CPU, one
thread: `GeneralizedRCNN.inference` for boxes and scores, its RoI heads' own pooling for the features of these
boxes and of the whole picture. `python -m benchmarks regions` repeats the comparison at full size where
detectron2 is installed.
"""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_features_detector import detectron2_state

from features import convert, detector

ASKED = {"short_side_px": 128, "long_side_px": 192, "max_boxes": 4, "nms_iou": 0.5, "min_score": 0.05}
EVERY = {"c4": 128, "fpn": 64}  # each so many-th feature is written down


def seeded_state(variant: str) -> dict[str, torch.Tensor]:
    """detectron2's parameters with weights of a sensible size: signals neither die nor explode."""
    state = detectron2_state(variant)
    generator = torch.Generator().manual_seed(20)

    def normal(value: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(value.shape, generator=generator) * std

    for name, value in state.items():
        fan_in = max(1, value[0].numel()) if value.ndim > 1 else 1
        if name.startswith(("pixel_", "proposal_generator.anchor")):
            continue
        if name.endswith(("norm.running_var", "norm.weight")):
            state[name] = torch.rand(value.shape, generator=generator) + 0.5
        elif name.endswith(("norm.running_mean", "norm.bias")):
            state[name] = normal(value, 0.1)
        elif name.endswith(".bias"):
            state[name] = normal(value, 0.05)
        elif "objectness_logits" in name or "cls_score" in name:
            state[name] = normal(value, 0.1 * math.sqrt(1 / fan_in))
        elif "anchor_deltas" in name or "bbox_pred" in name:
            state[name] = normal(value, 0.01 * math.sqrt(1 / fan_in))
        else:
            state[name] = normal(value, math.sqrt(2 / fan_in))
        if name.endswith("stem.conv1.weight"):
            state[name] /= detector.PIXEL_STD
        if name.endswith("conv3.norm.weight"):
            state[name] *= 0.3
    return state


def seeded_picture() -> np.ndarray:
    """128 x 160: squares on a gradient."""
    rows, columns = np.mgrid[:128, :160]
    pixels = np.stack([rows + 60, columns + 40, 220 - rows], axis=2).astype(np.uint8)
    pixels[20:70, 30:80] = (200, 40, 30)
    pixels[60:110, 90:150] = (30, 60, 190)
    return pixels


@pytest.fixture(params=["c4", "fpn"])
def found(request, tmp_path) -> tuple[str, detector.Regions]:
    torch.set_num_threads(1)
    state = {
        ours: value for name, value in seeded_state(request.param).items() if (ours := convert.renamed(name))
    }
    path = tmp_path / "detector.safetensors"
    save_file(state, path, metadata={"variant": request.param})
    return request.param, detector.load(path, request.param)(seeded_picture(), **ASKED)


def test_boxes_scores_and_features_are_those_of_detectron2(found):
    variant, regions = found
    given = GIVEN[variant]
    assert np.abs(regions.boxes - np.array(given["boxes"])).max() < 0.05
    assert np.abs(regions.scores - np.array(given["scores"])).max() < 1e-4
    mine, theirs = regions.features[:, :: EVERY[variant]], np.array(given["features"])
    assert mine.shape == theirs.shape
    cosine = (mine * theirs).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(regions.features, axis=1), given["norms"], rtol=1e-3)


GIVEN: dict[str, dict[str, list]] = {
    "c4": {
        "boxes": [
            [0.0, 0.8864346, 15.75228, 26.26211],
            [0.0, 8.997839, 20.00365, 33.55029],
            [0.0, 1.373404, 30.81811, 34.12178],
            [0.0, 21.51228, 17.83309, 44.46717],
            [0.0, 0.0, 160.0, 128.0],
        ],
        "scores": [0.5793908, 0.5684022, 0.460405, 0.4594108, 1.0],
        "norms": [1312.19, 1452.87, 1514.67, 1567.75, 1819.25],
        "features": [
            [
                0.0,
                0.098692,
                10.48,
                12.951,
                14.33,
                1.3782,
                29.977,
                0.0,
                31.145,
                0.35326,
                11.063,
                2.4809,
                49.617,
                14.773,
                4.2004,
                6.765,
            ],
            [
                0.0,
                0.026888,
                9.2664,
                14.758,
                17.09,
                1.4319,
                31.949,
                0.0,
                36.682,
                0.30218,
                10.095,
                1.722,
                58.737,
                8.4066,
                4.4506,
                8.1028,
            ],
            [
                0.020525,
                0.31608,
                9.3553,
                15.133,
                20.207,
                2.1434,
                34.574,
                0.0,
                36.695,
                0.34737,
                8.9829,
                2.1062,
                57.292,
                9.1279,
                4.9835,
                8.8585,
            ],
            [
                0.0,
                0.020555,
                8.7141,
                20.574,
                14.545,
                1.0348,
                35.294,
                0.0,
                45.885,
                0.36891,
                10.034,
                1.2742,
                65.745,
                4.5843,
                4.9999,
                9.1982,
            ],
            [
                0.0,
                2.7156,
                9.4507,
                20.084,
                25.541,
                3.0745,
                47.77,
                0.0,
                47.166,
                0.90152,
                3.7661,
                0.0075432,
                60.004,
                4.4568,
                4.9324,
                10.641,
            ],
        ],
    },
    "fpn": {
        "boxes": [
            [0.0, 75.35335, 160.0, 124.9806],
            [29.30924, 85.04622, 41.41164, 104.1254],
            [38.0886, 38.66613, 64.00448, 44.30265],
            [99.6087, 60.50024, 148.0085, 122.488],
            [0.0, 0.0, 160.0, 128.0],
        ],
        "scores": [0.9994329, 0.9990846, 0.9988477, 0.9987833, 1.0],
        "norms": [2576.99, 2662.02, 3554.95, 2868.8, 2160.56],
        "features": [
            [
                13.954,
                0.0,
                59.701,
                23.095,
                0.0,
                99.429,
                0.0,
                210.58,
                0.0,
                3.7438,
                0.0,
                4.565,
                0.0,
                193.43,
                113.68,
                0.0,
            ],
            [
                7.234,
                0.0,
                106.85,
                5.6626,
                0.0,
                116.96,
                0.0,
                142.7,
                0.0,
                0.0,
                0.0,
                51.669,
                0.0,
                172.52,
                0.0,
                0.0,
            ],
            [
                26.649,
                0.0,
                199.88,
                7.6154,
                0.0,
                199.49,
                0.0,
                207.66,
                0.0,
                0.0,
                0.0,
                48.673,
                0.0,
                243.62,
                120.52,
                0.0,
            ],
            [
                65.2,
                0.0,
                54.515,
                52.958,
                0.0,
                74.903,
                0.0,
                203.05,
                2.3863,
                21.057,
                0.0,
                106.45,
                0.0,
                188.38,
                144.18,
                0.0,
            ],
            [
                0.0,
                0.0,
                22.474,
                53.244,
                0.0,
                193.67,
                0.0,
                145.95,
                23.043,
                0.0,
                67.094,
                0.0,
                0.0,
                179.78,
                113.32,
                0.0,
            ],
        ],
    },
}
