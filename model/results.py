"""What is kept of every finished cell: docs/results/CORPUS/MODEL/SEED.json, under 2 kB, in Git.

Runs on different days and machines add up there, and the report's tables are made from nothing else. A file
says which settings (`settings`, a digest) at which commit gave its numbers.
"""

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from model.checkpoint import COSTS
from pipeline import params
from pipeline.disk import atomically
from pipeline.provenance import digest

RESULTS = Path("docs/results")
MAX_BYTES = 2048
ATTRIBUTES = ("Brand", "Shape", "Color", "Type")  # of the paper's Table 2: kept first
ATTRIBUTES_KEPT = 8  # then those with most values
FOUR = ("precision", "recall", "f1", "count")
PLACES = frozenset({"path", "url", "mirrors", "base"})
STAGES = ("source", "products", "images", "ocr", "regions", "evaluate")
# Settings of a cell that came after results were kept, and one that went, as all of these had them.
LATER: dict[str, dict[str, Any]] = {
    "settings": {"grounded": False},
    "train": {"max_tokens": 32768, "pretrained_rate": 1.0},
}
GONE: dict[str, dict[str, Any]] = {"settings": {}, "train": {"accumulate": 1}}
# Of `images`: how they are asked for, which changes none. Digests have it as it was when the first was kept.
ASKED_FOR = {
    "concurrency": 16,
    "requests_per_s": None,
    "timeout_s": 30.0,
    "attempts": 5,
    "max_transient": 0.01,
}


def settings_digest(corpus: str, model: str) -> str:
    """Of the resolved settings that the numbers of a cell depend on.

    Not of code, which `commit` tells, nor of devices (`cost`), which round otherwise and may read text in
    another precision, nor of where a pinned file lies or how pictures are asked for.
    """
    cell = json.loads((params.CONFIG / corpus / "models" / f"{model}.json").read_text(encoding="utf-8"))
    cell.pop("code", None)
    for section in LATER.keys() & cell.keys():
        known = {name: value for name, value in cell[section].items() if LATER[section].get(name) != value}
        cell[section] = known | GONE[section]
    files = {name: params.CONFIG / corpus / f"{name}.json" for name in STAGES}
    stages = {name: json.loads(path.read_text()) for name, path in files.items() if path.is_file()}
    images = stages.get("images", {})
    images |= {name: value for name, value in ASKED_FOR.items() if name in images}
    return digest(deciding([cell, stages]))[:16]


def deciding(settings: Any) -> Any:
    """Settings without devices and places."""
    if isinstance(settings, list):
        return [deciding(one) for one in settings]
    if not isinstance(settings, dict):
        return settings
    is_pinned = settings.get("sha256") or settings.get("base_sha256")
    unseen = {"device"} | (PLACES if is_pinned else frozenset())
    return {name: deciding(value) for name, value in settings.items() if name not in unseen}


def is_declared(corpus: str) -> bool:
    """Whether params.yaml has this corpus today."""
    return (params.CONFIG / corpus).is_dir()


def is_current(one: Mapping[str, Any]) -> bool:
    """Whether a kept result has the settings that params.yaml gives its cell today."""
    path = params.CONFIG / one["corpus"] / "models" / f"{one['model']}.json"
    return path.is_file() and one["settings"] == settings_digest(one["corpus"], one["model"])


def same(corpus: str, models: Iterable[str]) -> dict[str, str]:
    """Of each model that has the settings of one before it, that one's name: such a variant need not run.

    The paper's tables repeat the base's setting in each sweep. Models without a file in config/ are left out.
    """
    first: dict[str, str] = {}
    found: dict[str, str] = {}
    for name in models:
        if (params.CONFIG / corpus / "models" / f"{name}.json").is_file():
            earlier = first.setdefault(settings_digest(corpus, name), name)
            if earlier != name:
                found[name] = earlier
    return found


def commit() -> str | None:
    """The commit that the working tree stands on, with "+" where code differs; None outside Git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"])
    except FileNotFoundError:
        return None
    return head.stdout.strip() + "+" * (dirty.returncode != 0) if head.returncode == 0 else None


def size(model: Any) -> dict[str, int]:
    """Parameters, all and without the tables of embeddings."""
    import torch

    tables = [one for one in model.modules() if isinstance(one, torch.nn.Embedding | torch.nn.EmbeddingBag)]
    embedded = sum(one.weight.numel() for one in tables)
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": total, "without_embeddings": total - embedded}


def four(score: dict[str, Any] | None) -> list[float] | None:
    """Precision, recall, F1 and count."""
    return None if score is None else [round(float(score[name]), 4) for name in FOUR]


def kept(scores: dict[str, Any]) -> dict[str, Any]:
    """The part of a metrics file, or of its floor, that is kept."""
    often = sorted(
        scores["by_attribute"].items(),
        key=lambda one: (one[0] not in ATTRIBUTES, -one[1]["count"], one[0]),
    )
    groups = {
        "by_origin": scores["by_origin"],
        "in_ocr": scores["in_ocr"],
        "by_attribute": dict(often[:ATTRIBUTES_KEPT]),
    }
    named = {name: scores[name] for name in ("five_way", "positives_only", "chunk") if name in scores}
    return {
        "micro": four(scores),
        **{name: four(score) for name, score in named.items()},
        **{group: {name: four(one) for name, one in found.items()} for group, found in groups.items()},
    }


def keep(corpus: str, model: str, seed: int, scores: dict[str, Any], sizes: dict[str, int]) -> Path:
    """Write the result of one cell.

    Raises `ValueError` when it is over MAX_BYTES even without its attributes.
    """
    costs = COSTS / corpus / model / f"{seed}.json"
    floor = kept(scores["floor"])
    content = {
        "corpus": corpus,
        "model": model,
        "seed": seed,
        "settings": settings_digest(corpus, model),
        "commit": commit(),
        "weights": scores.get("made_with", {}).get("weights"),
        "cost": sizes | (json.loads(costs.read_text()) if costs.is_file() else {}),
        **kept(scores),
        "floor": floor,
    }
    while len((text := json.dumps(content, separators=(",", ":")) + "\n").encode()) > MAX_BYTES:
        if not content["by_attribute"]:
            raise ValueError(f"the result of {corpus} {model} {seed} has {len(text)} bytes, over {MAX_BYTES}")
        name, _ = content["by_attribute"].popitem()
        floor["by_attribute"].pop(name, None)
    path = RESULTS / corpus / model / f"{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def cells(corpora: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """All results that are kept, of these corpora or of all, sorted by corpus, model and seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*/*/*.json")]
    wanted = None if corpora is None else set(corpora)
    chosen = [one for one in found if wanted is None or one["corpus"] in wanted]
    return sorted(chosen, key=lambda one: (one["corpus"], one["model"], one["seed"]))
