"""Slow stages as pure functions over shards: fingerprint, store, resume, lock, progress, reading.

A shard is a function of its input rows, the stage's settings, code, weights, libraries and
threads; their digest is its fingerprint, and a finished shard is kept under that name in a store
outside DVC's outs ($SMARTAVE_STORE, by default .cache/shards). So a stage that was killed goes on
where it was, a changed one never takes an old shard, and equal shards are made once. All paths are
relative to the repository root, from which every stage is started.

    python -m pipeline.shards status     what is finished, per stage and corpus, and who is writing
    python -m pipeline.shards verify     compare every shard with its sha256
    python -m pipeline.shards gc         remove what no finished stage uses
"""

import argparse
import bisect
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from tqdm import tqdm

from pipeline import params, schema, workers

PACKAGES = ("model", "features", "pipeline")
EXECUTORS: dict[str, workers.Executor] = {"local": workers.local}
LOCKS = Path(".cache/locks")
LOCK_WAIT_S = 10.0  # an orphan of a killed run needs a moment to stop
LAYOUT = 1  # of a stored shard; part of every fingerprint
Rows = list[dict[str, Any]]


# What a shard is made from


class Chunk(Protocol):
    """The input rows of one shard: their digest, and a way for a worker to get at them. Picklable."""

    @property
    def digest(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    def load(self) -> Rows: ...


@dataclass(frozen=True, slots=True)
class RowsChunk:
    """Rows held in memory: for small ones, such as an asin and a URL."""

    rows: tuple[dict[str, Any], ...]

    @property
    def digest(self) -> str:
        return _digest(self.rows)

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def load(self) -> Rows:
        return [dict(row) for row in self.rows]


@dataclass(frozen=True, slots=True)
class FolderChunk:
    """Rows that a worker reads from another stage's shards: `pieces` are (file, first row, end row)."""

    digest: str
    num_rows: int
    columns: tuple[str, ...]
    pieces: tuple[tuple[Path, int, int], ...]

    def load(self) -> Rows:
        rows: Rows = []
        for path, begin, end in self.pieces:
            table = _read(path, self.columns)
            rows += table.slice(begin, end - begin).to_pylist()
        for row in rows:
            image = row.get("image")
            if image is not None and hashlib.sha256(image).hexdigest() != row["sha256"]:
                raise ValueError(
                    f"the image of {row['asin']} does not have its sha256 in {self.pieces[0][0]}"
                )
        return rows


def chunks_of_rows(rows: Sequence[dict[str, Any]], shard_size: int) -> list[Chunk]:
    return [RowsChunk(tuple(rows[at : at + shard_size])) for at in range(0, len(rows), shard_size)]


def chunks_of_folder(
    folder: "ShardFolder",
    shard_size: int,
    *,
    columns: tuple[str, ...] = ("asin", "status", "sha256", "image"),
    key: tuple[str, ...] = ("asin", "status", "sha256"),
) -> list[Chunk]:
    """Groups of `shard_size` rows across the folder's files; a worker gets `columns` of them.

    `key` are the columns that stand for the row's content in the digest: with the defaults the
    image's sha256 does, so that no image byte is read here.
    """
    chunks: list[Chunk] = []
    rows: Rows = []
    pieces: list[tuple[Path, int, int]] = []

    def close() -> None:
        if rows:
            chunks.append(FolderChunk(_digest(rows), len(rows), columns, tuple(pieces)))
            rows.clear()
            pieces.clear()

    for path in folder.files:
        found = _read(path, key).to_pylist()
        begin = 0
        while begin < len(found):
            end = min(len(found), begin + shard_size - len(rows))
            rows += found[begin:end]
            pieces.append((path, begin, end))
            begin = end
            if len(rows) == shard_size:
                close()
    close()
    return chunks


@dataclass(frozen=True)
class Job:
    """One stage over one corpus.

    `make_worker(settings)` is called once in each worker process (load models there); it returns
    `process(rows)`, which gives one row of `schema` per input row, in order; a generator shows
    progress row by row. `make_worker` is a top-level function, `settings` and `chunks` are
    picklable. `threads` is what each worker computes with, whatever the number of workers or of
    cores, and therefore part of the fingerprint. Rows whose status is in `transient` failed for
    now: their shard is made again by the next run, and more than the share `max_transient` of
    them fails the stage.
    """

    stage: str
    corpus: str
    module: str
    settings: params.Settings
    schema: pa.Schema
    chunks: Sequence[Chunk]
    make_worker: Callable[[Any], Callable[[Rows], Iterable[dict[str, Any]]]]
    libraries: tuple[str, ...] = ()  # distributions whose versions change the bytes
    weights: Mapping[str, str] | None = None  # name -> sha256
    threads: int = 2
    transient: frozenset[str] = frozenset()
    max_transient: float = 0.0

    @property
    def output(self) -> Path:
        return Path("data") / self.corpus / self.stage

    def made_with(self) -> dict[str, Any]:
        """All that a shard depends on besides its rows."""
        return {
            "layout": LAYOUT,
            "stage": self.stage,
            "settings": self.settings.model_dump(mode="json"),
            "code": code_digest(self.module),
            "libraries": {
                name: importlib.metadata.version(name) for name in sorted({*self.libraries, "pyarrow"})
            },
            "python": ".".join(platform.python_version_tuple()[:2]),
            "weights": dict(self.weights or {}),
            "threads": self.threads,
            "schema": str(self.schema.to_string(show_schema_metadata=True)),
        }


def code_files(module: str) -> list[str]:
    """The files of `module` and of all project modules that it imports, also inside functions, sorted.

    Paths are relative to the folder that holds the packages: the form of dvc.yaml's `deps`.
    """
    import grimp

    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    if module not in graph.modules:
        raise ValueError(f"{module} is not a module of {', '.join(PACKAGES)}")
    names = {module, *graph.find_upstream_modules(module)}
    return sorted(f"{name.replace('.', '/')}.py" for name in names if "." in name)


def code_digest(module: str) -> str:
    found = importlib.util.find_spec(PACKAGES[-1])
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent.parent
    return _digest({name: sha256_of(root / name) for name in code_files(module)})


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Writing


@contextlib.contextmanager
def atomically(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """A temporary path beside `path`: complete and on disk under the final name after the block, or gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(value: Any, path: Path) -> None:
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def store() -> Path:
    return Path(os.environ.get("SMARTAVE_STORE") or ".cache/shards")


@dataclass(frozen=True, slots=True)
class _Stored:
    """A finished shard: the file and beside it, written last, its record."""

    stage: str
    fingerprint: str

    @property
    def path(self) -> Path:
        return store() / self.stage / self.fingerprint[:2] / f"{self.fingerprint}.parquet"

    def record(self) -> dict[str, Any] | None:
        """None when it is not there or not what was written (said on stderr: it is made again)."""
        record_path = self.path.with_suffix(".json")
        if not record_path.is_file():
            return None
        with contextlib.suppress(json.JSONDecodeError):
            record: dict[str, Any] = json.loads(record_path.read_text())
            if self.path.is_file() and _is_intact(self.path, record):
                return record
        sys.stderr.write(f"{self.path} is corrupt: it is made again\n")
        return None

    def write(self, rows: Rows, job_schema: pa.Schema, transient: frozenset[str]) -> dict[str, Any]:
        status = Counter(row["status"] for row in rows)
        finished = not transient.intersection(status)
        # without a record beside it, no later run takes it
        path = self.path if finished else self.path.with_suffix(".unfinished")
        with atomically(path, mode=0o444) as temporary:
            schema.write_parquet(rows, job_schema, temporary)
            record = {
                "rows": len(rows),
                "bytes": temporary.stat().st_size,
                "sha256": sha256_of(temporary),
                "status": dict(sorted(status.items())),
                "first": rows[0]["asin"],
                "last": rows[-1]["asin"],
            }
        if finished:
            write_json(record, path.with_suffix(".json"))
        return record


def _is_intact(path: Path, record: Mapping[str, Any]) -> bool:
    return path.stat().st_size == record["bytes"] and sha256_of(path) == record["sha256"]


@dataclass(frozen=True)
class _OpenWorker:
    """Picklable: makes the function that turns one (chunk, place in the store) into a record."""

    job_settings: Any
    make_worker: Callable[[Any], Callable[[Rows], Iterable[dict[str, Any]]]]
    schema: pa.Schema
    transient: frozenset[str]

    def __call__(self) -> workers.Handle:
        process = self.make_worker(self.job_settings)

        def handle(task: tuple[Chunk, _Stored], tick: Callable[[int], None]) -> dict[str, Any]:
            chunk, stored = task
            rows = chunk.load()
            asins = [row["asin"] for row in rows]
            made = []
            for row in process(rows):
                made.append(row)
                tick(1)
            if [row["asin"] for row in made] != asins:
                raise ValueError(f"made {len(made)} rows that are not those of the {len(asins)} inputs")
            return stored.write(made, self.schema, self.transient)

        return handle


@contextlib.contextmanager
def sole_writer(stage: str, corpus: str) -> Iterator[None]:
    """Hold the lock of one stage of one corpus; `ValueError` names the process that holds it already.

    The kernel drops the lock with its process, so a killed run never blocks the next one.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    path = LOCKS / f"{corpus}.{stage}.lock"
    holder = path.with_suffix(".holder")
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        who = holder.read_text().strip() if holder.is_file() else "another process"
        raise ValueError(f"{stage} of {corpus} is being written by {who}") from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def run(job: Job) -> Path:
    """Make every shard that the store lacks, then assemble data/CORPUS/STAGE; its manifest.json comes last.

    $SMARTAVE_WORKERS processes work at a time (default 1), on the executor $SMARTAVE_EXECUTOR
    (default `local`); neither changes a byte. Raises `ValueError` naming the shard that cannot be
    made; what is finished stays in the store for the next run.
    """
    execute, num_workers = _executor()
    made_with = job.made_with()
    name = f"{job.stage} of {job.corpus}"
    with sole_writer(job.stage, job.corpus), workers.stopping_with_parent():
        shards = [_Stored(job.stage, _digest([made_with, chunk.digest])) for chunk in job.chunks]
        records = [shard.record() for shard in shards]
        todo = [index for index, record in enumerate(records) if record is None]
        with _progress(name, job.chunks, records) as bar:
            results = execute(
                _OpenWorker(job.settings, job.make_worker, job.schema, job.transient),
                [(job.chunks[index], shards[index]) for index in todo],
                workers=num_workers,
                threads=job.threads,
                progress=bar.update,
            )
            with contextlib.closing(results):
                try:
                    for at, record in results:
                        records[todo[at]] = record
                        bar.update(record["rows"])
                except workers.TaskError as error:
                    asins = [row["asin"] for row in job.chunks[todo[error.index]].load()]
                    raise ValueError(
                        f"{name}: shard {todo[error.index]:05d} ({asins[0]} to {asins[-1]}): {error}"
                    ) from None
        finished = [record for record in records if record is not None]
        assert len(finished) == len(shards)
        status: Counter[str] = sum((Counter(record["status"]) for record in finished), Counter())
        _check_transient(job, status)
        _assemble(job, made_with, shards, finished, status)
    return job.output


def _executor() -> tuple[workers.Executor, int]:
    name = os.environ.get("SMARTAVE_EXECUTOR") or "local"
    if name not in EXECUTORS:
        raise ValueError(f"SMARTAVE_EXECUTOR must be one of {', '.join(EXECUTORS)}, got {name!r}")
    count = os.environ.get("SMARTAVE_WORKERS") or "1"
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"SMARTAVE_WORKERS must be a whole number of at least 1, got {count!r}")
    return EXECUTORS[name], int(count)


def _check_transient(job: Job, status: Counter[str]) -> None:
    failed, total = sum(status[name] for name in job.transient), status.total()
    if failed > job.max_transient * total:
        raise ValueError(
            f"{job.stage} of {job.corpus}: {failed} of {total} rows failed for now; run it again to try them "
            f"again, or raise {job.stage}.max_transient (the share that is let pass, now {job.max_transient})"
        )


def _assemble(
    job: Job,
    made_with: dict[str, Any],
    shards: Sequence[_Stored],
    records: Sequence[dict[str, Any]],
    status: Counter[str],
) -> None:
    job.output.mkdir(parents=True, exist_ok=True)
    manifest = job.output / "manifest.json"
    manifest.unlink(missing_ok=True)  # from here on the folder is not complete
    for old in job.output.iterdir():
        old.unlink()
    entries = []
    for index, (shard, record) in enumerate(zip(shards, records, strict=True)):
        path = job.output / f"{index:05d}.parquet"
        unfinished = shard.path.with_suffix(".unfinished")
        if job.transient.intersection(record["status"]):
            _copy(unfinished, path)
            unfinished.unlink()
        else:
            _link(shard.path, path)
        entries.append({"name": path.name, "fingerprint": shard.fingerprint, **record})
    _sync_folder(job.output)
    counts = {"rows": status.total(), "status": dict(sorted(status.items()))}
    write_json(counts, Path("metrics") / job.corpus / f"{job.stage}.json")
    fingerprint = _digest([made_with, [shard.fingerprint for shard in shards]])
    complete = {"fingerprint": fingerprint, "made_with": made_with, **counts, "shards": entries}
    write_json(complete, manifest)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    with atomically(target) as temporary:
        shutil.copyfile(source, temporary)


class _Lines:
    """Where nobody looks at a terminal: tqdm's states as lines of their own."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def _progress(name: str, chunks: Sequence[Chunk], records: Sequence[dict[str, Any] | None]) -> Any:
    watched = sys.stderr.isatty()
    return tqdm(
        desc=name,
        total=sum(chunk.num_rows for chunk in chunks),
        initial=sum(record["rows"] for record in records if record is not None),
        unit="row",
        file=sys.stderr if watched else _Lines(),
        mininterval=0.5 if watched else 5,
        miniters=0,
        dynamic_ncols=watched,
    )


# Reading


def _read(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not a readable shard: {error}") from error


class ShardFolder:
    """The output of a stage. Raises `ValueError` when it is not complete or a file has the wrong size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = path / "manifest.json"
        if not manifest.is_file():
            raise ValueError(f"{path} is not complete: it has no manifest.json (run its stage again)")
        try:
            self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        except ValueError as error:
            raise ValueError(f"{manifest} is not JSON: {error}") from error
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        self.files = [path / shard["name"] for shard in self.shards]
        for file, shard in zip(self.files, self.shards, strict=True):
            size = file.stat().st_size if file.is_file() else None
            if size != shard["bytes"]:
                raise ValueError(f"{file} must have {shard['bytes']} bytes, got {size}")
        self._firsts = [shard["first"] for shard in self.shards]
        self._open: dict[int, tuple[pa.Table, dict[str, int]]] = {}

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def verify(self) -> None:
        """Read every byte; `ValueError` names the first shard that is not what was written."""
        for file, shard in zip(self.files, self.shards, strict=True):
            if not _is_intact(file, shard):
                raise ValueError(f"{file} is corrupt: it does not have the sha256 {shard['sha256']}")

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """All rows in order of asin, one shard in memory at a time."""
        for file in self.files:
            yield from _read(file, columns).to_pylist()

    def get(self, asin: str) -> dict[str, Any]:
        """Raises `KeyError` where there is no such row."""
        table, row = self._find(asin)
        found: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
        return found

    def array(self, asin: str, column: str = "features") -> np.ndarray | None:
        """A read-only view `(rows, width)` of mapped memory, dtype as in the schema; None for null."""
        table, row = self._find(asin)
        value = table.column(column)[row]
        if not value.is_valid:
            return None
        about = table.schema.metadata
        dtype = np.dtype(about[b"dtype"].decode()).newbyteorder("<")
        return np.frombuffer(value.as_buffer(), dtype=dtype).reshape(-1, int(about[b"width"]))

    def _find(self, asin: str) -> tuple[pa.Table, int]:
        index = bisect.bisect_right(self._firsts, asin) - 1
        if index < 0:
            raise KeyError(asin)
        if index not in self._open:
            table = self._map(index)
            self._open[index] = table, {name: row for row, name in enumerate(table["asin"].to_pylist())}
        table, rows_of = self._open[index]
        return table, rows_of[asin]

    def _map(self, index: int) -> pa.Table:
        """The shard uncompressed in the store, mapped: random reads then cost a page, shared by processes."""
        path = store() / "mapped" / f"{self.shards[index]['sha256']}.arrow"
        if not path.is_file():
            if not _is_intact(self.files[index], self.shards[index]):
                raise ValueError(f"{self.files[index]} is corrupt: it does not have its sha256")
            table = _read(self.files[index])
            with atomically(path) as temporary, pa.ipc.new_file(temporary, table.schema) as writer:
                writer.write_table(table)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


# The command


def _folders() -> list[Path]:
    return sorted(path.parent for path in Path("data").glob("*/*/manifest.json"))


def _records() -> Iterator[tuple[_Stored, dict[str, Any]]]:
    for path in sorted(store().glob("*/??/*.json")):
        yield _Stored(path.parent.parent.name, path.stem), json.loads(path.read_text())


def status() -> list[str]:
    lines = []
    for path in _folders():
        manifest = ShardFolder(path).manifest
        counts = ", ".join(f"{count} {name}" for name, count in manifest["status"].items())
        lines.append(
            f"{path}: complete, {manifest['rows']} rows in {len(manifest['shards'])} shards ({counts})"
        )
    stored: dict[str, list[int]] = {}
    for shard, record in _records():
        stored.setdefault(shard.stage, []).append(record["bytes"])
    lines += [
        f"{store()}/{stage}: {len(sizes)} finished shards, {sum(sizes) / 1e6:.1f} MB"
        for stage, sizes in stored.items()
    ]
    lines += [f"{path.stem}: being written by {path.read_text().strip()}" for path in LOCKS.glob("*.holder")]
    return lines or ["nothing is there yet"]


def verify() -> list[str]:
    """One line per shard that is not what was written."""
    wrong = [
        f"{shard.path} is corrupt (the next run makes it again)"
        for shard, record in _records()
        if not shard.path.is_file() or not _is_intact(shard.path, record)
    ]
    for path in _folders():
        try:
            ShardFolder(path).verify()
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def gc() -> list[str]:
    """Remove every stored file that no data/*/*/manifest.json names; refuses while a stage is writing.

    The finished shards of an interrupted run are named by none yet and go too.
    """
    with contextlib.ExitStack() as held:
        for path in sorted(LOCKS.glob("*.lock")):
            corpus, stage = path.stem.split(".")
            held.enter_context(sole_writer(stage, corpus))
        kept = set()
        for folder in _folders():
            for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
                kept |= {shard["fingerprint"], shard["sha256"]}
        files = [path for path in store().rglob("*") if path.is_file() and path.stem not in kept]
        total = sum(path.stat().st_size for path in files)
        for path in files:
            path.unlink()
    return [f"removed {len(files)} files, {total / 1e6:.1f} MB"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.shards", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=("status", "verify", "gc"))
    command = parser.parse_args().command
    try:
        lines = {"status": status, "verify": verify, "gc": gc}[command]()
    except ValueError as error:
        raise SystemExit(f"shards: {error}") from error
    sys.stdout.writelines(line + "\n" for line in lines)
    raise SystemExit(1 if command == "verify" and lines else 0)


if __name__ == "__main__":
    main()
