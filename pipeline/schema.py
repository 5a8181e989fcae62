"""The one contract file: row types and Arrow schemas that pass between stages.

Spans are half-open `[begin, end)` in characters of the paragraph they name.
Boxes are `(x1, y1, x2, y2)` and quads four `(x, y)` corners, clockwise from the
top left, both in pixels of the stored image.
"""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ID_PATTERNS = {
    "sample": re.compile(r"[A-Z0-9]{10}"),
    "mave": re.compile(r"[A-Z0-9]{10}"),
    "mepave": re.compile(r"[cs]_[0-9]+"),
}
ORIGINS = ("text", "printed", "visible", "several", "unknown")
SPLITS = ("train", "validation", "test")
TEXT_SOURCES = ("title", "description", "feature", "price", "brand")

PRODUCTS = pa.schema(
    [
        ("item", pa.string()),  # asin; MEPAVE: sid
        ("asin", pa.string()),  # image key; MEPAVE: cid
        ("corpus", pa.string()),
        ("root_category", pa.string()),
        ("category", pa.string()),
        ("title", pa.string()),
        ("paragraphs", pa.list_(pa.struct([("text", pa.string()), ("source", pa.string())]))),
        ("image_urls", pa.list_(pa.string())),
        (
            "attributes",
            pa.list_(
                pa.struct(
                    [
                        ("key", pa.string()),
                        ("values", pa.list_(pa.string())),
                        ("origins", pa.list_(pa.string())),  # parallel to values, one of ORIGINS
                        (
                            "evidences",
                            pa.list_(
                                pa.struct(
                                    [
                                        ("value", pa.string()),
                                        ("paragraph", pa.int32()),
                                        ("begin", pa.int32()),
                                        ("end", pa.int32()),
                                    ]
                                )
                            ),
                        ),
                        ("split", pa.string()),
                    ]
                )
            ),
        ),
        ("split", pa.string()),  # null when split by instance
    ]
)

IMAGES = pa.schema(
    [
        ("asin", pa.string()),
        ("url", pa.string()),
        ("status", pa.string()),  # "ok" or the reason why there is no image
        ("error", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image", pa.binary()),  # the bytes as fetched
    ]
)

OCR = pa.schema(
    [
        ("asin", pa.string()),
        ("status", pa.string()),
        (
            "lines",  # in reading order
            pa.list_(
                pa.struct(
                    [
                        ("text", pa.string()),
                        ("confidence", pa.float32()),
                        ("quad", pa.list_(pa.float32(), 8)),  # x, y of four corners
                    ]
                )
            ),
        ),
    ]
)

REGIONS = pa.schema(
    [
        ("asin", pa.string()),
        ("status", pa.string()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # the last one is the whole image
        ("scores", pa.list_(pa.float32())),
        ("num_regions", pa.int32()),
        ("features", pa.binary()),  # little-endian, num_regions x width; see region_schema
        ("grid", pa.binary()),  # null, or 49 x width
    ]
)

PREDICTIONS = pa.schema(
    [
        ("item", pa.string()),
        ("asin", pa.string()),
        ("attribute", pa.string()),
        (
            "values",
            pa.list_(
                pa.struct(
                    [
                        ("value", pa.string()),
                        ("score", pa.float32()),
                        (
                            "source",
                            pa.struct(
                                [
                                    ("kind", pa.string()),  # text, ocr or vocabulary
                                    ("index", pa.int32()),  # paragraph or OCR line; null for vocabulary
                                    ("begin", pa.int32()),
                                    ("end", pa.int32()),
                                ]
                            ),
                        ),
                    ]
                )
            ),
        ),
        ("floor", pa.list_(pa.string())),  # what the no-learning floor says
        ("gold", pa.list_(pa.string())),
        ("origins", pa.list_(pa.string())),  # parallel to gold
        ("in_ocr", pa.list_(pa.bool_())),  # parallel to gold: our OCR read this value
    ]
)


def region_schema(*, width: int, dtype: str = "float16") -> pa.Schema:
    """REGIONS with the features' width and dtype in the schema's metadata."""
    return REGIONS.with_metadata({"width": str(width), "dtype": dtype})


AS_IT_IS = frozenset({"image"})  # columns that are compressed already; in schemas without nested ones


def write_parquet(rows: list[dict] | pa.Table, schema: pa.Schema, path: Path) -> None:
    """Write `rows` so that equal rows give equal bytes (the caller renames into place)."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=schema)
    zipped = [name for name in schema.names if name not in AS_IT_IS]
    is_flat = len(zipped) < len(schema)
    pq.write_table(
        table.cast(schema) if table.schema != schema else table,
        path,
        version="2.6",
        compression={name: "zstd" if name in zipped else "none" for name in schema.names}
        if is_flat
        else "zstd",
        compression_level=dict.fromkeys(zipped, 1) if is_flat else 1,
        use_dictionary=False,
        write_statistics=False,
        store_schema=True,
        row_group_size=4096,
        data_page_version="1.0",
        write_page_checksum=True,
    )
