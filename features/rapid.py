"""RapidOCR as the second engine: PP-OCR's small models, which its package carries, for Chinese and English.

It runs on onnxruntime, picture by picture, as its own users call it.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rapidocr import RapidOCR
from rapidocr.utils.process_img import ResizeImgError

from features.recogniser import Found

MODELS = ("PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx", "ch_ppocr_mobile_v2.0_cls_mobile.onnx")


def weight_files() -> dict[str, Path]:
    """Raises `ValueError` for a model that the package lacks: it would download it."""
    package = importlib.util.find_spec("rapidocr")
    assert package is not None
    assert package.origin is not None
    files = {name: Path(package.origin).parent / "models" / name for name in MODELS}
    for name, path in files.items():
        if not path.is_file():
            raise ValueError(f"ocr.engine: rapidocr does not carry {name}; install the version of the lock")
    return files


class Rapid:
    def __init__(self, *, canvas_px: int, threads: int) -> None:
        detector, recogniser, classifier = weight_files().values()
        self.engine = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.text_score": 0.0,
                "Global.max_side_len": canvas_px,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "Det.model_path": str(detector),
                "Rec.model_path": str(recogniser),
                "Cls.model_path": str(classifier),
            }
        )

    def __call__(self, pictures: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[list[Found]]:
        """`pictures`: RGB (height, width, 3) and grey, of which only the first is looked at."""
        return [self._read(rgb) for rgb, _ in pictures]

    def _read(self, rgb: np.ndarray) -> list[Found]:
        try:
            read: Any = self.engine(np.ascontiguousarray(rgb[..., ::-1]))
        except ResizeImgError:  # so long and thin that nothing of its short side is left on the canvas
            return []
        if read.boxes is None or read.txts is None or read.scores is None:
            return []
        return [
            (quad.tolist(), text, float(score))
            for quad, text, score in zip(read.boxes, read.txts, read.scores, strict=True)
        ]
