import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from misbehaving import serving
from pydantic import ValidationError

from pipeline import locks, params, source

LINE = b'{"id": "B000000001"}\n'
PIN = hashlib.sha256(LINE).hexdigest()
PARAMS = """\
# what runs
run: {corpora: [mine]}   # only mine
corpora:
  mine:   # our own catalogue
    kind: mave
    labels:
      - path: own/labels.jsonl   # by hand
    metadata: [{path: own/meta.json.gz, sha256: '%s'}]
    images: {base: own/images}
  zhong: {kind: mepave, path: own/mepave}
  sample: {kind: sample, products: 240}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository root with a user's files in own/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "mepave").mkdir(parents=True)
    (tmp_path / "own" / "labels.jsonl").write_bytes(LINE)
    (tmp_path / "own" / "meta.json.gz").write_bytes(gzip.compress(LINE, mtime=0))
    for split in ("train", "valid", "test"):
        (tmp_path / "own" / "mepave" / f"jdair.jave.{split}.txt").write_bytes(LINE)
    (tmp_path / "params.yaml").write_text(PARAMS % ("0" * 64))
    return tmp_path


def mave(*files: dict[str, Any], **more: Any) -> source.Mave:
    return source.Mave.model_validate({"kind": "mave", "labels": files, **more})


def bring(settings: params.Settings) -> Path:
    source.bring(settings, "mine", Path("data/mine/source"))
    return Path("data/mine/source")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pinned_local_files_are_copied_in_order_and_nothing_else_stays(here: Path) -> None:
    Path("data/mine/source/labels").mkdir(parents=True)
    Path("data/mine/source/labels/00-stale.jsonl").write_text("old")
    labels = {"path": "own/labels.jsonl", "sha256": PIN, "size": len(LINE)}
    folder = bring(mave(labels, labels, metadata=[labels], roots={"All_Beauty": labels}))
    assert tree(folder) == {
        "labels/00-labels.jsonl": LINE,
        "labels/01-labels.jsonl": LINE,
        "metadata/00-labels.jsonl": LINE,
        "roots/All_Beauty.jsonl": LINE,
    }
    assert os.stat(folder / "labels/00-labels.jsonl").st_ino != os.stat("own/labels.jsonl").st_ino
    assert [path.name for path in Path("data/mine").iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            {"path": "own/labels.jsonl", "sha256": "1" * 64},
            rf"own/labels\.jsonl has sha256 {PIN}.*pinned 1{{64}}",
        ),
        (
            {"path": "own/labels.jsonl", "sha256": PIN, "size": 3},
            r"own/labels\.jsonl has .*pinned .*\(3 bytes\)",
        ),
        ({"path": "own/labels.jsonl"}, r"no sha256 pin; `python -m pipeline\.source mine --pin` writes it"),
        ({"path": "own/absent.jsonl", "sha256": PIN}, r"own/absent\.jsonl is not a file: put it there"),
        ({"path": "own", "sha256": PIN}, "own is not a file"),
    ],
)
def test_a_file_that_is_not_the_pinned_one_is_an_error_and_the_old_state_stays(
    here: Path, file: dict[str, Any], message: str
) -> None:
    folder = bring(mave({"path": "own/labels.jsonl", "sha256": PIN}))
    with pytest.raises(ValueError, match=message):
        bring(mave(file))
    assert tree(folder) == {"labels/00-labels.jsonl": LINE}


def test_a_git_lfs_pointer_is_named_for_what_it_is(here: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 744855753\n"
    Path("own/labels.jsonl").write_text(pointer)
    with pytest.raises(ValueError, match=r"labels\.jsonl is a Git LFS pointer.*oid sha256:abc"):
        bring(mave({"path": "own/labels.jsonl", "sha256": PIN}))


def test_mepave_takes_its_three_files_with_a_pin_each(here: Path) -> None:
    pins = dict.fromkeys(("train", "validation", "test"), PIN)
    folder = bring(source.Mepave(kind="mepave", path="own/mepave", sha256=pins))
    assert sorted(tree(folder)) == [f"jdair.jave.{split}.txt" for split in ("test", "train", "valid")]
    with pytest.raises(ValueError, match="no sha256 pin"):
        bring(source.Mepave(kind="mepave", path="own/mepave", sha256={"train": PIN}))
    with pytest.raises(ValueError, match="form in the README of jd-aig/JAVE and put it there"):
        bring(source.Mepave(kind="mepave", path="own", sha256=pins))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": []}, "at least 1 item"),
        ({"labels": [{}]}, "either a path or a url"),
        ({"labels": [{"path": "a", "url": "https://b"}]}, "either a path or a url"),
        ({"labels": [{"path": "a", "mirrors": ["https://b"]}]}, "mirrors belong to a url"),
        ({"labels": [{"path": "a", "sha256": "A" * 64}]}, "should match pattern"),
        ({"labels": [{"path": "a", "md5": "x"}]}, "Extra inputs"),
        ({"labels": [{"url": "http://a/b"}]}, "must be https, got 'http://a/b'"),
        ({"labels": [{"url": "file:///a/b"}]}, "must be https"),
        ({"labels": [{"url": "https://a/b", "mirrors": ["ftp://a/b"]}]}, "must be https, got 'ftp://a/b'"),
        ({"labels": [{"url": "http://example.org:80/b"}]}, "http on a loopback host:port only"),
        ({"labels": [{"url": "http://127.0.0.1/b"}]}, "http on a loopback host:port only"),
        ({"labels": [{"path": "a"}], "roots": {"../x": {"path": "a"}}}, "should match pattern"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        source.Mave.model_validate({"kind": "mave", **given})


def test_a_file_name_is_harmless_whatever_the_address_says() -> None:
    names = [
        source.File(url=f"https://example.org/{tail}").name
        for tail in ("a/meta_X.json.gz?raw=1", "a/..%2F..%2Fetc", "", "%2e%2e", "a%20b")
    ]
    assert names == ["meta_X.json.gz", "etc", "file", "file", "a_b"]


@pytest.mark.parametrize(("number", "last"), [(12, "11-a"), (100, "99-a"), (101, "100-a")])
def test_names_sort_in_the_order_of_the_files_however_many_there_are(number: int, last: str) -> None:
    targets = [one.target for one in source.wanted(mave(*[{"path": "own/a"}] * number))]
    assert targets == sorted(targets)
    assert targets[-1] == f"labels/{last}"


def test_the_sample_is_generated_by_the_stage(here: Path) -> None:
    Path("config/sample").mkdir(parents=True)
    Path("config/sample/source.json").write_text('{"kind": "sample", "products": 12, "min_test_values": 0}')
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.source", "sample"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in Path("data/sample/source").iterdir()} == {"labels", "metadata", "images"}


def test_the_stage_fails_with_one_clear_line(here: Path) -> None:
    Path("config/mine").mkdir(parents=True)
    for given, message in (
        (None, "config/mine/source.json does not exist"),
        ({"kind": "other"}, "kind must be one of sample, mave, mepave, got 'other'"),
        ({"kind": "mave"}, "config/mine/source.json: labels is missing"),
    ):
        if given is not None:
            Path("config/mine/source.json").write_text(json.dumps(given))
        with pytest.raises(ValueError, match=message):
            source.load("mine")


def test_a_file_that_cannot_be_had_says_where_to_ask_and_where_to_put_it(here: Path) -> None:
    with serving({"labels.jsonl": LINE}) as server:
        labels = {"url": server.url("labels.jsonl"), "sha256": PIN}
        metadata = {"url": server.url("403"), "sha256": "0" * 64}
        with pytest.raises(ValueError, match="HTTP 403") as failed:
            bring(mave(labels, metadata=[metadata]))
    told = str(failed.value)
    assert "ask for Amazon's metadata with the form" in told
    assert "put the file at raw/mine/403 by hand and name it in params.yaml: corpora.mine.metadata.0" in told
    assert not Path("data/mine/source").exists()


def test_who_brings_a_corpus_second_is_told_who_is_at_it_and_leaves_what_that_one_writes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCK_WAIT_S", 0.1)
    half = here / "data/mine/.source.partial/labels/00-labels.jsonl"
    half.parent.mkdir(parents=True)
    half.write_text("half")
    labels = {"path": "own/labels.jsonl", "sha256": PIN}
    with (
        locks.sole_writer("source", "mine"),
        pytest.raises(ValueError, match=f"source of mine is being written by process {os.getpid()} on "),
    ):
        bring(mave(labels))
    assert half.read_text() == "half"
    assert tree(bring(mave(labels))) == {"labels/00-labels.jsonl": LINE}


# Pins


def test_pins_are_written_where_they_belong_and_comments_stay(here: Path) -> None:
    written = source.pin("mine")
    text = Path("params.yaml").read_text()
    meta = hashlib.sha256(Path("own/meta.json.gz").read_bytes()).hexdigest()
    assert [line.split(":")[0] for line in written] == ["own/labels.jsonl", "own/meta.json.gz"]
    assert f"- path: own/labels.jsonl   # by hand\n        sha256: {PIN}\n        size: {len(LINE)}\n" in text
    assert meta in text
    assert "0" * 64 not in text
    for kept in ("# what runs", "# only mine", "mine:   # our own catalogue", "images: {base: own/images}"):
        assert kept in text
    again = source.pin("mine")
    assert again == written
    assert Path("params.yaml").read_text() == text


def test_pins_of_mepave_are_by_split(here: Path) -> None:
    source.pin("zhong")
    from ruamel.yaml import YAML

    entry = YAML(typ="safe").load(Path("params.yaml"))["corpora"]["zhong"]
    assert entry["sha256"] == dict.fromkeys(("train", "validation", "test"), PIN)


@pytest.mark.parametrize(
    ("fold", "labels_of"),
    [
        ("fold: {base: mine, split: {folds: 5}}", "mine"),
        ("fold: {base: mine, labels: [{path: own/labels.jsonl}]}", "fold"),
    ],
)
def test_files_that_a_corpus_has_from_its_base_are_pinned_there(
    here: Path, fold: str, labels_of: str
) -> None:
    path = Path("params.yaml")
    path.write_text(path.read_text().replace("  zhong:", f"  {fold}\n  zhong:"))
    assert source.pin("fold") == source.pin("fold")
    from ruamel.yaml import YAML

    corpora = YAML(typ="safe").load(path)["corpora"]
    assert corpora[labels_of]["labels"][0]["sha256"] == PIN
    assert "metadata" not in corpora["fold"]
    assert corpora["mine"]["metadata"][0]["sha256"] != "0" * 64


def test_a_pinned_corpus_can_be_brought(here: Path) -> None:
    source.pin("mine")
    from ruamel.yaml import YAML

    entry = YAML(typ="safe").load(Path("params.yaml"))["corpora"]["mine"]
    del entry["images"]
    folder = bring(source.Mave.model_validate(entry))
    assert sorted(tree(folder)) == ["labels/00-labels.jsonl", "metadata/00-meta.json.gz"]


@pytest.mark.parametrize(
    ("corpus", "change", "message"),
    [
        ("yours", ("", ""), r"params\.yaml: corpora has no 'yours', only mine, zhong, sample"),
        ("mine", ("kind: mave", "kind: maev"), r"corpora\.mine\.kind must be one of .*got 'maev'"),
        ("mine", ("kind: mave", "base: maev"), r"corpora\.mine\.base must name a corpus, got 'maev'"),
        ("mine", ("kind: mave", "base: [zhong]"), r"corpora\.mine\.base must name a corpus, got \['zhong'\]"),
        ("mine", ("- path: own", "- pfad: own"), r"params\.yaml: corpora\.mine"),
        ("mine", ("own/labels.jsonl", "own/absent"), r"own/absent is not a file"),
    ],
)
def test_what_cannot_be_pinned_is_an_error_and_changes_nothing(
    here: Path, corpus: str, change: tuple[str, str], message: str
) -> None:
    before = Path("params.yaml").read_text().replace(*change)
    Path("params.yaml").write_text(before)
    with pytest.raises(ValueError, match=message):
        source.pin(corpus)
    assert Path("params.yaml").read_text() == before


def test_a_file_that_came_before_another_failed_is_pinned_and_not_brought_again(here: Path) -> None:
    with serving({"labels.jsonl": LINE, "meta.json.gz": LINE * 2}) as server:
        server.script["meta.json.gz"] = ["403"]
        labels, metadata = server.url("labels.jsonl"), server.url("meta.json.gz")
        text = Path("params.yaml").read_text().replace("path: own/labels.jsonl", f"url: {labels}")
        text = text.replace(f"path: own/meta.json.gz, sha256: '{'0' * 64}'", f"url: {metadata}")
        Path("params.yaml").write_text(text)
        with pytest.raises(ValueError, match="HTTP 403"):
            source.pin("mine")
        assert f"- url: {labels}   # by hand\n        sha256: {PIN}\n" in Path("params.yaml").read_text()
        assert [line.split(": ")[0] for line in source.pin("mine")] == [metadata]
        assert server.hits == {"labels.jsonl": 1, "meta.json.gz": 2}
