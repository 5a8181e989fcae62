"""Regions of every product's picture by Faster R-CNN with ResNet101, as shards of `schema.REGIONS`.

    python -m features.regions CORPUS

Per picture at most `max_boxes` boxes, best first, and last the whole picture as one more region; their
features are float16, little-endian, 2048 (`c4`) or 1024 (`fpn`) wide. Boxes are in pixels of the picture
as `pipeline.pictures` decodes it. Statuses: `ok`, `undecodable`, or the image's own where there is no
image. `weights` is `random` (seeded) or a .safetensors made by `python -m features.convert`.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from pipeline import params, pictures, schema, shards

if TYPE_CHECKING:
    import numpy as np

    from features.detector import Detector
    from features.detectron import Detectron

RANDOM = "random"
WIDTHS = {"c4": 2048, "fpn": 1024}
NO_REGIONS: dict[str, Any] = {"boxes": [], "scores": [], "num_regions": 0, "features": None, "grid": None}


class Settings(params.Settings):
    backend: Literal["torchvision", "detectron2"] = "torchvision"
    variant: Literal["c4", "fpn"] = "c4"
    weights: str = RANDOM
    seed: int = Field(0, ge=0, lt=2**32)  # of random weights
    short_side_px: int = Field(800, ge=32, le=4096)
    long_side_px: int = Field(1333, ge=32, le=8192)
    max_boxes: int = Field(36, ge=1, le=100)  # besides the whole picture
    nms_iou: float = Field(0.5, gt=0, le=1)  # of two boxes that overlap more, the better one stays
    min_score: float = Field(0.2, ge=0, le=1)  # of a class; random weights know no classes
    grid: bool = False  # also the 7x7 cells of res5 over the whole picture, 49 x 2048
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(1, ge=1, le=64)  # per worker; other threads, other bits
    shard_size: int = Field(32, ge=1, le=4096)

    @model_validator(mode="after")
    def _weights_fit(self) -> "Settings":
        if self.weights == RANDOM and self.backend == "detectron2":
            raise ValueError("backend detectron2 needs weights, and they are random")
        if self.weights != RANDOM and not self.weights.endswith(".safetensors"):
            raise ValueError(
                f"weights must be {RANDOM} or a .safetensors file (features.convert makes one), "
                f"got {self.weights!r}"
            )
        return self


def make_worker(settings: Settings) -> Callable[[shards.Rows], Iterator[dict[str, Any]]]:
    """A function from rows `asin, status, image` to rows of `schema.REGIONS`."""
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("regions.device is cuda, and torch sees no GPU")
    torch.set_num_threads(settings.threads)
    return functools.partial(detect_rows, open_detector(settings), settings)


def detect_rows(model: Callable[..., Any], settings: Settings, rows: shards.Rows) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {"asin": row["asin"], **_detect(model, row, settings)}


def open_detector(settings: Settings) -> "Detector | Detectron":
    from features import detector, detectron

    if settings.weights == RANDOM:
        return detector.untrained(settings.variant, seed=settings.seed).to(settings.device)
    if settings.backend == "detectron2":
        return detectron.Detectron(Path(settings.weights), settings.variant).to(settings.device)
    return detector.load(Path(settings.weights), settings.variant).to(settings.device)


def _detect(model: Callable[..., Any], row: dict[str, Any], settings: Settings) -> dict[str, Any]:
    import numpy as np

    if row["status"] != "ok":
        return {"status": row["status"], **NO_REGIONS}
    try:
        pixels = np.asarray(pictures.decode(row["image"]))
    except Exception:  # noqa: BLE001 - a decoder may raise anything; the status counts it
        return {"status": "undecodable", **NO_REGIONS}
    found = model(
        pixels,
        short_side_px=settings.short_side_px,
        long_side_px=settings.long_side_px,
        max_boxes=settings.max_boxes,
        nms_iou=settings.nms_iou,
        min_score=settings.min_score,
    )
    return {
        "status": "ok",
        "boxes": found.boxes.tolist(),
        "scores": found.scores.tolist(),
        "num_regions": len(found.boxes),
        "features": half(found.features, row["asin"]),
        "grid": half(found.grid, row["asin"]) if settings.grid else None,
    }


def half(features: "np.ndarray", asin: str) -> bytes:
    """Little-endian float16; `ValueError` where a feature is not finite, or not in float16."""
    import numpy as np

    with np.errstate(over="ignore"):
        halved = features.astype("<f2")
    if not np.isfinite(halved).all():
        raise ValueError(
            f"a region feature of {asin} is not finite in float16 (largest magnitude "
            f"{np.abs(features).max():.4g}, limit {np.finfo(np.float16).max:.0f}): "
            "regions.weights do not fit the detector"
        )
    return halved.tobytes()


def job(corpus: str, settings: Settings) -> shards.Job:
    images = shards.ShardFolder(Path("data") / corpus / "images")
    weights = {}
    if settings.weights != RANDOM:
        path = Path(settings.weights)
        if not path.is_file():
            raise ValueError(f"regions.weights: {path} does not exist")
        weights["detector"] = shards.sha256_of(path)
    return shards.Job(
        stage="regions",
        corpus=corpus,
        module="features.regions",
        settings=settings,
        schema=schema.region_schema(width=WIDTHS[settings.variant]),
        chunks=shards.chunks_of_folder(images, settings.shard_size),
        make_worker=make_worker,
        libraries=("torch", "torchvision", "numpy", "pillow"),
        weights=weights,
        threads=settings.threads,
        lost=NO_REGIONS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m features.regions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("corpus", metavar="CORPUS", help="a corpus of params.yaml")
    corpus = parser.parse_args().corpus
    try:
        settings = params.load(Settings, params.CONFIG / corpus / "regions.json")
        shards.run(job(corpus, settings))
    except ValueError as error:
        raise SystemExit(f"regions: {error}") from error


if __name__ == "__main__":
    main()
