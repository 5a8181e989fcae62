"""The whole road on a very small sample corpus: every stage for real, run, rerun and changed."""

import json

import pyarrow.parquet as pq
import pytest
from conftest import Workspace
from small_road import locked, params, small_road, stages_run

pytestmark = pytest.mark.timeout(900)


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
    ran = stages_run(road.run("dvc", "repro", "regions", timeout=600).stdout)
    assert sorted(ran) == ["config", "regions@sample"]
    cells = [
        f"{stage}@sample-{model}-0"
        for model in ("smartave", "smartave-text")
        for stage in ("train", "evaluate")
    ]
    assert sorted(json.loads(road.run("dvc", "status", "--json").stdout)) == sorted([*cells, "report"])
    params(road, lambda content: content["corpora"]["sample"]["regions"].update(max_boxes=3))
    road.run("dvc", "repro", "regions", timeout=600)
    assert locked(road)["regions@sample"]["outs"] == before["regions@sample"]["outs"]
    assert json.loads(road.run("dvc", "status", "--json").stdout) == {}
    experiment = ("dvc", "exp", "run", "-S", "+models.smartave-text.beam_width=3")
    of_one = ["config", "train@sample-smartave-text-0", "evaluate@sample-smartave-text-0", "report"]
    assert sorted(stages_run(road.run(*experiment, timeout=600).stdout)) == sorted(of_one)
