"""detectron2's model-zoo detectors: downloaded, checked, and converted once to what features.detector reads.

    python -m features.zoo faster_rcnn_R_101_FPN_3x weights/coco-fpn.safetensors
    python -m features.zoo faster_rcnn_R_101_C4_3x weights/coco-c4.safetensors --sha256 HEX
    python -m features.zoo https://HOST/visual_genome.pkl weights/vg.safetensors --sha256 HEX

Only what is pinned by sha256 is opened. The zoo publishes none: it puts the first digits of a file's MD5 into
its name, which are checked too. FPN's is pinned here, by a public copy of the file. For C4's none was found:
without --sha256 it is downloaded, its sha256 is told, and it is opened by who passes that.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit

from features import convert
from pipeline.disk import sha256_of
from pipeline.download import Download

ROOT = "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection"
MODELS = {
    "faster_rcnn_R_101_C4_3x": f"{ROOT}/faster_rcnn_R_101_C4_3x/138204752/model_final_298dad.pkl",
    "faster_rcnn_R_101_FPN_3x": f"{ROOT}/faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl",
}
PINS = {  # the Git LFS pointer in palantir/aip-sdk, a copy "downloaded from Detectron2 Faster-RCNN Model Zoo"
    MODELS["faster_rcnn_R_101_FPN_3x"]: "9014213b9aeac24bb799c857266e34438e6e839821752658026e77c8ceb620f3",
}
MD5_IN_NAME = re.compile(r"model_final_([0-9a-f]{6,32})\.pkl")


def fetch(model: str, output: Path, *, sha256: str | None = None, plain_http: Collection[str] = ()) -> str:
    """A sentence on what was written. Raises `ValueError` for what is unknown, not pinned or no detector."""
    url = MODELS.get(model, model)
    if not urlsplit(url).scheme:
        raise ValueError(f"{model} is neither an address nor one of {', '.join(MODELS)}")
    name = Path(urlsplit(url).path).name
    digits = MD5_IN_NAME.fullmatch(name)
    if sha256 is None and url not in MODELS.values():
        raise ValueError(f"{url} must be pinned: pass its --sha256")
    sha256 = sha256 or PINS.get(url)
    path = Download(urls=[url], sha256=sha256, plain_http=plain_http).fetch()
    if digits:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if not found.startswith(digits[1]):
            raise ValueError(f"{url} has the MD5 {found}, and its name says {digits[1]}")
    if sha256 is None:
        raise ValueError(
            f"{url} is here, but nobody publishes its sha256 to check it by; its MD5 begins as its name "
            f"says. If you trust it, open it with\n  --sha256 {sha256_of(path)}"
        )
    variant = convert.convert(path, output, form=Path(name).suffix)
    return f"{output}: set regions.weights to it, and regions.variant to {variant}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m features.zoo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help=f"an https address, or {' or '.join(MODELS)}")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the .safetensors to write")
    parser.add_argument("--sha256", metavar="HEX", help="of the checkpoint")
    arguments = parser.parse_args()
    try:
        told = fetch(arguments.model, arguments.output, sha256=arguments.sha256)
    except ValueError as error:
        raise SystemExit(f"zoo: {error}") from error
    sys.stdout.write(told + "\n")


if __name__ == "__main__":
    main()
