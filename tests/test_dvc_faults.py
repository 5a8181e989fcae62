"""The road when it is killed, on real pictures, and from addresses."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import SHARED_DATA, Workspace, copy_project, new_workspace
from small_road import SAMPLE, locked, params, small_road, stored

from benchmarks import rehearsal

pytestmark = pytest.mark.timeout(900)


def kill_when(workspace: Workspace, ready: Callable[[], bool], *command: str) -> None:
    """Run `command` and SIGKILL its whole process group once `ready`."""
    process = subprocess.Popen(
        command,
        cwd=workspace.folder,
        env=workspace.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 250
    while not ready():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_in_images_ocr_and_regions_the_next_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    undisturbed, workspace = small_road(tmp_path / "undisturbed"), small_road(tmp_path / "killed")
    undisturbed.run("dvc", "repro", "ocr", "regions", timeout=600)
    store = workspace.folder / ".cache" / "shards"
    for stage, shards in (("images", 1), ("ocr", 1), ("ocr", 3), ("regions", 2)):

        def enough(stage: str = stage, shards: int = shards) -> bool:
            return len(list(store.glob(f"{stage}/*/*.json"))) >= shards

        kill_when(workspace, enough, "dvc", "repro", "ocr", "regions")
        assert not (workspace.folder / "data/sample" / stage / "manifest.json").exists()
    finished = stored(store)
    workspace.run("dvc", "repro", "ocr", "regions", timeout=600)
    assert finished.items() <= stored(store).items(), "a finished shard was made again or lost"
    assert locked(workspace) == locked(undisturbed)


@pytest.mark.shared_data
@pytest.mark.skipif(not (SHARED_DATA / "packshots").is_dir(), reason="../shared/data is not there")
def test_a_dozen_real_pack_shots_go_the_whole_road_as_the_readme_says(tmp_path: Path) -> None:
    workspace = small_road(tmp_path / "packshots")
    source = SHARED_DATA / "packshots"
    for name in ("labels.jsonl", "metadata.jsonl"):
        lines = (source / name).read_text().splitlines()[:12]
        (workspace.folder / name).write_text("\n".join(lines) + "\n")
    entry = {
        **SAMPLE,
        "kind": "mave",
        "labels": [{"path": "labels.jsonl"}],
        "metadata": [{"path": "metadata.jsonl"}],
        "images": {"base": os.path.relpath(source / "images", workspace.folder), "shard_size": 4},
    }
    for key in ("products", "seed", "min_test_values"):
        del entry[key]

    def turn_on(content: dict[str, Any]) -> None:
        content["corpora"]["packshots"] = entry
        content["run"].update(corpora=["packshots"], models=["smartave"])

    params(workspace, turn_on)
    workspace.run("python", "-m", "pipeline.source", "packshots", "--pin")
    workspace.run("dvc", "repro", timeout=600)
    scores = json.loads((workspace.folder / "metrics/packshots/smartave/0.json").read_text())
    sizes = scores["made_with"]["sizes"]
    assert sum(split["products"] for split in sizes.values()) == 12
    ocr = json.loads((workspace.folder / "metrics/packshots/ocr.json").read_text())
    assert ocr["status"].get("ok", 0) >= 8


def test_mave_goes_from_urls_to_products_and_pictures_with_only_places_and_pins_changed(
    tmp_path: Path,
) -> None:
    workspace = new_workspace(tmp_path / "mave")
    copy_project(workspace.folder)
    found = rehearsal.rehearse(workspace.folder, tmp_path / "files", num_lines=400, labelled=0.5)
    rows = pq.read_table(workspace.folder / "data/mave/products.parquet").to_pylist()
    assert found["products"]["products"] == len(rows) > 80
    assert len({row["root_category"] for row in rows}) == 8
    for row in rows:
        assert [url for url in row["image_urls"] if "._SS40_" not in url]
        for attribute in row["attributes"]:
            for span in attribute["evidences"]:
                text = row["paragraphs"][span["paragraph"]]["text"]
                assert text[span["begin"] : span["end"]] == span["value"]
    counted = found["products"]["counted"]
    wanted = {"span: text differs", "in no root", "metadata without label", "repeated metadata"}
    assert wanted <= counted.keys()
    status = found["images"]["status"]
    assert found["images"]["rows"] == len(rows)
    assert status["ok"] > 60
    assert set(status) == {"ok", "not_found", "truncated"}
