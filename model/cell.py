"""What a cell of the grid is made of: which architecture, with which settings, trained how."""

from typing import Any, Literal

from pydantic import Field

from pipeline import params


class Training(params.Settings):
    """Section `train`; the defaults are the paper's Table 6 for MAVE."""

    batch_size: int = Field(32, ge=1)  # questions; products where a product's questions are asked together
    epochs: float = Field(20, gt=0)  # 0.1: a tenth of the training questions, once
    learning_rate: float = Field(2e-5, gt=0)
    pretrained_rate: float = Field(1.0, ge=0, le=1)  # of learning_rate, for a checkpoint's layers
    warmup_steps: int = Field(2000, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    max_tokens: int = Field(32768, ge=1)  # computed at once; a batch that has more is computed in parts
    evaluations: int = Field(5, ge=1)  # how often, evenly, the validation split is looked at


class Cell(params.Settings):
    """config/CORPUS/models/MODEL.json: which architecture, with which settings, trained how."""

    architecture: str
    code: str  # digest of the architecture's code
    settings: dict[str, Any]
    train: Training
