"""A detectron2 Faster R-CNN R101 checkpoint (C4 or FPN, .pkl or .pth) as safetensors for features.detector.

    python -m features.convert model_final_298dad.pkl detector.safetensors

Model-zoo files are pickles, and a pickle can run anything. They are read here, once, by an unpickler
that builds arrays and plain containers and refuses all else; the stages read safetensors only.
"""

import argparse
import codecs
import pickle
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file

from features.detector import PIXEL_MEAN_BGR, Detector
from pipeline.disk import atomically, sha256_of

# Names in a detectron2 state and in ours; the first pattern that matches counts.
NAMES = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"backbone\.(?:bottom_up\.)?stem\.conv1\.weight", r"stem.0.weight"),
        (r"backbone\.(?:bottom_up\.)?stem\.conv1\.norm\.(\w+)", r"stem.1.\1"),
        (r"(?:backbone\.(?:bottom_up\.)?|roi_heads\.)(res\d\.\d+\.conv\d)\.weight", r"\1.weight"),
        (r"(?:backbone\.(?:bottom_up\.)?|roi_heads\.)(res\d\.\d+)\.conv(\d)\.norm\.(\w+)", r"\1.bn\2.\3"),
        (
            r"(?:backbone\.(?:bottom_up\.)?|roi_heads\.)(res\d\.\d+)\.shortcut\.weight",
            r"\1.downsample.0.weight",
        ),
        (
            r"(?:backbone\.(?:bottom_up\.)?|roi_heads\.)(res\d\.\d+)\.shortcut\.norm\.(\w+)",
            r"\1.downsample.1.\2",
        ),
        (r"proposal_generator\.rpn_head\.conv\.(\w+)", r"rpn.head.conv.0.0.\1"),
        (r"proposal_generator\.rpn_head\.objectness_logits\.(\w+)", r"rpn.head.cls_logits.\1"),
        (r"proposal_generator\.rpn_head\.anchor_deltas\.(\w+)", r"rpn.head.bbox_pred.\1"),
        (r"roi_heads\.box_predictor\.(cls_score|bbox_pred)\.(\w+)", r"predictor.\1.\2"),
        *(
            (rf"backbone\.fpn_{theirs}{level}\.(\w+)", rf"fpn.{ours}.{level - 2}.0.\1")
            for theirs, ours in (("lateral", "inner_blocks"), ("output", "layer_blocks"))
            for level in (2, 3, 4, 5)
        ),
        *((rf"roi_heads\.box_head\.fc{n}\.(\w+)", rf"box_head.fc{n + 5}.\1") for n in (1, 2)),
    )
]
UNUSED = re.compile(r"proposal_generator\.anchor_generator\.|roi_heads\.(mask|keypoint)_|pixel_(mean|std)$")


def renamed(name: str) -> str | None:
    """Our name of a detectron2 parameter; None for one that a box detector does without.

    Raises `ValueError` for one that a Faster R-CNN R101 does not have.
    """
    for pattern, ours in NAMES:
        if found := pattern.fullmatch(name):
            return found.expand(ours)
    if UNUSED.match(name):
        return None
    raise ValueError(f"{name} is no parameter of a detectron2 Faster R-CNN R101 (C4 or FPN)")


def convert(checkpoint: Path, output: Path, *, form: str | None = None) -> str:
    """Write `output`; returns the variant found. Raises `ValueError` for anything but such a checkpoint.

    `form` is .pkl or .pth where the file's own name does not say it.
    """
    state = read_checkpoint(checkpoint, form or checkpoint.suffix)
    for name, expected in (("pixel_mean", PIXEL_MEAN_BGR), ("pixel_std", (1.0, 1.0, 1.0))):
        if name in state and not torch.allclose(state[name].flatten(), torch.tensor(expected)):
            raise ValueError(
                f"{checkpoint}: {name} is {state[name].flatten().tolist()}; only weights that continue the "
                f"MSRA ResNet101 ({name} {list(expected)}) are supported"
            )
    variant = "fpn" if "backbone.fpn_lateral2.weight" in state else "c4"
    ours = {ours: value.contiguous() for name, value in state.items() if (ours := renamed(name)) is not None}
    deltas = ours.get("predictor.bbox_pred.weight")
    if deltas is None:
        raise ValueError(f"{checkpoint} has no roi_heads.box_predictor.bbox_pred: it is no Faster R-CNN")
    wanted = Detector(variant, num_classes=len(deltas) // 4).state_dict()
    if problems := differences(wanted, ours):
        raise ValueError(f"{checkpoint} is no detectron2 Faster R-CNN R101 {variant}: {problems}")
    about = {"variant": variant, "source_sha256": sha256_of(checkpoint)}
    with atomically(output) as temporary:
        save_file(ours, temporary, metadata=about)
    return variant


# What an unpickler raises over bytes that are no pickle, or one of something else.
UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    MemoryError,
    OverflowError,
    struct.error,
)
PLAIN_NUMBER = re.compile(r"[<>|=]?(?:f[248]|[iu][1248])")


def differences(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """What is missing, too much or of another shape, shortly; empty when nothing is."""
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is too much" for name in found if name not in wanted]
    wrong += [
        f"{name} has the shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def read_checkpoint(path: Path, form: str) -> dict[str, torch.Tensor]:
    """The tensors of a detectron2 checkpoint by name, float32; nothing in the file is executed."""
    try:
        if form == ".pkl":
            with path.open("rb") as file:
                content = _ArrayUnpickler(file, encoding="latin1").load()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no dictionary of parameters")
    tensors = {}
    for name, value in state.items():
        whole = getattr(value, "value", None) if isinstance(value, _Array) else value
        if not isinstance(whole, torch.Tensor | np.ndarray):
            raise ValueError(f"{path}: {name} is no array of numbers")
        if isinstance(whole, np.ndarray):
            whole = whole.astype(np.float32)
        tensor = torch.as_tensor(whole)
        if tensor.is_complex():
            raise ValueError(f"{path}: {name} has complex numbers")
        tensors[str(name)] = tensor.float()
    return tensors


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes; `_codecs.encode` itself would look up any codec by name."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding!r} is not allowed")
    return codecs.latin_1_encode(text)[0]


class _Number:
    """What stands for `numpy.dtype`: a plain number, no structure, no object."""

    def __init__(self, name: str, align: bool = False, copy: bool = True) -> None:
        if not PLAIN_NUMBER.fullmatch(name):
            raise pickle.UnpicklingError(f"an array of {name!r} is not allowed")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """What stands for `numpy.ndarray`: made from bytes that are as many as its shape says."""

    value: np.ndarray

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, number, is_fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self.value = _array(raw, number, shape, "F" if is_fortran else "C").value


def _array(buffer: Any, number: _Number, shape: tuple[int, ...], order: str) -> _Array:
    """How protocol 5 writes arrays."""
    made = _Array()
    made.value = np.frombuffer(buffer, number.dtype).reshape(shape, order="F" if order == "F" else "C")
    return made


class _ArrayUnpickler(pickle.Unpickler):
    # No function of numpy is called: what it does with a hostile state is not known.
    allowed: ClassVar[dict[tuple[str, str], Callable[..., Any]]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Number,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy.core.numeric", "_frombuffer"): _array,
        ("numpy._core.numeric", "_frombuffer"): _array,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return self.allowed[module, name]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m features.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=".pkl or .pth of detectron2")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the .safetensors to write")
    arguments = parser.parse_args()
    try:
        variant = convert(arguments.checkpoint, arguments.output)
    except ValueError as error:
        raise SystemExit(f"convert: {error}") from error
    sys.stdout.write(f"{arguments.output}: set regions.weights to it, and regions.variant to {variant}\n")


if __name__ == "__main__":
    main()
