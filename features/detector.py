"""Faster R-CNN with ResNet101 on torchvision's detection parts: regions of a picture and their features.

Two variants, both as detectron2's model zoo has them, so that its weights fit (features/convert.py):
`c4`   res5 runs on 14x14 RoIAlign crops of res4; a region's feature is the mean of its 7x7 map, 2048 wide.
`fpn`  a two-layer box head on 7x7 RoIAlign crops of the pyramid, 1024 wide.
Those weights continue the caffe-style MSRA ResNet101: BGR minus a mean, no division by a standard
deviation, and the stride of a bottleneck in its first 1x1 convolution. So do ours.

Legend: H, W pixels the network sees; h, w cells of a feature map; R regions; K classes; A anchors per cell.
Boxes are (x1, y1, x2, y2).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet101
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, batched_nms, clip_boxes_to_image, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import FrozenBatchNorm2d

from features.convolutions import Cast, fused

WIDTHS = {"c4": 2048, "fpn": 1024}
PIXEL_MEAN_BGR = (103.53, 116.28, 123.675)
ANCHOR_SIZES_PX = (32, 64, 128, 256, 512)
PIXEL_STD = 58.0  # about that of photographs
COCO_CLASSES = 80
RPN_IOU = 0.7
MAX_PROPOSALS = 1000


@dataclass(frozen=True, slots=True)
class Regions:
    """What the detector sees in one picture, in pixels of that picture; the last region is all of it."""

    boxes: np.ndarray  # (R, 4) float32
    scores: np.ndarray  # (R,) float32; 1 for the whole picture
    features: np.ndarray  # (R, width) float32
    grid: np.ndarray  # (49, 2048) float32: res5 of the whole picture, row by row


class Anchors(AnchorGenerator):
    """Anchors at exact multiples of the stride, not rounded, sizes outermost, as detectron2 has them."""

    def __init__(self, sizes: tuple[tuple[int, ...], ...], strides: tuple[int, ...]):
        super().__init__(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        self.strides = strides

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=None):
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt().repeat(len(scales))
        size = torch.as_tensor(scales, dtype=dtype, device=device).repeat_interleave(len(aspect_ratios))
        half_w, half_h = size / root / 2, size * root / 2
        return torch.stack([-half_w, -half_h, half_w, half_h], dim=1)  # (A, 4)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        like = feature_maps[0]
        self.set_cell_anchors(like.dtype, like.device)
        strides = [[torch.tensor(stride, device=like.device)] * 2 for stride in self.strides]
        placed = torch.cat(self.grid_anchors([list(level.shape[-2:]) for level in feature_maps], strides))
        return [placed] * len(image_list.image_sizes)


class Proposals(RegionProposalNetwork):
    """Gives each proposal's objectness as a fifth column, best first."""

    def filter_proposals(self, *args):
        boxes, scores = super().filter_proposals(*args)
        return [
            torch.cat([box, score[:, None]], dim=1) for box, score in zip(boxes, scores, strict=True)
        ], scores


class Detector(nn.Module):
    """Pictures in, regions out. Only pictures of one resized shape share a batch: nothing is padded to fit
    another, so a region never depends on other pictures.

    An untrained detector (`trained=False`) ranks by objectness alone, as its class scores mean nothing.
    """

    def __init__(self, variant: str, *, num_classes: int = COCO_CLASSES, trained: bool = True):
        super().__init__()
        self.variant = variant
        self.trained = trained
        self.width = WIDTHS[variant]
        body = resnet101(weights=None, norm_layer=FrozenBatchNorm2d)
        for stage in (body.layer2, body.layer3, body.layer4):
            first = stage[0]
            first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
        self.stem = nn.Sequential(body.conv1, body.bn1, nn.ReLU(inplace=True), body.maxpool)
        self.res2, self.res3, self.res4, self.res5 = body.layer1, body.layer2, body.layer3, body.layer4
        if variant == "c4":
            anchors = Anchors((ANCHOR_SIZES_PX,), (16,))
            channels, before_nms = 1024, 6000
        else:
            anchors = Anchors(tuple((size,) for size in ANCHOR_SIZES_PX), (4, 8, 16, 32, 64))
            channels, before_nms = 256, 1000
            self.fpn = FeaturePyramidNetwork([256, 512, 1024, 2048], 256, extra_blocks=LastLevelMaxPool())
            self.box_head = TwoMLPHead(256 * 7 * 7, self.width)
        self.rpn = Proposals(
            anchors,
            RPNHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,  # this and the next three matter in training only
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"testing": before_nms},
            post_nms_top_n={"testing": MAX_PROPOSALS},
            nms_thresh=RPN_IOU,
        )
        self.predictor = FastRCNNPredictor(self.width, num_classes + 1)  # the background is the last class
        self.predictor.bbox_pred = nn.Linear(self.width, num_classes * 4)
        self.box_coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixels: np.ndarray, **asked: Any) -> Regions:
        """`pixels`: (height, width, 3) uint8 RGB."""
        return self.many([pixels], **asked)[0]

    @torch.inference_mode()
    def many(
        self,
        pictures: Sequence[np.ndarray],
        *,
        short_side_px: int,
        long_side_px: int,
        max_boxes: int,
        nms_iou: float,
        min_score: float,
    ) -> list[Regions]:
        """At most `max_boxes` regions of each picture, best first, then the whole.

        The pictures have one resized shape. Of two boxes (of one class) that overlap by more than `nms_iou`
        the better one stays; `min_score` is asked of a trained detector's class scores only.
        """
        resized = np.stack(
            [resize(one, short_side_px=short_side_px, long_side_px=long_side_px) for one in pictures]
        )
        levels, found = self._seen(resized, nms_iou=nms_iou, min_score=min_score)
        made = []
        for index, (pixels, (boxes, scores)) in enumerate(zip(pictures, found, strict=True)):
            height, width = resized.shape[1:3]
            boxes = torch.cat([boxes[:max_boxes], boxes.new_tensor([[0, 0, width, height]])])
            scores = torch.cat([scores[:max_boxes], scores.new_ones(1)])
            features, grid = self._features([level[index : index + 1] for level in levels], boxes)
            parts = (rescaled(boxes, resized[index], pixels), scores, features, grid)
            made.append(Regions(*(part.cpu().numpy() for part in parts)))
        return made

    @torch.inference_mode()
    def features_of(self, pixels: np.ndarray, boxes: np.ndarray, **sides_px: int) -> np.ndarray:
        """Features (R, width) of given boxes (R, 4) in pixels of the picture."""
        resized = resize(pixels, **sides_px)
        scale = [resized.shape[1] / pixels.shape[1], resized.shape[0] / pixels.shape[0]] * 2
        image = self._batch(resized[None])
        return self._features(self._levels(image), image.new_tensor(boxes * scale))[0].cpu().numpy()

    def _batch(self, resized: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 RGB to (B, 3, H, W) as the network wants it."""
        height, width = resized.shape[1:3]
        image = torch.from_numpy(resized[..., ::-1].copy()).permute(0, 3, 1, 2).float()
        image = image - torch.tensor(PIXEL_MEAN_BGR).view(3, 1, 1)
        if self.variant == "fpn":  # the pyramid doubles sizes on its way down
            image = F.pad(image, (0, -width % 32, 0, -height % 32))
        return image.to(self.predictor.cls_score.weight.device)

    def _levels(self, image: Tensor) -> list[Tensor]:
        """c4: res4, (B, 1024, H/16, W/16). fpn: five of (B, 256, h, w) at strides 4 to 64, then res5."""
        res2 = self.res2(self.stem(image))
        res3 = self.res3(res2)
        res4 = self.res4(res3)
        if self.variant == "c4":
            return [res4]
        res5 = self.res5(res4)
        return [*self.fpn({"2": res2, "3": res3, "4": res4, "5": res5}).values(), res5]

    def _seen(
        self, resized: np.ndarray, *, nms_iou: float, min_score: float
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Levels, and for each picture boxes (R, 4) in pixels of `resized` and scores (R,), best first."""
        image, size = self._batch(resized), resized.shape[1:3]
        levels = self._levels(image)
        self.rpn.nms_thresh = RPN_IOU if self.trained else nms_iou
        seen = levels[: len(self.rpn.anchor_generator.sizes)]
        found, _ = self.rpn(
            ImageList(image, [size] * len(image)), {str(i): level for i, level in enumerate(seen)}
        )
        return levels, [
            self._boxes(
                [level[index : index + 1] for level in levels],
                proposed,
                size,
                nms_iou=nms_iou,
                min_score=min_score,
            )
            for index, proposed in enumerate(found)
        ]

    def _boxes(
        self,
        levels: list[Tensor],
        found: Tensor,
        size: tuple[int, ...],
        *,
        nms_iou: float,
        min_score: float,
    ) -> tuple[Tensor, Tensor]:
        """Boxes (R, 4) clipped to `size`, and their scores (R,), best first, of proposals (R, 5)."""
        proposals, objectness = found[:, :4], found[:, 4]
        if not self.trained:
            best = objectness.argsort(descending=True, stable=True)
            return proposals[best], objectness[best]
        logits, deltas = self.predictor(self._features(levels, proposals)[0])
        chances = logits.softmax(dim=1)[:, :-1]  # (R, K)
        region, label = (chances > min_score).nonzero(as_tuple=True)
        scores = chances[region, label]
        deltas = deltas.view(len(proposals), -1, 4)[region, label]
        boxes = clip_boxes_to_image(self.box_coder.decode_single(deltas, proposals[region]), size)
        kept = batched_nms(boxes, scores, label, nms_iou)
        return boxes[kept], scores[kept]

    def _features(self, levels: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Features (R, width) of `boxes`, and the 7x7 cells (49, 2048) of the last box or picture."""
        if self.variant == "c4":
            maps = self.res5(_crop(levels[0], boxes, cells=14, stride=16))  # (R, 2048, 7, 7)
            return maps.mean(dim=(2, 3)), maps[-1].flatten(1).T
        level = pyramid_level(boxes)
        crops = boxes.new_zeros(len(boxes), 256, 7, 7)
        for index in range(4):
            of_level = level == index
            crops[of_level] = _crop(levels[index], boxes[of_level], cells=7, stride=4 * 2**index)
        return self.box_head(crops), F.adaptive_avg_pool2d(levels[-1], 7)[0].flatten(1).T


RESNET = ("stem", "res2", "res3", "res4", "res5")


def compiled(detector: Detector) -> Detector:
    """The same detector with its ResNet by torch.compile, anew for each shape of picture."""
    faster = copy.deepcopy(detector).to(memory_format=torch.channels_last)
    for name in RESNET:
        setattr(faster, name, torch.compile(getattr(faster, name), options={"freezing": True}))
    return faster


def hastened(detector: Detector, dtype: torch.dtype) -> Detector:
    """The same detector as a faster program: fused convolutions, those of the ResNet in `dtype`."""
    faster = copy.deepcopy(detector)
    for name in RESNET:
        setattr(faster, name, Cast(fused(getattr(faster, name)), dtype))
    head = faster.rpn.head
    head.conv = Cast(fused(head.conv), torch.float32)
    if faster.variant == "fpn":
        for blocks in (faster.fpn.inner_blocks, faster.fpn.layer_blocks):
            for index, block in enumerate(blocks):
                blocks[index] = Cast(fused(block), torch.float32)
    return faster


def resize(pixels: np.ndarray, *, short_side_px: int, long_side_px: int) -> np.ndarray:
    """Bilinear, to `resized_shape`."""
    shape = resized_shape(pixels.shape[:2], short_side_px=short_side_px, long_side_px=long_side_px)
    return np.asarray(Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BILINEAR))


def resized_shape(shape: tuple[int, ...], *, short_side_px: int, long_side_px: int) -> tuple[int, int]:
    """(H, W): the short side is `short_side_px`, or less where the long one would be too long."""
    height, width = shape
    scale = min(short_side_px / min(height, width), long_side_px / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def rescaled(boxes: Tensor, seen: np.ndarray, pixels: np.ndarray) -> Tensor:
    """Boxes in pixels of `pixels` instead of the resized `seen`; rounding puts none outside."""
    height, width = pixels.shape[:2]
    scaled = boxes * boxes.new_tensor([width / seen.shape[1], height / seen.shape[0]] * 2)
    scaled[-1] = scaled.new_tensor([0, 0, width, height])  # the whole picture, exactly
    return clip_boxes_to_image(scaled, (height, width))


def pyramid_level(boxes: Tensor) -> Tensor:
    """(R,) int64 in 0..3: a box of 224 x 224 px goes to level 2 (stride 16), twice the side one level up."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    return (torch.floor(4 + torch.log2(side / 224 + 1e-8)).clamp(2, 5) - 2).long()


def _crop(level: Tensor, boxes: Tensor, *, cells: int, stride: int) -> Tensor:
    return roi_align(level, [boxes], cells, spatial_scale=1 / stride, sampling_ratio=0, aligned=True)


def untrained(variant: str, *, seed: int) -> Detector:
    """A detector with seeded random weights whose features stay around 10, far from float16's limit.

    The last normalisation of each residual branch is scaled by 1 / sqrt(branches in its stage), so a
    stage at most doubles the variance that enters it, however deep it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = Detector(variant, trained=False)
        for module in detector.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(detector.rpn.head.cls_logits.weight, std=1e-3)  # far from where the sigmoid is 1
        nn.init.normal_(detector.rpn.head.bbox_pred.weight, std=1e-4)  # proposals stay near their anchors
        detector.get_parameter("stem.0.weight").div_(PIXEL_STD)
        for stage, blocks in (("res2", 3), ("res3", 4), ("res4", 23), ("res5", 3)):
            for block in range(blocks):
                detector.get_buffer(f"{stage}.{block}.bn3.weight").fill_(blocks**-0.5)
    return detector


def read_weights(path: Path, variant: str) -> dict[str, Tensor]:
    """The parameters that `features.convert` wrote; `ValueError` when they are of the other variant."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("variant")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    except (SafetensorError, OSError) as error:
        raise ValueError(f"regions.weights: {path} cannot be read: {error}") from error
    if found != variant:
        raise ValueError(f"regions.variant is {variant}, but regions.weights {path} are of variant {found}")
    return state


def load(path: Path, variant: str) -> Detector:
    """A trained detector from what `features.convert` wrote. Raises `ValueError` for anything else."""
    state = read_weights(path, variant)
    detector = Detector(variant, num_classes=len(state["predictor.bbox_pred.weight"]) // 4)
    detector.load_state_dict(state)
    return detector
