"""Train one model on one corpus with one seed.

    python -m model.train CORPUS MODEL SEED

    torchrun --nproc-per-node 2 -m model.train CORPUS MODEL SEED

Writes runs/CORPUS/MODEL/SEED/model (weights, configuration, tokenizer, provenance, validation scores)
and history.json beside it. Checkpoints live outside DVC's outputs, under a digest of everything
that the result depends on: killed anywhere, the next run goes on from the last whole one. Several processes
share each batch, and give what one does when it divides the data.
"""

import argparse
import hashlib
import importlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from features.devices import tell_if_slow
from features.memory import keep_freed
from model.cell import Cell
from model.checkpoint import COSTS
from model.examples import Question, questions
from pipeline import params
from pipeline.shards import ShardFolder, code_digest
from pipeline.workers import stopping_with_parent

CHECKPOINTS = Path(".cache/training")
PREPARING = ("products", "images", "ocr", "regions")  # stages whose settings a model's input is made by


def digest(corpus: str, cell: Cell, seed: int) -> str:
    """Of everything that the trained weights depend on."""
    products = Path("data", corpus, "products.parquet").read_bytes()
    shards = [
        [shard["sha256"] for shard in ShardFolder(Path("data", corpus, stage)).manifest["shards"]]
        for stage in ("ocr", "regions")
    ]
    parts = [
        cell.model_dump(mode="json"),
        seed,
        hashlib.sha256(products).hexdigest(),
        shards,
        code_digest("model.train"),
        code_digest(cell.architecture),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def sighted(cell: Cell, training: Sequence[Question]) -> Cell:
    """The cell, or one that does not look at pictures, where training has none to learn from."""
    settings = importlib.import_module(cell.architecture).Settings.model_validate(cell.settings)
    if not getattr(settings, "image", False) or any(
        question.product.regions is not None for question in training
    ):
        return cell
    sys.stderr.write("no training product has a picture: the model will not look at any\n")
    return cell.model_copy(update={"settings": {**cell.settings, "image": False}})


def provenance(corpus: str, cell: Cell, seed: int, training: Sequence[Question]) -> dict[str, Any]:
    """What a user of the model has to know, and `model.predict` to prepare its input the same way."""
    by_category: dict[str, set[str]] = {}
    for question in training:
        by_category.setdefault(question.product.category, set()).add(question.attribute)
    return {
        "architecture": cell.architecture,
        "corpus": corpus,
        "seed": seed,
        "settings": cell.settings,
        "train": cell.train.model_dump(mode="json"),
        "weights": cell.settings.get("pretrained") or "random",
        **{stage: json.loads(Path("config", corpus, f"{stage}.json").read_text()) for stage in PREPARING},
        "attributes": sorted({question.attribute for question in training}),
        "attributes_by_category": {name: sorted(by_category[name]) for name in sorted(by_category)},
    }


def open_more_files() -> None:
    """As many as may be: each tensor of each part that a process loads ahead is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def keep_cost(corpus: str, name: str, seed: int, seconds: float, examples: int) -> None:
    """Note how long a training took that was not interrupted, for the paper's Table 3 and for estimates."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    path = COSTS / corpus / name / f"{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"training_s": round(seconds, 1), "examples": examples, "device": device}))


def run(corpus: str, name: str, seed: int) -> None:
    """Train the cell and write its folder; raises `ValueError` when there is nothing to train on."""
    import torch
    import transformers

    from model.trainer import fit, judge, judged_at_once

    transformers.utils.logging.disable_progress_bar()  # of loading weights; the trainer's own stays
    cell = params.load(Cell, params.CONFIG / corpus / "models" / f"{name}.json")
    checkpoints = CHECKPOINTS / digest(corpus, cell, seed)
    training, validation = list(questions(corpus, "train")), list(questions(corpus, "validation"))
    if not training or not validation:
        raise ValueError(
            f"{corpus} has {len(training)} training and {len(validation)} validation questions; "
            "both must be there"
        )
    cell = sighted(cell, training)
    open_more_files()
    tell_if_slow(cell.train.precision, "cuda" if torch.cuda.is_available() else "cpu", "train")
    started = time.perf_counter()
    model, processor, history, resumed = fit(cell, training, validation, seed, checkpoints)
    if int(os.environ.get("RANK", "0")):
        return  # the first process of several writes for all
    if resumed:
        (COSTS / corpus / name / f"{seed}.json").unlink(missing_ok=True)
    else:
        examples = max(1, round(len(training) * cell.train.epochs))
        keep_cost(corpus, name, seed, time.perf_counter() - started, examples)
    processor.truncated.clear()  # every epoch counted again, and processes that load batches not at all
    for question in training:
        processor.encode(question)
    truncated = dict(sorted(processor.truncated.items()))
    rows = judge(model, processor, validation, judged_at_once(cell, processor))
    folder = Path("runs", corpus, name, str(seed))
    temporary = folder / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for weights in temporary.glob("*.safetensors"):
        weights.chmod(0o644)  # as readable as what lies beside them
    processor.save_pretrained(temporary)
    documents = {
        temporary / "validation.json": rows,
        temporary / "truncated.json": truncated,
        temporary / "provenance.json": provenance(corpus, cell, seed, training),
        folder / "history.json": history,
    }
    for path, content in documents.items():
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "model", ignore_errors=True)
    temporary.rename(folder / "model")
    shutil.rmtree(checkpoints)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("corpus", metavar="CORPUS", help="a corpus of params.yaml, its data stages done")
    parser.add_argument("model", metavar="MODEL", help="a model of params.yaml")
    parser.add_argument("seed", metavar="SEED", type=int, help="of weights, order and dropout")
    arguments = parser.parse_args()
    keep_freed()
    try:
        with stopping_with_parent():
            run(arguments.corpus, arguments.model, arguments.seed)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
