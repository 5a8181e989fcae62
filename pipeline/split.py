"""Who is in which split: by the rank of a seeded hash, so that the order of the input does not matter."""

import hashlib
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline import params
from pipeline.schema import SPLITS

Fraction = Annotated[float, Field(ge=0, le=1)]


class Split(params.Settings):
    """`product` keeps a product's questions together; `instance` does not (the paper's way); `given` takes
    the split that the files carry (MEPAVE). With `folds`, the test split is fold number `fold` of that many
    and `fractions` only share out the rest."""

    by: Literal["product", "instance", "given"] = "product"
    fractions: tuple[Fraction, Fraction, Fraction] = (0.8, 0.1, 0.1)
    seed: int = 0
    folds: int | None = Field(default=None, ge=2, le=100)
    fold: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _adds_up(self) -> "Split":
        if abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must add up to 1, got {sum(self.fractions):g}")
        if self.fold >= (self.folds or 1):
            raise ValueError(f"fold must be below folds ({self.folds}), got {self.fold}")
        if self.folds and self.fractions[0] == 0:
            raise ValueError("fractions: the share of train must be above 0 with folds")
        return self


def rank(seed: int, key: str) -> bytes:
    """A pseudo-random position that depends on seed and key alone."""
    return hashlib.sha256(f"{seed}\0{key}".encode()).digest()


def assign(keys: Iterable[str], settings: Split) -> dict[str, str]:
    """The split of every distinct key; sizes follow `fractions` to the nearest whole key."""
    ranked = sorted(set(keys), key=lambda key: rank(settings.seed, key))
    if settings.folds is None:
        return _cut(ranked, settings.fractions)
    train, validation, _ = settings.fractions
    number = {key: position * settings.folds // len(ranked) for position, key in enumerate(ranked)}
    rest = [key for key in ranked if number[key] != settings.fold]
    splits = _cut(rest, (train / (train + validation), validation / (train + validation), 0.0))
    return splits | {key: "test" for key in ranked if number[key] == settings.fold}


def _cut(ranked: list[str], fractions: tuple[float, float, float]) -> dict[str, str]:
    first = round(fractions[0] * len(ranked))
    second = round((fractions[0] + fractions[1]) * len(ranked))
    names = [SPLITS[0]] * first + [SPLITS[1]] * (second - first) + [SPLITS[2]] * (len(ranked) - second)
    return dict(zip(ranked, names, strict=True))
