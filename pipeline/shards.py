"""Slow stages as pure functions over shards: fingerprint, store, resume, lock, progress, reading.

A shard is a function of its input rows, the stage's settings, code, weights, libraries and
threads; their digest is its fingerprint, and a finished shard is kept under that name in a store
outside DVC's outs ($SMARTAVE_STORE, by default .cache/shards). So a stage that was killed goes on
where it was, a changed one never takes an old shard, and equal shards are made once. All paths are
relative to the repository root, from which every stage is started. Making, assembling and tidying
stand in one file because only it knows how the store is laid out; reading is in reading.py.

    python -m pipeline.shards status     what is finished, per stage and corpus, and who is writing
    python -m pipeline.shards verify     compare every shard with its sha256
    python -m pipeline.shards gc         remove what no finished stage uses

A store belongs to one clone: gc removes all shards that the stages of this clone do not use.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from pipeline import cluster, params, schema, workers
from pipeline.disk import atomically, is_intact, sha256_of, start_sync, sync_folder, write_json
from pipeline.locks import LOCKS, holder, sole_writer
from pipeline.progress import bar as progress_bar
from pipeline.provenance import code_digest, code_files, digest
from pipeline.reading import Chunk, Rows, ShardFolder, chunks_of_folder, chunks_of_rows, read, store

__all__ = [
    "KILLS_WORKER",
    "Chunk",
    "Job",
    "Made",
    "Rows",
    "ShardFolder",
    "Stored",
    "atomically",
    "chunks_of_folder",
    "chunks_of_rows",
    "code_digest",
    "code_files",
    "make",
    "run",
    "sha256_of",
    "sole_writer",
    "stored",
    "write_json",
]

EXECUTORS: dict[str, workers.Executor] = {"local": workers.local, "dask": cluster.dask}
KILLS_WORKER = "kills_worker"  # status of a row with which worker after worker died
LAYOUT = 2  # of a stored shard; part of every fingerprint
STORED = re.compile(  # below the store; what has another name was not written here
    r"\w+/([0-9a-f]{2})/\1[0-9a-f]{62}\.(parquet|json|unfinished)|mapped/[0-9a-f]{64}\.arrow"
    r"|(\w+/[0-9a-f]{2}|mapped)/\..+\.tmp|predict/[\w-]+\.input"
)

Made = dict[str, Any] | Counter[str]  # a row of the output, or counts of what was measured
MakeWorker = Callable[[Any], Callable[[Rows], Iterable[Made]]]


@dataclass(frozen=True)
class Job:
    """One stage over one corpus.

    `make_worker(settings)` is called once in each worker process (load models there); it returns
    `process(rows)`, which gives one row of `schema` per input row, in order; a generator shows
    progress row by row. Among the rows it may give a `Counter` of what it measured: they are summed
    over all shards, and `measures(sum)` is what the stage's metrics tell of them. `make_worker` is a
    top-level function, `settings` and `chunks` are picklable. `threads` is what each worker computes
    with, whatever the number of workers or of cores, and therefore part of the fingerprint. Rows
    whose status is in `transient` failed for now: their shard is made again by the next run, and
    more than the share `max_transient` of them fails the stage. A row that kills its worker gets the
    status `kills_worker` and the columns `lost`.
    """

    stage: str
    corpus: str
    module: str
    settings: params.Settings
    schema: pa.Schema
    chunks: Sequence[Chunk]
    make_worker: MakeWorker
    unseen: frozenset[str] = frozenset()  # settings that change no byte of a finished shard
    libraries: tuple[str, ...] = ()  # distributions whose versions change the bytes
    weights: Mapping[str, str] | None = None  # name -> sha256
    precision: str = "float32"  # what the settings come to on this machine
    threads: int = 2
    max_workers: int | None = None  # unless $SMARTAVE_WORKERS asks for more; None: what keeps all cores busy
    at_once: int | None = None  # tasks, on other machines too; None: as many as there are workers
    measures: Callable[[Counter[str]], dict[str, Any]] = dict
    transient: frozenset[str] = frozenset()
    max_transient: float = 0.0
    lost: Mapping[str, Any] | None = None  # other columns of a row whose status is `kills_worker`; None: null
    unit: str = "image"  # what the progress counts

    @property
    def output(self) -> Path:
        return Path("data") / self.corpus / self.stage

    def made_with(self) -> dict[str, Any]:
        """All that a shard depends on besides its rows."""
        return {
            "layout": LAYOUT,
            "stage": self.stage,
            "settings": self.settings.model_dump(mode="json", exclude=set(self.unseen)),
            "code": code_digest(self.module),
            "libraries": {
                name: importlib.metadata.version(name) for name in sorted({*self.libraries, "pyarrow"})
            },
            "python": ".".join(platform.python_version_tuple()[:2]),
            "weights": dict(self.weights or {}),
            "precision": self.precision,
            "threads": self.threads,
            "schema": str(self.schema.to_string(show_schema_metadata=True)),
        }


@dataclass(frozen=True, slots=True)
class Stored:
    """A finished shard: the file and beside it, written last, its record."""

    stage: str
    fingerprint: str

    @property
    def path(self) -> Path:
        return store() / self.stage / self.fingerprint[:2] / f"{self.fingerprint}.parquet"

    @property
    def unfinished(self) -> Path:
        """Where it waits to be assembled while some of its rows failed for now; no later run takes it."""
        return self.path.with_suffix(".unfinished")

    def rows(self) -> Rows:
        found: Rows = read(self.path if self.path.is_file() else self.unfinished).to_pylist()
        return found

    def forget(self) -> None:
        for path in (self.path.with_suffix(".json"), self.path, self.unfinished):
            path.unlink(missing_ok=True)

    def record(self) -> dict[str, Any] | None:
        """None when it is not there or not what was written (said on stderr: it is made again)."""
        record_path = self.path.with_suffix(".json")
        if not record_path.is_file():
            return None
        record = _record(record_path)
        if record and self.path.is_file() and is_intact(self.path, record):
            return record
        sys.stderr.write(f"{self.path} is corrupt: it is made again\n")
        return None

    def write(
        self, rows: Rows, measured: Counter[str], job_schema: pa.Schema, transient: frozenset[str]
    ) -> dict[str, Any]:
        status = Counter(row["status"] for row in rows)
        finished = not transient.intersection(status)
        path = self.path if finished else self.unfinished
        with atomically(path, mode=0o444) as temporary:
            schema.write_parquet(rows, job_schema, temporary)
            with temporary.open("rb") as file:
                start_sync(file)  # while its digest is taken
            record = {
                "rows": len(rows),
                "bytes": temporary.stat().st_size,
                "sha256": sha256_of(temporary),
                "status": dict(sorted(status.items())),
                "measured": dict(sorted(measured.items())),
                "first": rows[0]["asin"],
                "last": rows[-1]["asin"],
            }
        if finished:
            write_json(record, path.with_suffix(".json"), durable=False)  # lost, the shard is made again
            self.unfinished.unlink(missing_ok=True)
        return record


@dataclass(frozen=True, slots=True)
class _Task:
    """Make a shard, without the rows that are `fatal`; or see whether the row `only` is."""

    chunk: Chunk
    stored: Stored
    fatal: frozenset[int] = frozenset()
    only: int | None = None


@dataclass(frozen=True)
class _OpenWorker:
    """Picklable: makes the function that turns a task into the record of a shard."""

    job_settings: Any
    make_worker: MakeWorker
    schema: pa.Schema
    transient: frozenset[str]
    lost: Mapping[str, Any] | None

    def __call__(self) -> workers.Handle:
        process = self.make_worker(self.job_settings)

        def handle(task: _Task, tick: Callable[[int], None]) -> dict[str, Any] | None:
            rows = task.chunk.load()
            if task.only is not None:
                for _ in process([rows[task.only]]):
                    pass
                return None
            made, measured = [], Counter[str]()
            for one in process([row for at, row in enumerate(rows) if at not in task.fatal]):
                if isinstance(one, Counter):
                    measured.update(one)
                    continue
                made.append(one)
                tick(1)
            for at in sorted(task.fatal):
                columns = self.lost or dict.fromkeys(self.schema.names)
                made.insert(at, {**columns, "asin": rows[at]["asin"], "status": KILLS_WORKER})
            asins = [row["asin"] for row in rows]
            if [row["asin"] for row in made] != asins:
                raise ValueError(f"made {len(made)} rows that are not those of the {len(asins)} inputs")
            return task.stored.write(made, measured, self.schema, self.transient)

        return handle


def run(job: Job) -> Path:
    """Make every shard that the store lacks, then assemble data/CORPUS/STAGE; its manifest.json comes last.

    $SMARTAVE_WORKERS processes work at a time (default: as many as keep all cores busy, one on a GPU), on the
    executor $SMARTAVE_EXECUTOR (`local`, the default, or `dask`); neither changes a byte. A row that kills
    its worker, tried alone, twice has the status `kills_worker`. Raises `ValueError` naming
    the shard that cannot be made; what is finished stays in the store for the next run.
    """
    made_with = job.made_with()
    with sole_writer(job.stage, job.corpus), workers.stopping_with_parent():
        shards, records = make(job, made_with)
        status: Counter[str] = sum((Counter(record["status"]) for record in records), Counter())
        _check_transient(job, status)
        _assemble(job, made_with, shards, records, status)
    return job.output


def stored(job: Job, made_with: dict[str, Any]) -> list[Stored]:
    """Where the shards of `job` are or will be."""
    return [Stored(job.stage, digest([made_with, chunk.digest])) for chunk in job.chunks]


def make(job: Job, made_with: dict[str, Any]) -> tuple[list[Stored], list[dict[str, Any]]]:
    """Every shard of `job` in the store, and its record; for who sees to it that nobody else makes them.

    Raises as `run` does.
    """
    name = f"{job.stage} of {job.corpus}"
    shards = stored(job, made_with)
    records = [shard.record() for shard in shards]
    todo = {
        index: _Task(job.chunks[index], shards[index])
        for index, record in enumerate(records)
        if record is None
    }
    with _progress(job, name, records) as bar:
        for index, record in _made(job, name, todo, bar.update):
            records[index] = record
    finished = [record for record in records if record is not None]
    assert len(finished) == len(shards)
    return shards, finished


def _made(
    job: Job, name: str, todo: Mapping[int, _Task], progress: Callable[[int], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(shard, its record) as they are made. A shard that takes its workers with it is made without the rows
    that do so by themselves."""
    died: dict[int, workers.Died] = {}
    for index, result in _executed(job, name, todo, progress):
        if isinstance(result, workers.Died):
            died[index] = result
        else:
            yield index, result
    for index, death in sorted(died.items()):
        task = todo[index]
        alone = {at: replace(task, only=at) for at in range(task.chunk.num_rows)}
        fatal = {
            at: result
            for at, result in _executed(job, name, alone, lambda _: None)
            if isinstance(result, workers.Died)
        }
        without = {index: replace(task, fatal=frozenset(fatal))}
        [(_, result)] = list(_executed(job, name, without, progress))
        if isinstance(result, workers.Died):
            told = f", also without the {len(fatal)} rows that kill one" if fatal else ", by no row alone"
            raise ValueError(
                f"{_named(name, index, task)}: its worker died {workers.MAX_DEATHS} times, last by "
                f"{death.how}{told}"
            )
        progress(len(fatal))
        yield index, result


def _executed(
    job: Job, name: str, tasks: Mapping[int, _Task], progress: Callable[[int], None]
) -> Iterator[tuple[int, Any]]:
    execute, num_workers = executor(job.threads, job.max_workers, job.at_once)
    indices = list(tasks)
    open_worker = _OpenWorker(job.settings, job.make_worker, job.schema, job.transient, job.lost)
    results = execute(
        open_worker, list(tasks.values()), workers=num_workers, threads=job.threads, progress=progress
    )
    with contextlib.closing(results):
        try:
            for at, result in results:
                yield indices[at], result
        except workers.TaskError as error:
            index = indices[error.index]
            raise ValueError(f"{_named(name, index, tasks[index])}: {error}") from None


def _named(name: str, index: int, task: _Task) -> str:
    first, last = task.chunk.ends
    return f"{name}: shard {index:05d} ({first} to {last})"


def executor(
    threads: int, at_most: int | None = None, at_once: int | None = None
) -> tuple[workers.Executor, int]:
    """What runs tasks of so many threads, and how many at a time; `ValueError` for a wrong environment.

    `at_most` is for this machine. `at_once` holds for the workers of another scheduler too; without it all of
    them work, also those that come later.
    """
    name = os.environ.get("SMARTAVE_EXECUTOR") or "local"
    if name not in EXECUTORS:
        raise ValueError(f"SMARTAVE_EXECUTOR must be one of {', '.join(EXECUTORS)}, got {name!r}")
    if name == "dask" and (address := os.environ.get("SMARTAVE_DASK")):
        enough = cluster.num_workers(address) if at_once else sys.maxsize
    else:
        enough = max(1, (os.cpu_count() or 1) // threads)
        enough = min(enough, at_most or enough)
    count = os.environ.get("SMARTAVE_WORKERS") or str(min(enough, at_once or enough))
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
    shards: Sequence[Stored],
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
        if job.transient.intersection(record["status"]):
            _copy(shard.unfinished, path)
            shard.unfinished.unlink()
        else:
            _link(shard.path, path)
        entries.append({"name": path.name, "fingerprint": shard.fingerprint, **record})
    sync_folder(job.output)
    measured = sum((Counter(record["measured"]) for record in records), Counter[str]())
    counts = {"rows": status.total(), "status": dict(sorted(status.items())), **job.measures(measured)}
    write_json(counts, Path("metrics") / job.corpus / f"{job.stage}.json")
    fingerprint = digest([made_with, [shard.fingerprint for shard in shards]])
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


def _progress(job: Job, name: str, records: Sequence[dict[str, Any] | None]) -> Any:
    done = sum(record["rows"] for record in records if record is not None)
    total = sum(chunk.num_rows for chunk in job.chunks)
    return progress_bar(name, total, seconds=5, initial=done, unit=job.unit, miniters=0)


# The command


def _folders() -> list[Path]:
    return sorted(path.parent for path in Path("data").glob("*/*/manifest.json"))


def _stored_files() -> list[Path]:
    patterns = ("*/??/*", "mapped/*", "predict/*.input")
    found = [path for pattern in patterns for path in store().glob(pattern) if path.is_file()]
    return sorted(path for path in found if STORED.fullmatch(path.relative_to(store()).as_posix()))


def _records() -> Iterator[tuple[Stored, dict[str, Any]]]:
    for path in _stored_files():
        if path.suffix == ".json":
            yield Stored(path.parent.parent.name, path.stem), _record(path)


def _record(path: Path) -> dict[str, Any]:
    """Empty where it is no JSON: a failure of power may damage it."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        return {}
    return record


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
        if record:
            stored.setdefault(shard.stage, []).append(record["bytes"])
    lines += [
        f"{store()}/{stage}: {len(sizes)} finished shards, {sum(sizes) / 1e6:.1f} MB"
        for stage, sizes in stored.items()
    ]
    for path in sorted(LOCKS.glob("*.lock")):
        try:
            with FileLock(path, timeout=0, fallback_to_soft=False):
                pass
        except Timeout:
            lines.append(f"{path.stem}: being written by {holder(path)}")
    return lines or ["nothing is there yet"]


def verify() -> list[str]:
    """One line per shard that is not what was written."""
    wrong = [
        f"{shard.path} is corrupt (the next run makes it again)"
        for shard, record in _records()
        if not record or not shard.path.is_file() or not is_intact(shard.path, record)
    ]
    for path in _folders():
        try:
            ShardFolder(path).verify()
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def gc() -> list[str]:
    """Remove every stored file that no data/*/*/manifest.json names; refuses while a stage is writing.

    Files of others in the folder stay; those of another clone's stages look like ours and go.
    The finished shards of an interrupted run, also of `model.predict`, are named by none yet and go too.
    """
    with contextlib.ExitStack() as held:
        for path in sorted(LOCKS.glob("*.lock")):
            corpus, stage = path.stem.split(".")
            held.enter_context(sole_writer(stage, corpus))
        kept = set()
        for folder in _folders():
            for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
                kept |= {shard["fingerprint"], shard["sha256"]}
        files = [path for path in _stored_files() if path.stem not in kept]
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
    except (ValueError, OSError) as error:
        raise SystemExit(f"shards: {error}") from error
    sys.stdout.writelines(line + "\n" for line in lines)
    raise SystemExit(1 if command == "verify" and lines else 0)


if __name__ == "__main__":
    main()
