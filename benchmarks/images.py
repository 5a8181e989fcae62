"""Images by URL beside img2dataset: the same loopback server, two processes of 8 requests at a time each.

Both keep the bytes as they came and decode every picture to see that it is whole. One process of img2dataset
decodes in threads on all cores, one of ours on one (Pillow keeps the interpreter's lock); so img2dataset also
runs as one process of 16 threads, and the faster form is the one to beat. Each runs with few and with many
pictures, after a sync of the disk; the difference leaves start-up out. Each takes turns with the others and
its median counts: on a shared machine, the fastest of each would be of other minutes. img2dataset's clock is
that of its shards: its last seconds are waits. What one connection gets from the server shows that it is not
the limit.
"""

import argparse
import asyncio
import hashlib
import http.client
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np
from PIL import Image, ImageFilter

from pipeline import schema, shards

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(os.environ.get("SMARTAVE_PEERS", ROOT / ".cache/peers"))
FEW, MANY = 128, 2176  # few: a shard of 64 for each of our processes, so that both start
TURNS = 5
PROCESSES, CONCURRENCY = 2, 8
SIDE_PX, DISTINCT = 800, 32


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_mib: float


def pictures() -> list[bytes]:
    """Like pack shots: a product of soft noise on white, some 100 kB of JPEG."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(DISTINCT):
        noise = rng.integers(0, 256, (SIDE_PX // 2, SIDE_PX // 2, 3), dtype=np.uint8)
        product = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.2))
        image = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
        image.paste(product, (SIDE_PX // 4, SIDE_PX // 4))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=92)
        made.append(file.getvalue())
    return made


def serve(files: list[bytes], told: Connection) -> None:
    """`/NUMBER.jpg`, connections kept alive; a process of its own."""
    answers = [
        f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
        for data in files
    ]

    class Answer(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport, self.asked = cast(asyncio.Transport, transport), b""

        def data_received(self, data: bytes) -> None:
            self.asked += data
            while (end := self.asked.find(b"\r\n\r\n")) >= 0:
                request, self.asked = self.asked[:end], self.asked[end + 4 :]
                number = int(request[5 : request.index(b".jpg")])
                self.transport.write(answers[number % len(answers)])
                if b"connection: close" in request.lower():
                    self.transport.close()  # after what is written

    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(Answer, "127.0.0.1", 0, backlog=512)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


def only_read(place: str, num_images: int) -> float:
    """Images in a second over one connection: what the server can do at least."""
    client = http.client.HTTPConnection(place)
    start = time.perf_counter()
    for number in range(num_images):
        client.request("GET", f"/{number}.jpg")
        client.getresponse().read()
    client.close()
    return num_images / (time.perf_counter() - start)


def run(command: list[str], folder: Path, **environment: str) -> Run:
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[:3]} failed:\n{errors[-3000:]}")
    return Run(time.perf_counter() - start, usage.ru_maxrss / 1024)


def ours(folder: Path, urls: list[str], place: str, files: list[bytes]) -> Run:
    asins = [f"B{number:09d}" for number in range(len(urls))]
    rows = [
        {**dict.fromkeys(schema.PRODUCTS.names), "item": asin, "asin": asin, "image_urls": [url]}
        for asin, url in zip(asins, urls, strict=True)
    ]
    (folder / "data/toy").mkdir(parents=True)
    (folder / "config/toy").mkdir(parents=True)
    schema.write_parquet(rows, schema.PRODUCTS, folder / "data/toy/products.parquet")
    settings = {"hosts": [place], "concurrency": PROCESSES * CONCURRENCY}
    (folder / "config/toy/images.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pipeline.images", "toy"]
    done = run(command, folder, PYTHONPATH=str(ROOT), SMARTAVE_WORKERS=str(PROCESSES))
    known = {hashlib.sha256(data).hexdigest() for data in files}
    found = shards.ShardFolder(folder / "data/toy/images").rows(["status", "sha256"])
    kept = [row for row in found if row["status"] == "ok" and row["sha256"] in known]
    assert len(kept) == len(urls), f"{len(kept)} of {len(urls)} pictures came"
    return done


def theirs(folder: Path, urls: list[str], processes: int) -> Run:
    folder.mkdir(parents=True)
    (folder / "urls.txt").write_text("\n".join(urls))
    options = {
        "url_list": "urls.txt",
        "output_folder": "out",
        "output_format": "parquet",
        "processes_count": processes,
        "thread_count": PROCESSES * CONCURRENCY // processes,
        "resize_mode": "no",
        "skip_reencode": True,
        "number_sample_per_shard": len(urls) // processes,
        "compute_hash": "sha256",
    }
    command = [str(PEERS / "bin/img2dataset"), *(f"--{name}={value}" for name, value in options.items())]
    done = run(command, folder, NO_ALBUMENTATIONS_UPDATE="1")
    stats = [json.loads(path.read_text()) for path in (folder / "out").glob("*_stats.json")]
    succeeded = sum(one["successes"] for one in stats)
    assert succeeded == len(urls), f"img2dataset brought {succeeded} of {len(urls)}"
    seconds = max(one["end_time"] for one in stats) - min(one["start_time"] for one in stats)
    return replace(done, seconds=seconds)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--images", type=int, default=MANY)
    many = parser.parse_args(arguments or []).images
    files = pictures()
    context = get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(files, there), daemon=True)
    server.start()
    place = f"127.0.0.1:{here.recv()}"
    size = sum(map(len, files)) / len(files)
    print(f"images: {many - FEW} of {SIDE_PX} x {SIDE_PX} px, {size / 1e3:.0f} kB each")
    print(f"server alone   {only_read(place, many):7.1f} images/s")
    urls = [f"http://{place}/{number}.jpg" for number in range(many)]
    forms: dict[str, Callable[[Path, list[str]], Run]] = {"ours": partial(ours, place=place, files=files)}
    if (PEERS / "bin/img2dataset").is_file():
        for processes in (1, PROCESSES):
            forms[f"img2dataset, {processes}"] = partial(theirs, processes=processes)
    else:
        print("  (the peer is not installed: benchmarks/peers.txt says how)")
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    peaks: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(TURNS):
        for name, form in forms.items():
            done = []
            for number in (FEW, many):
                os.sync()  # what one leaves to be written is not waited for by the next
                with tempfile.TemporaryDirectory() as folder:
                    done.append(form(Path(folder, f"{turn}"), urls[:number]))
            seconds[name].append(done[1].seconds - done[0].seconds)
            peaks[name].append(done[1].peak_mib)
    for name, taken in seconds.items():
        rates = sorted((many - FEW) / one for one in taken)
        print(
            f"{name:14s} {median(rates):7.1f} images/s ({rates[0]:.0f} to {rates[-1]:.0f}), "
            f"{max(peaks[name]):4.0f} MiB at most in one process"
        )
        if name != "ours":
            print(f"  ours is {median(taken) / median(seconds['ours']):.2f} times as fast")
    server.terminate()


if __name__ == "__main__":
    main(sys.argv[1:])
