"""OCR of pack shots: EasyOCR's own loop over files beside ours, exact and fast, in one run on the same cores.

    python -m benchmarks ocr

Pictures are those of ../shared/data/packshots, and where it is absent a few that the sample corpus draws.
All three work with as many processes as there are cores, each with one thread, on the same pictures; the
order turns with each round. Shown are pictures per second, their ratio to the loop of `readtext`, and how far
the lines agree. BENCH_PICTURES and BENCH_ROUNDS say how many (default 12 and 1).
"""

import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from features.lines import Line, agreement, lines_in_order, shares

PACKSHOTS = Path(__file__).parents[2] / "shared/data/packshots/images"
NUM_PICTURES = int(os.environ.get("BENCH_PICTURES", "12"))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "1"))
LOOPS = ("readtext", "exact", "fast")

Lines = dict[str, list[Line]]


def pictures_to_read(folder: str) -> list[str]:
    if PACKSHOTS.is_dir():
        return [str(path) for path in sorted(PACKSHOTS.iterdir())][:NUM_PICTURES]
    from pipeline import sample

    sample.generate(sample.Settings(), Path(folder))
    return [str(path) for path in sorted(Path(folder).rglob("*.jpg"))][:NUM_PICTURES]


def open_loop(name: str) -> Callable[[list[str]], Lines]:
    """A function from paths to their lines; models are loaded here, outside the time that counts."""
    import cv2
    import torch

    from features import ocr
    from pipeline import pictures

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if name == "readtext":
        reader = ocr.open_reader(ocr.Settings())

        def read_files(paths: list[str]) -> Lines:
            read = {}
            for path in paths:
                size = pictures.decode(Path(path).read_bytes()).size
                read[path] = lines_in_order(reader.readtext(path), height=size[1], width=size[0])
            return read

        return read_files
    work = ocr.make_worker(ocr.Settings(mode=name, check_every=0))  # type: ignore[arg-type]

    def read_rows(paths: list[str]) -> Lines:
        rows = [{"asin": path, "status": "ok", "image": Path(path).read_bytes()} for path in paths]
        read: list[dict[str, Any]] = [row for row in work(rows) if not isinstance(row, Counter)]
        return {
            row["asin"]: [Line(one["text"], one["confidence"], tuple(one["quad"])) for one in row["lines"]]
            for row in read
        }

    return read_rows


def serve(name: str, pipe) -> None:
    read = open_loop(name)
    pipe.send(None)
    while paths := pipe.recv():
        pipe.send(read(paths))


def timed(name: str, paths: list[str], num_processes: int) -> tuple[float, Lines]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(num_processes):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(name, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    start = time.perf_counter()
    for at, pipe in enumerate(pipes):
        pipe.send(paths[at::num_processes])
    read: Lines = {}
    for pipe in pipes:
        read |= pipe.recv()
    seconds = time.perf_counter() - start
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    return seconds, read


def main() -> None:
    num_processes = min(2, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        paths = pictures_to_read(folder)
        seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
        lines: dict[str, Lines] = {}
        for turn in range(ROUNDS):
            for name in LOOPS[turn % 3 :] + LOOPS[: turn % 3]:
                took, lines[name] = timed(name, paths, num_processes)
                seconds[name].append(took)
    print(f"{len(paths)} pictures, {num_processes} processes of one thread, median of {ROUNDS} rounds")
    loop = statistics.median(seconds["readtext"])
    for name in LOOPS:
        median = statistics.median(seconds[name])
        told = shares(sum((agreement(lines["readtext"][p], lines[name][p]) for p in paths), Counter()))
        print(
            f"{name:9s} {len(paths) / median:6.3f} pictures/s {loop / median:6.2f}x   of readtext's lines "
            f"{told['share_of_lines_found']:.1%} found, {told['share_of_characters_right']:.1%} of their "
            "characters right"
        )


if __name__ == "__main__":
    main()
