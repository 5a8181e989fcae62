"""Regions of every product's picture by Faster R-CNN with ResNet101, as shards of `schema.REGIONS`.

    python -m features.regions CORPUS

Per picture at most `max_boxes` boxes, best first, and last the whole picture as one more region; their
features are float16, little-endian, 2048 (`c4`) or 1024 (`fpn`) wide. Boxes are in pixels of the picture
as `pipeline.pictures` decodes it. Statuses: `ok`, `undecodable`, or the image's own where there is no
image. `weights` is `random` (seeded) or a .safetensors made by `python -m features.convert`.
`precision` says how the torchvision backend computes: `reference` as PyTorch does by itself, `float32` the
same numbers up to rounding and faster, `bfloat16` less exact and faster still, `compiled` by torch.compile
(half a minute for each shape of picture, so for pictures of few shapes). Every `check_every`-th picture's
features are computed by `reference` as well, and the stage's metrics tell their cosine.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, model_validator

from features import devices
from features.decode import batches, groups
from features.devices import Device
from features.memory import keep_freed
from pipeline import params, schema, shards

if TYPE_CHECKING:
    import numpy as np

    from features.detector import Detector, Regions
    from features.detectron import Detectron

RANDOM = "random"
ASKED = {"short_side_px", "long_side_px", "max_boxes", "nms_iou", "min_score"}
BATCH_PIXELS = 1_000_000  # of resized pictures in one batch
LOW = 0.999  # a cosine under this is counted
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
    precision: Literal["reference", "float32", "bfloat16", "compiled"] = "float32"
    check_every: int = Field(16, ge=0)  # pictures of a shard of which one is compared with `reference`
    grid: bool = False  # also the 7x7 cells of res5 over the whole picture, 49 x 2048
    device: Device = "auto"  # a GPU where there is one
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


def make_worker(settings: Settings) -> "Work":
    """For a process that does nothing else; `open_work` is for one that does."""
    keep_freed()
    return open_work(settings)


def open_work(settings: Settings) -> "Work":
    import torch

    settings = devices.here(settings, "regions")
    torch.set_num_threads(settings.threads)
    reference = open_detector(settings)
    if settings.backend == "detectron2" or settings.precision == "reference":
        return Work(reference, None, settings)
    from features.detector import compiled, hastened

    detector = cast("Detector", reference)
    if settings.precision == "compiled":
        faster = compiled(detector)
    else:
        faster = hastened(detector, getattr(torch, settings.precision)).to(settings.device)
    return Work(faster, detector if settings.check_every else None, settings)


def open_detector(settings: Settings) -> "Detector | Detectron":
    from features import detector, detectron

    if settings.weights == RANDOM:
        return detector.untrained(settings.variant, seed=settings.seed).to(settings.device)
    if settings.backend == "detectron2":
        return detectron.Detectron(Path(settings.weights), settings.variant).to(settings.device)
    return detector.load(Path(settings.weights), settings.variant).to(settings.device)


@dataclass
class Work:
    """One worker: turns rows `asin, status, image` into rows of `schema.REGIONS`, and counts at the end."""

    model: "Detector | Detectron"
    reference: "Detector | None"
    settings: Settings

    def __call__(self, rows: shards.Rows) -> Iterator[dict[str, Any] | Counter[str]]:
        counts: Counter[str] = Counter()
        num_seen = 0
        for group in groups(rows):
            usable = [one for one in group if one.rgb is not None]
            regions = iter(self._regions([one.rgb for one in usable]))  # type: ignore[misc]
            for one in group:
                if one.rgb is None:
                    yield {"asin": one.asin, "status": one.status, **NO_REGIONS}
                    continue
                found = next(regions)
                if self.reference is not None and num_seen % self.settings.check_every == 0:
                    counts += self._compared(one.rgb, found)
                num_seen += 1
                yield {
                    "asin": one.asin,
                    "status": "ok",
                    "boxes": found.boxes.tolist(),
                    "scores": found.scores.tolist(),
                    "num_regions": len(found.boxes),
                    "features": half(found.features, one.asin),
                    "grid": half(found.grid, one.asin) if self.settings.grid else None,
                }
        yield counts

    def _regions(self, pictures: "list[np.ndarray]") -> "list[Regions]":
        """In order of the pictures; those of one resized shape are looked at together."""
        from features.detector import resized_shape

        asked = self.settings.model_dump(include=ASKED)
        found: list[Any] = [None] * len(pictures)
        sides = {name: asked[name] for name in ("short_side_px", "long_side_px")}
        shapes = [resized_shape(one.shape[:2], **sides) for one in pictures]
        for members in batches(shapes, BATCH_PIXELS):
            for index, regions in zip(
                members, self.model.many([pictures[index] for index in members], **asked), strict=True
            ):
                found[index] = regions
        return found

    def _compared(self, rgb: "np.ndarray", found: "Regions") -> Counter[str]:
        """How far the features are from those that `reference` has at the same boxes."""
        import numpy as np

        assert self.reference is not None
        sides = self.settings.model_dump(include={"short_side_px", "long_side_px"})
        wanted = self.reference.features_of(rgb, found.boxes, **sides)
        lengths = np.linalg.norm(wanted, axis=1) * np.linalg.norm(found.features, axis=1)
        cosine = (wanted * found.features).sum(axis=1, dtype=np.float64) / np.maximum(lengths, 1e-12)
        return Counter(pictures=1, regions=len(cosine), cosine=cosine.sum(), low=int((cosine < LOW).sum()))


def cosine_to_reference(counts: Counter[str]) -> dict[str, Any]:
    if not counts["regions"]:
        return {}
    told = {name: counts[name] for name in ("pictures", "regions")}
    mean = round(counts["cosine"] / counts["regions"], 6)
    return {"cosine_to_reference": {**told, "mean": mean, f"below_{LOW}": counts["low"]}}


def smallest_holding(boxes: "np.ndarray", quad: Sequence[float]) -> int:
    """Index of the smallest of `boxes` (R, 4), the last the whole picture, that holds all of an OCR line.

    `quad` are x, y of its four corners; what lies outside the picture is held by the whole of it.
    """
    import numpy as np

    xs, ys = np.array(quad[::2]), np.array(quad[1::2])
    holds = (boxes[:, 0] <= xs.min()) & (boxes[:, 1] <= ys.min())
    holds &= (boxes[:, 2] >= xs.max()) & (boxes[:, 3] >= ys.max())
    holds[-1] = True
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return int(np.where(holds, areas, np.inf).argmin())


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
    settings = devices.here(settings, "regions")
    devices.tell_if_slow(settings.precision, settings.device, "regions")
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
        max_workers=devices.max_workers(settings.device),
        measures=cosine_to_reference,
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
    except (ValueError, OSError) as error:
        raise SystemExit(f"regions: {error}") from error


if __name__ == "__main__":
    main()
