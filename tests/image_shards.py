"""What an images stage leaves, for the tests of the stages that read it."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline import schema
from pipeline.disk import sha256_of


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_images(folder: Path, images: dict[str, bytes | None]) -> None:
    """A complete `folder` of one shard; an asin without bytes has the status `missing`."""
    folder.mkdir(parents=True)
    rows = [
        {
            **dict.fromkeys(schema.IMAGES.names),
            "asin": asin,
            "status": "missing" if data is None else "ok",
            "sha256": None if data is None else hashlib.sha256(data).hexdigest(),
            "image": data,
        }
        for asin, data in sorted(images.items())
    ]
    path = folder / "00000.parquet"
    schema.write_parquet(rows, schema.IMAGES, path)
    shard = {
        "name": path.name,
        "rows": len(rows),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "first": rows[0]["asin"],
        "last": rows[-1]["asin"],
    }
    (folder / "manifest.json").write_text(json.dumps({"rows": len(rows), "shards": [shard]}))
