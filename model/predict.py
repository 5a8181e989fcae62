"""Apply a trained model to a catalogue: lines of Amazon's metadata form in, one line of JSON each out.

    python -m model.predict --model runs/sample/smartave/0/model --input catalogue.jsonl --output out.jsonl

A line is `{"asin", "title", "description": [...], "feature": [...], "category": [...],
"imageURLHighRes": [...], ...}`; the file may be gzipped. Texts, pictures, OCR and regions are prepared
by the settings that the model was trained with. Out come, in the order of the input,
`{"asin", "status", "image", "attributes": [{"key", "values": [{"value", "score", "source"}]}]}`.

`status` is "ok" or the reason why a line could not be used (`kills_worker`: one process after another died
of it); `image` is "ok" or why there was no picture. `source` says where a value was read: `kind` text, ocr
or vocabulary; `index` the cleaned paragraph (its `field` is title, description, feature, ...) or OCR line,
and `begin`, `end` in its characters.

Lines are answered in shards, as slow stages make theirs: by SMARTAVE_WORKERS processes (default: as many as
keep all cores busy, one on a GPU) or on Dask (SMARTAVE_EXECUTOR, SMARTAVE_DASK), the output being the same.
Killed anywhere, the same command goes on where it was, and asks again for pictures that failed for now. What
is zipped is unzipped into the store (SMARTAVE_STORE) meanwhile.
"""

import argparse
import contextlib
import hashlib
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from features import devices
from model import checkpoint
from model.extractor import CHUNK, Extractor, Reader, least_score, of_pictures
from pipeline import mave, params, progress, shards
from pipeline.disk import atomically
from pipeline.images import TRANSIENT
from pipeline.lines import BLOCK_BYTES
from pipeline.provenance import digest
from pipeline.reading import store
from pipeline.tally import Tally
from pipeline.unzip import GZIP_MAGIC

SHARD = 2 * CHUNK  # lines; whole chunks, so that what shares a batch does not hang on where a shard ends
SHARD_BYTES = 32 << 20  # with which a shard ends as well
ANSWERED = pa.schema([("asin", pa.string()), ("status", pa.string()), ("answer", pa.string())])
LIBRARIES = (
    "easyocr",
    "numpy",
    "onnxruntime",
    "opencv-python-headless",
    "pillow",
    "rapidocr",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
)


class Settings(params.Settings):
    """What an answer depends on besides line and model. No other run takes the shards of an output."""

    output: str
    model: str
    images: str | None
    hosts: tuple[str, ...]
    attributes: tuple[str, ...] | None
    min_precision: float | None
    batch_size: int
    threads: int = 1  # of each process
    processes: int = 1  # that ask the hosts at the same time


def raw_lines(file: BinaryIO) -> Iterator[bytes]:
    """Every line, also blank ones; of one that is too long, its beginning."""
    while line := file.readline(mave.MAX_LINE_BYTES + 1):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(mave.MAX_LINE_BYTES)
        yield line


@dataclass(frozen=True, slots=True)
class Lines:
    """A `pipeline.reading.Chunk`: the lines of one shard, called by their numbers."""

    path: Path
    begin: int  # byte
    first: int  # number of its first line
    num_rows: int
    sha256: str

    @property
    def digest(self) -> str:
        return digest([self.first, self.sha256])

    @property
    def ends(self) -> tuple[str, str]:
        return f"line {self.first}", f"line {self.first + self.num_rows - 1}"

    def load(self) -> shards.Rows:
        with self.path.open("rb") as file:
            file.seek(self.begin)
            raws = list(islice(raw_lines(file), self.num_rows))
        if hashlib.sha256(b"".join(raws)).hexdigest() != self.sha256:
            raise ValueError(f"{self.path} changed while it was read; run again")
        return [{"asin": f"line {self.first + at}", "raw": raw} for at, raw in enumerate(raws)]


def in_shards(path: Path) -> list[Lines]:
    """A plain file, cut."""
    found: list[Lines] = []
    first = 1
    with path.open("rb") as file, progress.of_bytes(path, path.stat().st_size) as bar:
        lines = raw_lines(file)
        while True:
            begin, number, sha256 = file.tell(), 0, hashlib.sha256()
            for raw in islice(lines, SHARD):
                sha256.update(raw)
                number += 1
                if file.tell() - begin >= SHARD_BYTES:
                    break
            if not number:
                return found
            found.append(Lines(path, begin, first, number, sha256.hexdigest()))
            bar.update(file.tell() - begin)
            first += number


@contextlib.contextmanager
def plain(path: Path, name: str) -> Iterator[Path]:
    """The file; of one that is zipped what it holds, which the store has meanwhile under a name."""
    unzipped = store() / "predict" / f"{name}.input"
    with path.open("rb") as file:
        is_zipped = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    with mave.opened(path) as content, contextlib.ExitStack() as stack:  # which tells a pointer from data
        if is_zipped:
            unzipped.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(unzipped.unlink, missing_ok=True)
            with unzipped.open("wb") as copy:
                shutil.copyfileobj(content, copy, BLOCK_BYTES)
        yield unzipped if is_zipped else path


def make_worker(settings: Settings) -> Callable[[shards.Rows], Iterator[shards.Made]]:
    import torch

    torch.set_num_threads(settings.threads)
    extractor = Extractor.from_pretrained(
        settings.model,
        images=None if settings.images is None else Path(settings.images),
        hosts=settings.hosts,
        min_precision=settings.min_precision,
        batch_size=settings.batch_size,
        processes=settings.processes,
    )

    def process(rows: shards.Rows) -> Iterator[shards.Made]:
        lines = (extractor.reader.read(row["raw"]) for row in rows)
        answered = extractor.rows(lines, attributes=settings.attributes)
        for row, answer in zip(rows, answered, strict=True):
            yield Counter([answer["status"], *([f"image: {answer['image']}"] if answer["image"] else [])])
            yield {
                "asin": row["asin"],
                "status": answer["image"] if answer["image"] in TRANSIENT else answer["status"],
                "answer": json.dumps(answer, ensure_ascii=False),
            }

    return process


def job(settings: Settings, output: Path, chunks: Sequence[Lines]) -> shards.Job:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Path(settings.model)
    provenance = checkpoint.provenance(model)
    named = {path.name: path for path in sorted(model.iterdir())}
    named |= {stage: Path(str(provenance.get(stage, {}).get("weights"))) for stage in ("ocr", "regions")}
    content = {name: shards.sha256_of(path) for name, path in named.items() if path.is_file()}
    architecture = provenance["architecture"]
    most, at_once = devices.max_workers(device), None
    if settings.hosts:  # else nothing is asked for
        limits = of_pictures(provenance, None, settings.hosts)
        at_once = shards.executor(settings.threads, most, limits.concurrency)[1]
        settings = settings.model_copy(update={"processes": at_once})
    return shards.Job(
        stage="predict",
        corpus=output.name,
        module="model.predict",
        settings=settings,
        unseen=frozenset({"model", "processes"}),  # the model counts by its content
        schema=ANSWERED,
        chunks=chunks,
        make_worker=make_worker,
        libraries=LIBRARIES,
        weights={**content, architecture: shards.code_digest(architecture)},
        precision=device,
        threads=settings.threads,
        max_workers=most,
        at_once=at_once,
        transient=TRANSIENT,
        lost={"answer": None},
        unit="line",
    )


def run(arguments: argparse.Namespace) -> Tally:
    """Write the whole output, or none of it; returns the statuses of lines and pictures."""
    if not arguments.input.is_file():
        raise ValueError(f"{arguments.input} does not exist")
    if arguments.images is not None and not arguments.images.is_dir():
        raise ValueError(f"{arguments.images} is not a folder")
    provenance = checkpoint.provenance(arguments.model)
    if arguments.min_precision is not None:
        least = least_score(arguments.model, arguments.min_precision)
        sys.stderr.write(f"values with a score under {least} are left out\n")
    for name in sorted(set(arguments.attributes or ()) - set(provenance["attributes"])):
        sys.stderr.write(f"{name}: the model was not trained on this attribute, and is asked all the same\n")
    output = arguments.output
    if output.is_dir():
        raise ValueError(f"{output} is a folder")
    # What reads pictures sets its process to as many.
    threads = max(provenance.get(stage, {}).get("threads", 1) for stage in ("ocr", "regions"))
    shards.executor(threads)  # which raises for a wrong environment
    settings = Settings(
        output=str(output.resolve()),
        model=str(arguments.model),
        images=None if arguments.images is None else str(arguments.images),
        hosts=tuple(arguments.hosts),
        attributes=None if arguments.attributes is None else tuple(arguments.attributes),
        min_precision=arguments.min_precision,
        batch_size=arguments.batch_size,
        threads=threads,
    )
    lock = f"{re.sub(r'[^0-9A-Za-z_-]', '_', output.name)}-{digest(str(output.resolve()))[:8]}"
    with shards.sole_writer("predict", lock), plain(arguments.input, lock) as path:
        chunks = in_shards(path)
        asked = job(settings, output, chunks)
        made_with = asked.made_with()
        take_up(shards.stored(asked, made_with), arguments.anew)
        made, records = shards.make(asked, made_with)
        reader = Reader(provenance)
        with atomically(output) as temporary, temporary.open("wb") as file:
            for chunk, shard in zip(chunks, made, strict=True):
                file.writelines(f"{answer}\n".encode() for answer in answers(chunk, shard, reader))
        for shard in made:  # pictures may be others tomorrow
            shard.forget()
    tally = Tally()
    for record in records:
        tally.counts.update(record["measured"])
        if killed := record["status"].get(shards.KILLS_WORKER):
            tally.add(shards.KILLS_WORKER, count=killed)
    return tally


def take_up(made: Sequence[shards.Stored], anew: bool) -> None:
    """Tell what an interrupted run has left, or forget it."""
    found = [shard for shard in made if shard.path.is_file()]
    if anew:
        for shard in found:
            shard.forget()
    elif found:
        sys.stderr.write(
            f"{len(found)} of {len(made)} shards are of a run that did not end, with the pictures that there "
            "were then; --anew answers them again\n"
        )


def answers(chunk: Lines, shard: shards.Stored, reader: Reader) -> Iterator[str]:
    """The lines of the output for those of a shard."""
    for at, row in enumerate(shard.rows()):
        if row["status"] == shards.KILLS_WORKER:
            asin = reader.read(chunk.load()[at]["raw"]).asin
            none = {"asin": asin, "status": row["status"], "image": None, "attributes": []}
            yield json.dumps(none, ensure_ascii=False)
        else:
            yield row["answer"]


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="FOLDER", help="what model.train wrote")
    add("--input", required=True, type=Path, metavar="FILE", help="the catalogue, .jsonl or .jsonl.gz")
    add("--output", required=True, type=Path, metavar="FILE", help="written whole or not at all")
    add("--images", type=Path, metavar="FOLDER", help="image names of the catalogue are files below it")
    add("--hosts", nargs="+", default=(), metavar="HOST", help="image URLs are fetched from these only")
    add("--attributes", nargs="+", metavar="NAME", help="default: those trained for the category, else all")
    add(
        "--min-precision",
        type=_share,
        metavar="P",
        help="leave out values scored under the threshold that gives this precision on validation",
    )
    add("--batch-size", type=_positive, default=64, metavar="N", help="questions at a time (default: 64)")
    add("--anew", action="store_true", help="take nothing of a run of the same command that did not end")
    return parser.parse_args(command_line)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be over 0 and at most 1, got {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def main() -> None:
    try:
        tally = run(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"predict: {error}")
    for reason, count in sorted(tally.counts.items()):
        sys.stderr.write(f"{count:>8} {reason}\n")


if __name__ == "__main__":
    main()
