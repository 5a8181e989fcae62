"""Region features from disk to tensors on one core: the chosen layout beside four others, in one run.

Chosen is `binary` in Parquet with zstd-1 for the shards that DVC keeps and moves, and from it, on first use,
an uncompressed Arrow file that is mapped: reads then cost a copy. The others are lists of halves in Parquet
as by default, fixed-size lists uncompressed, binary uncompressed, and safetensors. Each read ends in
one tensor per picture that owns its memory; files are warm; the best of five rounds counts.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from pipeline import schema
from pipeline.disk import sha256_of, write_json
from pipeline.reading import ShardFolder

IMAGES, REGIONS, WIDTH = 256, 37, 2048
ROUNDS = 5


def rows_of(features: np.ndarray) -> list[dict]:
    return [
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


def write_folder(features: np.ndarray, folder: Path) -> ShardFolder:
    """As the stage leaves it."""
    folder.mkdir()
    path = folder / "00000.parquet"
    rows = rows_of(features)
    schema.write_parquet(rows, schema.region_schema(width=WIDTH), path)
    shard = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    shard |= {"first": rows[0]["asin"], "last": rows[-1]["asin"]}
    write_json({"rows": len(rows), "shards": [shard]}, folder / "manifest.json")
    return ShardFolder(folder)


def halves(column: pa.ChunkedArray) -> Iterable[torch.Tensor]:
    if pa.types.is_binary(column.type):
        for value in column:
            yield torch.from_numpy(np.frombuffer(value.as_buffer(), "<f2").reshape(-1, WIDTH).copy())
    else:
        flat = column.combine_chunks().flatten().to_numpy().reshape(IMAGES, REGIONS, WIDTH)
        yield from (torch.from_numpy(values.copy()) for values in flat)


def parquet_reader(path: Path) -> Callable[[], list[torch.Tensor]]:
    return lambda: list(halves(pq.read_table(path, columns=["features"], use_threads=False)["features"]))


def mapped_reader(folder: ShardFolder, asins: list[str]) -> Callable[[], list[torch.Tensor]]:
    def read() -> list[torch.Tensor]:
        views = (folder.array(asin) for asin in asins)
        return [torch.from_numpy(view.copy()) for view in views if view is not None]

    return read


def main() -> None:
    torch.set_num_threads(1)
    features = np.random.default_rng(0).normal(size=(IMAGES, REGIONS * WIDTH)).astype("<f2")
    size_gib = features.nbytes / 2**30
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SMARTAVE_STORE"] = str(folder / "store")
        stored = write_folder(features, folder / "regions")
        lists = pa.table({"features": pa.array(list(features))})
        pq.write_table(lists, folder / "lists.parquet")
        fixed = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), REGIONS * WIDTH)
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pq.write_table(pa.table({"features": fixed}), folder / "fixed.parquet", **options)
        binary = pa.array([values.tobytes() for values in features], pa.binary())
        pq.write_table(pa.table({"features": binary}), folder / "binary.parquet", **options)
        tensors = {f"B{i:09d}": torch.from_numpy(values) for i, values in enumerate(features)}
        save_file(tensors, folder / "all.safetensors")
        layouts: list[tuple[str, Path, Callable[[], list[torch.Tensor]]]] = [
            (
                "list<half>, default options",
                folder / "lists.parquet",
                parquet_reader(folder / "lists.parquet"),
            ),
            ("fixed-size list, plain", folder / "fixed.parquet", parquet_reader(folder / "fixed.parquet")),
            ("binary, plain", folder / "binary.parquet", parquet_reader(folder / "binary.parquet")),
            (
                "safetensors",
                folder / "all.safetensors",
                lambda: [one.clone() for one in load_file(folder / "all.safetensors").values()],
            ),
            ("binary, zstd: shards at rest", stored.files[0], parquet_reader(stored.files[0])),
            ("the same, mapped: training", stored.files[0], mapped_reader(stored, list(tensors))),
        ]
        print(f"{IMAGES} pictures of {REGIONS} x {WIDTH} float16, {size_gib * 1024:.0f} MiB, one thread")
        for told, path, read in layouts:
            times = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                made = read()
                times.append(time.perf_counter() - start)
            assert torch.equal(torch.stack(made).flatten(), torch.from_numpy(features).flatten())
            print(
                f"{told:30s} {size_gib / min(times):6.2f} GiB/s, first {size_gib / times[0]:6.2f}, "
                f"{path.stat().st_size / 2**20:6.1f} MiB on disk"
            )


if __name__ == "__main__":
    main()
