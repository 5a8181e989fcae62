"""Region features from Parquet to tensors, beside a list-of-halves layout with default options."""

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema

IMAGES, REGIONS, WIDTH = 256, 37, 2048


def main() -> None:
    features = np.random.default_rng(0).normal(size=(IMAGES, REGIONS * WIDTH)).astype("<f2")
    size_gib = features.nbytes / 2**30
    rows = [
        {
            "asin": f"B{row:09d}",
            "status": "ok",
            "boxes": [[0.0, 0.0, 1.0, 1.0]] * REGIONS,
            "scores": [1.0] * REGIONS,
            "num_regions": REGIONS,
            "features": values.tobytes(),
            "grid": None,
        }
        for row, values in enumerate(features)
    ]
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = Path(folder, "ours.parquet"), Path(folder, "peer.parquet")
        schema.write_parquet(rows, schema.region_schema(width=WIDTH), ours)
        pq.write_table(pa.table({"features": pa.array(list(features))}), peer)
        for name, path in (("list<float16>, default options", peer), ("binary, as stored", ours)):
            start = time.perf_counter()
            column = pq.read_table(path, columns=["features"], use_threads=False)["features"]
            if pa.types.is_binary(column.type):
                read = np.concatenate([np.frombuffer(value.as_buffer(), "<f2") for value in column])
            else:
                read = column.combine_chunks().flatten().to_numpy()
            seconds = time.perf_counter() - start
            assert np.array_equal(read.reshape(features.shape), features)
            print(
                f"{name:32s} {size_gib / seconds:6.2f} GiB/s, {path.stat().st_size / 2**20:6.1f} MiB on disk"
            )


if __name__ == "__main__":
    main()
