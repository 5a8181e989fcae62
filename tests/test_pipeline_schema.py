import pyarrow.parquet as pq

from pipeline import schema


def test_pictures_are_stored_as_they_are_and_all_else_is_compressed(tmp_path):
    rows = [
        dict.fromkeys(schema.IMAGES.names) | {"asin": "B000000001", "status": "ok", "image": b"\0" * 9999}
    ]
    schema.write_parquet(rows, schema.IMAGES, tmp_path / "images.parquet")
    found = compressions(tmp_path / "images.parquet")
    assert found.pop("image") == "UNCOMPRESSED"
    assert set(found.values()) == {"ZSTD"}
    lines = [{"text": "ORGANIC", "confidence": 1.0, "quad": [0.0] * 8}]
    schema.write_parquet(
        [{"asin": "B000000001", "status": "ok", "lines": lines}], schema.OCR, tmp_path / "ocr"
    )
    assert set(compressions(tmp_path / "ocr").values()) == {"ZSTD"}


def compressions(path):
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    return {column.path_in_schema: column.compression for column in columns}
