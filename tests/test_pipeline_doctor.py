"""Workspaces that are broken in the ways that happen, and what the doctor says and does."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Workspace, new_workspace
from misbehaving import serving

from pipeline import doctor, source

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 744855753\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def made(tmp_path: Path) -> Workspace:
    """A DVC workspace in which one stage has run."""
    workspace = new_workspace(tmp_path / "project")
    (workspace.folder / "dvc.yaml").write_text(
        "stages:\n  toy:\n    cmd: mkdir -p data/toy && echo one > data/toy/a\n    outs: [data/toy]\n"
    )
    workspace.run("dvc", "init", "--quiet")
    workspace.run("dvc", "repro", "--quiet")
    return workspace


def told() -> list[str]:
    checks = (doctor.broken_lock, doctor.missing_objects, doctor.remains, doctor.incomplete_stages)
    return [f"{problem.what}: {problem.remedy}" for check in checks for problem in check()]


def test_what_breaks_a_dvc_workspace_is_named_and_the_lock_is_cleared(
    made: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made.folder)
    assert not told()

    doctor.RWLOCK.write_text('{"/somewhere": {"wri')
    assert made.run("dvc", "repro", check=False).returncode != 0
    assert told() == [f"{doctor.RWLOCK} is cut short and blocks every dvc command: delete it"]
    monkeypatch.setattr(doctor, "wheels", lambda: [])
    assert doctor.report(clear=False) == 1
    assert "delete it; --clear does it\n1 problems are left" in capsys.readouterr().out
    assert doctor.report(clear=True) == 0
    assert f"cleared: {doctor.RWLOCK} is cut short" in capsys.readouterr().out
    made.run("dvc", "repro")

    lost = next(
        path for path in Path(".dvc/cache/files").rglob("*") if path.is_file() and path.suffix != ".dir"
    )
    lost.chmod(0o644)
    lost.unlink()
    name = f"{lost.parent.name}{lost.name}"
    (line,) = told()
    assert line.startswith(
        f"DVC's cache lacks {name} of data/toy, and 0 more: `dvc commit toy` puts it there"
    )
    shutil.rmtree("data/toy")
    assert told()[0].endswith("`dvc fetch toy` where there is a remote, else `dvc repro toy`")
    shutil.rmtree(".dvc/cache")
    assert not told(), "where nothing was made yet nothing is missing"


def test_a_list_of_files_that_is_cut_short_counts_as_lost_and_what_mends_it_is_named(
    made: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.folder)
    (listed,) = Path(".dvc/cache").rglob("*.dir")
    listed.chmod(0o644)
    listed.write_text(listed.read_text()[:20])
    (line,) = told()
    assert line.startswith(f"DVC's cache lacks {listed.parent.name}{listed.name} of data/toy, and 0 more")
    made.run("dvc", "commit", "--force", "toy")
    assert not told()


CONFLICT = "<<<<<<< HEAD\n{0}=======\n{0}>>>>>>> theirs\n"


@pytest.mark.parametrize(
    ("name", "damage", "named"),
    [
        ("dvc.lock", CONFLICT.format, "dvc cannot read this workspace: unable to read: 'dvc.lock'"),
        ("params.yaml", "x: [1\n{}".format, "dvc cannot read this workspace: unable to read: 'params.yaml'"),
        ("config/mine/source.json", CONFLICT.format, "config/mine/source.json is not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_the_other_checks_go_on(
    made: Workspace, monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[str], str], named: str
) -> None:
    monkeypatch.chdir(made.folder)
    monkeypatch.setattr(doctor, "wheels", lambda: [])
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() if path.exists() else '{"kind": "sample"}'
    path.write_text(damage(before))
    Path("data/mine/ocr").mkdir(parents=True)
    told = [problem.what for problem in doctor.examine()]
    assert len(told) == 2
    assert told[0].startswith(named)
    assert told[1] == "data/mine/ocr is not complete"


def test_wheels_that_do_not_fit_are_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "torchvision").mkdir()
    (here / "torchvision/__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.setenv("PYTHONPATH", str(here))
    (problem,) = doctor.wheels()
    assert problem.what == (
        "torch and torchvision do not fit each other (RuntimeError: operator torchvision::nms does not exist)"
    )


def test_pointers_and_login_pages_are_told_from_data(here: Path) -> None:
    source = here / "data/mave/source/labels"
    source.mkdir(parents=True)
    (source / "00-labels.jsonl").write_text(POINTER)
    (source / "01-labels.jsonl").write_text('{"id": 1}\n')
    (here / "config/mine").mkdir(parents=True)
    (here / "raw").mkdir()
    (here / "raw/meta.json.gz").write_text("<!DOCTYPE html><html>please log in</html>")
    named = {"kind": "mave", "labels": [{"path": "raw/absent"}], "roots": {"A": {"path": "raw/meta.json.gz"}}}
    (here / "config/mine/source.json").write_text(json.dumps(named))
    found = [problem.what for problem in doctor.pointers()]
    assert found == [
        "data/mave/source/labels/00-labels.jsonl is a Git LFS pointer, not the data (oid sha256:abc)",
        "raw/meta.json.gz is an HTML page, not the data",
    ]


def test_pointers_in_a_folder_that_a_source_names_are_told_from_data(here: Path) -> None:
    (here / "config/mepave").mkdir(parents=True)
    (here / "config/mepave/source.json").write_text('{"kind": "mepave", "path": "raw/mepave"}')
    (here / "raw/mepave/product_images").mkdir(parents=True)
    for name, text in (
        ("train", POINTER),
        ("valid", "<html>please log in</html>"),
        ("test", "c_1\ts_1\t红\t红"),
    ):
        (here / f"raw/mepave/jdair.jave.{name}.txt").write_text(text, encoding="utf-8")
    assert [problem.what for problem in doctor.pointers()] == [
        "raw/mepave/jdair.jave.train.txt is a Git LFS pointer, not the data (oid sha256:abc)",
        "raw/mepave/jdair.jave.valid.txt is an HTML page, not the data",
    ]


def test_remains_of_killed_runs_are_cleared_and_nothing_else(here: Path) -> None:
    for name in ("data/mine/.source.partial/a", "data/mine/images/.00000.parquet.abc.tmp", "data/mine/ocr/x"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("half")
    for problem in doctor.remains():
        assert problem.clear is not None
        problem.clear()
    assert [str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()] == ["data/mine/ocr/x"]
    assert told() == [
        "data/mine/images is not complete: `dvc repro images@mine` goes on with it",
        "data/mine/ocr is not complete: `dvc repro ocr@mine` goes on with it",
    ]


def test_a_stage_that_is_running_is_left_alone(here: Path) -> None:
    from filelock import FileLock

    (here / "data/mine/images").mkdir(parents=True)
    (here / "data/mine/images/.a.tmp").write_text("half")
    (here / ".cache/locks").mkdir(parents=True)
    with FileLock(here / ".cache/locks/mine.images.lock"):
        assert not [*doctor.remains(), *doctor.incomplete_stages()]
    assert len([*doctor.remains(), *doctor.incomplete_stages()]) == 2


def test_what_a_download_by_hand_is_writing_is_left_alone(here: Path) -> None:
    with serving({"labels": b"{}"}) as server, ThreadPoolExecutor() as pool:
        server.delays["labels"] = 0.5
        labels = {"url": server.url("labels"), "sha256": hashlib.sha256(b"{}").hexdigest()}
        settings = source.Mave.model_validate({"kind": "mave", "labels": [labels]})
        brought = pool.submit(source.bring, settings, "mine", Path("data/mine/source"))
        while not (here / "data/mine/.source.partial").exists():
            assert not brought.done()
        assert not [*doctor.remains()]
        brought.result()


def test_what_a_stage_that_dvc_runs_is_writing_is_left_alone(here: Path) -> None:
    (here / "data/mine/.source.partial").mkdir(parents=True)
    (here / ".dvc/tmp").mkdir(parents=True, exist_ok=True)
    lock = here / doctor.RWLOCK
    alive, gone = {"pid": os.getpid(), "cmd": "dvc repro"}, {"pid": 2**22 + 1, "cmd": "dvc repro"}
    for held, left in (
        ({"write": {"a": alive}, "read": {}}, 0),
        ({"write": {}, "read": {"a": [gone, alive]}}, 0),
        ({"write": {"a": gone}, "read": {"a": [gone]}}, 1),
    ):
        lock.write_text(json.dumps(held))
        assert len([*doctor.remains()]) == left, held
