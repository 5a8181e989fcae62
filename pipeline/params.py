"""Settings of stages: a pydantic class per stage, read from the resolved files under config/.

`params.yaml` is checked and resolved once, by `python -m model.config`; a stage reads
nothing but its own resolved file, so that changing one setting reruns what it touches.
"""

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

CONFIG = Path("config")


class Settings(BaseModel):
    """Base of every section of params.yaml: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Settings)


def problems(error: ValidationError, where: str) -> list[str]:
    """One sentence per problem: `params.yaml: regions.max_boxes must be ..., got 0`."""
    sentences = []
    for problem in error.errors():
        key = ".".join(str(part) for part in (where, *problem["loc"]) if part != "")
        context = problem.get("ctx", {})
        match problem["type"]:
            case "extra_forbidden":
                sentences.append(f"params.yaml: {key} is not a setting that exists")
            case "missing":
                sentences.append(f"params.yaml: {key} is missing")
            case "greater_than_equal" | "less_than_equal" | "greater_than" | "less_than":
                sign = {"ge": ">=", "le": "<=", "gt": ">", "lt": "<"}
                limit = " and ".join(f"{sign[name]} {context[name]}" for name in sign if name in context)
                sentences.append(f"params.yaml: {key} must be {limit}, got {problem['input']!r}")
            case _:
                sentences.append(f"params.yaml: {key}: {problem['msg']}, got {problem['input']!r}")
    return sentences


def load(settings: type[S], path: Path) -> S:
    """The resolved settings of one stage, from e.g. `config/sample/regions.json`.

    Raises `ValueError` when the file is absent (unknown corpus, or config not yet made) or wrong.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: is the corpus or model named in params.yaml? "
            "(`dvc repro config` writes it)"
        )
    try:
        return settings.model_validate(json.loads(path.read_text()))
    except ValidationError as error:
        raise ValueError("\n".join(problems(error, str(path)))) from error
