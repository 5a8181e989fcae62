"""Every write of the data half made to fail in turn: what has a final name is whole."""

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty_disk
import pyarrow as pa
import pytest
from misbehaving import serving
from PIL import Image

from pipeline import disk, editing, images, mave, mepave, params, products, schema, shards, source
from pipeline.download import Download

DATA = bytes(range(256)) * 1024
PIN = hashlib.sha256(DATA).hexdigest()


def sweep(
    act: Callable[[], Any],
    whole: Callable[[], bool],
    least: int,
    start: Callable[[], Any] = lambda: None,
) -> None:
    """Let the k-th operation fail, for each k until nothing fails any more; then all must be there."""
    for k in range(1, 200):
        start()
        with faulty_disk.failing(k, faulty_disk.REASONS[k % 2]) as broken:
            try:
                act()
            except (OSError, ValueError, pa.ArrowException):
                failed = True
            else:
                failed = False
        assert failed == (broken.count >= k), "a failed write went unnoticed"
        assert whole(), f"something partial stands under a final name after write {k} failed"
        if not failed:
            break
        act()
        assert whole()
        for path in Path().iterdir():
            if path.name != "in":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert k > least, "too few operations were seen for this to test anything"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMARTAVE_STORE", ".cache/shards")
    Path("in").mkdir()
    return tmp_path


def is_whole(path: Path, data: bytes) -> bool:
    return not path.exists() or path.read_bytes() == data


def test_a_json_file_is_whole_or_not_there(here: Path) -> None:
    value = {"a": 1}
    expected = (json.dumps(value, indent=1) + "\n").encode()
    sweep(lambda: disk.write_json(value, Path("out.json")), lambda: is_whole(Path("out.json"), expected), 2)


def test_a_download_is_whole_or_not_there(here: Path) -> None:
    with serving({"data": DATA}) as server:
        wanted = Download(
            urls=[server.url("data")], sha256=PIN, plain_http=[server.place], cache=Path("cache")
        )
        sweep(wanted.fetch, lambda: is_whole(Path("cache") / PIN, DATA), 3)


def test_a_source_folder_is_whole_or_not_there(here: Path) -> None:
    Path("in/labels.jsonl").write_bytes(DATA)
    file = {"path": "in/labels.jsonl", "sha256": PIN}
    settings = source.Mave.model_validate({"kind": "mave", "labels": [file], "metadata": [file]})
    folder = Path("data/mine/source")

    def whole() -> bool:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return not folder.exists() or [path.read_bytes() for path in files] == [DATA, DATA]

    def act() -> None:
        source.bring(settings, "mine", folder)

    sweep(act, whole, 2)


def test_a_joined_file_is_whole_or_not_there(here: Path) -> None:
    rows = [{"asin": f"B{i:09d}", "title": "One"} for i in range(3)]
    Path("in/m.json.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    labels = [{"id": row["asin"], "category": "Mugs", "attributes": []} for row in rows]
    Path("in/l.jsonl").write_text("\n".join(map(json.dumps, labels)))
    mave.join([Path("in/m.json.gz")], [Path("in/l.jsonl")], Path("all.jsonl"))
    expected = Path("all.jsonl").read_bytes()
    assert expected.count(b"\n") == 3

    def act() -> None:
        mave.join([Path("in/m.json.gz")], [Path("in/l.jsonl")], Path("all.jsonl"))

    sweep(act, lambda: is_whole(Path("all.jsonl"), expected), 2)


def released(folder: Path) -> None:
    folder.mkdir()
    for number, (name, _) in enumerate(mepave.FILES.values()):
        rows = [f"c_{number}\ts_{number}{i}\t红色\t<颜色>红色</颜色>\n" for i in range(9)]
        (folder / name).write_text("".join(rows), encoding="utf-8")


def test_the_sequences_of_mepave_are_whole_or_not_there(here: Path) -> None:
    released(Path("in/mepave"))

    def write(folder: Path) -> None:
        for split, path in mepave.files(Path("in/mepave")).items():
            mepave.write_sequences(path, folder / split)

    write(Path("in/expected"))
    expected = {
        path.relative_to("in/expected"): path.read_bytes() for path in Path("in/expected").glob("*/*")
    }
    assert len(expected) == 12

    def whole() -> bool:
        assert len(list(Path("out").glob("*/*"))) == sum((Path("out") / name).is_file() for name in expected)
        return all(is_whole(Path("out") / name, data) for name, data in expected.items())

    sweep(lambda: write(Path("out")), whole, 12 * 4)


def test_products_and_their_metrics_are_whole_or_not_there(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(params, "CONFIG", Path("in"))
    released(Path("in/mepave"))
    Path("in/mine").mkdir()
    Path("in/mine/products.json").write_text(products.Settings(kind="mepave").model_dump_json())

    def start() -> None:
        shutil.copytree("in/mepave", "data/mine/source", dirs_exist_ok=True)

    start()
    products.run("mine")
    made = ("data/mine/products.parquet", "metrics/mine/products.json")
    expected = {name: Path(name).read_bytes() for name in made}

    def whole() -> bool:
        return all(is_whole(Path(name), data) for name, data in expected.items())

    sweep(lambda: products.run("mine"), whole, 7, start)


def test_a_params_yaml_that_is_pinned_is_never_half_and_has_the_pins_of_the_first_files(here: Path) -> None:
    released(Path("in/mepave"))
    old = b"# mine\ncorpora:\n  mine: {kind: mepave, path: in/mepave}\n"
    path = Path("params.yaml")

    def start() -> None:
        path.write_bytes(old)

    start()
    pins = [line.split()[1] for line in source.pin("mine")]
    new, states = path.read_bytes(), [old]
    for number in (1, 2, 3):
        start()
        with editing.edited(path) as content:
            content["corpora"]["mine"]["sha256"] = dict(zip(mepave.FILES, pins[:number], strict=False))
        states.append(path.read_bytes())
    assert new == states[-1]
    assert new.startswith(b"# mine")
    sweep(lambda: source.pin("mine"), lambda: path.read_bytes() in states, 4, start)


def test_a_folder_of_image_shards_is_whole_or_says_that_it_is_not(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inline(open_worker: Any, tasks: Any, *, workers: int, threads: int, progress: Any) -> Any:
        handle = open_worker()
        for index, task in enumerate(tasks):
            yield index, handle(task, progress)

    monkeypatch.setitem(shards.EXECUTORS, "inline", inline)
    monkeypatch.setenv("SMARTAVE_EXECUTOR", "inline")
    Path("in/pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(f"in/pictures/{number}.png")
    rows = [
        {
            **dict.fromkeys(schema.PRODUCTS.names),
            "item": f"B{i:09d}",
            "asin": f"B{i:09d}",
            "image_urls": [f"{i}.png"],
        }
        for i in range(3)
    ]
    schema.write_parquet(rows, schema.PRODUCTS, Path("in/products.parquet"))
    monkeypatch.setattr(images, "wanted", lambda _, real=images.wanted: real(Path("in/products.parquet")))
    settings = images.Settings(base="in/pictures", shard_size=2)

    def whole() -> bool:
        for record in Path(".cache/shards").rglob("*.json"):
            assert disk.is_intact(record.with_suffix(".parquet"), json.loads(record.read_text()))
        if not Path("data/toy/images/manifest.json").exists():
            return True
        folder = shards.ShardFolder(Path("data/toy/images"))
        folder.verify()
        return [row["status"] for row in folder.rows()] == ["ok"] * 3

    sweep(lambda: shards.run(images.job("toy", settings)), whole, 10)


def test_a_file_that_takes_no_advice_is_written_all_the_same() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb", buffering=0) as pipe:
        pipe.write(b"some")
        disk.start_sync(pipe)
