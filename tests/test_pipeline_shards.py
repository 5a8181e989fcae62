import contextlib
import errno
import importlib.metadata
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image

from pipeline import images, locks, params, provenance, schema, shards

ROOT = Path(__file__).parent.parent
SCHEMA = pa.schema([("asin", pa.string()), ("status", pa.string()), ("square", pa.int64())])
ASINS = [f"A{number:09d}" for number in range(10)]


class Settings(params.Settings):
    power: int = 2
    shard_size: int = 4
    patience: int = 1


def squares(settings):
    def process(rows):
        for row in rows:
            yield {
                "asin": row["asin"],
                "status": row.get("status", "ok"),
                "square": row["x"] ** settings.power,
            }

    return process


def one_row_too_few(settings):
    return lambda rows: [{"asin": row["asin"], "status": "ok", "square": 0} for row in rows[1:]]


def never_two(settings):
    def process(rows):
        for row in rows:
            if row["x"] == 5:
                raise ValueError("no feature of A000000005 may be NaN")
            yield {"asin": row["asin"], "status": "ok", "square": 0}

    return process


def fails(settings, *, error):
    def process(rows):
        raise error

    return process


def unopened(settings):
    raise ValueError("the weights W.pth are not there")


def dies_of_opening(settings, *, tally, openings):
    """Kills its own process at each of these openings, counted from 1, and after the second at row 5."""
    with tally.open("a") as file:
        file.write("x")
    opening = len(tally.read_text())
    if opening in openings:
        os.kill(os.getpid(), signal.SIGKILL)

    def process(rows):
        for row in rows:
            if row["x"] == 5 and opening == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield {"asin": row["asin"], "status": "ok", "square": row["x"]}

    return process


def dies(settings, *, tally, times):
    """Kills its own process at row 5, `times` times; what it did before is counted in the file `tally`."""

    def process(rows):
        for row in rows:
            if row["x"] == 5 and len(tally.read_text()) < times:
                with tally.open("a") as file:
                    file.write("x")
                os.kill(os.getpid(), signal.SIGSEGV)
            yield {"asin": row["asin"], "status": "ok", "square": row["x"]}

    return process


def tells_threads(settings):
    def process(rows):
        for row in rows:
            yield {"asin": row["asin"], "status": "ok", "square": int(os.environ["OMP_NUM_THREADS"])}

    return process


def inline(open_worker, tasks, *, workers, threads, progress):
    """Another engine behind the same seam: this process."""
    handle = open_worker()
    for index, task in enumerate(tasks):
        try:
            yield index, handle(task, progress)
        except ValueError as error:
            from pipeline.workers import TaskError

            raise TaskError(index, str(error)) from error


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SMARTAVE_STORE", raising=False)
    monkeypatch.delenv("SMARTAVE_WORKERS", raising=False)
    monkeypatch.setitem(shards.EXECUTORS, "inline", inline)
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "inline")
    return tmp_path


def rows(**statuses):
    return [{"asin": asin, "x": x, "status": statuses.get(asin, "ok")} for x, asin in enumerate(ASINS)]


def job(make_worker=squares, inputs=None, settings=None, **changes):
    settings = settings or Settings()
    chunks = shards.chunks_of_rows(rows() if inputs is None else inputs, settings.shard_size)
    fields = {
        "stage": "squares",
        "corpus": "toy",
        "module": "pipeline.shards",
        "settings": settings,
        "schema": SCHEMA,
        "chunks": chunks,
        "make_worker": make_worker,
        "unseen": frozenset({"patience"}),
    }
    return shards.Job(**{**fields, **changes})


def finished():
    """path -> (inode, mtime) of every finished shard of the store; a shard made again has others."""
    found = {}
    for record in Path(".cache/shards").glob("*/??/*.json"):
        path = record.with_suffix(".parquet")
        found[path] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# One run


def test_a_run_gives_one_sorted_row_per_input_and_a_manifest_that_tells_them():
    output = shards.run(job())
    folder = shards.ShardFolder(output)
    folder.verify()
    assert [(row["asin"], row["square"]) for row in folder.rows()] == [
        (a, x * x) for x, a in enumerate(ASINS)
    ]
    assert [row for row in folder.rows(["square"])][3] == {"square": 9}
    assert [shard["rows"] for shard in folder.manifest["shards"]] == [4, 4, 2]
    assert len(folder) == 10
    assert folder.get("A000000007")["square"] == 49
    for absent in ("A000000099", "0", "A0000000041"):
        with pytest.raises(KeyError):
            folder.get(absent)
    assert json.loads(Path("metrics/toy/squares.json").read_text()) == {"rows": 10, "status": {"ok": 10}}


def test_no_input_at_all_is_a_complete_empty_folder():
    folder = shards.ShardFolder(shards.run(job(inputs=[])))
    folder.verify()
    assert list(folder.rows()) == []


def test_the_number_of_workers_changes_no_byte_and_each_has_the_threads_of_the_job(monkeypatch):
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "local")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    one = contents(shards.run(job(tells_threads, threads=3)))
    assert {row["square"] for row in shards.ShardFolder(Path("data/toy/squares")).rows()} == {3}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.setenv("SMARTAVE_STORE", "elsewhere")
    monkeypatch.setenv("SMARTAVE_WORKERS", "3")
    assert contents(shards.run(job(tells_threads, threads=3))) == one


@pytest.mark.parametrize(("name", "value"), [("SMARTAVE_WORKERS", "two"), ("SMARTAVE_WORKERS", "0")])
def test_a_wrong_number_of_workers_is_an_error(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got '{value}'"):
        shards.run(job())


def test_an_unknown_executor_is_an_error(monkeypatch):
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "cloud")
    with pytest.raises(ValueError, match="SMARTAVE_EXECUTOR must be one of local, dask, inline, got 'cloud'"):
        shards.run(job())


@pytest.mark.parametrize(
    ("make_worker", "message"),
    [
        (never_two, r"squares of toy: shard 00001 \(A000000004 to A000000007\): no feature of A000000005"),
        (one_row_too_few, r"shard 00000 .*made 3 rows that are not those of the 4 inputs"),
    ],
)
def test_a_shard_that_cannot_be_made_is_named(make_worker, message):
    with pytest.raises(ValueError, match=message):
        shards.run(job(make_worker))
    assert not Path("data/toy/squares/manifest.json").exists()


def test_a_worker_that_cannot_open_says_why(monkeypatch):
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "local")
    with pytest.raises(ValueError, match=r"^the weights W.pth are not there$"):
        shards.run(job(unopened))


def test_two_workers_that_die_while_they_open_end_the_stage_and_no_row_is_blamed(monkeypatch, tmp_path):
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "local")
    monkeypatch.setenv("SMARTAVE_WORKERS", "1")
    with pytest.raises(
        ValueError, match=r"^2 processes died .* by signal 9: is there memory .*SMARTAVE_WORKERS"
    ):
        shards.run(job(partial(dies_of_opening, tally=tmp_path / "tally", openings={1, 2})))
    assert len((tmp_path / "tally").read_text()) == 2


def test_a_death_while_opening_counts_against_no_task_and_not_after_another_has_opened(monkeypatch, tmp_path):
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "local")
    monkeypatch.setenv("SMARTAVE_WORKERS", "1")
    worker = partial(dies_of_opening, tally=tmp_path / "tally", openings={1, 3})
    assert shards.ShardFolder(shards.run(job(worker))).manifest["status"] == {"ok": 10}
    assert len((tmp_path / "tally").read_text()) == 4


def test_a_full_disk_is_told_in_a_sentence_and_what_is_our_fault_in_whole(monkeypatch):
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "local")
    with pytest.raises(
        ValueError, match=r"shard 0000\d \(A\d+ to A\d+\): \[Errno 28\] No space left on device$"
    ):
        shards.run(job(partial(fails, error=OSError(errno.ENOSPC, "No space left on device"))))
    with pytest.raises(ValueError, match=r"(?s)Traceback .*KeyError: 'asin'$"):
        shards.run(job(partial(fails, error=KeyError("asin"))))
    with pytest.raises(ValueError, match=r"(?s)Traceback .*TimeoutError$"):  # it has no words of its own
        shards.run(job(partial(fails, error=TimeoutError())))


@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_that_dies_now_and_then_costs_retries_and_changes_no_byte(monkeypatch, tmp_path, times):
    undisturbed = [row["square"] for row in shards.ShardFolder(shards.run(job(toward(tmp_path, 0)))).rows()]
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "local")
    monkeypatch.setenv("SMARTAVE_STORE", "elsewhere")
    folder = shards.ShardFolder(shards.run(job(toward(tmp_path, times))))
    assert [row["square"] for row in folder.rows()] == undisturbed
    assert folder.manifest["status"] == {"ok": 10}
    assert len((tmp_path / "tally").read_text()) == times


def toward(folder, times):
    (folder / "tally").write_text("")
    return partial(dies, tally=folder / "tally", times=times)


@pytest.mark.parametrize("executor", ["local", pytest.param("dask", marks=pytest.mark.soak)])
def test_an_image_that_kills_every_worker_is_a_row_with_a_status(monkeypatch, tmp_path, executor):
    monkeypatch.setenv("SMARTAVE_EXECUTOR", executor)
    monkeypatch.setenv("SMARTAVE_WORKERS", "1")
    folder = shards.ShardFolder(shards.run(job(toward(tmp_path, 99), lost={"square": -1})))
    folder.verify()
    assert folder.manifest["status"] == {"kills_worker": 1, "ok": 9}
    assert [row["square"] for row in folder.rows()] == [0, 1, 2, 3, 4, -1, 6, 7, 8, 9]
    assert folder.get("A000000005")["status"] == "kills_worker"
    assert len((tmp_path / "tally").read_text()) == 4  # twice with its shard, twice alone
    before = finished()
    shards.run(job(toward(tmp_path, 99), lost={"square": -1}))
    assert finished() == before


def dies_of_many(settings):
    """With more than one row its process ends; no row alone is to blame."""

    def process(rows):
        if len(rows) > 1:
            os._exit(3)
        for row in rows:
            yield {"asin": row["asin"], "status": "ok", "square": 0}

    return process


def test_a_shard_that_kills_its_worker_by_no_row_alone_is_named(monkeypatch):
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "local")
    message = r"shard 00000 \(A000000000 to A000000003\): its worker died 2 times, .* code 3, by no row alone"
    with pytest.raises(ValueError, match=message):
        shards.run(job(dies_of_many, inputs=rows()[:4]))


def counts_what_it_makes(settings):
    def process(rows):
        yield Counter(rows=len(rows))
        for row in rows:
            yield {"asin": row["asin"], "status": "ok", "square": row["x"]}
        yield Counter(even=sum(row["x"] % 2 == 0 for row in rows))

    return process


def test_what_workers_measure_is_summed_over_shards_also_over_those_made_before():
    measured = job(counts_what_it_makes, measures=lambda counts: {"share": counts["even"] / counts["rows"]})
    for _ in range(2):
        shards.run(measured)
        told = json.loads(Path("metrics/toy/squares.json").read_text())
        assert told == {"rows": 10, "status": {"ok": 10}, "share": 0.5}


# Dask


def test_dask_gives_the_bytes_of_local_with_the_threads_of_the_job(monkeypatch):
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "local")
    one = contents(shards.run(job(tells_threads, threads=3)))
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "dask")
    for number in ("1", "2"):
        monkeypatch.setenv("SMARTAVE_STORE", f"elsewhere-{number}")
        monkeypatch.setenv("SMARTAVE_WORKERS", number)
        assert contents(shards.run(job(tells_threads, threads=3))) == one


def test_dask_tells_how_many_rows_are_done(monkeypatch):
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "dask")
    monkeypatch.setenv("SMARTAVE_WORKERS", "1")
    done = []
    monkeypatch.setattr(
        shards, "progress_bar", lambda *args, **how: contextlib.nullcontext(mock.Mock(update=done.append))
    )
    shards.run(job())
    assert sum(done) == len(ASINS)


def test_a_scheduler_that_runs_already_is_used(monkeypatch):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit=0
    ) as cluster:
        monkeypatch.setenv("SMARTAVE_EXECUTOR", "dask")
        monkeypatch.setenv("SMARTAVE_DASK", cluster.scheduler_address)
        there = contents(shards.run(job()))
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "local")
    monkeypatch.setenv("SMARTAVE_STORE", "elsewhere")
    assert contents(shards.run(job())) == there


@pytest.mark.parametrize(
    ("make_worker", "message"),
    [
        (never_two, r"shard 00001 .*no feature of A000000005 may be"),
        (unopened, r"^the weights W.pth are not"),
    ],
)
def test_dask_tells_what_a_worker_could_not_do(monkeypatch, make_worker, message):
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "dask")
    monkeypatch.setenv("SMARTAVE_WORKERS", "1")
    with pytest.raises(ValueError, match=message):
        shards.run(job(make_worker))


@pytest.mark.parametrize("first", [range(2), reversed(range(1, 3))])
def test_shards_finished_in_any_order_before_give_the_same_bytes(first):
    whole = contents(shards.run(job()))
    kept = sorted(Path(".cache/shards/squares").rglob("*.json"))
    for at in set(range(3)) - set(first):
        for name in (kept[at], kept[at].with_suffix(".parquet")):
            name.unlink()
    assert contents(shards.run(job())) == whole


# What a shard depends on


def test_what_changes_a_shard_makes_it_again_and_nothing_else_does(monkeypatch):
    shards.run(job())
    first = finished()
    shards.run(job())
    shards.run(job(settings=Settings(patience=9)))
    shards.run(job(corpus="other"))
    assert finished() == first
    for changes in (
        {"settings": Settings(power=3)},
        {"weights": {"detector": "0" * 64}},
        {"threads": 5},
        {"libraries": ("numpy",)},
        {"schema": SCHEMA.with_metadata({"width": "4"})},
        {"module": "pipeline.images"},
        {"inputs": [{**row, "x": row["x"] + 1} for row in rows()]},
    ):
        before = finished()
        shards.run(job(**changes))
        assert len(finished()) == len(before) + 3, changes
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "999")
    before = finished()
    shards.run(job())
    assert len(finished()) == len(before) + 3
    assert {path: first[path] for path in first} == {path: finished()[path] for path in first}


def test_a_changed_input_row_makes_its_own_shard_only():
    shards.run(job())
    before = finished()
    inputs = rows()
    inputs[5]["x"] = 77
    shards.run(job(inputs=inputs))
    assert len(finished()) == len(before) + 1


def test_a_change_in_the_code_of_an_imported_module_makes_shards_again(tmp_path):
    """In a copy of the packages: the digest follows imports, also those inside functions."""
    for package in provenance.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    ask = [sys.executable, "-c", "from pipeline import shards; print(shards.code_digest('pipeline.images'))"]

    def digest():
        return subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    before = digest()
    assert digest() == before
    (tmp_path / "pipeline/flows.py").write_text("unrelated = True\n")
    assert digest() == before
    fetch = tmp_path / "pipeline/fetch.py"  # imported by images inside a function
    fetch.write_text(fetch.read_text() + "\n# changed\n")
    assert digest() != before


def test_the_code_of_a_stage_is_its_module_and_what_it_imports():
    files = shards.code_files("pipeline.images")
    assert {"pipeline/images.py", "pipeline/shards.py", "pipeline/fetch.py"} <= set(files)
    assert files == sorted(files)
    assert all((ROOT / file).is_file() for file in files)
    assert not [file for file in files if file.startswith(("model/", "features/"))]
    with pytest.raises(ValueError, match=r"pipeline\.nothing is not a module of model, features, pipeline"):
        shards.code_files("pipeline.nothing")


# Failures for now


def test_a_shard_with_a_transient_failure_is_tried_again_by_the_next_run():
    flaky = frozenset({"transient"})
    shaky = rows(A000000005="transient")
    allowed = job(inputs=shaky, transient=flaky, max_transient=0.1)
    folder = shards.ShardFolder(shards.run(allowed))
    assert folder.manifest["status"] == {"ok": 9, "transient": 1}
    assert len(finished()) == 2
    assert not list(Path(".cache/shards").rglob("*.unfinished"))


def test_more_transient_failures_than_allowed_fail_the_stage_but_keep_what_is_finished():
    shaky = rows(A000000005="transient", A000000009="transient")
    strict = job(inputs=shaky, transient=frozenset({"transient"}), max_transient=0.1)
    with pytest.raises(ValueError, match=r"2 of 10 rows failed for now.*squares\.max_transient"):
        shards.run(strict)
    assert len(finished()) == 1
    assert not Path("data/toy/squares").exists()


# Faults of the disk


@pytest.mark.parametrize("name", ["fsync", "replace", "open"])
def test_a_full_disk_leaves_nothing_partial_and_the_next_run_completes(monkeypatch, name):
    """The k-th call fails, for every k until a run gets through."""
    undisturbed = contents(shards.run(job()))
    real = getattr(os, name)
    for k in range(200):
        shutil.rmtree("data")
        shutil.rmtree(".cache/shards")
        calls = 0

        def failing(*arguments, at=k, **options):
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            try:
                shards.run(job())
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017 - one of two right outcomes
            else:
                assert calls <= k
                break
        assert not list(Path().rglob("*.tmp"))
        for path in finished():
            assert shards.sha256_of(path) == json.loads(path.with_suffix(".json").read_text())["sha256"]
        Path("data").mkdir(exist_ok=True)
        assert contents(shards.run(job())) == undisturbed
    assert k > 5


@pytest.mark.parametrize("name", ["unlink", "link", "replace"])
def test_an_assembly_that_fails_anywhere_leaves_a_folder_that_says_it_is_not_complete(monkeypatch, name):
    output = shards.run(job())
    old = contents(output)
    shards.run(job(settings=Settings(power=3)))
    new = contents(output)
    real, refused = getattr(os, name), 0
    for k in range(100):
        shards.run(job())
        calls = 0

        def failing(*arguments, at=k, **options):
            nonlocal calls
            calls += 1
            if calls > at and "toy/squares" in str(arguments[-1]):
                raise OSError(errno.EIO, "Input/output error")
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            with contextlib.suppress(OSError):
                shards.run(job(settings=Settings(power=3)))
        try:
            shards.ShardFolder(output).verify()
        except ValueError as error:
            assert "is not complete" in str(error)  # noqa: PT017 - one of two right outcomes
            refused += 1
        else:
            assert contents(output) in (old, new)
        if contents(output) == new:
            break
    assert contents(output) == new
    assert name == "link" or refused > 1  # without links there are copies


def test_where_hard_links_do_not_work_the_output_is_a_copy(monkeypatch):
    def no_link(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    linked = contents(shards.run(job()))
    monkeypatch.setattr(os, "link", no_link)
    assert contents(shards.run(job())) == linked


# Corruption


def damaged(path, kind):
    data = bytearray(path.read_bytes())
    path.unlink()  # a hard link: the other name must stay as it is
    if kind == "flipped":
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data[: len(data) // 2] if kind == "cut" else data)


@pytest.mark.parametrize(("kind", "message"), [("flipped", "00001.parquet is corrupt"), ("cut", "must have")])
def test_a_corrupt_or_partial_shard_is_found_before_it_is_used(kind, message):
    output = shards.run(job())
    damaged(output / "00001.parquet", kind)
    with pytest.raises(ValueError, match=message):
        shards.ShardFolder(output).verify()
    assert any("00001.parquet" in line for line in shards.verify())


def test_reading_a_row_of_a_corrupt_shard_is_an_error():
    output = shards.run(job())
    damaged(output / "00001.parquet", "flipped")
    with pytest.raises(ValueError, match=r"00001\.parquet is corrupt"):
        shards.ShardFolder(output).get("A000000005")


@pytest.mark.parametrize("kind", ["flipped", "cut", "gone"])
def test_a_corrupt_shard_of_the_store_is_made_again(kind, capsys):
    good = contents(shards.run(job()))
    victim = next(iter(finished()))
    victim.unlink() if kind == "gone" else damaged(victim, kind)
    assert contents(shards.run(job())) == good
    assert f"{victim} is corrupt: it is made again" in capsys.readouterr().err
    assert shards.verify() == []


@pytest.mark.parametrize("left", [b"", b'{"rows": 4', b"\0\xff"])
def test_a_shard_whose_record_was_lost_with_the_power_is_told_and_made_again(left, capsys):
    good = contents(shards.run(job()))
    victim = next(iter(finished()))
    victim.with_suffix(".json").write_bytes(left)
    assert shards.verify() == [f"{victim} is corrupt (the next run makes it again)"]
    assert any("2 finished shards" in line for line in shards.status())
    assert contents(shards.run(job())) == good
    assert f"{victim} is corrupt: it is made again" in capsys.readouterr().err
    assert shards.verify() == []


def test_a_folder_without_its_manifest_is_not_complete():
    output = shards.run(job())
    (output / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"is not complete: it has no manifest\.json"):
        shards.ShardFolder(output)


# The next stage reads


def image_shards(count=7, size=3):
    """Rows of schema.IMAGES whose images are not pictures: only bytes and their sha256 matter here."""
    import hashlib

    made = [
        {**dict.fromkeys(schema.IMAGES.names), "asin": asin, "status": "ok", "image": asin.encode() * 50}
        for asin in ASINS[:count]
    ]
    for row in made:
        row["sha256"] = hashlib.sha256(row["image"]).hexdigest()
    given = {row["asin"]: row for row in made}
    return shards.ShardFolder(
        shards.run(
            job(
                lambda settings: lambda rows: [given[row["asin"]] for row in rows],
                inputs=[{"asin": asin, "sha": row["sha256"]} for asin, row in given.items()],
                settings=Settings(shard_size=size),
                schema=schema.IMAGES,
                stage="images",
            )
        )
    )


def test_chunks_of_a_folder_cross_its_files_and_know_their_content():
    folder = image_shards()
    chunks = shards.chunks_of_folder(folder, 4)
    assert [chunk.num_rows for chunk in chunks] == [4, 3]
    assert [chunk.ends for chunk in chunks] == [(ASINS[0], ASINS[3]), (ASINS[4], ASINS[6])]
    loaded = [row for chunk in chunks for row in chunk.load()]
    assert [row["asin"] for row in loaded] == ASINS[:7]
    assert loaded[5]["image"] == ASINS[5].encode() * 50
    assert set(loaded[0]) == {"asin", "status", "sha256", "image"}
    assert chunks[0].digest != chunks[1].digest
    same = shards.chunks_of_folder(image_shards(size=7), 4)
    assert [chunk.digest for chunk in same] == [chunk.digest for chunk in chunks]


def test_an_image_that_is_not_what_its_sha256_says_fails_its_shard():
    folder = image_shards()
    table = pa.parquet.read_table(folder.files[0])
    spoilt = table.set_column(7, "image", pa.array([b"other"] * table.num_rows, pa.binary()))
    folder.files[0].unlink()
    schema.write_parquet(spoilt, schema.IMAGES, folder.files[0])
    with pytest.raises(ValueError, match="the image of A000000000 does not have its sha256"):
        shards.chunks_of_folder(folder, 4)[0].load()


def test_features_come_as_views_of_mapped_memory():
    width, wanted = 4, {}
    region_schema = schema.region_schema(width=width)

    def regions(settings):
        def process(rows):
            for row in rows:
                number = row["x"] % 3  # 0 regions: no usable image
                features = np.full((number, width), row["x"], dtype="<f2") if number else None
                wanted[row["asin"]] = features
                yield {
                    "asin": row["asin"],
                    "status": "ok",
                    "boxes": [[0.0, 0.0, 1.0, 1.0]] * number,
                    "scores": [1.0] * number,
                    "num_regions": number,
                    "features": None if features is None else features.tobytes(),
                    "grid": None,
                }

        return process

    folder = shards.ShardFolder(shards.run(job(regions, schema=region_schema, stage="regions")))
    for asin in reversed(ASINS):
        got = folder.array(asin)
        if wanted[asin] is None:
            assert got is None
            continue
        np.testing.assert_array_equal(got, wanted[asin])
        assert got.dtype == np.float16
        assert not got.flags.owndata
        assert not got.flags.writeable
    assert folder.array(ASINS[1], "grid") is None
    assert len(list(Path(".cache/shards/mapped").iterdir())) == 3


# The command


def command(*arguments, **options):
    line = [sys.executable, "-m", "pipeline.shards", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, env=environment, capture_output=True, text=True, **options)


def test_status_verify_and_gc_tell_and_keep_what_is_used():
    shards.run(job())
    output = shards.run(job(settings=Settings(power=3)))
    good = contents(output)
    told = "\n".join(shards.status())
    assert "data/toy/squares: complete, 10 rows in 3 shards (10 ok)" in told
    assert ".cache/shards/squares: 6 finished shards" in told
    Path(".cache/shards/squares/ab").mkdir(exist_ok=True)
    Path(".cache/shards/squares/ab/.x.parquet.123.tmp").write_bytes(b"left by a killed run")
    assert command("gc", check=True).stdout.startswith("removed 7 files")
    assert len(finished()) == 3
    assert contents(output) == good
    assert shards.verify() == []
    damaged(next(iter(finished())), "flipped")
    told = command("verify")
    assert told.returncode == 1
    assert "is corrupt (the next run makes it again)" in told.stdout


def test_gc_leaves_the_files_of_others_where_the_store_is_a_folder_with_others(monkeypatch, tmp_path):
    monkeypatch.setenv("SMARTAVE_STORE", str(tmp_path / "shared"))
    shards.run(job())
    shutil.rmtree("data")
    name = "ab" + 62 * "0"
    theirs = ["thesis.tex", "photos/07/beach.json", f"photos/cd/{name}.json", f"a/b/ab/{name}.json", ".x.tmp"]
    for path in (tmp_path / "shared" / name for name in theirs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert len(shards.status()) == 1
    assert shards.verify() == []
    assert shards.gc()[0].startswith("removed 6 files")
    left = (path for path in Path("shared").rglob("*") if path.is_file())
    assert {path.relative_to("shared").as_posix() for path in left} == set(theirs)


# Killed runs and two runs: the real images stage on real files


def drawn_corpus(folder, count=40):
    """A catalogue whose pictures take some time each: shards of two, `count` / 2 of them."""
    (folder / "data/toy").mkdir(parents=True)
    (folder / "config/toy").mkdir(parents=True)
    (folder / "pictures").mkdir()
    noise = np.random.default_rng(0)
    products = []
    for number in range(count):
        asin = f"B{number:09d}"
        pixels = noise.integers(0, 255, (600, 600, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{asin}.jpg", quality=80)
        product = dict.fromkeys(schema.PRODUCTS.names) | {
            "item": asin,
            "asin": asin,
            "image_urls": [f"{asin}.jpg"],
        }
        products.append(product)
    schema.write_parquet(products, schema.PRODUCTS, folder / "data/toy/products.parquet")
    settings = {"base": "pictures", "shard_size": 2}
    (folder / "config/toy/images.json").write_text(json.dumps(settings))


STAGE = [sys.executable, "-m", "pipeline.images", "toy"]


def environment():
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SMARTAVE_")}
    return {**clean, "PYTHONPATH": str(ROOT)}


def start(line=STAGE):
    return subprocess.Popen(line, env=environment(), start_new_session=True, stderr=subprocess.PIPE)


def wait_for(condition, what, limit_s=60):
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, f"no {what} within {limit_s} s"
        time.sleep(0.002)


def complete(*, by_command=False):
    if by_command:
        subprocess.run(STAGE, env=environment(), capture_output=True, check=True)
    else:
        settings = params.load(images.Settings, Path("config/toy/images.json"))
        shards.run(images.job("toy", settings))
    return contents(Path("data/toy/images"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    drawn_corpus(folder)
    subprocess.run(STAGE, cwd=folder, env=environment(), check=True, capture_output=True)
    return folder


@pytest.fixture
def corpus(undisturbed, folder):
    for name in ("config", "pictures"):
        shutil.copytree(undisturbed / name, folder / name)
    (folder / "data/toy").mkdir(parents=True)
    shutil.copy(undisturbed / "data/toy/products.parquet", folder / "data/toy")
    return contents(undisturbed / "data/toy/images")


@pytest.mark.parametrize("num_done", [0, 3, 12])
def test_killed_at_any_point_the_stage_goes_on_and_gives_the_same_bytes(corpus, num_done):
    stage = start()
    holder = Path(".cache/locks/toy.images.holder")
    wait_for(lambda: len(finished()) >= num_done and holder.exists(), f"{num_done} finished shards")
    os.killpg(stage.pid, signal.SIGKILL)
    assert stage.wait() == -signal.SIGKILL
    stage.stderr.close()
    survived = finished()
    assert num_done <= len(survived) < 20
    assert not Path("data/toy/images/manifest.json").exists()
    assert complete(by_command=num_done == 3) == corpus
    assert {path: finished()[path] for path in survived} == survived, "a finished shard was made again"
    assert len(finished()) == 20
    shards.gc()
    assert not list(Path(".cache").rglob("*.tmp"))


KILLED = ("worker", "parent", "group")


def processes_of(stage, kind):
    """A worker of the stage, if it has one; the stage itself."""
    if kind != "worker":
        return [psutil.Process(stage.pid)]
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(stage.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return []


def kill_and_go_on(corpus, kind, after_s, *, executor="local", num_workers=2):
    """SIGKILL after so many seconds, wherever the stage is then; a second run must end with `corpus`."""
    chosen = {"SMARTAVE_EXECUTOR": executor, "SMARTAVE_WORKERS": str(num_workers)}
    stage = subprocess.Popen(
        STAGE, env={**environment(), **chosen}, start_new_session=True, stderr=subprocess.DEVNULL
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        stage.wait(after_s)
    if stage.poll() is None:
        if kind == "group":
            os.killpg(stage.pid, signal.SIGKILL)
        else:
            for process in processes_of(stage, kind)[:1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        if kind == "worker":  # costs a retry, and the stage ends by itself
            assert stage.wait(60) == 0
            assert contents(Path("data/toy/images")) == corpus
        else:
            stage.wait(60)
    survived = finished()
    line = subprocess.run(STAGE, env={**environment(), **chosen}, capture_output=True, text=True)
    assert line.returncode == 0, line.stderr
    assert contents(Path("data/toy/images")) == corpus
    assert {path: finished()[path] for path in survived} == survived, "a finished shard was made again"
    assert len(finished()) == 20


@pytest.mark.parametrize("kind", ["worker", "parent"])
def test_a_worker_or_the_parent_alone_may_be_killed(corpus, kind):
    kill_and_go_on(corpus, kind, 1.6)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(30))
def test_killed_at_a_seeded_point_the_stage_goes_on_and_gives_the_same_bytes(corpus, seed):
    """Worker, parent, group in turn; local and dask, 1 and 2 workers; at a time that the seed draws."""
    kind, executor = KILLED[seed % 3], ("local", "local", "dask")[seed // 3 % 3]
    longest_s = 8 if executor == "dask" else 4
    after_s = random.Random(seed).uniform(0.3, longest_s)
    kill_and_go_on(corpus, kind, after_s, executor=executor, num_workers=1 + seed // 9 % 2)


def test_killed_while_it_assembles_the_folder_is_not_complete_and_then_the_same(corpus):
    assert complete() == corpus
    manifest = Path("data/toy/images/manifest.json")
    inode = manifest.stat().st_ino
    stage = start()
    wait_for(lambda: not manifest.exists() or manifest.stat().st_ino != inode, "assembly")
    os.killpg(stage.pid, signal.SIGKILL)
    stage.wait()
    stage.stderr.close()
    assert complete() == corpus


SLOW_STAGE = """
import time
import pyarrow as pa
from pipeline import params, shards

def make_worker(settings):
    def process(rows):
        for row in rows:
            time.sleep(0.1)
            yield {"asin": row["asin"], "status": "ok"}
    return process

if __name__ == "__main__":
    rows = [{"asin": f"C{number:09d}"} for number in range(200)]
    schema = pa.schema([("asin", pa.string()), ("status", pa.string())])
    shards.run(shards.Job("slow", "toy", "pipeline.shards", params.Settings(), schema,
                          shards.chunks_of_rows(rows, 2), make_worker))
"""


def orphaned(launcher, tmp_path):
    """A stage of 20 s whose launcher was killed (`None`: itself) when two of its shards were finished."""
    (tmp_path / "slow_stage.py").write_text(SLOW_STAGE)
    stage = [sys.executable, "slow_stage.py"]
    started = start([sys.executable, "-c", launcher.format(stage)] if launcher else stage)
    wait_for(lambda: len(finished()) >= 2, "finished shards")
    started.kill()
    started.wait()

    def all_gone():
        try:
            os.killpg(started.pid, 0)
        except ProcessLookupError:
            return True
        return False

    wait_for(all_gone, "end of the orphans", limit_s=10)
    with started.stderr as stderr:
        return stderr.read().decode()


def test_when_the_process_that_started_a_stage_dies_the_stage_and_its_workers_stop(tmp_path):
    assert "has died: stopping" in orphaned("import subprocess; subprocess.run({!r})", tmp_path)
    assert len(finished()) < 100


def test_workers_die_with_a_stage_that_is_killed_alone(tmp_path):
    orphaned(None, tmp_path)
    assert len(finished()) < 100


def start_holder(seconds):
    hold = (
        "import time; from pipeline import shards\nwith shards.sole_writer('squares', 'toy'): time.sleep({})"
    )
    holder = start([sys.executable, "-c", hold.format(seconds)])
    wait_for(Path(".cache/locks/toy.squares.holder").exists, "holder")
    return holder


def test_a_second_writer_is_refused_with_the_holder_named_and_a_dead_one_never_blocks(monkeypatch):
    hold = (
        "from pipeline import shards; import time\nwith shards.sole_writer('squares', 'toy'): time.sleep(60)"
    )
    holder = start([sys.executable, "-c", hold])
    wait_for(Path(".cache/locks/toy.squares.holder").exists, "holder")
    monkeypatch.setattr(locks, "LOCK_WAIT_S", 0.2)
    with pytest.raises(ValueError, match=f"squares of toy is being written by process {holder.pid} on "):
        shards.run(job())
    with pytest.raises(ValueError, match="is being written by"):
        shards.gc()
    assert f"toy.squares: being written by process {holder.pid} on" in "\n".join(shards.status())
    holder.kill()
    holder.wait()
    holder.stderr.close()
    assert len(shards.ShardFolder(shards.run(job()))) == 10
    assert "being written" not in "\n".join(shards.status())


def test_a_second_writer_waits_a_moment_for_the_first_to_end(monkeypatch):
    hold = (
        "from pipeline import shards; import time\nwith shards.sole_writer('squares', 'toy'): time.sleep(1)"
    )
    holder = start([sys.executable, "-c", hold])
    wait_for(Path(".cache/locks/toy.squares.holder").exists, "holder")
    assert len(shards.ShardFolder(shards.run(job()))) == 10
    assert holder.wait() == 0
    holder.stderr.close()
