"""The one graph: what each stage depends on, and what a change reruns."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Workspace
from ruamel.yaml import YAML

from model import config, results
from pipeline.provenance import code_files

GRAPH = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = config.read(ROOT / "params.yaml")
RESOLVED = config.resolve(PARAMS)


def body(stage: str) -> dict[str, Any]:
    return GRAPH[stage].get("do", GRAPH[stage])


def module(stage: str) -> str:
    found = re.fullmatch(r"python -m (\w+\.\w+).*", body(stage)["cmd"])
    assert found, body(stage)["cmd"]
    return found[1]


def architectures() -> set[str]:
    return {entry["architecture"] for entry in PARAMS["models"].values() if "architecture" in entry}


@pytest.mark.parametrize("stage", GRAPH)
def test_a_stage_depends_on_exactly_the_code_it_imports(stage: str) -> None:
    """`config` also takes the digest of each architecture's code, so it depends on that code too."""
    expected = set(code_files(module(stage)))
    if stage == "config":
        expected |= {file for name in architectures() for file in code_files(name)}
    listed = [name for name in body(stage)["deps"] if name.endswith(".py")]
    lines = "\n".join(f"        - {name}" for name in sorted(expected))
    assert listed == sorted(expected), f"dvc.yaml: the code of {stage} is now\n{lines}"


def test_every_stage_is_a_module_of_its_own_and_only_config_reads_params() -> None:
    modules = [module(stage) for stage in GRAPH]
    assert len(set(modules)) == len(modules) == 9
    readers = [stage for stage in GRAPH if "params.yaml" in body(stage)["deps"] or "params" in body(stage)]
    assert readers == ["config"]


def test_stages_that_can_be_killed_keep_no_outputs_through_dvc() -> None:
    persistent = [
        stage
        for stage in GRAPH
        for out in body(stage).get("outs", [])
        if isinstance(out, dict) and next(iter(out.values())).get("persist")
    ]
    assert persistent == ["config"]


@pytest.fixture
def real_graph(monkeypatch: pytest.MonkeyPatch) -> Any:
    """DVC's own graph of the real dvc.yaml; an edge goes from a stage to one that it needs."""
    from dvc.repo import Repo

    monkeypatch.chdir(ROOT)
    with Repo() as repo:
        yield repo.index.graph


def rerun_by(graph: Any, files: set[str]) -> set[str]:
    """The stages that depend on one of `files`, or a folder of one, or on a stage that does."""
    import networkx

    paths = files | {str(folder) for file in files for folder in Path(file).parents}
    touched = {stage for stage in graph if paths & {dep.def_path for dep in stage.deps}}
    for stage in tuple(touched):
        touched |= networkx.ancestors(graph, stage)
    return {stage.addressing for stage in touched}


def rewritten(edit: dict[str, Any], *where: str) -> set[str]:
    """The files under config/ that differ after `edit` in the section of params.yaml at `where`."""
    params = copy.deepcopy(PARAMS)
    section = params
    for part in where:
        section = section.setdefault(part, {})
    section.update(edit)
    resolved = config.resolve(params)
    return {f"config/{name}" for name in resolved if resolved[name] != RESOLVED.get(name)}


def cells(*models: str) -> set[str]:
    return {
        f"{stage}@{corpus}-{model}-{seed}"
        for stage in ("train", "evaluate")
        for corpus in PARAMS["run"]["corpora"]
        for model in models
        for seed in PARAMS["run"]["seeds"]
    }


def test_another_number_of_boxes_reruns_regions_and_what_stands_on_it(real_graph: Any) -> None:
    files = rewritten({"max_boxes": 5}, "corpora", "sample", "regions")
    assert files == {"config/sample/regions.json"}
    assert rerun_by(real_graph, files) == {"regions@sample", *cells(*PARAMS["run"]["models"]), "report"}


def test_a_setting_of_one_model_reruns_its_cells_only(real_graph: Any) -> None:
    files = rewritten({"dropout": 0.25}, "models", "smartave-text")
    assert files == {f"config/{corpus}/models/smartave-text.json" for corpus in PARAMS["corpora"]}
    assert rerun_by(real_graph, files) == {*cells("smartave-text"), "report"}


def test_other_sources_to_drop_rerun_products_and_not_the_source(real_graph: Any) -> None:
    files = rewritten({"drop_sources": ["brand", "price"]}, "corpora", "sample")
    assert files == {"config/sample/products.json"}
    assert rerun_by(real_graph, files) == {stage.addressing for stage in real_graph} - {
        "config",
        "source@sample",
    }


@pytest.mark.parametrize("stage", results.STAGES)
def test_a_kept_result_is_made_again_when_a_setting_in_its_digest_changes(
    real_graph: Any, stage: str
) -> None:
    [corpus] = PARAMS["run"]["corpora"]
    wanted = {cell for cell in cells(*PARAMS["run"]["models"]) if cell.startswith("evaluate@")}
    evaluated = {one for one in real_graph if one.addressing in wanted}
    assert len(evaluated) == len(wanted)
    for one in evaluated:
        assert f"config/{corpus}/{stage}.json" in {dep.def_path for dep in one.deps}


def test_a_corpus_that_does_not_run_reruns_the_report_alone(real_graph: Any) -> None:
    files = rewritten({"other": {"kind": "sample", "seed": 8}}, "corpora")
    assert files
    assert all(name.startswith("config/other/") for name in files)
    assert rerun_by(real_graph, files) == {"report"}  # which tells kept results of declared corpora apart


def test_no_stage_depends_on_prose(real_graph: Any) -> None:
    assert rerun_by(real_graph, {"README.md", "CHANGELOG.md", "docs/log.md"}) == set()


@pytest.mark.timeout(500)
def test_an_experiment_sets_one_model_through_dvc(workspace: Workspace) -> None:
    before = workspace.run("dvc", "repro", "config")
    assert "Running stage 'config'" in before.stdout
    workspace.commit("Config")
    setting = "+models.smartave-text.dropout=0.25"
    workspace.run("dvc", "exp", "run", "--set-param", setting, "config")
    changed = workspace.run("git", "diff", "--name-only").stdout.split()
    resolved = {f"config/{corpus}/models/smartave-text.json" for corpus in PARAMS["corpora"]}
    assert set(changed) - {"dvc.lock"} == {"params.yaml", *resolved}
    again = workspace.run("dvc", "repro", "config")
    assert "Stage 'config' didn't change, skipping" in again.stdout
