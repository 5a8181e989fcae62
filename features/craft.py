"""EasyOCR's text detector CRAFT as a faster program of the same network: where lines of text are.

The same weights and, up to rounding, the same maps (features/convolutions.py says how). Boxes come out of
the maps as EasyOCR takes them, but each component is looked at in its own window instead of in the whole map.

Legend: B pictures, H, W canvas pixels, multiples of 32; maps are (H/2, W/2), text and link.
"""

import itertools
import math

import cv2
import numpy as np
import torch
from easyocr.craft import CRAFT
from torch import Tensor, nn

from features.convolutions import Joined, fused

MEAN = np.array([0.485, 0.456, 0.406], np.float32) * np.float32(255)
STD = np.array([0.229, 0.224, 0.225], np.float32) * np.float32(255)
TEXT, LINK, LOW_TEXT = 0.7, 0.4, 0.4  # EasyOCR's thresholds
MIN_CELLS = 10  # of a component
MULTIPLE_PX = 32
SKIPS = (512, 512, 256, 128)  # channels that the way up takes from the way down, coarsest first


class TextMaps(nn.Module):
    """CRAFT, (B, 3, H, W) -> (B, H/2, W/2, 2) float32."""

    def __init__(self, craft: CRAFT, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        slices = [list(getattr(craft.basenet, f"slice{number}")) for number in range(1, 6)]
        for one, following in itertools.pairwise(slices):
            if isinstance(following[0], nn.ReLU):  # works in place there, so the skip connection has it too
                one.append(following.pop(0))
        self.down = nn.ModuleList(fused(layers) for layers in slices)
        ups = [fused(getattr(craft, f"upconv{number}").conv) for number in range(1, 5)]
        self.join = nn.ModuleList(Joined(up[0], size) for up, size in zip(ups, SKIPS, strict=True))  # type: ignore[arg-type]
        self.up = nn.ModuleList(up[1:] for up in ups)
        self.head = fused(craft.conv_cls)
        self.dtype = dtype
        self.to(dtype)
        self.eval()

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.dtype).contiguous(memory_format=torch.channels_last)
        levels = []
        for down in self.down:
            x = down(x)
            levels.append(x)
        *skips, x = levels
        for join, up, skip in zip(self.join, self.up, reversed(skips), strict=True):
            x = up(join(x, skip))
        return self.head(x).float().permute(0, 2, 3, 1)


def scale_to(canvas_px: int, height: int, width: int) -> float:
    return min(1.0, canvas_px / max(height, width))


def canvas_shape(canvas_px: int, height: int, width: int) -> tuple[int, int]:
    """(H, W): the shrunk picture and the black that fills it up to multiples of 32."""
    scale = scale_to(canvas_px, height, width)
    return tuple(-int(side * scale) % MULTIPLE_PX + int(side * scale) for side in (height, width))  # type: ignore[return-value]


def canvas(pixels: np.ndarray, canvas_px: int) -> np.ndarray:
    """The normalised picture on black, (3, H, W) float32, its long side at most `canvas_px`."""
    height, width = pixels.shape[:2]
    scale = scale_to(canvas_px, height, width)
    size = (int(width * scale), int(height * scale))
    resized = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    placed = np.zeros((*canvas_shape(canvas_px, height, width), 3), np.float32)
    placed[: size[1], : size[0]] = resized
    return ((placed - MEAN) / STD).transpose(2, 0, 1)


def boxes_of(maps: np.ndarray) -> list[np.ndarray]:
    """Quads (4, 2) float32 of the components in maps (H/2, W/2, 2), clockwise, in cells of the map."""
    text, link = np.ascontiguousarray(maps[..., 0]), np.ascontiguousarray(maps[..., 1])
    is_text, is_link = text > LOW_TEXT, link > LINK
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        (is_text | is_link).astype(np.uint8), connectivity=4
    )
    only_link = is_link & ~is_text
    found = []
    for label in range(1, count):
        left, top, width, height, size = (int(value) for value in stats[label])
        if size < MIN_CELLS:
            continue
        window = np.s_[top : top + height, left : left + width]
        mine = labels[window] == label
        if text[window][mine].max() < TEXT:
            continue
        found.append(_quad(mine & ~only_link[window], (left, top), size, text.shape))
    return found


def _quad(mine: np.ndarray, place: tuple[int, int], size: int, shape: tuple[int, ...]) -> np.ndarray:
    """The smallest rectangle around a component `mine` at `place` once it is dilated."""
    (height, width), (left, top) = mine.shape, place
    grow = int(math.sqrt(size * min(width, height) / (width * height)) * 2)
    x1, y1 = max(left - grow, 0), max(top - grow, 0)
    x2, y2 = min(left + width + grow + 1, shape[1]), min(top + height + grow + 1, shape[0])
    area = np.zeros((y2 - y1, x2 - x1), np.uint8)
    area[top - y1 : top - y1 + height, left - x1 : left - x1 + width] = mine
    rows, columns = np.nonzero(cv2.dilate(area, np.ones((1 + grow, 1 + grow), np.uint8)))
    points = np.stack([columns + x1, rows + y1], axis=1)
    quad = cv2.boxPoints(cv2.minAreaRect(points.astype(np.int32)))
    sides = np.linalg.norm(quad[0] - quad[1]), np.linalg.norm(quad[1] - quad[2])
    if abs(1 - max(sides) / (min(sides) + 1e-5)) <= 0.1:  # nearly a square: it may have come out as a diamond
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        quad = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float32)
    return np.roll(quad, 4 - quad.sum(axis=1).argmin(), axis=0)
