"""detectron2 itself as the detector, where it is installed: the same weights in, the same rows out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from features.convert import renamed
from features.detector import Regions, read_weights, rescaled, resize

INSTALL = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"


class Detectron:
    """Called as a `features.detector.Detector` is."""

    def __init__(self, path: Path, variant: str):
        try:
            from detectron2 import model_zoo
            from detectron2.modeling import build_model
        except ImportError as error:
            raise ValueError(
                f"regions.backend is detectron2, which cannot be imported ({error}); it is in no package "
                f"registry, {INSTALL} tells how to install it; the backend torchvision needs nothing more"
            ) from error
        state = read_weights(path, variant)
        config = model_zoo.get_config(f"COCO-Detection/faster_rcnn_R_101_{variant.upper()}_3x.yaml")
        config.MODEL.WEIGHTS = ""
        config.MODEL.DEVICE = "cpu"
        config.MODEL.ROI_HEADS.NUM_CLASSES = len(state["predictor.bbox_pred.weight"]) // 4
        self.model = build_model(config).eval()
        names = {name: renamed(name) for name in self.model.state_dict()}
        self.model.load_state_dict({name: state[ours] for name, ours in names.items() if ours}, strict=False)
        self.variant = variant

    def to(self, device: str) -> "Detectron":
        self.model.to(device)
        return self

    def many(self, pictures: Sequence[np.ndarray], **asked: Any) -> list[Regions]:
        return [self(pixels, **asked) for pixels in pictures]

    @torch.inference_mode()
    def __call__(
        self,
        pixels: np.ndarray,
        *,
        short_side_px: int,
        long_side_px: int,
        max_boxes: int,
        nms_iou: float,
        min_score: float,
    ) -> Regions:
        from detectron2.structures import Boxes

        resized = resize(pixels, short_side_px=short_side_px, long_side_px=long_side_px)
        height, width = resized.shape[:2]
        heads = self.model.roi_heads
        heads.box_predictor.test_score_thresh = min_score
        heads.box_predictor.test_nms_thresh = nms_iou
        heads.box_predictor.test_topk_per_image = max_boxes
        image = torch.from_numpy(resized[..., ::-1].copy()).permute(2, 0, 1)
        images = self.model.preprocess_image([{"image": image}])
        levels = self.model.backbone(images.tensor)
        proposals, _ = self.model.proposal_generator(images, levels, None)
        [found], _ = heads(images, levels, proposals, None)
        whole = found.pred_boxes.tensor.new_tensor([[0, 0, width, height]])
        boxes = torch.cat([found.pred_boxes.tensor, whole])
        scores = torch.cat([found.scores, found.scores.new_ones(1)])
        if self.variant == "c4":
            maps = heads._shared_roi_transform([levels[name] for name in heads.in_features], [Boxes(boxes)])
            features, grid = maps.mean(dim=(2, 3)), maps[-1]
        else:
            crops = heads.box_pooler([levels[name] for name in heads.box_in_features], [Boxes(boxes)])
            res5 = self.model.backbone.bottom_up(images.tensor)["res5"]
            features, grid = heads.box_head(crops), F.adaptive_avg_pool2d(res5, 7)[0]
        parts = (rescaled(boxes, resized, pixels), scores, features, grid.flatten(1).T)
        return Regions(*(part.cpu().numpy() for part in parts))
