"""Settings of stages: a pydantic class per stage, read from the resolved files under config/.

`params.yaml` is checked and resolved once, by `python -m model.config`; a stage reads
nothing but its own resolved file, so that changing one setting reruns what it touches.
"""

import json
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

CONFIG = Path("config")


class Settings(BaseModel):
    """Base of every section of params.yaml: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Settings)
Key = tuple[str | int, ...]


def problems(error: ValidationError, settings: type[BaseModel], given: Any) -> Iterator[tuple[Key, str]]:
    """Each problem as its key (within `given`) and how its sentence ends: `must be in 1..100, got 0`."""
    for problem in error.errors():
        context, value = problem.get("ctx", {}), problem["input"]
        key = _key(problem["loc"], given)
        match problem["type"]:
            case "extra_forbidden":
                yield key, "is not a setting that exists"
            case "missing" | "union_tag_not_found":
                yield key, "is missing"
            case "greater_than_equal" | "less_than_equal" | "greater_than" | "less_than":
                yield key, f"must be {_limits(settings, problem['loc'], context)}, got {value!r}"
            case "value_error" | "assertion_error":
                yield key, problem["msg"].split(", ", 1)[1]
            case _:
                demand = problem["msg"].replace("Input should be", "must be").split(", unable")[0]
                yield key, f"{demand[0].lower()}{demand[1:]}, got {value!r}"


def sentence(file: str, key: Key, rest: str) -> str:
    """`params.yaml: regions.max_boxes must be in 1..100, got 0`."""
    place = ".".join(map(str, key))
    return f"{file}: {place} {rest}" if place else f"{file}: {rest}"


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
        given = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        return settings.model_validate(given)
    except ValidationError as error:
        found = problems(error, settings, given)
        raise ValueError("\n".join(sentence(str(path), *problem) for problem in found)) from error


def _key(location: Key, given: Any) -> Key:
    """`location` without the names of union members, which pydantic adds and no file contains."""
    key: list[str | int] = []
    for depth, part in enumerate(location):
        inside = part in given if isinstance(given, dict) else part in range(_length(given))
        if inside:
            given = given[part]
        elif depth < len(location) - 1 or not isinstance(given, dict):
            continue
        key.append(part)
    return tuple(key)


def _length(given: Any) -> int:
    return len(given) if isinstance(given, list | tuple) else 0


def _limits(annotation: Any, location: Key, context: dict[str, Any]) -> str:
    """Both bounds of a field where it has two; `context` holds the one that was broken."""
    found = {**_bounds(annotation, location), **context}
    limits = {name: int(limit) if limit == int(limit) else limit for name, limit in found.items()}
    if {"ge", "le"} <= limits.keys():
        return f"in {limits['ge']}..{limits['le']}"
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return " and ".join(f"{sign} {limits[name]}" for name, sign in signs.items() if name in limits)


def _bounds(annotation: Any, location: Key) -> dict[str, Any]:
    """The numeric bounds declared at `location`, found by walking the classes and their annotations."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _bounds(arguments[0], location) | ({} if location else _declared(arguments[1:]))
    if origin in (Union, types.UnionType):
        found: dict[str, Any] = {}
        for member in arguments:  # the location may or may not spend a part on the member's name
            found |= _bounds(member, location) or _bounds(member, location[1:])
        return found
    if not location:
        return {}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(location[0]))
        if field is None:
            return {}
        return _bounds(field.annotation, location[1:]) | ({} if location[1:] else _declared(field.metadata))
    return _bounds(arguments[-1 if origin is dict else 0], location[1:]) if arguments else {}


BOUNDS = {
    annotated_types.Ge: "ge",
    annotated_types.Gt: "gt",
    annotated_types.Le: "le",
    annotated_types.Lt: "lt",
}


def _declared(metadata: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in metadata:
        if isinstance(one, FieldInfo):  # `Annotated[int, Field(ge=0)]` inside a list or a union
            found |= _declared(one.metadata)
        elif name := BOUNDS.get(type(one)):
            found[name] = getattr(one, name)
    return found
