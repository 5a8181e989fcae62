import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from pipeline import params


class Side(params.Settings):
    length_px: int = Field(ge=8, lt=100)


class Boxes(params.Settings):
    max_boxes: int = Field(36, ge=1, le=100)
    share: float = Field(0.5, gt=0, le=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field([])
    sides: dict[str, Side] = Field({})
    timeout_s: Annotated[float, Field(gt=0, lt=60)] | None = None
    variant: Literal["c4", "fpn"] = "c4"

    @model_validator(mode="after")
    def _enough(self) -> "Boxes":
        if self.variant == "fpn" and self.max_boxes < 2:
            raise ValueError("fpn needs two boxes")
        return self


def sentences(given: dict) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Boxes.model_validate(given)
    found = params.problems(caught.value, Boxes, given)
    return [params.sentence("params.yaml", ("regions", *key), rest) for key, rest in found]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_boxes": 0}, "regions.max_boxes must be in 1..100, got 0"),
        ({"max_boxes": 101}, "regions.max_boxes must be in 1..100, got 101"),
        ({"max_boxes": "many"}, "regions.max_boxes must be a valid integer, got 'many'"),
        ({"share": 0}, "regions.share must be > 0 and <= 1, got 0"),
        ({"seeds": [3, -1]}, "regions.seeds.1 must be >= 0, got -1"),
        ({"sides": {"long": {"length_px": 7}}}, "regions.sides.long.length_px must be >= 8 and < 100, got 7"),
        ({"sides": {"long": {}}}, "regions.sides.long.length_px is missing"),
        ({"timeout_s": 60}, "regions.timeout_s must be > 0 and < 60, got 60"),
        ({"variant": "dc5"}, "regions.variant must be 'c4' or 'fpn', got 'dc5'"),
        ({"max_box": 3}, "regions.max_box is not a setting that exists"),
        ({"variant": "fpn", "max_boxes": 1}, "regions fpn needs two boxes"),
    ],
)
def test_a_problem_is_a_sentence_with_key_limit_and_value(given: dict, expected: str) -> None:
    assert sentences(given) == [f"params.yaml: {expected}"]


def test_all_problems_are_told_at_once() -> None:
    assert len(sentences({"max_boxes": 0, "share": 2, "colour": "red"})) == 3


def test_settings_come_back_as_they_were_written(tmp_path: Path) -> None:
    settings = Boxes(max_boxes=3, sides={"long": Side(length_px=9)})
    path = tmp_path / "regions.json"
    path.write_text(settings.model_dump_json())
    assert params.load(Boxes, path) == settings


def test_a_missing_file_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/ocr\.json does not exist: .*dvc repro config"):
        params.load(Boxes, tmp_path / "nowhere" / "ocr.json")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        (json.dumps({"max_boxes": 0}), r"regions\.json: max_boxes must be in 1\.\.100, got 0"),
        (json.dumps([1]), r"regions\.json: must be a valid dictionary or instance of Boxes, got \[1\]"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "regions.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        params.load(Boxes, path)
