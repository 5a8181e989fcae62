"""All of MAVE's road to pictures on this machine: generated files of the real shapes, served on loopback.

    python -m benchmarks.rehearsal                                  some 300 MB, minutes
    python -m benchmarks.rehearsal --lines 15500000 --labelled 0.22 as large as the real thing: 100 GB of disk

A copy of the project runs `dvc repro images@mave` with only addresses, pins and `images.hosts` changed. The
metadata is zipped twice and has thumbnails, the files by category have pictures, labels come as positives and
negatives; spans that are off, repeated products, products of no category, dead and broken pictures occur.
"""

import argparse
import gzip
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from pipeline.disk import sha256_of
from pipeline.editing import edited

ROOT = Path(__file__).resolve().parent.parent
CATEGORIES = ("Mugs", "Bags", "Lamps")
KEYS = [f"Attribute {number}" for number in range(30)]
WORDS = [
    "red",
    "blue",
    "steel",
    "cotton",
    "large",
    "small",
    "round",
    "travel",
    "kitchen",
    "mug",
    "bag",
    "lamp",
    "chair",
    "soft",
    "deluxe",
    "set",
    "of",
    "with",
    "for",
]
PICTURES = 16
LINES, LABELLED = 100_000, 0.22


def asin(number: int) -> str:
    return f"B{number:09d}"


def product(number: int, rng: random.Random) -> tuple[dict[str, Any], list[str]]:
    """A metadata row without pictures, and its paragraphs as they are after cleaning."""
    title = " ".join(rng.choices(WORDS, k=rng.randint(5, 12)))
    features = [" ".join(rng.choices(WORDS, k=rng.randint(8, 30))) for _ in range(rng.randint(0, 5))]
    marked = [f"<p><b>{text}</b></p>" if rng.random() < 0.1 else text for text in features]
    row: dict[str, Any] = {
        "category": ["A", "B"],
        "description": ["", " ".join(rng.choices(WORDS, k=60))] if number % 3 else [],
        "title": title,
        "also_buy": [asin(rng.randrange(10**6)) for _ in range(30)],
        "brand": rng.choice(WORDS),
        "feature": marked,
        "similar_item": " ".join(rng.choices(WORDS, k=250)) * 4,
        "price": "$9.99",
        "asin": asin(number),
    }
    return row, [title, *row["description"][1:], *features, "$9.99", row["brand"]]


def labels(number: int, texts: list[str], rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """The product's positive and negative line; one span in fifty is off."""
    keys = rng.sample(KEYS, 6)
    positives = []
    for key in keys[: rng.randint(1, 3)]:
        evidences = []
        for _ in range(rng.randint(1, 4)):
            pid = rng.randrange(len(texts))
            value = rng.choice(texts[pid].split())
            begin = texts[pid].index(value) + (rng.random() < 0.02)
            evidences.append({"value": value, "pid": pid, "begin": begin, "end": begin + len(value)})
        positives.append({"key": key, "evidences": evidences})
    row = {"id": asin(number), "category": CATEGORIES[number % len(CATEGORIES)]}
    negatives = [{"key": key, "evidences": []} for key in keys[3:]]
    return {**row, "attributes": positives}, {**row, "attributes": negatives}


def write_files(folder: Path, place: str, roots: list[str], num_lines: int, labelled: float) -> None:
    """labels/, metadata/ and roots/ as they come from their sources, and pictures/."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pictures").mkdir()
    with ExitStack() as stack:

        def opened(name: str, times: int) -> Any:
            file: Any = stack.enter_context((folder / name).open("wb", buffering=1 << 20))
            for _ in range(times):
                file = stack.enter_context(gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1, mtime=0))
            return file

        positive, negative = opened("positives.jsonl", 0), opened("negatives.jsonl", 0)
        whole = opened("all.json.gz", 2)
        by_root = [opened(f"meta_{number}.json.gz", 1) for number in range(len(roots))]
        for number in range(num_lines):
            row, texts = product(number, rng)
            address = f"http://{place}/images/I/{asin(number)}"
            line = json.dumps({**row, "image": [f"{address}._SS40_.jpg"]}).encode() + b"\n"
            whole.write(line * (2 if number % 100 == 50 else 1))
            at = rng.randrange(len(roots) + 1)  # the last is none of the eight
            if at < len(roots):
                pictures = {"imageURL": [f"{address}._SS40_.jpg"], "imageURLHighRes": [f"{address}.jpg"]}
                if number % 20 == 0:
                    pictures = {"imageURL": [], "imageURLHighRes": []}
                by_root[at].write(json.dumps({**row, **pictures}).encode() + b"\n")
            if rng.random() < labelled:
                one, other = labels(number, texts, rng)
                positive.write(json.dumps(one).encode() + b"\n")
                if rng.random() < 0.5:
                    negative.write(json.dumps(other).encode() + b"\n")
    noise = np.random.default_rng(0)
    for number in range(PICTURES):
        small = Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((500, 500)).save(file, "JPEG")
        (folder / f"pictures/{number}.jpg").write_bytes(file.getvalue())


class Handler(SimpleHTTPRequestHandler):
    """Files of the folder; any picture by asin, of which one in thirty is gone and one in thirty is cut."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if not self.path.startswith("/images/"):
            return super().do_GET()
        number = int("".join(filter(str.isdigit, Path(self.path).name.split(".")[0])) or 0)
        data = (Path(self.directory) / f"pictures/{number % PICTURES}.jpg").read_bytes()
        if number % 30 == 7:
            data, status = b"", 404
        else:
            data, status = data[:2000] if number % 30 == 13 else data, 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The `host:port` that serves `folder`."""
    folder.mkdir(parents=True, exist_ok=True)

    class Here(Handler):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, directory=str(folder), **more)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def turn_on(project: Path, folder: Path, place: str) -> None:
    """Name MAVE in the project's params.yaml, and change its addresses, pins and image hosts."""
    with edited(project / "params.yaml") as content:
        entry = content["corpora"]["mave"]
        served = ["positives.jsonl", "negatives.jsonl", "all.json.gz"]
        served += [f"meta_{number}.json.gz" for number in range(len(entry["roots"]))]
        files = [*entry["labels"], *entry["metadata"], *entry["roots"].values()]
        for file, name in zip(files, served, strict=True):
            digest, size = sha256_of(folder / name), (folder / name).stat().st_size
            file.update(url=f"http://{place}/{name}", mirrors=[], sha256=digest, size=size)
        entry["images"]["hosts"] = [DoubleQuotedScalarString(place)]
        content["run"]["corpora"] = ["mave"]


def copy_project(project: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, listed):
        if name == "dvc.lock" or name.startswith(("config/", "metrics/")):
            continue
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, project / name)
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)


def rehearse(project: Path, files: Path, num_lines: int, labelled: float) -> dict[str, Any]:
    """Run `dvc repro images@mave` in `project`, a copy of ours; its metrics of products and images."""
    roots = list(YAML(typ="safe").load((project / "params.yaml").read_text())["corpora"]["mave"]["roots"])
    with serving(files) as place:
        write_files(files, place, roots, num_lines, labelled)
        turn_on(project, files, place)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
        subprocess.run(["dvc", "repro", "images@mave"], cwd=project, env=environment, check=True)
    return {
        stage: json.loads((project / f"metrics/mave/{stage}.json").read_text())
        for stage in ("products", "images")
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rehearsal",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--lines", type=int, default=LINES, help="of metadata")
    parser.add_argument("--labelled", type=float, default=LABELLED, help="share of them")
    parser.add_argument("--folder", type=Path, help="an empty one with room for it; none: a temporary one")
    given = parser.parse_args(arguments or [])
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        (folder / "project").mkdir(parents=True)
        copy_project(folder / "project")
        start = time.perf_counter()
        found = rehearse(folder / "project", folder / "files", given.lines, given.labelled)
        print(f"{given.lines} lines in {time.perf_counter() - start:.0f} s, generating them included")
        print(
            json.dumps({"Total": found["products"]["tables"]["Total"], "images": found["images"]}, indent=1)
        )


if __name__ == "__main__":
    main(sys.argv[1:])
