"""Lines of text out of places in pictures: EasyOCR's recogniser over the crops of many pictures at once.

On a CPU, EasyOCR reads one crop at a time, each padded to its own multiple of 64 pixels. Here the crops of
all pictures of a chunk that have the same padded width are read together, which changes no text: padding
wider would. What is hard to read is read again with more contrast, and the surer reading counts, as there.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from easyocr.config import imgH as HEIGHT_PX
from easyocr.recognition import AlignCollate, recognizer_predict
from easyocr.utils import diff, get_image_list, group_text_box
from PIL import Image

from features.convolutions import Cast, fused
from features.decode import batches

if TYPE_CHECKING:
    import easyocr

MIN_SIZE_PX = 20  # of a line's longer side; EasyOCR's
UNSURE, CONTRAST = 0.1, 0.5  # below this confidence, read again with this contrast; EasyOCR's
MAX_CROP_PIXELS = 64 * 64 * 512  # read at once

Found = tuple[list[list[float]], str, float]  # corners, text, confidence


def hastened(reader: "easyocr.Reader") -> "easyocr.Reader":
    """The same reader whose recogniser has fused convolutions; `reader` stays as it is."""
    changed = copy.copy(reader)
    changed.recognizer = copy.deepcopy(reader.recognizer)
    model = getattr(changed.recognizer, "module", changed.recognizer)
    model.FeatureExtraction = Cast(fused([model.FeatureExtraction.ConvNet]), torch.float32)
    return changed


@dataclass(frozen=True, slots=True)
class Crop:
    corners: list[list[float]]
    grey: np.ndarray
    width_px: int  # to pad to


def lines_of(quads: Sequence[np.ndarray]) -> tuple[list[list[int]], list[list[list[float]]]]:
    """Components joined to lines: upright ones as x1, x2, y1, y2, and slanted ones as four corners."""
    polygons = [np.array(quad).astype(np.int32).reshape(-1) for quad in quads]
    upright, slanted = group_text_box(polygons, 0.1, 0.5, 0.5, 0.5, 0.1, True)
    return (
        [box for box in upright if max(box[1] - box[0], box[3] - box[2]) > MIN_SIZE_PX],
        [box for box in slanted if max(diff([x for x, _ in box]), diff([y for _, y in box])) > MIN_SIZE_PX],
    )


def crops_of(grey: np.ndarray, upright: list[list[int]], slanted: list[list[list[float]]]) -> list[Crop]:
    """`grey`: (height, width) uint8."""
    crops = []
    for box in upright:
        pieces, width = get_image_list([box], [], grey, model_height=HEIGHT_PX)
        crops += [Crop(corners, crop, int(width)) for corners, crop in pieces]
    for corners in slanted:
        pieces, width = get_image_list([], [corners], grey, model_height=HEIGHT_PX)
        crops += [Crop(corners, crop, int(width)) for corners, crop in pieces]
    return crops


def read(reader: "easyocr.Reader", crops: Sequence[Crop]) -> list[Found]:
    """One reading per crop, in order."""
    first = _read(reader, crops, contrast=0.0)
    unsure = [index for index, (_, confidence) in enumerate(first) if confidence < UNSURE]
    second = _read(reader, [crops[index] for index in unsure], contrast=CONTRAST)
    for index, again in zip(unsure, second, strict=True):
        if not first[index][1] > again[1]:
            first[index] = again
    return [(crop.corners, text, confidence) for crop, (text, confidence) in zip(crops, first, strict=True)]


def _read(reader: "easyocr.Reader", crops: Sequence[Crop], *, contrast: float) -> list[tuple[str, float]]:
    readings: list[Any] = [None] * len(crops)
    for members in batches([(HEIGHT_PX, crop.width_px) for crop in crops], MAX_CROP_PIXELS):
        width = crops[members[0]].width_px
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'mode' parameter is deprecated", DeprecationWarning)
            collate = AlignCollate(HEIGHT_PX, width, keep_ratio_with_pad=True, adjust_contrast=contrast)
            batch = collate([Image.fromarray(crops[index].grey) for index in members])
        for index, (text, confidence) in zip(members, _predict(reader, batch, width), strict=True):
            readings[index] = text, float(confidence)
    return readings


@torch.inference_mode()
def _predict(reader: "easyocr.Reader", batch: torch.Tensor, width: int) -> list[tuple[str, float]]:
    ignored = [
        reader.character.index(letter) + 1 for letter in sorted(set(reader.character) - set(reader.lang_char))
    ]
    return recognizer_predict(
        reader.recognizer, reader.converter, [batch], width // 10, ignored, {}, device=reader.device
    )
