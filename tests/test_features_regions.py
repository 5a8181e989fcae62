import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import copy_project, new_workspace
from corrupt_images import TABLE
from image_shards import encoded, write_images
from PIL import Image
from pydantic import ValidationError

from features import detector, regions
from pipeline import schema, shards

SMALL = {"short_side_px": 96, "long_side_px": 160, "max_boxes": 4, "threads": 1}


def row(image: bytes | None, status: str = "ok", asin: str = "B000000001") -> dict[str, object]:
    return {"asin": asin, "status": status, "sha256": None, "image": image}


def drawn(rgb: tuple[int, int, int] = (180, 40, 40)) -> bytes:
    image = Image.new("RGB", (120, 96), (235, 235, 235))
    image.paste(rgb, (20, 20, 80, 80))
    return encoded(image, "JPEG")


@pytest.fixture(scope="session")
def work() -> regions.Work:
    return regions.open_work(regions.Settings(**SMALL, grid=True, check_every=2))


@pytest.fixture(scope="session")
def process(work):
    return lambda rows: rows_of(work, rows)


def rows_of(work: regions.Work, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [made for made in work(rows) if not isinstance(made, Counter)]


def test_a_picture_is_a_row_of_boxes_scores_and_float16_features(process, tmp_path):
    [made] = process([row(drawn())])
    assert made["status"] == "ok"
    assert made["num_regions"] == len(made["boxes"]) == len(made["scores"]) == 5
    assert made["boxes"][-1] == [0, 0, 120, 96]
    features = np.frombuffer(made["features"], "<f2").reshape(5, 2048)
    grid = np.frombuffer(made["grid"], "<f2").reshape(49, 2048)
    np.testing.assert_allclose(grid.mean(axis=0, dtype=np.float32), features[-1], rtol=0.01, atol=0.02)
    schema.write_parquet([made], schema.region_schema(width=2048), tmp_path / "row.parquet")


@pytest.mark.parametrize(
    ("image", "status", "expected"),
    [
        (None, "missing", "missing"),
        (None, "placeholder", "placeholder"),
        (drawn()[:500], "ok", "undecodable"),
        (b"no picture at all", "ok", "undecodable"),
    ],
)
def test_no_picture_is_a_row_with_a_reason_and_no_regions(process, image, status, expected, tmp_path):
    [made] = process([row(image, status)])
    assert made == {"asin": "B000000001", "status": expected, **regions.NO_REGIONS}
    schema.write_parquet([made], schema.region_schema(width=2048), tmp_path / "row.parquet")


def test_a_shard_of_broken_images_has_a_row_for_each(process):
    rows = [
        row(data, "ok" if name != "bomb" else status, asin=name) for name, (data, status, _) in TABLE.items()
    ]
    made = {one["asin"]: one["status"] for one in process(rows)}
    assert list(made) == list(TABLE)
    for name, (_, status, _) in TABLE.items():
        assert made[name] in ({"ok"} if status == "ok" else {"undecodable", "too_many_pixels"}), name


def test_the_same_pictures_give_the_same_bytes_whatever_came_before(process):
    pictures = [row(drawn()), row(drawn((30, 60, 200))), row(None, "missing"), row(drawn())]
    first = process(pictures)
    process(pictures[1:2])
    assert process(pictures) == first


def test_pictures_of_one_shape_are_seen_together_and_as_each_alone(work, monkeypatch):
    other = encoded(Image.new("RGB", (96, 120), (40, 80, 160)), "JPEG")
    rows = [row(drawn()), row(other), row(drawn((30, 60, 200))), row(other)]
    seen = []
    many = work.model.many
    monkeypatch.setattr(
        work.model, "many", lambda batch, **asked: seen.append(len(batch)) or many(batch, **asked)
    )
    together = rows_of(work, rows)
    assert seen == [2, 2]
    for alone, made in zip([rows_of(work, [one])[0] for one in rows], together, strict=True):
        np.testing.assert_allclose(made["boxes"], alone["boxes"], atol=0.01)
        mine, theirs = (np.frombuffer(one["features"], "<f2").astype(float) for one in (made, alone))
        np.testing.assert_allclose(mine, theirs, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("variant", "precision", "least"),
    [
        ("c4", "float32", 0.999999),
        ("fpn", "float32", 0.999999),
        ("c4", "bfloat16", 0.999),
        ("fpn", "bfloat16", 0.999),
        ("c4", "compiled", 0.999999),
    ],
)
def test_a_faster_detector_is_close_to_the_reference_and_says_how_close(
    variant, precision, least, monkeypatch
):
    compile_ = torch.compile  # code generation would take half a minute
    monkeypatch.setattr(torch, "compile", lambda module, options: compile_(module, backend="aot_eager"))
    settings = regions.Settings(**SMALL, variant=variant, precision=precision, check_every=2)
    work = regions.open_work(settings)
    *made, counts = work([row(drawn()), row(drawn((30, 60, 200))), row(drawn((20, 160, 40)))])
    assert counts["pictures"] == 2
    told = regions.cosine_to_reference(counts)["cosine_to_reference"]
    assert told["regions"] == 10
    assert told["below_0.999"] == 0
    assert least <= told["mean"] <= 1 + 1e-6
    plain = regions.open_work(settings.model_copy(update={"precision": "reference"}))
    assert plain.reference is None
    reference = rows_of(plain, [row(drawn())])[0]
    if precision != "bfloat16":
        np.testing.assert_allclose(made[0]["boxes"], reference["boxes"], atol=0.05)
    assert regions.cosine_to_reference(Counter()) == {}


def test_a_line_belongs_to_the_smallest_region_that_holds_it():
    boxes = np.array([[0, 0, 60, 60], [10, 10, 50, 30], [12, 12, 30, 20], [0, 0, 100, 80]], np.float32)
    assert regions.smallest_holding(boxes, (14, 14, 28, 14, 28, 18, 14, 18)) == 2
    assert regions.smallest_holding(boxes, (14, 14, 40, 15, 40, 25, 14, 24)) == 1
    assert regions.smallest_holding(boxes, (5, 5, 40, 15, 40, 25, 14, 24)) == 0
    assert regions.smallest_holding(boxes, (50, 5, 90, 5, 90, 25, 50, 25)) == 3
    assert regions.smallest_holding(boxes, (90, 5, 120, 5, 120, 25, 90, 25)) == 3


def test_a_feature_that_float16_cannot_hold_is_an_error_that_names_the_product():
    for wrong in (np.nan, np.inf, 70_000.0, -1e9):
        features = np.zeros((2, 8), np.float32)
        features[1, 3] = wrong
        with pytest.raises(ValueError, match=r"a region feature of B000000009 is not finite in float16"):
            regions.half(features, "B000000009")
    assert regions.half(np.array([1.5, -2], np.float32), "B000000009") == b"\x00\x3e\x00\xc0"


def test_a_picture_with_a_wild_feature_fails_its_shard(work, monkeypatch):
    huge = detector.Regions(
        *(np.full(shape, 1e6, np.float32) for shape in ((1, 4), (1,), (1, 2048), (49, 2048)))
    )
    monkeypatch.setattr(work.model, "many", lambda batch, **_: [huge] * len(batch))
    with pytest.raises(ValueError, match="a region feature of B000000001 is not finite"):
        rows_of(replace(work, reference=None), [row(drawn())])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_boxes": 0}, "greater than or equal to 1"),
        ({"max_boxes": 101}, "less than or equal to 100"),
        ({"variant": "yolo"}, "'c4' or 'fpn'"),
        ({"weights": "model_final.pkl"}, "must be random or a .safetensors file"),
        ({"backend": "detectron2"}, "backend detectron2 needs weights"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed, message):
    with pytest.raises(ValidationError, match=message):
        regions.Settings(**changed)


def test_detectron2_that_is_not_there_says_how_to_get_it(tmp_path):
    if "detectron2" in sys.modules:
        pytest.skip("detectron2 is installed here")
    settings = regions.Settings(backend="detectron2", weights=str(tmp_path / "detector.safetensors"))
    with pytest.raises(ValueError, match=r"cannot be imported .*detectron2.readthedocs.io.* tells how"):
        regions.open_detector(settings)


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"regions.device is cuda, and torch sees no GPU"):
        regions.open_work(regions.Settings(device="cuda"))


def test_whatever_changes_a_byte_changes_the_fingerprint(monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "ShardFolder", lambda path: path)
    monkeypatch.setattr(shards, "chunks_of_folder", lambda folder, size: [])
    weights = tmp_path / "detector.safetensors"
    weights.write_bytes(b"one")

    def made_with(**changed: object) -> str:
        return json.dumps(regions.job("sample", regions.Settings(**changed)).made_with(), sort_keys=True)

    variants = [{}, {"max_boxes": 9}, {"seed": 1}, {"short_side_px": 600}, {"variant": "fpn"}, {"threads": 2}]
    variants += [{"nms_iou": 0.4}, {"grid": True}, {"precision": "bfloat16"}, {"weights": str(weights)}]
    told = [made_with(**changed) for changed in variants]
    weights.write_bytes(b"two")
    told.append(made_with(weights=str(weights)))
    assert len(set(told)) == len(told)
    assert made_with() == told[0]
    with pytest.raises(ValueError, match=r"regions.weights: nowhere.safetensors does not exist"):
        made_with(weights="nowhere.safetensors")


def test_the_stage_runs_over_shards_and_max_boxes_makes_them_again(tmp_path):
    """The command, from an images stage's shards to its own, as `dvc repro` calls it."""
    workspace = new_workspace(tmp_path / "project")
    copy_project(workspace.folder)
    config = workspace.folder / "config" / "toy" / "regions.json"
    config.parent.mkdir(parents=True)
    write_images(
        workspace.folder / "data" / "toy" / "images",
        {"B000000001": drawn(), "B000000002": None, "B000000003": drawn((30, 60, 200))},
    )

    def run(**changed: object) -> shards.ShardFolder:
        config.write_text(json.dumps({**SMALL, "shard_size": 2, **changed}))
        workspace.run(sys.executable, "-m", "features.regions", "toy")
        return shards.ShardFolder(workspace.folder / "data" / "toy" / "regions")

    made = run()
    assert made.manifest["status"] == {"missing": 1, "ok": 2}
    rows = {found["asin"]: found for found in made.rows()}
    assert [found["num_regions"] for found in rows.values()] == [5, 0, 5]
    assert rows["B000000001"]["features"] != rows["B000000003"]["features"]
    fewer = run(max_boxes=3)
    assert [found["num_regions"] for found in fewer.rows()] == [4, 0, 4]
    old, new = ({shard["fingerprint"] for shard in part.shards} for part in (made, fewer))
    assert not old & new
    assert Path(workspace.folder / "metrics" / "toy" / "regions.json").is_file()
