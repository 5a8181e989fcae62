"""The MAVE join beside Google's method (Apache Beam, Beautiful Soup): same input, one process, one core.

The input has the shape of the real dump: 6.8 kB a line, 22 % of the lines labelled; half of a line's bulk
stands in title, description and feature, 10 % of these paragraphs hold HTML, the other half stands in fields
that nobody reads. Both outputs must hold the same rows. Then the same input gzipped, beside the plain one
and the fastest gzip reader of the registry that does nothing but read; then the label index of all of MAVE.
Programs take turns, three beside Beam and nine beside the readers, and the median of each counts. Two readers
at once, a core each, show what a second core is worth while it is measured.
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(os.environ.get("SMARTAVE_PEERS", ROOT / ".cache/peers"))
BEAM = ROOT / "benchmarks/peers/join_beam.py"
BEAM_NAME = "Beam and Beautiful Soup"
LINES, LABELLED, LINE_BYTES = 120_000, 0.22, 6800
ALL_LABELS = 3_474_518  # positives and negatives of MAVE
LIMIT_MIB = 2048
READERS = {
    "gzip": "import gzip; opened = gzip.open(path)",
    "isal": "from isal import igzip; opened = igzip.open(path)",
    "zlib-ng": "from zlib_ng import gzip_ng; opened = gzip_ng.open(path)",
    "rapidgzip": "import rapidgzip; opened = rapidgzip.open(path, parallelization=1)",
}
OUR_JOIN = """
import resource, sys, time
from pathlib import Path
import bs4
from pipeline import mave
metadata, labels, output = map(Path, sys.argv[1:])
start, start_cpu = time.perf_counter(), time.process_time()
mave.join([metadata], [labels], output)
children = resource.getrusage(resource.RUSAGE_CHILDREN)  # what unzips
cpu_s = time.process_time() - start_cpu + children.ru_utime + children.ru_stime
print(time.perf_counter() - start, cpu_s)
"""
READ_ALL = """
import sys, time
path = sys.argv[1]
start, start_cpu = time.perf_counter(), time.process_time()
{opening}
while opened.read(1 << 20):
    pass
opened.close()
print(time.perf_counter() - start, time.process_time() - start_cpu)
"""


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu_s: float
    peak_mib: float
    output: str


def words(rng: random.Random) -> list[str]:
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    return ["".join(rng.choices(letters, range(26, 0, -1), k=rng.randint(2, 9))) for _ in range(5000)]


def text(rng: random.Random, known: list[str], num_chars: int) -> str:
    return " ".join(rng.choices(known, k=max(1, num_chars // 7)))


def marked_up(rng: random.Random, plain: str) -> str:
    """About what product pages hold: a paragraph of some sentences, bold words, breaks, entities."""
    pieces = plain.split()
    for _ in range(max(1, len(pieces) // 25)):
        at = rng.randrange(len(pieces))
        pieces[at] = rng.choice(("<b>{}</b>", "{}<br />", "<li>{}</li>", "{} &amp;", "<i>{}</i>")).format(
            pieces[at]
        )
    return f"<p>{' '.join(pieces)}</p>"


def asin(number: int) -> str:
    return f"B{number:09d}"


def metadata(num_lines: int) -> Iterator[bytes]:
    rng = random.Random(0)
    known = words(rng)
    for number in range(num_lines):
        paragraphs = [text(rng, known, 480) for _ in range(4)] + [text(rng, known, 200) for _ in range(5)]
        paragraphs = [marked_up(rng, one) if rng.random() < 0.1 else one for one in paragraphs]
        row: dict[str, Any] = {
            "category": ["Home & Kitchen", text(rng, known, 20)],
            "tech1": text(rng, known, 600),
            "description": paragraphs[:4],
            "title": text(rng, known, 80),
            "also_buy": [asin(rng.randrange(10**6)) for _ in range(60)],
            "image": [],
            "brand": text(rng, known, 10),
            "feature": paragraphs[4:],
            "rank": [f">#{rng.randrange(10**6)} in Home & Kitchen (See Top 100)"],
            "details": {text(rng, known, 12): text(rng, known, 20) for _ in range(6)},
            "main_cat": "Amazon Home",
            "similar_item": "",
            "date": "January 1, 2015",
            "price": f"${rng.randrange(100)}.99",
            "asin": asin(number),
        }
        missing = LINE_BYTES - len(json.dumps(row))
        row["similar_item"] = text(rng, known, 2 * missing)[:missing]
        yield json.dumps(row).encode() + b"\n"


def label(number: int) -> bytes:
    spans = [{"value": "mug", "pid": pid, "begin": 4, "end": 7} for pid in range(2)]
    row = {"id": asin(number), "category": "Mugs", "attributes": [{"key": "Type", "evidences": spans}]}
    return json.dumps(row).encode() + b"\n"


def run(*command: str | Path, cores: slice = slice(1), folder: Path = ROOT) -> Run:
    """The command in `folder`, on these cores, its wall-clock seconds and its memory high-water mark."""
    allowed = sorted(os.sched_getaffinity(0))[cores]
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {os.waitstatus_to_exitcode(status)}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output)


def without_start_up(done: Run) -> Run:
    """As the program itself measured it, imports left out."""
    seconds, cpu_s = map(float, done.output.split())
    return replace(done, seconds=seconds, cpu_s=cpu_s)


def in_turns(programs: Mapping[str, Callable[[], Run]], turns: int = 9) -> dict[str, Run]:
    """The run of median time of each, interleaved: on a shared machine, the fastest of each would be of other
    minutes."""
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    for _ in range(turns):
        for name, once in programs.items():
            runs[name].append(once())
    return {name: sorted(of_one, key=lambda one: one.seconds)[turns // 2] for name, of_one in runs.items()}


def our_join(source: Path, labels: Path, output: Path, *, cores: slice = slice(1)) -> Run:
    output.unlink(missing_ok=True)  # of the turn before: replacing it would cost what freeing it does
    return without_start_up(run(sys.executable, "-c", OUR_JOIN, source, labels, output, cores=cores))


def read_alone(python: Path, code: str, zipped: Path, *, cores: slice = slice(1)) -> Run:
    return without_start_up(run(python, "-c", code, zipped, cores=cores))


def read_twice_at_once(python: Path, code: str, zipped: Path) -> Run:
    """The slower of two, a core each: what a second core is worth here."""
    with ThreadPoolExecutor() as pool:
        both = pool.map(lambda core: read_alone(python, code, zipped, cores=core), (slice(1), slice(1, 2)))
        return max(both, key=lambda one: one.seconds)


def by_id(path: Path) -> dict[str, Any]:
    with path.open() as file:
        return {row["id"]: row for row in map(json.loads, file)}


def show(name: str, done: Run, size: int, num_lines: int) -> None:
    rates = (
        f"{size / 2**20 / seconds:7.1f} MiB/s {num_lines / seconds:8.0f} lines/s"
        for seconds in (done.seconds, done.cpu_s)
    )
    print(f"{name:26s} {'  by CPU time '.join(rates)} {done.peak_mib:6.0f} MiB at most")


def peer_or_say_how(command: Path) -> bool:
    if not command.is_file():
        print(f"  (the peer is not installed: benchmarks/peers.txt says how; looked for {command})")
    return command.is_file()


def beside_beam(folder: Path, num_lines: int) -> None:
    source, labels = folder / "metadata.jsonl", folder / "labels.jsonl"
    with source.open("wb") as file:
        file.writelines(metadata(num_lines))
    asked = sorted(random.Random(1).sample(range(num_lines), round(LABELLED * num_lines)))
    labels.write_bytes(b"".join(map(label, asked)))
    size = source.stat().st_size
    print(f"join: {num_lines} lines of {size / num_lines:.0f} bytes, {len(asked)} labelled, one core each")
    programs = {"ours": lambda: our_join(source, labels, folder / "ours.jsonl")}
    if with_peers := peer_or_say_how(python := PEERS / "bin/python"):
        programs[BEAM_NAME] = lambda: without_start_up(
            run(python, BEAM, source, labels, folder / "beam.jsonl")
        )
    done = in_turns(programs, turns=3)
    for name, one in done.items():
        show(name, one, size, num_lines)
    if with_peers:
        ours, beam = done["ours"], done[BEAM_NAME]
        assert by_id(folder / "ours.jsonl") == by_id(folder / "beam.jsonl"), "the outputs differ"
        print(
            f"  equal outputs; ours is {beam.seconds / ours.seconds:.1f} times as fast, "
            f"by CPU time {beam.cpu_s / ours.cpu_s:.1f} times"
        )
    zipped = folder / "metadata.json.gz"
    zipped.write_bytes(gzip.compress(source.read_bytes(), 6))
    programs = {
        "ours": programs["ours"],
        "ours, gzipped (2 cores)": lambda: our_join(zipped, labels, folder / "zipped.jsonl", cores=slice(2)),
    }
    for name, opening in READERS.items() if with_peers else ():
        code = READ_ALL.format(opening=opening)
        programs[f"{name} alone"] = partial(read_alone, python, code, zipped)
    if with_peers:
        twice = READ_ALL.format(opening=READERS["isal"])
        programs["the slower of two isal"] = partial(read_twice_at_once, python, twice, zipped)
    plain, ours_zipped, *readers = (done := in_turns(programs)).values()
    for name, one in done.items():
        show(name, one, size, num_lines)
    if with_peers:
        *readers, twice_at_once = readers
        slower = max(plain.seconds, min(one.seconds for one in readers))
        print(f"  gzipped: {slower / ours_zipped.seconds:.0%} of the slower of plain join and fastest reader")
        kept = done["isal alone"].seconds / twice_at_once.seconds
        print(f"  two isal at once, a core each, keep {kept:.0%} of the speed of one")


def all_labels(folder: Path, num_labels: int) -> None:
    """Join and stage at the size of all of MAVE's labels; the metadata holds each hundredth product."""
    source = folder / "data/mave/source"
    positives, negatives = source / "labels/00-p.jsonl", source / "labels/01-n.jsonl"
    whole, root = source / "metadata/00-m.jsonl", source / "roots/Books.json"
    num_positives = round(num_labels * 2_226_509 / ALL_LABELS)
    for path, numbers in ((positives, range(num_positives)), (negatives, range(num_positives, num_labels))):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.writelines(map(label, numbers))
    asked = range(0, num_labels, 100)
    for path in (whole, root):
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            for number in asked:
                row = {"asin": asin(number), "title": "one mug of a kind", "feature": ["one mug more"]}
                file.write(json.dumps({**row, "imageURL": ["x"]}).encode() + b"\n")
    files = ("--metadata", whole, "--labels", positives, negatives, "--output", folder / "all.jsonl")
    joined = run(sys.executable, "-m", "pipeline.mave", *files)
    assert json.loads(joined.output)["lines written"]["count"] == len(asked)
    (folder / "config/mave").mkdir(parents=True)
    settings = {"kind": "mave", "products_per_root": 4000, "attributes_per_root": {"Books": 9}}
    (folder / "config/mave/products.json").write_text(json.dumps(settings))
    stage = run(sys.executable, "-m", "pipeline.products", "mave", folder=folder)
    made = json.loads((folder / "metrics/mave/products.json").read_text())
    assert made["products"] == min(4000, len(asked))
    for name, done in (("join", joined), ("products", stage)):
        print(
            f"{num_labels} label lines, {name}: {done.seconds:.0f} s ({done.cpu_s:.0f} s of CPU), "
            f"{done.peak_mib:.0f} MiB at most (limit {LIMIT_MIB})"
        )
        assert done.peak_mib < LIMIT_MIB, name


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.join", description=__doc__)
    parser.add_argument("--lines", type=int, default=LINES, help="of metadata")
    parser.add_argument("--labels", type=int, default=ALL_LABELS, help="of the index; 0 leaves it out")
    given = parser.parse_args(arguments or [])
    with tempfile.TemporaryDirectory() as folder:
        beside_beam(Path(folder), given.lines)
        if given.labels:
            all_labels(Path(folder), given.labels)


if __name__ == "__main__":
    main(sys.argv[1:])
