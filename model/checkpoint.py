"""Trained models on disk: a transformers folder, and what is needed to use it again."""

import importlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from model.examples import Extraction, Question

PROVENANCE = "provenance.json"
ARCHITECTURE = re.compile(r"model\.(baselines\.)?[a-z][a-z0-9_]*")
COSTS = Path(".cache/costs")  # what training took, outside DVC's outputs: clocks differ, outputs must not


def provenance(folder: Path) -> dict[str, Any]:
    """What the model in `folder` was made with; raises `ValueError` when `model.train` did not finish it."""
    about = Path(folder) / PROVENANCE
    if not about.is_file():
        raise ValueError(f"{folder} is not a trained model: it has no {PROVENANCE}")
    found: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))
    name = found.get("architecture")
    if not isinstance(name, str) or not ARCHITECTURE.fullmatch(name):
        raise ValueError(f"{about}: architecture must be a module of model/, got {name!r}")
    return found


def load(folder: Path) -> tuple[Any, Any]:
    """The model, in evaluation mode and on the GPU where there is one, and its processor.

    Raises `ValueError` when the folder is not one that `model.train` finished, or its weights are not those
    that the architecture has today: transformers would draw the others by chance.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of loading weights
    name = provenance(folder)["architecture"]
    architecture = importlib.import_module(name)
    model, told = architecture.Model.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[what]:
            raise ValueError(
                f"{folder} was trained with another version of {name}: train it again ({what}: "
                f"{', '.join(sorted(map(str, told[what]))[:3])})"
            )
    processor = architecture.Processor.from_pretrained(folder)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def extract(
    model: Any, processor: Any, questions: Iterable[Question], *, batch_size: int
) -> Iterator[tuple[Extraction, ...]]:
    """The extractions of each question, in order. The model must be in evaluation mode."""
    waiting = iter(questions)
    while batch := list(islice(waiting, batch_size)):
        yield from model.extract([processor.encode(question) for question in batch], processor)
