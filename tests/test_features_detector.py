import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.models.detection.image_list import ImageList

from features import convert, detector

ASKED = {"short_side_px": 128, "long_side_px": 192, "max_boxes": 6, "nms_iou": 0.5, "min_score": 0.02}


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """240 x 180: a red square on grey, not in the middle."""
    pixels = np.full((180, 240, 3), 235, np.uint8)
    pixels[30:130, 20:120] = (200, 30, 40)
    return pixels


@pytest.fixture(scope="session", params=["c4", "fpn"])
def untrained(request) -> detector.Detector:
    torch.set_num_threads(1)
    return detector.untrained(request.param, seed=5)


def test_regions_lie_inside_and_the_last_is_the_whole_picture(untrained, picture):
    found = untrained(picture, **ASKED)
    width = {"c4": 2048, "fpn": 1024}[untrained.variant]
    assert found.boxes.shape == (7, 4)
    assert found.scores.shape == (7,)
    assert found.features.shape == (7, width)
    assert found.grid.shape == (49, 2048)
    assert {part.dtype for part in (found.boxes, found.scores, found.features, found.grid)} == {
        np.dtype(np.float32)
    }
    assert found.boxes[-1].tolist() == [0, 0, 240, 180]
    assert found.scores[-1] == 1
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, :2] < found.boxes[:, 2:]).all()
    assert (found.boxes[:, 2:] <= (240, 180)).all()


def test_the_network_sees_blue_green_red_around_the_mean(untrained):
    seen = []
    hook = untrained.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    untrained(np.full((64, 64, 3), (124, 116, 94), np.uint8), **ASKED)
    hook.remove()
    assert seen[0].shape[:2] == (1, 3)
    np.testing.assert_allclose(seen[0][0, :, 0, 0], [-9.53, -0.28, 0.325], atol=1e-3)


def test_random_proposals_are_ranked_and_do_not_overlap_more_than_asked(untrained, picture):
    found = untrained(picture, **{**ASKED, "nms_iou": 0.2})
    scores = found.scores[:-1]
    assert (np.diff(scores) <= 0).all()
    assert len(set(scores.tolist())) == len(scores)  # no score is stuck at 1
    boxes = torch.from_numpy(found.boxes[:-1])
    overlap = detector_iou(boxes) - torch.eye(len(boxes))
    if untrained.variant == "c4":  # in the pyramid each level is judged by itself
        assert overlap.max() <= 0.2 + 1e-3


def detector_iou(boxes: torch.Tensor) -> torch.Tensor:
    from torchvision.ops import box_iou

    return box_iou(boxes, boxes)


def test_fewer_boxes_are_the_first_of_more(untrained, picture):
    six = untrained(picture, **ASKED)
    two = untrained(picture, **{**ASKED, "max_boxes": 2})
    assert len(two.boxes) == 3
    assert np.array_equal(two.boxes[:2], six.boxes[:2])
    np.testing.assert_allclose(two.features[:2], six.features[:2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((90, 90, 3), np.uint8),
        np.full((90, 90, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8),
        (np.indices((90, 90)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2),
        np.full((16, 700, 3), 128, np.uint8),
    ],
    ids=["black", "white", "noise", "checkerboard", "strip"],
)
def test_random_features_are_far_from_the_limit_of_float16(untrained, pixels):
    found = untrained(pixels, **ASKED)
    assert np.abs(found.features).max() < 65504 / 20
    assert np.abs(found.grid).max() < 65504 / 20


def test_random_weights_follow_the_seed_and_leave_the_global_one_alone(picture):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = (detector.untrained("c4", seed=seed)(picture, **ASKED) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.features.tobytes() == again.features.tobytes()
    assert first.boxes.tobytes() == again.boxes.tobytes()
    assert first.features.tobytes() != other.features.tobytes()


def test_a_region_is_seen_where_it_is():
    """A square's feature moves with it: it differs less than that of the same place without the square."""
    model = detector.untrained("c4", seed=0)

    def feature(square: int, region: int) -> torch.Tensor:
        pixels = torch.full((1, 3, 128, 256), 110.0)
        pixels[:, :, 32:96, square : square + 64] = torch.tensor([-60.0, -80, 80]).view(3, 1, 1)
        with torch.inference_mode():
            levels = model._levels(pixels)
            return model._features(levels, torch.tensor([[region, 32.0, region + 64, 96]]))[0][0]

    here, moved, elsewhere = feature(32, 32), feature(160, 160), feature(32, 160)
    assert torch.dist(here, moved) < 0.5 * torch.dist(here, elsewhere)


def test_resizing_keeps_the_short_side_unless_the_long_one_gets_too_long():
    assert detector.resize(np.zeros((100, 200, 3), np.uint8), short_side_px=50, long_side_px=500).shape[
        :2
    ] == (
        50,
        100,
    )
    assert detector.resize(np.zeros((100, 200, 3), np.uint8), short_side_px=80, long_side_px=100).shape[
        :2
    ] == (
        50,
        100,
    )
    assert detector.resize(np.zeros((4, 2000, 3), np.uint8), short_side_px=80, long_side_px=100).shape[
        :2
    ] == (
        1,
        100,
    )


def test_a_box_belongs_to_the_level_of_its_size():
    sides = torch.tensor([[20.0], [112], [223], [224], [447], [448], [2000]])
    boxes = torch.cat([torch.zeros(7, 2), sides.expand(7, 2)], dim=1)
    assert detector.pyramid_level(boxes).tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_anchors_stand_on_the_stride_unrounded_with_ratios_innermost():
    anchors = detector.Anchors(((32, 64),), (16,))
    assert anchors.cell_anchors[0].shape == (6, 4)
    wide, square, tall = anchors.cell_anchors[0][:3]
    assert square.tolist() == [-16, -16, 16, 16]
    np.testing.assert_allclose(wide, [-22.627417, -11.313708, 22.627417, 11.313708])
    np.testing.assert_allclose(tall, [-11.313708, -22.627417, 11.313708, 22.627417])
    level = torch.zeros(1, 8, 2, 3)
    pictures = ImageList(torch.zeros(2, 3, 33, 50), [(33, 50), (33, 50)])
    placed, as_well = anchors(pictures, [level])
    assert torch.equal(placed, as_well)
    assert placed.shape == (2 * 3 * 6, 4)
    assert placed[6:9].tolist() == (anchors.cell_anchors[0][:3] + torch.tensor([16, 0, 16, 0])).tolist()


# Checkpoints of detectron2


def detectron2_state(variant: str, num_classes: int = 5) -> dict[str, torch.Tensor]:
    """Random parameters under detectron2's names, written down from its model zoo's checkpoints."""
    body = "backbone.bottom_up." if variant == "fpn" else "backbone."
    shapes: dict[str, tuple[int, ...]] = {f"{body}stem.conv1.weight": (64, 3, 7, 7)}
    norms = {f"{body}stem.conv1.norm": 64}
    channels = 64
    for stage, blocks in ((2, 3), (3, 4), (4, 23), (5, 3)):
        width = 16 * 2**stage
        for block in range(blocks):
            owner = "roi_heads." if variant == "c4" and stage == 5 else body
            name = f"{owner}res{stage}.{block}"
            shapes[f"{name}.conv1.weight"] = (width, channels, 1, 1)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            shapes[f"{name}.conv3.weight"] = (4 * width, width, 1, 1)
            norms |= {
                f"{name}.conv1.norm": width,
                f"{name}.conv2.norm": width,
                f"{name}.conv3.norm": 4 * width,
            }
            if block == 0:
                shapes[f"{name}.shortcut.weight"] = (4 * width, channels, 1, 1)
                norms[f"{name}.shortcut.norm"] = 4 * width
            channels = 4 * width
    hidden, anchors = (256, 3) if variant == "fpn" else (1024, 15)
    pooled = 1024 if variant == "fpn" else 2048
    rpn = "proposal_generator.rpn_head"
    heads = {f"{rpn}.conv": (hidden, hidden, 3, 3)}
    heads |= {f"{rpn}.objectness_logits": (anchors, hidden, 1, 1)}
    heads |= {f"{rpn}.anchor_deltas": (4 * anchors, hidden, 1, 1)}
    heads |= {"roi_heads.box_predictor.cls_score": (num_classes + 1, pooled)}
    heads |= {"roi_heads.box_predictor.bbox_pred": (4 * num_classes, pooled)}
    if variant == "fpn":
        for level, inputs in ((2, 256), (3, 512), (4, 1024), (5, 2048)):
            heads[f"backbone.fpn_lateral{level}"] = (256, inputs, 1, 1)
            heads[f"backbone.fpn_output{level}"] = (256, 256, 3, 3)
        heads |= {"roi_heads.box_head.fc1": (1024, 256 * 49), "roi_heads.box_head.fc2": (1024, 1024)}
    for name, shape in heads.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.01 for name, shape in shapes.items()}
    for name, size in norms.items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{part}"] = torch.rand(size, generator=generator) + 0.5
    state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(15, 4)
    state["pixel_mean"] = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    return state


@pytest.mark.parametrize("variant", ["c4", "fpn"])
@pytest.mark.parametrize("form", ["pkl", "pth"])
def test_a_detectron2_checkpoint_fills_every_parameter(variant, form, tmp_path, picture):
    state = detectron2_state(variant)
    source, output = tmp_path / f"model_final.{form}", tmp_path / "detector.safetensors"
    if form == "pth":
        torch.save({"model": state, "optimizer": {"lr": 0.1}, "iteration": 3}, source)
    else:
        arrays = {name: value.numpy() for name, value in state.items()}
        protocol = 2 if variant == "c4" else pickle.HIGHEST_PROTOCOL
        source.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2"}, protocol))
    assert convert.convert(source, output) == variant
    model = detector.load(output, variant)
    ours = model.state_dict()
    body = "backbone.bottom_up." if variant == "fpn" else "backbone."
    res5 = body if variant == "fpn" else "roi_heads."
    for theirs, name in (
        (f"{body}stem.conv1.weight", "stem.0.weight"),
        (f"{body}stem.conv1.norm.running_var", "stem.1.running_var"),
        (f"{body}res4.22.conv3.norm.bias", "res4.22.bn3.bias"),
        (f"{res5}res5.0.shortcut.weight", "res5.0.downsample.0.weight"),
        (f"{res5}res5.0.shortcut.norm.running_mean", "res5.0.downsample.1.running_mean"),
        ("proposal_generator.rpn_head.anchor_deltas.weight", "rpn.head.bbox_pred.weight"),
        ("roi_heads.box_predictor.cls_score.bias", "predictor.cls_score.bias"),
    ):
        assert torch.equal(ours[name], state[theirs]), name
    assert len(ours) == len(state) - 2  # without the stored anchors and the pixels' mean
    found = model(picture, **{**ASKED, "short_side_px": 48})
    assert found.features.shape[1] == model.width
    assert (found.scores[:-1] > ASKED["min_score"]).all()


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched-by-a-pickle"),)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("where", ["parameter", "top"])
def test_a_pickle_that_would_run_something_is_refused(protocol, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"model": {"backbone.stem.conv1.weight": Evil()}} if where == "parameter" else Evil()
    Path("evil.pkl").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ValueError, match=r"evil\.pkl cannot be read as a checkpoint: it asks for "):
        convert.convert(Path("evil.pkl"), Path("out.safetensors"))
    torch.save(content, "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read as a checkpoint"):
        convert.convert(Path("evil.pth"), Path("out.safetensors"))
    assert not Path("touched-by-a-pickle").exists()
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        b"\x80\x02c_codecs\nencode\n)R.",  # a call without what it needs
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00xx\x85R.",  # a type that there is not
        b"\x80\x02ccollections\nOrderedDict\n)RK\x01b.",  # a state that it cannot take
    ],
)
def test_a_malformed_pickle_is_an_error_with_its_name(content, tmp_path):
    path = tmp_path / "broken.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pkl cannot be read as a checkpoint"):
        convert.read_checkpoint(path, ".pkl")


def test_a_damaged_pickle_is_an_error_or_still_arrays(tmp_path):
    chance = random.Random(0)
    path = tmp_path / "damaged.pkl"
    whole = [
        pickle.dumps({"model": {"a": np.ones((2, 3), "f4"), "b": np.ones(2, "f8")}}, p) for p in range(5)
    ]
    read = 0
    for _ in range(500):
        damaged = bytearray(chance.choice(whole))
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(damaged))
            damaged[at : at + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 2))
        path.write_bytes(damaged)
        try:
            tensors = convert.read_checkpoint(path, ".pkl")
        except ValueError:
            continue
        read += 1
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert 0 < read < 500


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pth_that_ends_too_early_is_an_error_with_its_name(zipped, tmp_path):
    path = tmp_path / "short.pth"
    torch.save({"model": {"a": torch.zeros(100)}}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"short\.pth cannot be read as a checkpoint"):
            convert.read_checkpoint(path, ".pth")


def test_complex_numbers_are_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(2, dtype=torch.complex64)}}, tmp_path / "complex.pth")
    with pytest.raises(ValueError, match=r"complex\.pth: a has complex numbers"):
        convert.read_checkpoint(tmp_path / "complex.pth", ".pth")


def test_a_pickle_may_not_look_up_codecs(tmp_path):
    path = tmp_path / "codec.pkl"
    path.write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")
    with pytest.raises(ValueError, match="encoding 'rot13' is not allowed"):
        convert.read_checkpoint(path, ".pkl")


def small_state(**changed: object) -> dict[str, object]:
    state = {"roi_heads.box_predictor.bbox_pred.weight": np.zeros((20, 2048), np.float32)}
    return {name: value for name, value in {**state, **changed}.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (small_state(), r"is no detectron2 Faster R-CNN R101 c4: stem.0.weight is missing; .* more"),
        (
            small_state(pixel_std=np.full(3, 57.0)),
            r"pixel_std is \[57.0.* only weights that continue the MSRA",
        ),
        (small_state(surprise=np.zeros(3)), "surprise is no parameter of a detectron2"),
        (small_state(pixel_mean=np.array(["x"])), "an array of .U1. is not allowed"),
        ({"backbone.stem.conv1.weight": np.zeros((64, 3, 7, 7))}, "has no roi_heads.box_predictor.bbox_pred"),
        ([1, 2], "holds no dictionary of parameters"),
    ],
)
def test_another_checkpoint_is_an_error_that_says_why(state, message, tmp_path):
    path = tmp_path / "other.pkl"
    path.write_bytes(pickle.dumps({"model": state}))
    with pytest.raises(ValueError, match=message):
        convert.convert(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_of_the_other_variant_are_refused(tmp_path):
    path = tmp_path / "detector.safetensors"
    save_file({"predictor.bbox_pred.weight": torch.zeros(4, 4)}, path, metadata={"variant": "fpn"})
    with pytest.raises(ValueError, match=r"regions.variant is c4, but regions.weights .* of variant fpn"):
        detector.load(path, "c4")
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        detector.load(path, "c4")


def test_the_converters_command_says_what_to_set(tmp_path, monkeypatch, capsys):
    source, output = tmp_path / "model.pth", tmp_path / "detector.safetensors"
    torch.save({"model": detectron2_state("c4")}, source)
    monkeypatch.setattr(sys, "argv", ["convert", str(source), str(output)])
    convert.main()
    assert "regions.variant to c4" in capsys.readouterr().out
    with safe_open(output, framework="pt") as file:
        assert file.metadata()["variant"] == "c4"
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "none.pkl"), str(output)])
    with pytest.raises(SystemExit, match=r"convert: .*none\.pkl cannot be read"):
        convert.main()


def test_a_drawn_colour_and_shape_can_be_told_from_random_features():
    """Nearest class mean over a dozen drawn squares and discs, red and blue: better than chance by far."""
    from PIL import ImageDraw

    model = detector.untrained("c4", seed=0)
    features, labels = [], []
    for number in range(16):
        image = Image.new("RGB", (120, 120), (235, 235, 235))
        shape, rgb = ("rectangle", "ellipse")[number % 2], ((190, 40, 40), (40, 60, 180))[number // 2 % 2]
        edge = 20 + number // 4
        getattr(ImageDraw.Draw(image), shape)((edge, edge, edge + 70, edge + 70), fill=rgb)
        features.append(model(np.asarray(image), **{**ASKED, "max_boxes": 1}).features[-1])
        labels.append(number % 4)
    standard = (np.array(features) - np.mean(features, axis=0)) / (np.std(features, axis=0) + 1e-6)
    means = np.array([standard[:8][np.array(labels[:8]) == label].mean(axis=0) for label in range(4)])
    nearest = np.linalg.norm(standard[8:, None] - means, axis=2).argmin(axis=1)
    assert (nearest == labels[8:]).mean() >= 0.75
