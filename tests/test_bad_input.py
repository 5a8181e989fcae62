"""Every kind of bad input on one page: what is given, and the error or the counted row that comes of it."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from PIL import Image
from ruamel.yaml import YAML

from model import config
from pipeline import images, params, products, shards, source

GOOD = "B000000000"
GONE = [f"B1{i:08}" for i in range(100)]  # of these no product may come through
PICTURE = [f"B2{i:08}" for i in range(100)]  # these come through without a picture


def metadata(asin: str, **more: Any) -> dict[str, Any]:
    return {"asin": asin, "title": "Red mug", "imageURLHighRes": [f"{asin}.jpg"]} | more


def label(asin: str, *, begin: int = 0, pid: int = 0) -> dict[str, Any]:
    span = {"value": "Red", "pid": pid, "begin": begin, "end": begin + 3}
    return {"id": asin, "category": "Mugs", "attributes": [{"key": "Color", "evidences": [span]}]}


# metadata line, label line, the reason it is counted under
BAD_ROWS: list[tuple[Any, Any, str]] = [
    (metadata(GONE[0]), b'{"id": "B0000', "malformed line"),
    (metadata(GONE[1]), b"\xff\xfe\x00", "malformed line"),
    (metadata(GONE[2]), b"[]", "malformed line"),
    (b'{"asin": "B00', label(GONE[3]), "malformed line"),
    (metadata(GONE[4]), {"id": GONE[4]}, "label without id or attributes"),
    (metadata("mug-1"), label("mug-1"), "id is not an asin"),
    (metadata("../../etc/x"), label("../../etc/x"), "id is not an asin"),
    (metadata(GONE[5]), label(GONE[6]), "no metadata"),
    (metadata(GONE[7]), label(GONE[7], begin=400), "span: out of range"),
    (metadata(GONE[8]), label(GONE[8], begin=1), "span: text differs"),
    (metadata(GONE[9]), label(GONE[9], pid=7), "span: pid out of range"),
    (metadata(GONE[10], title="  "), label(GONE[10]), "no title"),
    (metadata(GONE[11], title=None), label(GONE[11]), "no title"),
]
COUNTED = {reason: sum(reason == one for _, _, one in BAD_ROWS) for _, _, reason in BAD_ROWS}
COUNTED["no metadata"] += 1  # the label of the metadata line that is malformed

# what becomes of the picture's bytes (None: no file), or the image URLs instead; the status of the row
BAD_PICTURES: list[tuple[Callable[[bytes], bytes | None] | list[str], str]] = [
    (lambda data: None, "missing"),
    (lambda data: data[: len(data) // 2], "truncated"),
    (lambda data: b"", "not_image"),
    (lambda data: b"<html>gone</html>", "not_image"),
    ([], "no_url"),
    (["../../secret.jpg"], "outside_base"),
    (["https://example.com/a.jpg"], "forbidden_host"),
    (["file:///etc/hostname"], "bad_url"),
]


def write_catalogue() -> dict[str, Any]:
    """A user's two files and pictures with all that is bad in them, and the corpus's entry in params.yaml."""
    folder = Path("own/images")
    folder.mkdir(parents=True)
    lines: dict[str, list[Any]] = {"metadata": [metadata(GOOD)], "labels": [label(GOOD)]}
    for row, its_label, _ in BAD_ROWS:
        lines["metadata"].append(row)
        lines["labels"].append(its_label)
    Image.effect_noise((96, 96), 60).convert("RGB").save(folder / f"{GOOD}.jpg")
    good = (folder / f"{GOOD}.jpg").read_bytes()
    for asin, (spoiled, _) in zip(PICTURE, BAD_PICTURES, strict=False):
        urls = {"imageURLHighRes": spoiled} if isinstance(spoiled, list) else {}
        lines["metadata"].append(metadata(asin, **urls))
        lines["labels"].append(label(asin))
        data = None if isinstance(spoiled, list) else spoiled(good)
        if data is not None:
            (folder / f"{asin}.jpg").write_bytes(data)
    entry: dict[str, Any] = {"kind": "mave", "images": {"base": "own/images"}}
    for name, rows in lines.items():
        data = b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        Path(f"own/{name}.jsonl").write_bytes(data)
        entry[name] = [{"path": f"own/{name}.jsonl", "sha256": hashlib.sha256(data).hexdigest()}]
    return entry


def shipped(**corpora: Any) -> dict[str, Any]:
    content = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    content["corpora"], content["run"]["corpora"] = corpora, list(corpora)
    return content


def read(entry: dict[str, Any]) -> None:
    """Bring `entry` from the user's files to pictures."""
    config.write(config.resolve(shipped(mine=entry)), Path("config"))
    source.bring(source.load("mine"), "mine", Path("data/mine/source"))
    products.run("mine")
    shards.run(images.job("mine", params.load(images.Settings, Path("config/mine/images.json"))))


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The products' metrics and the images' rows by asin, of the whole catalogue read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("catalogue"))
        read(write_catalogue())
        rows = {row["asin"]: row for row in shards.ShardFolder(Path("data/mine/images")).rows()}
        return json.loads(Path("metrics/mine/products.json").read_text()), rows


@pytest.mark.parametrize(("reason", "count"), list(COUNTED.items()))
def test_a_bad_row_is_counted_with_its_reason(catalogue: Any, reason: str, count: int) -> None:
    assert catalogue[0]["counted"][reason]["count"] == count


def test_no_bad_row_comes_through_and_every_good_one_does(catalogue: Any) -> None:
    assert set(catalogue[1]) == {GOOD, *PICTURE[: len(BAD_PICTURES)]}
    assert catalogue[1][GOOD]["status"] == "ok"


@pytest.mark.parametrize(
    ("asin", "status"), [(PICTURE[i], status) for i, (_, status) in enumerate(BAD_PICTURES)]
)
def test_a_bad_picture_is_a_row_with_a_status(catalogue: Any, asin: str, status: str) -> None:
    assert catalogue[1][asin]["status"] == status
    assert catalogue[1][asin]["image"] is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda entry: entry["labels"][0].update(sha256="0" * 64), r"own/labels\.jsonl .*0{64}"),
        (lambda entry: entry["labels"][0].pop("sha256"), r"own/labels\.jsonl has no sha256 pin; .*--pin"),
        (lambda entry: entry["metadata"][0].update(path="own/gone.jsonl"), r"own/gone\.jsonl"),
        (lambda entry: entry["images"].update(base="own/nowhere"), r"own/nowhere"),
        (lambda entry: entry.update(colour=1), r"corpora\.mine\.colour is not a setting that exists"),
        (lambda entry: entry.update(kind="shop"), r"corpora\.mine\.kind must be one of sample, mave, mepave"),
    ],
)
def test_a_bad_entry_stops_with_a_sentence_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    entry = write_catalogue()
    spoil(entry)
    with pytest.raises(ValueError, match=message):
        read(entry)


@pytest.mark.parametrize(
    ("run", "complaint"),
    [
        ({"corpora": ["nope"]}, "run.corpora.0 must be one of"),
        ({"models": ["bert"]}, "run.models.0 must be one of"),
        ({"seeds": [-1]}, "run.seeds.0 must be >= 0"),
        ({"gpus": 1}, "run.gpus is not a setting that exists"),
    ],
)
def test_what_cannot_run_is_told_before_anything_runs(run: dict[str, Any], complaint: str) -> None:
    content = shipped(sample={"kind": "sample"})
    content["run"].update(run)
    with pytest.raises(ValueError, match=re.escape(f"params.yaml: {complaint}")):
        config.resolve(content)


@pytest.mark.parametrize("module", ["pipeline.source", "pipeline.images", "features.ocr"])
def test_a_stage_of_an_unknown_corpus_ends_with_one_line_and_a_failure(module: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "nowhere"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "config/nowhere" in done.stderr
    assert len(done.stderr.splitlines()) == 1
